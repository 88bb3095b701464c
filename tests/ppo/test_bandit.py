"""Expected gradients by enumeration of all responses, with no sampling noise.

The policy chooses one or two tokens of a small vocabulary. Each expected gradient of the update is
compared with that of the objective, E[r] − β·KL(π‖π_ref), by autograd through the exact sum. It is
0 where π = π_ref·e^{r/β}/Z.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch import Tensor

from rlhf import objectives
from rlhf.config import LoRAConfig, PPOConfig
from rlhf.data.batching import TokenBatch
from rlhf.models.families import FAMILIES
from rlhf.models.language_model import LanguageModel
from rlhf.ppo.experience import Experience
from rlhf.ppo.roles import Role
from rlhf.ppo.update import Divisors, add_gradients

VOCABULARY = 6
PROMPT = [3, 5, 4]
BETA = 0.4
# Moments of a whole batch, other prompts included, that advantages are whitened with.
MEAN, STD = 0.7, 2.0


def make_config(**fields: Any) -> PPOConfig:
    return PPOConfig(
        base_model="tiny", prompt_dataset="prompts.jsonl", output_dir="out", kl_coeff=BETA,
        batch_size=12, clip_range=1000.0, **fields,
    )  # fmt: skip


@dataclass
class Bandit:
    """A policy (an adapter) and its reference (the base) over all responses of `length` tokens.

    Attributes:
        lm: The model.
        length: Tokens of each response.
    """

    lm: LanguageModel
    length: int

    @property
    def responses(self) -> list[list[int]]:
        """All S responses."""
        return [list(r) for r in itertools.product(range(VOCABULARY), repeat=self.length)]

    def logprobs(self, adapter: str | None) -> Tensor:
        """(S, T) log-probabilities of all responses."""
        with self.lm.using(adapter):
            answers = TokenBatch.from_lists(self.responses)
            prompts = TokenBatch.from_lists([PROMPT] * len(self.responses))
            states = self.lm.response_states(prompts, answers)
            return self.lm.token_logprobs(states, answers).logprobs

    @cached_property
    def own(self) -> Tensor:
        return self.logprobs("policy").detach()

    @cached_property
    def reference(self) -> Tensor:
        return self.logprobs(None).detach()

    @cached_property
    def probabilities(self) -> Tensor:
        """(S,) float64."""
        return self.own.double().sum(1).softmax(0)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.lm.named_trainable("policy")]

    def gradient_of(self, value: Any) -> Tensor:
        """∇ of a function of the policy's and the reference's (S,) log-probabilities, flat."""
        return self.gradient_by_token(lambda own, ref: value(own.sum(1), ref.sum(1)))

    def gradient_by_token(self, value: Any) -> Tensor:
        """∇ of a function of the (S, T) log-probabilities of policy and reference, flat."""
        loss = value(self.logprobs("policy"), self.reference)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.parameters, found, strict=True)
        ]
        return torch.cat([part.flatten() for part in parts])

    def objective_gradient(self, rewards: Tensor) -> Tensor:
        """∇(E[r] − β·KL(π‖π_ref)) for (S,) rewards."""
        return self.gradient_of(lambda own, ref: (own.exp() * (rewards - BETA * (own - ref))).sum())

    def optimal_rewards(self) -> Tensor:
        """(S,) rewards whose optimum is the policy as it is: r = β·log(π/π_ref) + constant."""
        return BETA * (self.own - self.reference).sum(1) + 0.3

    def update_gradient(
        self, config: PPOConfig, advantages: Tensor, sampled_from: Tensor | None = None
    ) -> Tensor:
        """Expected gradient of `add_gradients` over one response, its tokens' losses summed.

        Args:
            config: The configuration.
            advantages: (S, T), expected advantage of each response's tokens.
            sampled_from: (S, T) log-probabilities of what the responses are sampled from; by
                default the policy itself.
        """
        old = self.own if sampled_from is None else sampled_from
        total = torch.zeros_like(torch.cat([p.flatten() for p in self.parameters]))
        for i, (response, chance) in enumerate(
            zip(self.responses, old.double().sum(1).exp().tolist(), strict=True)
        ):
            micro = Experience(
                TokenBatch.from_lists([PROMPT]), TokenBatch.from_lists([response]),
                torch.zeros(1, dtype=torch.long), old[i, None], self.reference[i, None], None,
                advantages[i, None].float(), None,
            )  # fmt: skip
            for parameter in self.parameters:
                parameter.grad = None
            add_gradients(micro, Divisors(1, 1), Role(self.lm, "policy"), None, config, BETA)
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            total += chance * torch.cat([gradient.flatten() for gradient in found])
        return total

    def expected_advantages(
        self, config: PPOConfig, scores: Tensor, size: int, *, own_moments: bool = False
    ) -> Tensor:
        """(S, T), expected advantage of each response over all groups of `size` it may be in.

        Args:
            config: The configuration.
            scores: (S,).
            size: Responses to a prompt.
            own_moments: Whether a group is whitened alone; else with `MEAN` and `STD`.
        """
        draws = torch.tensor(list(itertools.product(range(len(scores)), repeat=size)))
        chances = self.probabilities[draws].prod(1)
        kl = objectives.KL[config.kl_estimator](self.own, self.reference)
        if config.kl_placement == "loss":
            kl = torch.zeros_like(kl)
        lengths = torch.full_like(scores, self.length, dtype=torch.long)
        rewards = objectives.token_rewards(scores, kl, lengths, config.kl_coeff)
        rows = draws.flatten()
        groups = torch.arange(len(draws)).repeat_interleave(size)
        mask = torch.ones(len(rows), self.length).bool()
        estimator = objectives.ADVANTAGES[config.advantage]
        values = self.values()[rows] if estimator.needs_critic else None
        advantages, _ = estimator.function(rewards[rows], values, mask, groups, config)
        if estimator.whitened and own_moments:
            parts = advantages.split(size)
            advantages = torch.cat([objectives.whiten(part, mask[:size]) for part in parts])
        elif estimator.whitened:
            advantages = whitened_with_others(advantages, mask)
        weights = chances.repeat_interleave(size)[:, None] * advantages / size
        total = torch.zeros(len(scores), self.length, dtype=torch.float64)
        return total.index_add(0, rows, weights) / self.probabilities[:, None]

    def values(self) -> Tensor:
        """(S, T) values of a bad critic, which may know only the tokens before."""
        seen = [[sum(response[:t]) for t in range(self.length)] for response in self.responses]
        return 0.3 * torch.tensor(seen).float() - 0.2


def whitened_with_others(advantages: Tensor, mask: Tensor) -> Tensor:
    count = 10**6
    sums = iter(torch.tensor([count, count * MEAN, (count - 1) * STD**2], dtype=torch.float64))
    return objectives.whiten(advantages, mask, reduce=lambda _: next(sums))


def make_bandit(arch: str, length: int) -> Bandit:
    model = tiny_model(arch, vocab=VOCABULARY, layers=1)
    lm = FAMILIES[arch](model, make_tokenizer(arch), base_name="tiny")
    lm.add_adapter("policy", LoRAConfig(rank=4), seed=3)
    randomize_lora(lm, "policy", std=0.3)
    bandit = Bandit(lm, length)
    distance = (bandit.probabilities - bandit.reference.sum(1).exp()).abs().sum()
    assert distance > 0.1
    return bandit


def some_rewards(bandit: Bandit) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 2 * torch.randn(len(bandit.responses), generator=generator) + 1


def assert_close(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Equal, up to a small share of the expected gradient's, or another's, size."""
    size = float((expected if scale is None else scale).norm())
    assert size > 1e-3
    assert float((actual - expected).norm()) < 2e-4 * size


