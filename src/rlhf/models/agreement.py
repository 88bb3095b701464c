"""Whether a model's layers, as its family computes them, are those of transformers' own forward.

A family says itself how a layer computes. A checkpoint of its `model_type` may ask for more, by a
field of config.json that nobody has read here or by code that has changed, and would then be
trained as another model than it is. So a few tokens are read both ways when it is loaded. What so
few tokens cannot show, such as a window of attention longer than they are, is not seen.
"""

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch, seeded_generator
from rlhf.errors import InputError
from rlhf.models.language_model import LanguageModel

PROMPT_LENGTHS = (6, 3)
RESPONSE_LENGTH = 2
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@torch.no_grad()
def check_agreement(lm: LanguageModel) -> None:
    """Compare logits from reading and from decoding with transformers' own.

    The largest difference may be `TOLERANCES` of the largest logit. In float32 that is a hundred
    times what another order of sums makes, about 1e-6. bfloat16 has 8 bits, and one token at a time
    is not rounded as many at once are: up to 0.026 was seen, over 48 random layers.

    Args:
        lm: The model, without adapters. Neither it nor any random state is changed.

    Raises:
        InputError: They differ.
    """
    prompts, responses = _tokens(lm)
    with lm.inference():
        expected = lm.transformers_logits(prompts, responses)
        logits = {
            "read": lm.logits(lm.response_states(prompts, responses)),
            "decoded": _decoded_logits(lm, prompts, responses),
        }
    largest = expected.abs().max()
    if not torch.isfinite(largest):
        return  # a broken checkpoint, which the first step will say
    limit = TOLERANCES[lm.dtype]
    for how, ours in logits.items():
        difference = (ours - expected).abs().max()
        if not difference <= limit * largest:
            name = lm.base_name or "the model given"
            raise InputError(
                f"base_model: {name}: {how} by rlhf, the logits of this {lm.config.model_type!r} "
                f"model differ from those of transformers by {difference / largest:.1g} of the "
                f"largest; expected at most {limit:g}. It needs something that the family "
                f"{lm.name} does not compute, so it cannot be used"
            )


def _tokens(lm: LanguageModel) -> tuple[TokenBatch, TokenBatch]:
    """Random prompts of different lengths, and responses."""
    generator = seeded_generator("agreement")
    high = min(lm.vocab_size, lm.module.get_input_embeddings().num_embeddings)

    def rows(lengths: tuple[int, ...]) -> TokenBatch:
        ids = torch.randint(high, (len(lengths), max(lengths)), generator=generator)
        return TokenBatch(ids, torch.tensor(lengths)).to(lm.device)

    return rows(PROMPT_LENGTHS), rows((RESPONSE_LENGTH,) * len(PROMPT_LENGTHS))


def _decoded_logits(lm: LanguageModel, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
    """Return (B, R+1, V), as decoding makes them token by token."""
    state, first = lm.prefill(prompts, RESPONSE_LENGTH + 1)
    rest = [lm.decode(state, tokens) for tokens in responses.ids.unbind(1)]
    return lm.logits(torch.stack([first, *rest], dim=1))
