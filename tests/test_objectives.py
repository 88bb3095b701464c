"""The formulas against slow float64 loops, hand-worked examples and published properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf import objectives

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10_000))


def random_rows(size: tuple[int, int, int], count: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """`count` random (B, R) tensors, a prefix mask with lengths >= 1, and the lengths."""
    rows, width, seed = size
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, width, generator=generator) for _ in range(count)]
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return tensors, torch.arange(width) < lengths[:, None], lengths


def close(actual: Tensor, expected: np.ndarray | float) -> None:
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=2e-4, atol=2e-5)


@given(SIZES, st.floats(0.5, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_gae_is_the_sum_over_future_deltas(
    size: tuple[int, int, int], gamma: float, lam: float
) -> None:
    (rewards, values), mask, lengths = random_rows(size, 2)
    advantages, returns = objectives.gae(rewards, values, mask, gamma, lam)
    expected = np.zeros(rewards.shape)
    for b, length in enumerate(lengths.tolist()):
        r, v = rewards[b].double().tolist(), values[b].double().tolist()
        v_next = [*v[1:length], 0.0]
        deltas = [r[t] + gamma * v_next[t] - v[t] for t in range(length)]
        for t in range(length):
            expected[b, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
    close(advantages, expected)
    close(returns, expected + (values * mask).double().numpy())


def test_gae_by_hand() -> None:
    # Two tokens, gamma 1, lambda 0.5: delta_1 = 1 - 0.25 = 0.75, delta_0 = 0.25 - 0.5 = -0.25,
    # so A_1 = 0.75, A_0 = -0.25 + 0.5 * 0.75 = 0.125, and the returns are 0.625 and 1.
    rewards = torch.tensor([[0.0, 1.0, 9.0]])
    values = torch.tensor([[0.5, 0.25, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = objectives.gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist() == [[0.125, 0.75, 0.0]]
    assert returns.tolist() == [[0.625, 1.0, 0.0]]


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_returns_with_lambda_one_are_the_rewards_to_come(size: tuple[int, int, int]) -> None:
    (rewards, values), mask, _ = random_rows(size, 2)
    _, returns = objectives.gae(rewards, values, mask, 1.0, 1.0)
    masked = (rewards * mask).double().numpy()
    close(returns, masked[:, ::-1].cumsum(1)[:, ::-1] * mask.numpy())


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_what_lies_past_the_end_never_matters(size: tuple[int, int, int]) -> None:
    (a, b, c, d), mask, lengths = random_rows(size, 4)
    noise = torch.where(mask, 0.0, 1e3)
    pairs = [
        (lambda x: objectives.gae(x + a, b + x, mask, 1.0, 0.95)[0]),
        (lambda x: objectives.whiten(a + x, mask)),
        (lambda x: objectives.policy_loss(a * mask + x, b * mask, c + x, mask, 0.2).total),
        (lambda x: objectives.value_loss(a + x, b - x, c + x, mask, 0.2).total),
    ]
    for function in pairs:
        torch.testing.assert_close(function(torch.zeros(())), function(noise))
    del d, lengths


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_whitening(size: tuple[int, int, int]) -> None:
    (values,), mask, _ = random_rows(size, 1)
    values = values * 3 + 2
    picked = values[mask].double().numpy()
    shifted = objectives.whiten(values, mask)
    scaled = objectives.whiten(values, mask, shift_mean=False)
    std = picked.std(ddof=1) if len(picked) > 1 else 1.0
    if std < 1e-2:
        return
    close(shifted[mask], (picked - picked.mean()) / std)
    close(scaled[mask], picked / std)
    assert not shifted[~mask].any()


def test_whitened_advantages_have_mean_zero() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    whitened = objectives.whiten(torch.tensor([[5.0, 7.0, 99.0], [9.0, 99.0, 99.0]]), mask)
    assert whitened[mask].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)


@given(SIZES, st.floats(0.05, 0.5))
@settings(max_examples=60, deadline=None)
def test_clipped_losses_token_by_token(size: tuple[int, int, int], clip: float) -> None:
    rows, mask, lengths = random_rows(size, 4)
    # In float64 as below: a ratio within float32's rounding of the clip would count either way.
    new, old, advantage, target = (row.double() for row in rows)
    policy_sum = value_sum = 0.0
    policy_clipped = value_clipped = 0
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            n, o, a, r = (float(x[b, t]) for x in (new, old, advantage, target))
            ratio = math.exp(n - o)
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            policy_sum += -min(ratio * a, bounded * a)
            policy_clipped += bounded * a < ratio * a
            near = min(max(n, o - clip), o + clip)
            value_sum += 0.5 * max((n - r) ** 2, (near - r) ** 2)
            value_clipped += (near - r) ** 2 > (n - r) ** 2
    policy = objectives.policy_loss(new, old, advantage, mask, clip)
    value = objectives.value_loss(new, old, target, mask, clip)
    close(policy.total, policy_sum)
    close(value.total, value_sum)
    assert (int(policy.clipped), int(value.clipped)) == (policy_clipped, value_clipped)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "has_gradient"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)],
)
def test_the_clip_takes_only_the_optimistic_gradient(
    log_ratio: float, advantage: float, has_gradient: bool
) -> None:
    new = torch.tensor([[log_ratio]], requires_grad=True)
    loss = objectives.policy_loss(
        new, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1).bool(), 0.2
    )
    loss.total.backward()
    assert new.grad is not None
    assert bool(new.grad.abs().sum() > 0) is has_gradient
    assert int(loss.clipped) == (not has_gradient)


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_kl_estimators_are_unbiased_and_k3_is_never_negative(
    logits: list[float], seed: int
) -> None:
    p = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
    noise = torch.randn(len(logits), generator=torch.Generator().manual_seed(seed)).double()
    q = (p + noise).log_softmax(0)
    exact = float((p.exp() * (p - q)).sum())
    k1, k3 = objectives.kl_k1(p, q), objectives.kl_k3(p, q)
    assert float((p.exp() * k1).sum()) == pytest.approx(exact, abs=1e-9)
    assert float((p.exp() * k3).sum()) == pytest.approx(exact, abs=1e-9)
    assert (k3 >= -1e-12).all()


def test_token_rewards_charge_kl_and_pay_at_the_last_token() -> None:
    kl = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    rewards = objectives.token_rewards(
        torch.tensor([10.0, 20.0]), kl, torch.tensor([2, 1]), kl_coeff=0.5
    )
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [18.0, 0.0, 0.0]]


@given(st.integers(1, 6), st.integers(0, 999), st.floats(0, 2), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_pairwise_loss(rows: int, seed: int, margin: float, centering: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = 5 * torch.randn(2, rows, generator=generator)
    losses = objectives.pairwise_loss(chosen, rejected, torch.full((rows,), margin), centering)
    for loss, c, r in zip(losses.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-(c - r - margin)))
        assert loss == pytest.approx(-math.log(probability) + centering * (c + r) ** 2, rel=1e-4)


def test_pairwise_loss_survives_hopeless_pairs() -> None:
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = objectives.pairwise_loss(chosen, torch.zeros(1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e4)
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.02), (6.6, 1.02), (0.0, 0.98), (5.5, 1.01)])
def test_adaptive_kl(kl: float, factor: float) -> None:
    # Error clipped to ±0.2, 100 of 1000 episodes: at most a step of 2 %.
    controller = objectives.AdaptiveKL(0.5, target=5.0, horizon=1000)
    controller.update(kl, episodes=100)
    assert controller.value == pytest.approx(0.5 * factor)


@given(
    kls=st.lists(st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf]), max_size=30),
    episodes=st.integers(1, 10**6),
    horizon=st.integers(1, 10**6),
)
def test_the_adaptive_coefficient_never_pays_for_kl(
    kls: list[float], episodes: int, horizon: int
) -> None:
    controller = objectives.AdaptiveKL(0.1, target=6.0, horizon=horizon)
    for kl in kls:
        before = controller.value
        controller.update(kl, episodes)
        assert 0.8 * before * (1 - 1e-9) <= controller.value <= 1.2 * before * (1 + 1e-9)
        if math.isfinite(kl) and episodes <= horizon:  # as published
            error = max(-0.2, min(0.2, kl / 6.0 - 1))
            assert controller.value == pytest.approx(before * (1 + error * episodes / horizon))


def test_fixed_kl_coefficient_stays() -> None:
    controller = objectives.AdaptiveKL(0.5, target=None, horizon=1000)
    controller.update(100.0, episodes=100)
    assert controller.value == 0.5


def test_explained_variance() -> None:
    mask = torch.ones(1, 4).bool()
    targets = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert objectives.explained_variance(targets + 7, targets, mask) == pytest.approx(1.0)
    assert objectives.explained_variance(torch.zeros(1, 4), targets, mask) == pytest.approx(0.0)
    assert objectives.explained_variance(targets, torch.ones(1, 4), mask) == 0.0
