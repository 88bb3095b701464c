"""The rollout engine: decoding with stateless sampling.

Every sampled token is the inverse CDF of its distribution at one uniform number, which belongs to
(seed, iteration, row, token). So a resumed run needs no random state, and neither the composition
of a batch, its chunks nor the number of processes changes a sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch, chunks, seeded_generator
from rlhf.models.language_model import LanguageModel


@dataclass(frozen=True)
class Generation:
    """Responses as they were sampled, never decoded and encoded again.

    Attributes:
        responses: Up to `max_new_tokens` tokens, cut after the first EOS (which is kept).
        finished: (B,) bool, true where the response ends with EOS, false where the limit cut it.
    """

    responses: TokenBatch
    finished: Tensor


def rollout_uniforms(seed: int, iteration: int, rows: range, max_new_tokens: int) -> Tensor:
    """The uniform numbers in [0, 1) of some rows of an iteration.

    Args:
        seed: The run's seed.
        iteration: PPO step, or any other number that names the draw.
        rows: Global row numbers.
        max_new_tokens: R.

    Returns:
        (len(rows), R) fp32, each row a function of (seed, iteration, row) alone.
    """
    draws = [
        torch.rand(max_new_tokens, generator=seeded_generator(seed, iteration, row)) for row in rows
    ]
    return torch.stack(draws) if draws else torch.empty(0, max_new_tokens)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u.

    Args:
        logits: (B, V) fp32, temperature applied.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) token ids; a token of probability 0 is never drawn.
    """
    cdf = logits.softmax(-1).cumsum(-1)
    # Relative to the last entry, because a fp32 sum over a vocabulary is not exactly 1.
    target = uniforms[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    # u·total may round up to total, past the last token that has any mass.
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())[:, 0]
    return torch.minimum(tokens, last)


def generate(
    lm: LanguageModel,
    prompts: TokenBatch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    min_response_length: int = 0,
) -> Generation:
    """Decodes one response per prompt with whatever adapter is active.

    The checkpoint's own sampling settings (top-k, top-p, repetition penalty) do not apply, and no
    id is banned.

    Args:
        lm: The model.
        prompts: B prompts.
        max_new_tokens: R, the most tokens of a response, EOS included.
        temperature: Divides the logits; 0 is greedy.
        uniforms: (B, R) numbers from `rollout_uniforms`; not needed when greedy.
        min_response_length: EOS is impossible before this many tokens.
    """
    device, size = prompts.ids.device, len(prompts)
    eos = torch.tensor(sorted(lm.layout.eos_ids), device=device)
    ids = torch.zeros(size, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.zeros(size, dtype=torch.long, device=device)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    if temperature > 0 and uniforms is None:
        raise ValueError("sampling needs uniforms; pass them or temperature=0")
    with lm.inference():
        state, hidden = lm.prefill(prompts)
        for step in range(max_new_tokens):
            positions = torch.full((size,), step, device=device)
            logits = lm.policy_logits(hidden, positions, temperature or 1.0, min_response_length)
            if temperature > 0:
                assert uniforms is not None
                tokens = sample(logits, uniforms[:, step].to(device))
            else:
                tokens = logits.argmax(-1)
            ids[:, step] = tokens
            lengths += ~finished
            finished |= torch.isin(tokens, eos)
            if finished.all() or step + 1 == max_new_tokens:
                break
            hidden = lm.decode(state, tokens)
    return Generation(TokenBatch(ids[:, : int(lengths.max())], lengths), finished)


def generate_in_chunks(
    lm: LanguageModel,
    prompts: TokenBatch,
    *,
    chunk_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    min_response_length: int = 0,
) -> Generation:
    """`generate`, at most `chunk_size` prompts at a time so that the KV cache fits.

    Prompts of like length go together; the result is in the order of `prompts`.
    """
    order = prompts.lengths.argsort(stable=True).tolist()
    parts = [
        generate(
            lm,
            prompts.select(rows),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            uniforms=None if uniforms is None else uniforms[list(rows)],
            min_response_length=min_response_length,
        )
        for rows in chunks(order, chunk_size)
    ]
    back = torch.tensor(order).argsort()
    responses = TokenBatch.concat([part.responses for part in parts]).select(back)
    finished = torch.cat([part.finished for part in parts])
    return Generation(responses, finished[back.to(finished.device)])
