"""The options of losses and scores against slow float64 loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.errors import InputError

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10_000))
AVERAGES = ["token", "sequence", "constant"]
LIMIT = 9


def make_rows(size: tuple[int, int, int], count: int) -> tuple[list[Tensor], Tensor]:
    """`count` random (B, R) float64 tensors, and a prefix mask with lengths >= 1."""
    rows, width, seed = size
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, width, generator=generator).double() for _ in range(count)]
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return tensors, torch.arange(width) < lengths[:, None]


def slow_mean(values: list[list[float]], average: str) -> float:
    """Mean of the token losses of responses, by the formula of each paper."""
    if average == "token":
        return sum(map(sum, values)) / sum(map(len, values))
    if average == "sequence":  # Shao et al. 2024, eq. 3: 1/G Σ_i 1/|o_i| Σ_t
        return sum(sum(row) / len(row) for row in values) / len(values)
    return sum(map(sum, values)) / (len(values) * LIMIT)  # Liu et al. 2025: a constant


def divisor(mask: Tensor, average: str) -> int:
    return int(mask.sum()) if average == "token" else len(mask)


def tokens(mask: Tensor, *tensors: Tensor) -> list[list[tuple[float, ...]]]:
    return [
        [tuple(float(x[i, t].detach()) for x in tensors) for t in range(int(mask[i].sum()))]
        for i in range(len(mask))
    ]


@pytest.mark.parametrize("average", AVERAGES)
@given(size=SIZES, low=st.floats(0.05, 0.5), high=st.none() | st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_losses_by_average_and_clip(
    average: str, size: tuple[int, int, int], low: float, high: float | None
) -> None:
    (new, old, advantage, target), mask = make_rows(size, 4)
    top = low if high is None else high

    def surrogate(n: float, o: float, a: float, _: float) -> float:
        ratio = math.exp(n - o)
        return -min(ratio * a, min(max(ratio, 1 - low), 1 + top) * a)

    def error(n: float, o: float, _: float, r: float) -> float:
        near = min(max(n, o - low), o + low)
        return 0.5 * max((n - r) ** 2, (near - r) ** 2)

    weights = objectives.loss_weights(mask, average, LIMIT)
    found = objectives.policy_loss(new, old, advantage, weights, low, high)
    rows = tokens(mask, new, old, advantage, target)
    expected = slow_mean([[surrogate(*token) for token in row] for row in rows], average)
    assert float(found.total) / divisor(mask, average) == pytest.approx(expected, abs=1e-6)
    clipped = sum(
        surrogate(n, o, a, 0) > -math.exp(n - o) * a for row in rows for n, o, a, _ in row
    )
    assert int(found.clipped) == clipped
    value = objectives.value_loss(new, old, target, weights, low)
    expected = slow_mean([[error(*token) for token in row] for row in rows], average)
    actual = float(value.total) / divisor(mask, average)
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert objectives.loss_weights(mask, "token", 8).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    expected = [[0.5, 0.5, 0, 0], [0.25] * 4]
    assert objectives.loss_weights(mask, "sequence", 8).tolist() == expected
    expected = [[0.125, 0.125, 0, 0], [0.125] * 4]
    assert objectives.loss_weights(mask, "constant", 8).tolist() == expected


def test_the_length_of_others_changes_no_constant_weight() -> None:
    """Dr. GRPO: a token's share is the same beside long and short responses; not so by token."""

    def share(average: str, other: int) -> float:
        mask = torch.arange(8) < torch.tensor([[3], [other]])
        weights = objectives.loss_weights(mask, average, 8)
        return float(weights[0, 0]) / divisor(mask, average)

    assert share("constant", 1) == share("constant", 8) == 1 / 16
    assert share("token", 1) > share("token", 8)
    assert share("sequence", 1) == share("sequence", 8)


def test_only_the_upper_clip_is_moved() -> None:
    ratios = torch.tensor([[1.25, 0.75, 1.25, 0.75]])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    loss = objectives.policy_loss(
        ratios.log(), torch.zeros(1, 4), advantages, torch.ones(1, 4), 0.2, 0.3
    )
    assert float(loss.total) == pytest.approx(-1.25 + 0.8 + 1.25 - 0.75)
    assert int(loss.clipped) == 1


