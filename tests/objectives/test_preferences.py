"""The losses of pairs against the likelihoods they stand for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import objectives

LOG_RATIOS = st.lists(st.floats(-15, 15), min_size=1, max_size=5)


@given(LOG_RATIOS, st.floats(0.01, 2), st.floats(0, 0.49))
@settings(max_examples=60, deadline=None)
def test_dpo_is_the_likelihood_of_choices_some_of_which_are_wrong(
    ratios: list[float], beta: float, smoothing: float
) -> None:
    found = objectives.dpo_loss(torch.tensor(ratios), beta, smoothing)
    expected = []
    for h in torch.tensor(ratios).double().tolist():
        right, wrong = 1 / (1 + math.exp(-beta * h)), 1 / (1 + math.exp(beta * h))
        expected.append(-(1 - smoothing) * math.log(right) - smoothing * math.log(wrong))
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_dpo_and_ipo_by_hand() -> None:
    # sigma(0.5 * ln 9) = 3/4: its log-ratio is ln 9 and beta one half.
    ratio = torch.tensor([math.log(9)])
    assert objectives.dpo_loss(ratio, 0.5).item() == pytest.approx(math.log(4 / 3))
    assert objectives.dpo_loss(-ratio, 0.5).item() == pytest.approx(math.log(4))
    smoothed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert objectives.dpo_loss(ratio, 0.5, 0.1).item() == pytest.approx(smoothed)
    # 1 / (2 * 0.25) = 2 nats are aimed for.
    ratios = torch.tensor([2.0, 0.0, 5.0], requires_grad=True)
    losses = objectives.ipo_loss(ratios, 0.25)
    assert losses.tolist() == [0, 4, 9]
    losses.sum().backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [0, -4, 6]


@given(st.floats(0.01, 2), st.floats(0.01, 0.49))
@settings(max_examples=30, deadline=None)
def test_dpo_with_label_smoothing_wants_the_log_odds(beta: float, smoothing: float) -> None:
    """Its minimum is where the policy is as sure of a choice as the labels are, not at infinity."""
    best = math.log((1 - smoothing) / smoothing) / beta
    ratio = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    objectives.dpo_loss(ratio, beta, smoothing).sum().backward()
    assert ratio.grad is not None
    assert abs(ratio.grad.item()) < 1e-9


def test_dpo_is_finite_far_from_the_reference() -> None:
    ratio = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = objectives.dpo_loss(ratio, 1.0)
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0]
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [-1, 0]