def is_multiple(gradient: Tensor, other: Tensor) -> bool:
    return float(torch.cosine_similarity(gradient, other, dim=0)) > 1 - 1e-5


# How much of the objective's gradient an update of groups of n makes. A mean that includes the
# response itself takes 1/n of it; whitening divides by the batch's deviation.
UNBIASED = {
    "gae": ({"gae_lambda": 1.0}, lambda n: 1 / STD),
    "rloo": ({}, lambda n: 1.0),
    "grpo": ({"grpo_std": False}, lambda n: 1 - 1 / n),
    "reinforce_pp": ({}, lambda n: 1 / STD),
    "reinforce_pp_baseline": ({}, lambda n: (1 - 1 / n) / STD),
}


def test_every_estimator_is_here() -> None:
    assert list(UNBIASED) == list(objectives.ADVANTAGES)


@pytest.mark.parametrize(("length", "size"), [(1, 3), (2, 2)])
@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_is_the_objectives(
    arch: str, name: str, length: int, size: int
) -> None:
    """Of one token and of two, where later tokens depend on earlier ones."""
    fields, factor = UNBIASED[name]
    config = make_config(advantage=name, responses_per_prompt=size, **fields)
    bandit = make_bandit(arch, length)
    rewards = some_rewards(bandit)
    wanted = bandit.objective_gradient(rewards)
    advantages = bandit.expected_advantages(config, rewards, size)
    assert_close(-bandit.update_gradient(config, advantages), factor(size) * wanted)
    at_optimum = bandit.optimal_rewards()
    assert float(bandit.objective_gradient(at_optimum).norm()) < 1e-4 * float(wanted.norm())
    advantages = bandit.expected_advantages(config, at_optimum, size)
    assert_close(-bandit.update_gradient(config, advantages), torch.zeros_like(wanted), wanted)


