"""Check that a family computes the same logits as transformers' own forward.

Each family implements its layers itself. A checkpoint of the same `model_type` may need more than
that, through a field of config.json that the family does not read or through changed code, and
would then be trained as a different model. So a few tokens are run both ways when a model is
loaded. A window of attention, which hides nothing from texts this short, is made shorter for the
check. What else shows only on longer texts is missed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch, seeded_generator
from rlhf.errors import InputError
from rlhf.models.language_model import LanguageModel

PROMPT_LENGTHS = (6, 3)
RESPONSE_LENGTH = 2
SHORT_WINDOW = 4
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def check_agreement(lm: LanguageModel) -> None:
    """Compare the logits of reading and of decoding with those of transformers.

    The largest difference may be `TOLERANCES` times the largest logit. In float32 that is a hundred
    times the effect of summing in another order, about 1e-6. bfloat16 has 8 bits of precision, and
    decoding one token rounds differently from reading many: up to 0.026 over 48 random layers.

    Args:
        lm: The model, without adapters. Neither the model nor any random state is changed.

    Raises:
        InputError: The logits differ, or a class of transformers cannot be called as we call it.
    """
    try:
        _compare(lm)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not lm.is_generic:  # our own code is at fault
            raise
        name, kind = lm.base_name or "the model given", lm.config.model_type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"base_model: {name}: transformers' class of {kind!r} models cannot be used ({reason})"
        ) from error


@torch.no_grad()
def _compare(lm: LanguageModel) -> None:
    """Raise an `InputError` if the logits differ."""
    prompts, responses = _tokens(lm)
    logits: dict[str, Tensor] = {}
    if lm.is_generic:
        logits["read in training"] = lm.logits(lm.response_states(prompts, responses))
    with lm.inference(), _short_window(lm):
        expected = lm.transformers_logits(prompts, responses)
        logits["read"] = lm.logits(lm.response_states(prompts, responses))
        logits["decoded"] = _decoded_logits(lm, prompts, responses)
    largest = expected.abs().max()
    if not torch.isfinite(largest):
        return  # a broken checkpoint; the first step will report it
    limit = TOLERANCES[lm.dtype]
    for how, ours in logits.items():
        difference = (ours - expected).abs().max()
        if not difference <= limit * largest:
            name = lm.base_name or "the model given"
            hint = ". Try to set all dropout in its config.json to 0" if "training" in how else ""
            raise InputError(
                f"base_model: {name}: {how} by rlhf, the logits of this {lm.config.model_type!r} "
                f"model differ from those of transformers by {difference / largest:.1g} of the "
                f"largest; expected at most {limit:g}. It needs something that the family "
                f"{lm.name} does not compute, so it cannot be used{hint}"
            )


@contextmanager
def _short_window(lm: LanguageModel) -> Iterator[None]:
    """Shorten the window that a family computes, so that it hides the start of the texts."""
    config = lm.config
    window = getattr(config, "sliding_window", None)
    if lm.is_generic or not window or window <= SHORT_WINDOW:
        yield
        return
    config.sliding_window = SHORT_WINDOW
    try:
        yield
    finally:
        config.sliding_window = window


def _tokens(lm: LanguageModel) -> tuple[TokenBatch, TokenBatch]:
    """Return random prompts of different lengths, and random responses."""
    generator = seeded_generator("agreement")
    high = min(lm.vocab_size, lm.module.get_input_embeddings().num_embeddings)

    def rows(lengths: tuple[int, ...]) -> TokenBatch:
        ids = torch.randint(high, (len(lengths), max(lengths)), generator=generator)
        return TokenBatch(ids, torch.tensor(lengths)).to(lm.device)

    return rows(PROMPT_LENGTHS), rows((RESPONSE_LENGTH,) * len(PROMPT_LENGTHS))


def _decoded_logits(lm: LanguageModel, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
    """Return the logits (B, R+1, V) of token-by-token decoding."""
    state, first = lm.prefill(prompts, RESPONSE_LENGTH + 1)
    rest = [lm.decode(state, tokens) for tokens in responses.ids.unbind(1)]
    return lm.logits(torch.stack([first, *rest], dim=1))
