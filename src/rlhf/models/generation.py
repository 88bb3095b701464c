"""Generation: the interface of an engine, and our own engine with stateless sampling.

Every sampled token is the inverse CDF of its distribution at one uniform number, determined by
(seed, iteration, row, token). So a resumed run needs no random state, and the samples do not
depend on batch composition, chunks or the number of processes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch, chunks, seeded_generator
from rlhf.data.groups import select_group_rows
from rlhf.errors import NumericalError
from rlhf.models.language_model import LanguageModel
from rlhf.signals import stop_point

# Number of vocabulary entries that sampling sums as one block.
BLOCK = 256
# Finished rows leave the batch once at most this share is left: dropping them copies the cache.
DROP_AT = 0.75


@dataclass(frozen=True)
class Generation:
    """Responses exactly as they were sampled, never decoded and encoded again.

    Attributes:
        responses: Up to `max_new_tokens` tokens, cut after the first EOS (which is kept).
        finished: (B,) bool, true where the response ends with EOS, false where the limit cut it.
        logprobs: (B, R) fp32, the log-probability that decoding gave each sampled token; 0 past the
            end, and everywhere in greedy decoding.
    """

    responses: TokenBatch
    finished: Tensor
    logprobs: Tensor


class Generator(Protocol):
    """An engine that answers prompts.

    The caller (PPO's rollouts, SFT's samples, inference, the server) activates the adapter first.
    Another engine need not compute as ours does, but its responses should be samples of the same
    distribution: PPO trains on log-probabilities from its own forward pass and reports their
    distance from the engine's as `ppo/decode_deviation`.
    """

    def __call__(
        self,
        lm: LanguageModel,
        prompts: TokenBatch,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        min_response_length: int = 0,
        groups: Tensor | None = None,
    ) -> Generation:
        """Return one response per prompt, or one per entry of `groups`, in that order.

        `generate`, and `generate_in_chunks` with its chunk size, are our own engine.
        """
        ...


def rollout_uniforms(
    seed: int, iteration: int, rows: range, max_new_tokens: int, purpose: str = "rollout"
) -> Tensor:
    """Return the uniform numbers in [0, 1) for the given rows of an iteration.

    Args:
        seed: The run's seed.
        iteration: PPO step, or any other number that identifies the draw.
        rows: Global row numbers.
        max_new_tokens: R.
        purpose: What the numbers are for; each purpose gets different numbers.

    Returns:
        (len(rows), R) fp32, each row a function of (purpose, seed, iteration, row) alone.
    """
    draws = [
        torch.rand(max_new_tokens, generator=seeded_generator(purpose, seed, iteration, row))
        for row in rows
    ]
    return torch.stack(draws) if draws else torch.empty(0, max_new_tokens)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by inverse CDF: return the first token whose cumulative probability exceeds u.

    Finds the block of tokens in which that happens, then the token in it. This sums over the whole
    vocabulary but needs cumulative sums over one block only.

    Args:
        logits: (B, V) fp32, temperature applied.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) token ids; a token of probability 0 is never drawn.
    """
    weights = logits.softmax(-1)
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(
        1, (-1, BLOCK)
    )
    sums = blocks.sum(-1)
    cdf = sums.cumsum(-1)
    target = uniforms[:, None] * cdf[:, -1:]
    block = _first_beyond(cdf, target)
    before = cdf.gather(1, block) - sums.gather(1, block)
    inner = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1)
    tokens = block * BLOCK + _first_beyond(inner, (target - before).clamp(min=0))
    return tokens[:, 0].clamp(max=weights.shape[1] - 1)  # NaN again, see `_first_beyond`


