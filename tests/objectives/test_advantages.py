"""Each estimator against a slow float64 loop that follows its paper, and what must not matter."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOConfig

WITHOUT_CRITIC = [name for name, entry in objectives.ADVANTAGES.items() if not entry.needs_critic]
# Prompts, responses to each, longest response, seed.
SIZES = st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000))


def make_config(advantage: str, **fields: Any) -> PPOConfig:
    return PPOConfig(
        base_model="tiny", prompt_dataset="prompts.jsonl", output_dir="out", advantage=advantage,
        batch_size=8, **fields,
    )  # fmt: skip


def make_batch(size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, R) token rewards with noise past the end, their mask, and groups in a random order."""
    prompts, per_prompt, width, seed = size
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * per_prompt
    rewards = 3 * torch.randn(rows, width, generator=generator) + 1
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    groups = torch.arange(prompts).repeat(per_prompt)[torch.randperm(rows, generator=generator)]
    return rewards, torch.arange(width) < lengths[:, None], groups


def estimate(name: str, batch: tuple[Tensor, Tensor, Tensor], **fields: Any) -> Tensor:
    """Advantages as a trainer gets them."""
    rewards, mask, groups = batch
    estimator = objectives.ADVANTAGES[name]
    advantages, returns = estimator.function(
        rewards, None, mask, groups, make_config(name, **fields)
    )
    assert returns is None
    return objectives.whiten(advantages, mask) if estimator.whitened else advantages


Rows = list[list[float]]


def ragged(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Rows, list[int]]:
    rewards, mask, groups = batch
    rows = [row[keep].double().tolist() for row, keep in zip(rewards, mask, strict=True)]
    return rows, groups.tolist()


def slow_rloo(rows: Rows, groups: list[int], gamma: float) -> Rows:
    """R(y_i) − 1/(k−1) Σ_{j≠i} R(y_j); R is the reward of the whole response."""
    result = []
    for i, row in enumerate(rows):
        others = [sum(rows[j]) for j in range(len(rows)) if groups[j] == groups[i] and j != i]
        result.append([sum(row) - sum(others) / len(others)] * len(row))
    return result


def slow_grpo(rows: Rows, groups: list[int], gamma: float, *, std: bool = True) -> Rows:
    """(r_i − mean(r)) / std(r) over the group, the same for each token."""
    result = []
    for i, row in enumerate(rows):
        group = [sum(rows[j]) for j in range(len(rows)) if groups[j] == groups[i]]
        centered = sum(row) - np.mean(group)
        result.append([centered / (np.std(group, ddof=1) + 1e-4) if std else centered] * len(row))
    return result


def standardized(rows: Rows) -> Rows:
    """Over all tokens of the batch."""
    tokens = [value for row in rows for value in row]
    if len(tokens) == 1:
        return [[0.0]]
    mean, std = np.mean(tokens), np.std(tokens, ddof=1)
    return [[float((value - mean) / std) for value in row] for row in rows]