def slow_grpo(totals: list[float]) -> list[float]:
    mean = sum(totals) / len(totals)
    std = (sum((r - mean) ** 2 for r in totals) / (len(totals) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in totals]


def slow_whitening(totals: list[float]) -> list[float]:
    mean = sum(totals) / len(totals)
    variance = sum((r - mean) ** 2 for r in totals) / (len(totals) - 1)
    return [(r - mean) / (variance + 1e-8) ** 0.5 for r in totals]


@pytest.mark.parametrize(
    ("name", "slow"),
    [("grpo", slow_grpo), ("reinforce_pp", slow_whitening), ("gae", slow_whitening)],
)
def test_a_deviation_of_few_responses_biases_the_direction(arch: str, name: str, slow: Any) -> None:
    """What divides depends on the response: the gradient is the formula's, not the objective's.

    It is 0 at the optimum all the same, where all rewards of a prompt agree.
    """
    config = make_config(advantage=name, responses_per_prompt=3)
    bandit = make_bandit(arch, 1)
    rewards = some_rewards(bandit)
    totals = (rewards - BETA * (bandit.own - bandit.reference).sum(1)).double().tolist()
    probabilities = bandit.probabilities.tolist()
    expected = [0.0] * VOCABULARY
    for group in itertools.product(range(VOCABULARY), repeat=3):
        chance = probabilities[group[0]] * probabilities[group[1]] * probabilities[group[2]]
        for response, advantage in zip(group, slow([totals[y] for y in group]), strict=True):
            expected[response] += chance * advantage / 3
    wanted = bandit.gradient_of(lambda own, ref: (torch.tensor(expected) * own).sum())
    advantages = bandit.expected_advantages(config, rewards, 3, own_moments=True)
    actual = -bandit.update_gradient(config, advantages)
    assert_close(actual, wanted)
    assert not is_multiple(actual, bandit.objective_gradient(rewards))
    if name == "grpo":
        advantages = bandit.expected_advantages(config, bandit.optimal_rewards(), 3)
        found = bandit.update_gradient(config, advantages)
        # Rewards agree only up to rounding, which the 1e-4 beside the deviation keeps small.
        assert float(found.norm()) < 0.05 * float(wanted.norm())


# --- where KL is charged and by which estimator --------------------------------------------------


def reverse(own: Tensor, ref: Tensor) -> Tensor:
    return (own.exp() * (own - ref)).sum()


def forward(own: Tensor, ref: Tensor) -> Tensor:
    return (ref.exp() * (ref - own)).sum()


def nothing(own: Tensor, ref: Tensor) -> Tensor:
    return 0 * own.sum()


def half_square(own: Tensor, ref: Tensor) -> Tensor:
    return (own.exp() * 0.5 * (own - ref) ** 2).sum()


# The function whose gradient a penalty has, on responses of one token.
PULLS = {
    ("reward", "k1"): reverse,
    ("reward", "k2"): lambda own, ref: half_square(own, ref) - reverse(own, ref),
    ("reward", "k3"): lambda own, ref: reverse(own, ref) - forward(own, ref),
    ("loss", "k2"): reverse,
    ("loss", "k3"): forward,
}


def penalty_gradient(
    bandit: Bandit, placement: str, estimator: str, sampled_from: Tensor | None = None
) -> Tensor:
    config = make_config(
        advantage="rloo", responses_per_prompt=2, kl_placement=placement, kl_estimator=estimator
    )
    scores = torch.zeros(len(bandit.responses))
    advantages = bandit.expected_advantages(config, scores, 2)
    return bandit.update_gradient(config, advantages, sampled_from) / BETA


@pytest.mark.parametrize(("placement", "estimator"), PULLS)
def test_what_a_penalty_pulls_to(arch: str, placement: str, estimator: str) -> None:
    bandit = make_bandit(arch, 1)
    wanted = bandit.gradient_of(PULLS[placement, estimator])
    found = penalty_gradient(bandit, placement, estimator)
    assert_close(found, wanted)
    unbiased = (placement, estimator) in {("reward", "k1"), ("loss", "k2")}
    assert is_multiple(found, bandit.gradient_of(reverse)) is unbiased


def test_k1_in_the_loss_pulls_nowhere(arch: str) -> None:
    bandit = make_bandit(arch, 1)

    def value(own: Tensor, ref: Tensor) -> Tensor:
        old = bandit.own
        weights = bandit.probabilities[:, None].float()
        return objectives.kl_loss(own, old, ref, weights, "k1")

    assert float(bandit.gradient_by_token(value).norm()) < 1e-5
    assert float(bandit.gradient_of(reverse).norm()) > 1e-2


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_penalty_in_the_loss_is_the_same_after_the_policy_has_moved(
    arch: str, estimator: str
) -> None:
    """The responses came from another distribution than the policy's."""
    bandit = make_bandit(arch, 1)
    old = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.1, 0.2]).log()[:, None]
    found = penalty_gradient(bandit, "loss", estimator, sampled_from=old)
    assert_close(found, bandit.gradient_of(PULLS["loss", estimator]))


def test_a_penalty_in_the_loss_does_not_see_what_follows_a_token(arch: str) -> None:
    """Of two tokens, only the rewards give the gradient of the whole response's KL.

    In the loss, each token's KL is pulled on as if the tokens before it were given.
    """
    bandit = make_bandit(arch, 2)
    whole = bandit.gradient_of(reverse)
    assert_close(penalty_gradient(bandit, "reward", "k1"), whole)
    found = penalty_gradient(bandit, "loss", "k2")
    reached = bandit.own[:, :1].exp()  # of the first token, a constant

    def given_prefixes(own: Tensor, ref: Tensor) -> Tensor:
        first, second = (own - ref).unbind(1)
        chance = own.exp()
        # Each first token is in VOCABULARY of the responses.
        return (chance[:, 0] * first).sum() / VOCABULARY + (
            reached[:, 0] * chance[:, 1] * second
        ).sum()

    assert_close(found, bandit.gradient_by_token(given_prefixes))
    assert not is_multiple(found, whole)


def test_k1_in_the_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient of k1 in the loss is 0 on average"):
        make_config(kl_placement="loss")