# --- KL ------------------------------------------------------------------------------------------


def slow_kl(name: str, n: float, r: float) -> float:
    ratio = math.exp(r - n)  # Schulman 2020's r, reference by policy
    return {
        "k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": ratio - 1 - math.log(ratio)
    }[name]  # fmt: skip


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@given(size=SIZES)
@settings(max_examples=20, deadline=None)
def test_kl_loss_and_its_gradient(name: str, average: str, size: tuple[int, int, int]) -> None:
    (new, old, ref), mask = make_rows(size, 3)
    new.requires_grad_()
    weights = objectives.loss_weights(mask, average, LIMIT)
    loss = objectives.kl_loss(new, old, ref, weights, name) / divisor(mask, average)
    rows = tokens(mask, new, old, ref)
    values = [[math.exp(n - o) * slow_kl(name, n, r) for n, o, r in row] for row in rows]
    assert loss.item() == pytest.approx(slow_mean(values, average), rel=1e-5, abs=1e-6)
    loss.backward()
    assert new.grad is not None
    step = 1e-5
    for i, row in enumerate(rows):
        for t, (n, o, r) in enumerate(row):
            slope = (slow_kl(name, n + step, r) - slow_kl(name, n - step, r)) / (2 * step)
            one = [[0.0] * len(other) for other in rows]
            one[i][t] = math.exp(n - o) * slope
            expected = slow_mean(one, average)
            assert float(new.grad[i, t]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not new.grad[~mask].any()


@given(SIZES)
@settings(max_examples=20, deadline=None)
def test_what_is_past_the_end_changes_no_kl_loss(size: tuple[int, int, int]) -> None:
    (new, old, ref), mask = make_rows(size, 3)
    noise = torch.where(mask, 0.0, 1e3)
    for name in objectives.KL:
        clean = objectives.kl_loss(new, old, ref, mask, name)
        noisy = objectives.kl_loss(new + noise, old - noise, ref - noise, mask, name)
        torch.testing.assert_close(noisy, clean)


def test_an_unknown_kl_estimator() -> None:
    with pytest.raises(InputError, match=r"kl_estimator: unknown estimator 'k4'.*k1, k2, k3"):
        objectives.find_kl("k4")


# --- scores --------------------------------------------------------------------------------------


def make_config(**fields: Any) -> PPOConfig:
    return PPOConfig(
        base_model="tiny", prompt_dataset="prompts.jsonl", output_dir="out", **fields
    )  # fmt: skip


def shaped(scores: list[float], lengths: list[int], finished: list[bool], **fields: Any) -> Any:
    found = objectives.shaped_scores(
        torch.tensor(scores), torch.tensor(lengths), torch.tensor(finished), make_config(**fields)
    )
    return found.tolist()


def test_scores_are_clipped_then_charged_then_replaced() -> None:
    rows = [5.0, -5.0, 1.0, 0.5], [2, 10, 12, 20], [True, True, False, True]
    assert shaped(*rows) == rows[0]
    assert shaped(*rows, reward_clip=2.0) == [2, -2, 1, 0.5]
    charged = shaped(*rows, length_penalty=0.25, length_penalty_start=10)
    assert charged == [5, -5, 0.5, -2.0]
    assert shaped(*rows, length_penalty=0.5) == [4, -10, -5, -9.5]
    fields = {"reward_clip": 2.0, "length_penalty": 0.25, "length_penalty_start": 10}
    assert shaped(*rows, **fields, missing_eos_penalty=3.0) == [2, -2, -2.5, -2.0]
    assert shaped(*rows, **fields, missing_eos_score=-9.0) == [2, -2, -9.0, -2.0]


def test_the_length_penalty_is_dapos() -> None:
    """Yu et al. 2025, §3.4, with their lengths 16384 and 4096 divided by 1024."""
    limit, cache = 16, 4
    config = {"length_penalty": 1 / cache, "length_penalty_start": limit - cache}
    for length in range(1, limit + 1):
        expected = 0.0 if length <= limit - cache else ((limit - cache) - length) / cache
        assert shaped([0.0], [length], [True], **config) == pytest.approx([expected])
