"""Responses that share a prompt: the prompt is read once, and nothing else changes.

The reference is transformers' own forward, one prompt and response at a time, without padding.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.language_models import EOS, LORA, PAD, make_lm
from support.numerics import assert_same_gradients
from support.reward_models import make_reward
from support.tiny import make_tokenizer, randomize_lora
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.data.batching import TokenBatch
from rlhf.data.groups import group_batches
from rlhf.data.schema import PromptText
from rlhf.models.families import FAMILIES
from rlhf.models.generation import Generation, generate, generate_in_chunks, rollout_uniforms
from rlhf.models.language_model import LanguageModel
from rlhf.models.packing import Grid

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
MODELS = ["t5", *(f"llama {rope}" for rope in ROPES)]

# Prompts of one token, PAD inside; responses with EOS first, empty, PAD sampled, cut; groups of
# different sizes in no order, one prompt without a response.
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [PAD, 12, PAD, 13], [14, 15], [16, 17]]
GROUPS = [2, 0, 1, 0, 4, 2, 0, 1]


def responses_of(arch: str) -> list[list[int]]:
    eos = EOS[arch]
    return [
        [20, 21, PAD, 22, eos], [eos], [23, PAD], [], [24, 25, 26, 27, 28, 29, 30],
        [31, eos], [32, 33, 34, 35], [PAD, PAD, eos],
    ]  # fmt: skip


def model_of(kind: str, layers: int = 3) -> LanguageModel:
    """A model in float64; LLaMA with keys shared by heads and a kind of rotary positions."""
    arch, _, rope = kind.partition(" ")
    if arch == "t5":
        lm = make_lm("t5")
        lm.module.double()
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters=ROPES[rope],
        )  # fmt: skip
        model = LlamaForCausalLM(config).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(5)
        lm = FAMILIES["llama"](model, make_tokenizer("llama"))
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy")
    return lm


def arch_of(kind: str) -> str:
    return kind.split()[0]


def plain_logprobs(lm: LanguageModel, arch: str, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probabilities of a response's tokens, (R,), from transformers' forward of one row."""
    if arch == "t5":
        decoder = torch.tensor([[0, *response]])
        logits = lm.module(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    else:
        row = torch.tensor([[*prompt, *response]])
        logits = lm.module(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :]
    logprobs = logits[: len(response)].log_softmax(-1)
    return logprobs[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]


def weighted(logprobs: Tensor, row: int) -> Tensor:
    """A loss in which no token counts like another."""
    return (logprobs * torch.linspace(0.5, 1.5 + row, len(logprobs))).sum()


def gradients_of(lm: LanguageModel, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    named = dict(lm.named_trainable("policy"))
    with lm.using("policy"):
        found = torch.autograd.grad(loss(), list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_logprobs_and_gradients_are_those_of_separate_rows(kind: str, checkpointing: bool) -> None:
    lm, arch = model_of(kind), arch_of(kind)
    if checkpointing:
        lm.module.gradient_checkpointing_enable()
    responses = responses_of(arch)

    def ours() -> Tensor:
        states = lm.response_states(
            TokenBatch.from_lists(PROMPTS), TokenBatch.from_lists(responses), torch.tensor(GROUPS)
        )
        stats = lm.token_logprobs(states, TokenBatch.from_lists(responses))
        parts = [stats.logprobs[i, : len(row)] for i, row in enumerate(responses)]
        for part, group, row in zip(parts, GROUPS, responses, strict=True):
            expected = plain_logprobs(lm, arch, PROMPTS[group], row)
            torch.testing.assert_close(part.double(), expected, atol=1e-5, rtol=1e-5)
        return torch.stack([weighted(part, i) for i, part in enumerate(parts)]).sum()

    def expected() -> Tensor:
        rows = zip(GROUPS, responses, strict=True)
        parts = [plain_logprobs(lm, arch, PROMPTS[group], row) for group, row in rows]
        return torch.stack([weighted(part, i) for i, part in enumerate(parts)]).sum()

    assert_same_gradients(gradients_of(lm, ours), gradients_of(lm, expected))


@pytest.mark.parametrize("kind", MODELS)
def test_final_states_and_their_gradients_are_those_of_separate_rows(kind: str) -> None:
    lm, arch = model_of(kind), arch_of(kind)
    responses = responses_of(arch)
    weights = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).double()
    batch = (TokenBatch.from_lists(PROMPTS), TokenBatch.from_lists(responses))

    def one_by_one() -> Tensor:
        states = [
            lm.response_states(
                TokenBatch.from_lists([PROMPTS[group]]), TokenBatch.from_lists([row])
            )[0, len(row)]
            for group, row in zip(GROUPS, responses, strict=True)
        ]
        return torch.stack(states)

    with lm.using("policy"), torch.no_grad():
        found = lm.final_states(*batch, torch.tensor(GROUPS))
        torch.testing.assert_close(found, one_by_one(), atol=1e-6, rtol=1e-6)
    ours = gradients_of(lm, lambda: (lm.final_states(*batch, torch.tensor(GROUPS)) * weights).sum())
    expected = gradients_of(lm, lambda: (one_by_one() * weights).sum())
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_decoding_with_shared_prompts_is_one_forward(kind: str) -> None:
    lm = model_of(kind)
    prompts, groups = TokenBatch.from_lists(PROMPTS), torch.tensor(GROUPS)
    tokens = torch.randint(3, 100, (8, 5), generator=torch.Generator().manual_seed(1))
    with lm.using("policy"):
        expected = lm.response_states(prompts, TokenBatch(tokens, torch.full((8,), 5)), groups)
        state, hidden = lm.prefill(prompts, 6, groups)
        assert state.prompt_keys[0].shape[0] == len(PROMPTS)  # no copy for each response
        rows = torch.arange(8)
        for step in range(5):
            torch.testing.assert_close(hidden, expected[rows, step], atol=1e-5, rtol=1e-5)
            if step in (1, 3):  # rows leave, and with the last of its group the prompt
                going = torch.ones(len(rows), dtype=torch.bool)
                going[[0, 4]] = False
                rows = rows[going]
                state.keep(going)
                assert state.prompt_keys[0].shape[0] == len(groups[rows].unique())
            hidden = lm.decode(state, tokens[rows, step])
        torch.testing.assert_close(hidden, expected[rows, 5], atol=1e-5, rtol=1e-5)


def same(one: Generation, other: Generation) -> None:
    assert one.responses.tolists() == other.responses.tolists()
    assert torch.equal(one.finished, other.finished)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_samples_are_those_of_repeated_prompts(arch: str, chunk_size: int) -> None:
    lm = make_lm(arch)
    prompts, groups = TokenBatch.from_lists(PROMPTS), torch.tensor(GROUPS)
    uniforms = rollout_uniforms(3, 0, range(8), 12)
    options = {"max_new_tokens": 12, "temperature": 2.0, "uniforms": uniforms}
    repeated = generate(lm, prompts.select_rows(groups), **options)
    assert len(set(map(tuple, repeated.responses.tolists()))) > 4
    same(generate(lm, prompts, groups=groups, **options), repeated)
    same(generate_in_chunks(lm, prompts, groups=groups, chunk_size=chunk_size, **options), repeated)


@pytest.mark.parametrize("kind", ["t5", "llama llama3"])
@torch.no_grad()
def test_bfloat16_is_as_exact_as_in_separate_rows(kind: str) -> None:
    """States in bfloat16 have 8 bits; both ways are within 5 % of float64's, seen 1 %."""
    lm, arch = model_of(kind), arch_of(kind)
    prompts, groups = TokenBatch.from_lists(PROMPTS), torch.tensor(GROUPS)
    responses = TokenBatch.from_lists(responses_of(arch))
    mask = torch.arange(8) <= responses.lengths[:, None]
    exact = lm.response_states(prompts, responses, groups)[mask]
    lm.module.bfloat16()
    for states in (
        lm.response_states(prompts, responses, groups),
        lm.response_states(prompts.select_rows(groups), responses),
    ):
        error = (states[mask].double() - exact).norm() / exact.norm()
        assert error < 0.05


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 9), max_size=5)), max_size=6
    ),
    size=st.integers(1, 7),
    max_tokens=st.integers(1, 120),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_batches_keep_groups_whole_unless_they_do_not_fit(
    lengths: list[tuple[int, list[int]]], size: int, max_tokens: int, seed: int
) -> None:
    rows = [(g, response) for g, (_, some) in enumerate(lengths) for response in some]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = torch.tensor([rows[i][0] for i in order], dtype=torch.long)
    responses = torch.tensor([rows[i][1] for i in order], dtype=torch.long)
    prompts = torch.tensor([prompt for prompt, _ in lengths], dtype=torch.long)
    batches = list(group_batches(prompts, responses, groups, size, max_tokens))
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) <= size
        inside = groups[batch].unique()
        tokens = len(inside) * prompts[inside].max() + len(batch) * responses[batch].max()
        assert tokens <= max_tokens or len(batch) == 1
    for group, (prompt, some) in enumerate(lengths):
        pieces = sum(bool((groups[batch] == group).any()) for batch in batches)
        fits = len(some) <= size and prompt + len(some) * max(some, default=0) <= max_tokens
        assert pieces <= 1 or not fits


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), extra=st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_a_grid_gives_items_and_gradients_back(lengths: list[int], extra: int) -> None:
    grid = Grid.of_lengths(torch.tensor(lengths), max(lengths) + extra)
    items = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    spread = grid.spread(items)
    expected = torch.zeros(len(lengths), max(lengths) + extra, 3, dtype=torch.float64)
    flat = iter(items.detach())
    for row, length in enumerate(lengths):
        for column in range(length):
            expected[row, column] = next(flat)
    assert torch.equal(spread, expected)
    assert torch.equal(grid.collect(spread), items)
    weights = torch.randn_like(items)
    (gradient,) = torch.autograd.grad((grid.collect(spread) * weights).sum(), items)
    assert torch.equal(gradient, weights)


def test_scores_do_not_depend_on_who_shares_a_prompt(arch: str) -> None:
    reward = make_reward(make_lm(arch))
    texts = ["the cat", "the cat", "the cat", "a dog ran", "the cat", "a dog ran", "a dog ran"]
    answers = [" sat", " ran to the dog", "", " sat", " and", " to a post", " sat"]
    finished = [True, False, True, True, True, False, True]
    prompts = [PromptText(text, ((0, len(text)),)) for text in texts]
    together = reward.score(prompts, answers, 3, finished=finished)
    for i, score in enumerate(together):
        alone = reward.score([prompts[i]], [answers[i]], finished=[finished[i]])
        torch.testing.assert_close(score[None], alone, atol=1e-5, rtol=1e-5)