def _first_beyond(cdf: Tensor, target: Tensor) -> Tensor:
    """Return (B, 1): the first index whose sum exceeds the target, else the last with any mass."""
    found = torch.searchsorted(cdf, target, right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    # With NaN the search runs off the end, and an invalid index would kill the GPU's whole context.
    return torch.minimum(found, last).clamp(max=cdf.shape[1] - 1)


def generate(
    lm: LanguageModel,
    prompts: TokenBatch,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    min_response_length: int = 0,
    groups: Tensor | None = None,
) -> Generation:
    """Decode one or several responses per prompt with the active adapter, if any.

    The checkpoint's own sampling settings (top-k, top-p, repetition penalty) do not apply, and no
    token is banned.

    Args:
        lm: The model.
        prompts: G prompts, each read once.
        max_new_tokens: R, the maximum length of a response, EOS included.
        temperature: Divides the logits; 0 is greedy.
        uniforms: (B, R) numbers from `rollout_uniforms`; not needed when greedy.
        min_response_length: EOS has probability 0 before this many tokens.
        groups: (B,) index of each response's prompt; None for one response to each.

    Raises:
        NumericalError: A logit was NaN or infinite; checked once, after the last token.
        StopRequested: A signal arrived; checked before every token.
    """
    device, size = prompts.ids.device, len(prompts if groups is None else groups)
    eos = torch.tensor(sorted(lm.layout.eos_ids), device=device)
    ids = torch.zeros(size, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.full((size,), max_new_tokens, device=device)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    logprobs = torch.zeros(size, max_new_tokens, device=device)
    if temperature > 0 and uniforms is None:
        raise ValueError("sampling needs uniforms; pass them or temperature=0")
    uniforms = None if uniforms is None else uniforms.to(device)
    rows = torch.arange(size, device=device)  # index in the result of each row still decoded
    broken = torch.zeros((), dtype=torch.bool, device=device)
    with lm.inference(), lm.folded():
        state, hidden = lm.prefill(prompts, max_new_tokens, groups)
        for step in range(max_new_tokens):
            stop_point()
            positions = torch.full_like(rows, step)
            logits = lm.policy_logits(hidden, positions, temperature or 1.0, min_response_length)
            if temperature > 0:
                assert uniforms is not None
                tokens = sample(logits, uniforms[rows, step])
                logprobs[rows, step] = -torch.nn.functional.cross_entropy(
                    logits, tokens, reduction="none"
                )
                broken |= ~torch.isfinite(logprobs[rows, step]).all()
            else:
                highest, tokens = logits.max(-1)  # NaN if any logit is NaN
                broken |= ~torch.isfinite(highest).all()
            ids[rows, step] = tokens
            ends = torch.isin(tokens, eos) & ~finished[rows]
            lengths[rows[ends]] = step + 1
            finished[rows[ends]] = True
            going = ~finished[rows]
            left = int(going.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            if left <= DROP_AT * len(rows) and not state.fixed:
                state.keep(going)
                rows, tokens = rows[going], tokens[going]
            hidden = lm.decode(state, tokens)
    if broken:
        raise NumericalError(
            f"logits of {lm.base_name or 'the model'} were NaN or infinite while it generated; "
            "lower learning_rate, use dtype float32, and check that the checkpoint is whole"
        )
    responses = TokenBatch(ids[:, : int(lengths.max())], lengths)
    # Finished rows keep decoding until they leave the batch.
    kept = logprobs[:, : responses.ids.shape[1]].masked_fill(~responses.mask, 0.0)
    return Generation(responses, finished, kept)


def generate_in_chunks(
    lm: LanguageModel,
    prompts: TokenBatch,
    *,
    chunk_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    min_response_length: int = 0,
    groups: Tensor | None = None,
) -> Generation:
    """Generate at most `chunk_size` responses at a time, so that the KV cache fits.

    Responses to one prompt, and to prompts of similar length, share a chunk; the result is in the
    order of `generate`.
    """
    if groups is None:
        groups = torch.arange(len(prompts), device=prompts.ids.device)
    rank = prompts.lengths.argsort(stable=True).argsort()
    order = rank[groups].argsort(stable=True)
    parts = []
    for rows in chunks(order.tolist(), chunk_size):
        some, members = select_group_rows(prompts, groups, rows)
        parts.append(
            generate(
                lm,
                some,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                uniforms=None if uniforms is None else uniforms[list(rows)],
                min_response_length=min_response_length,
                groups=members,
            )
        )
    back = order.argsort()
    responses = TokenBatch.concat([part.responses for part in parts]).select_rows(back)
    finished = torch.cat([part.finished for part in parts])
    width = responses.ids.shape[1]
    logprobs = torch.cat(
        [torch.nn.functional.pad(p.logprobs, (0, width - p.logprobs.shape[1])) for p in parts]
    )
    back = back.to(finished.device)
    return Generation(responses, finished[back], logprobs[back])