def slow_reinforce_pp(rows: Rows, groups: list[int], gamma: float) -> Rows:
    """r(x, y) − β Σ_{i≥t} KL(i), which are the rewards of tokens t and after, standardized."""
    return standardized(
        [
            [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
            for row in rows
        ]
    )


def slow_reinforce_pp_baseline(rows: Rows, groups: list[int], gamma: float) -> Rows:
    """The reward less the group's mean, as before; the mean of whole responses."""
    shifted = []
    for i, row in enumerate(rows):
        group = [sum(rows[j]) for j in range(len(rows)) if groups[j] == groups[i]]
        shifted.append([*row[:-1], row[-1] - sum(group) / len(group)])
    return slow_reinforce_pp(shifted, groups, gamma)


SLOW = {
    "rloo": slow_rloo,
    "grpo": slow_grpo,
    "reinforce_pp": slow_reinforce_pp,
    "reinforce_pp_baseline": slow_reinforce_pp_baseline,
}


def assert_same(actual: Tensor, expected: Rows, mask: Tensor) -> None:
    for row, values, keep in zip(actual, expected, mask, strict=True):
        np.testing.assert_allclose(row[keep].double(), values, rtol=2e-3, atol=1e-4)
        assert not row[~keep].any()


def far_from_zero(rows: Rows, groups: list[int]) -> bool:
    """Whether no spread that is divided by is so small that float32's rounding shows."""
    totals = [(sum(row), group) for row, group in zip(rows, groups, strict=True)]
    return all(
        np.std([total for total, other in totals if other == group]) > 0.05 for group in groups
    )


def test_all_are_compared() -> None:
    assert sorted(SLOW) == sorted(WITHOUT_CRITIC)
    assert sorted(objectives.ADVANTAGES) == sorted([*SLOW, "gae"])


@pytest.mark.parametrize("name", SLOW)
@given(size=SIZES, gamma=st.sampled_from([1.0, 0.9]))
@settings(max_examples=40, deadline=None)
def test_advantages_are_those_of_the_paper(
    name: str, size: tuple[int, int, int, int], gamma: float
) -> None:
    batch = make_batch(size)
    rows, groups = ragged(batch)
    if far_from_zero(rows, groups):
        expected = SLOW[name](rows, groups, gamma)
        assert_same(estimate(name, batch, gamma=gamma), expected, batch[1])


@given(size=SIZES)
@settings(max_examples=40, deadline=None)
def test_dr_grpo_does_not_divide(size: tuple[int, int, int, int]) -> None:
    batch = make_batch(size)
    rows, groups = ragged(batch)
    expected = slow_grpo(rows, groups, 1.0, std=False)
    assert_same(estimate("grpo", batch, grpo_std=False), expected, batch[1])


def test_by_hand() -> None:
    # Two prompts with the responses' rewards 1, 4, 7 and 0, 2; the first is of two tokens.
    rewards = torch.tensor([[0.5, 0.5], [0.0, 9.0], [4.0, 9.0], [7.0, 9.0], [2.0, 9.0]])
    mask = torch.tensor([[True, True], *([[True, False]] * 4)])
    batch = rewards, mask, torch.tensor([3, 0, 3, 3, 0])
    rloo = estimate("rloo", batch)
    assert rloo.tolist() == [[-4.5, -4.5], [-2.0, 0.0], [0.0, 0.0], [4.5, 0.0], [2.0, 0.0]]
    dr_grpo = estimate("grpo", batch, grpo_std=False)
    assert dr_grpo.tolist() == [[-3.0, -3.0], [-1.0, 0.0], [0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]
    grpo = estimate("grpo", batch)[:, 0].tolist()  # std 3 and sqrt(2)
    assert grpo == pytest.approx([-1, -math.sqrt(0.5), 0, 1, math.sqrt(0.5)], rel=1e-3)
    config = make_config("reinforce_pp")
    function = objectives.ADVANTAGES["reinforce_pp"].function
    assert function(*(rewards, None, mask, batch[2], config))[0][0].tolist() == [1.0, 0.5]
    function = objectives.ADVANTAGES["reinforce_pp_baseline"].function
    found = function(*(rewards, None, mask, batch[2], config))[0].tolist()
    assert found == [[-3.0, -3.5], [-1.0, 0.0], [0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce_pp_baseline"])
def test_equal_rewards_teach_nothing(name: str) -> None:
    """Not even rounding is left, which grpo would divide by almost nothing."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 123.4, 123.4, 123.4])[:, None]
    batch = rewards, torch.ones(6, 1).bool(), torch.tensor([0, 0, 0, 1, 1, 1])
    function = objectives.ADVANTAGES[name].function
    found = function(rewards, None, batch[1], batch[2], make_config(name))[0]
    assert not found.any()


@pytest.mark.parametrize("name", SLOW)
@given(size=SIZES, seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_padding_order_and_names_of_groups_do_not_matter(
    name: str, size: tuple[int, int, int, int], seed: int
) -> None:
    rewards, mask, groups = batch = make_batch(size)
    if not far_from_zero(*ragged(batch)):
        return
    expected = estimate(name, batch)
    rows, width = rewards.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    renamed = torch.randperm(len(groups.unique()), generator=generator)[groups] * 7 + 2
    padded = torch.cat([torch.where(mask, rewards, -777.0), torch.full((rows, 3), 55.0)], 1)
    longer = torch.cat([mask, torch.zeros(rows, 3).bool()], 1)
    actual = estimate(name, (padded[order], longer[order], renamed[order]))
    torch.testing.assert_close(actual[:, :width], expected[order], atol=1e-3, rtol=1e-3)
    assert not actual[:, width:].any()


@pytest.mark.parametrize("name", SLOW)
def test_processes_that_hold_whole_groups_agree_with_one_that_holds_all(name: str) -> None:
    parts = make_batch((3, 4, 5, 1)), make_batch((2, 4, 5, 2))
    rewards, masks, groups = zip(*parts, strict=True)
    together = torch.cat(rewards), torch.cat(masks), torch.cat([groups[0], groups[1] + 3])
    expected = estimate(name, together).split([12, 8])
    estimator, config = objectives.ADVANTAGES[name], make_config(name)
    own = [estimator.function(r, None, m, g, config)[0] for r, m, g in parts]
    if estimator.whitened:
        tokens = torch.cat([part[mask] for part, mask in zip(own, masks, strict=True)]).double()
        moments = torch.tensor(len(tokens)), tokens.sum(), ((tokens - tokens.mean()) ** 2).sum()
        for process in (0, 1):  # sums over both: their count, their sum, their squared deviations
            sums = iter(moments)
            own[process] = objectives.whiten(
                own[process], masks[process], reduce=lambda _, sums=sums: next(sums)
            ).float()
    for actual, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_rewards_to_come() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = objectives.rewards_to_come(rewards, mask, 0.5)
    assert found.tolist() == [[3.0, 4.0, 4.0], [8.0, 0.0, 0.0]]
