"""One checkpoint in two families: its own and the generic one compute the same."""

from typing import Any

import torch
from support.numerics import assert_same_gradients
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.models.generation import generate_in_chunks, rollout_uniforms
from rlhf.models.language_model import LanguageModel

Pair = tuple[LanguageModel, LanguageModel]


def assert_read_alike(
    pair: Pair, adapter: str | None, prompts: TokenBatch, responses: TokenBatch, groups: Tensor
) -> None:
    """Assert equal log-probabilities, entropies, final states and gradients."""
    found = []
    for lm in pair:
        with lm.using(adapter):
            read = lm.with_states(prompts, 2)
            states = lm.response_states(read, responses, groups)
            stats = lm.token_logprobs(states, responses, 0.7, 1, entropy=True)
            last = lm.final_states(read, responses, groups)
            weights = torch.linspace(0.5, 2.0, stats.logprobs.numel()).view_as(stats.logprobs)
            ((stats.logprobs + 0.3 * stats.entropy) * weights).sum().backward()
        found.append((lm, stats, last))
    (own, stats, last), (generic, other, final) = found
    torch.testing.assert_close(other.logprobs, stats.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.entropy, stats.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, last, atol=1e-5, rtol=1e-5)
    gradients = [{n: p.grad for n, p in lm.named_trainable(adapter)} for lm in (generic, own)]
    assert_same_gradients(*gradients)


def assert_sampled_alike(pair: Pair, prompts: TokenBatch, groups: Tensor) -> None:
    """Assert that rollouts with the adapter "policy" are equal, token for token."""
    options: dict[str, Any] = {
        "max_new_tokens": 12, "uniforms": rollout_uniforms(0, 0, range(len(groups)), 12),
        "groups": groups, "chunk_size": 3,
    }  # fmt: skip
    made = []
    for lm in pair:
        with lm.using("policy"):
            made.append(generate_in_chunks(lm, lm.with_states(prompts, 2), **options))
    own, generic = made
    assert generic.responses.tolists() == own.responses.tolists()
    assert torch.equal(generic.finished, own.finished)
    torch.testing.assert_close(generic.logprobs, own.logprobs, atol=1e-4, rtol=1e-4)
    assert len({len(row) for row in own.responses.tolists()}) > 1  # rows left the batch
