"""The roles of PPO (and DPO): policy, critic and reference, on as few models as possible.

With LoRA they are all adapters (or none) on one frozen base. Under full fine-tuning each is its own
model. Trainers see no difference.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import PPOConfig, TrainingConfig
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model
from rlhf.models.reward_model import (
    RewardModel,
    head_from_reward,
    value_from_reward,
)
from rlhf.models.saving import add_adapter_to_weights
from rlhf.models.scorers import Scorer


@dataclass(frozen=True)
class Role:
    """A language model in one role.

    Attributes:
        lm: The model, which other roles may share.
        adapter: The role's adapter; None for the base itself or a separate model.
    """

    lm: LanguageModel
    adapter: str | None

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the model with this role's adapter active; run forward *and* backward inside."""
        with self.lm.using(self.adapter):
            yield self.lm

    def named_trainable(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """Return what training this role changes, under names unique to the role."""
        return [(f"{role}.{n}", p) for n, p in self.lm.named_trainable(self.adapter)]


@dataclass(frozen=True)
class Critic:
    """The role that values states.

    Attributes:
        role: Model whose states the head reads.
        head: Maps a state to its value.
        on_policy_trunk: True if `role` is the policy itself, so that one forward pass serves both
            and the value loss trains the policy's adapter too (weighted by vf_coef).
    """

    role: Role
    head: ScalarHead
    on_policy_trunk: bool

    def values(self, states: Tensor) -> Tensor:
        """(B, R+1, D) states to (B, R) fp32: the value before each response token."""
        return self.head(states[:, :-1])

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return the critic's own weights; a head on the policy's trunk has nothing else."""
        own = [] if self.on_policy_trunk else self.role.named_trainable("critic")
        return [*own, *((f"critic.head.{n}", p) for n, p in self.head.named_parameters())]


@dataclass(frozen=True)
class Bases:
    """The models loaded before any role is made.

    Attributes:
        policy: Model that becomes the policy.
        frozen: Model whose weights never change: the same one with LoRA, a second one under full
            fine-tuning if any role needs it, else None.
    """

    policy: LanguageModel
    frozen: LanguageModel | None


def load_bases(
    config: TrainingConfig,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    frozen: bool = True,
) -> Bases:
    """Load the policy's base, twice only if necessary.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        frozen: Whether any role needs a base that never changes.
    """
    if config.lora.rank > 0:
        lm = load_language_model(config, trainable=False, model=model, tokenizer=tokenizer)
        return Bases(lm, lm)
    untouched = None
    if frozen:
        copied = copy.deepcopy(model)
        untouched = load_language_model(config, trainable=False, model=copied, tokenizer=tokenizer)
    policy = load_language_model(config, trainable=True, model=model, tokenizer=tokenizer)
    return Bases(policy, untouched)


def make_policy(config: TrainingConfig, bases: Bases) -> Role:
    """Make the policy: a fresh adapter, or the whole model."""
    if config.lora.rank == 0:
        return Role(bases.policy, None)
    # PPO and DPO compare probabilities under the same network: no dropout anywhere.
    lora = config.lora.model_copy(update={"dropout": 0.0})
    bases.policy.add_adapter("policy", lora, seed=config.seed)
    return Role(bases.policy, "policy")


def make_reference(config: PPOConfig, bases: Bases) -> Role | None:
    """Make the reference, the untuned policy; return None if no KL is charged."""
    if config.kl_coeff == 0:
        return None
    assert bases.frozen is not None
    return Role(bases.frozen, None)


def make_critic(
    config: PPOConfig,
    policy: Role,
    rewards: Sequence[tuple[Scorer, float]],
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Critic:
    """Make the critic that `config.critic` names.

    If a reward model reads the policy's token ids, the critic starts as a copy of it with weight
    and normalization folded in, so that from the start the value of a finished response is what
    this reward contributes to its score. Of several such models it is the one with the largest
    weight: one copy cannot express a sum. With LoRA the copy is an adapter on the shared base,
    under full fine-tuning a separate model. Otherwise values start at 0.

    Args:
        config: The stage's configuration.
        policy: The policy's role.
        rewards: The scorers with their weights.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
    """
    lm = policy.lm
    blank = ScalarHead(lm.hidden_size, init_std=0.0).to(lm.device)
    if config.critic == "head":
        return Critic(policy, blank, on_policy_trunk=True)
    if config.lora.rank == 0:
        start = _heaviest(rewards, lambda reward: reward.reads_ids_of(lm))
        if start is not None:
            own, head = _copy_of_reward_model(config, *start, model)
            return Critic(Role(own, None), head, on_policy_trunk=False)
        own = load_language_model(
            config, trainable=True, model=copy.deepcopy(model), tokenizer=tokenizer
        )
        return Critic(Role(own, None), blank, on_policy_trunk=False)
    start = _heaviest(rewards, lambda reward: reward.shares_base and reward.lm is lm)
    if start is not None:
        head = value_from_reward(start[0], "value", start[1]).to(lm.device)
        return Critic(Role(lm, "value"), head, on_policy_trunk=False)
    lm.add_adapter("value", config.lora.model_copy(update={"dropout": 0.0}), seed=config.seed)
    return Critic(Role(lm, "value"), blank, on_policy_trunk=False)


def _heaviest(
    rewards: Sequence[tuple[Scorer, float]], fits: Callable[[RewardModel], bool]
) -> tuple[RewardModel, float] | None:
    """Return the fitting reward model with the largest weight, and its weight; ties: the first."""
    found = [
        (reward, weight)
        for reward, weight in rewards
        if isinstance(reward, RewardModel) and weight and fits(reward)
    ]
    return max(found, key=lambda one: abs(one[1]), default=None)


def _copy_of_reward_model(
    config: PPOConfig, reward: RewardModel, weight: float, model: Any
) -> tuple[LanguageModel, ScalarHead]:
    """Return a separate, trainable model with the reward model's weights, and its weighted head.

    The weights are read from disk again rather than copied: training needs them in float32, and the
    reward model may hold them in bfloat16.
    """
    own = load_language_model(
        config,
        trainable=True,
        model=copy.deepcopy(model) if reward.shares_base else None,
        tokenizer=reward.lm.tokenizer,
        base_model=reward.lm.base_name,
        revision=reward.lm.revision,
    )
    if reward.adapter is not None:
        add_adapter_to_weights(reward.lm, reward.adapter, own)
    return own, head_from_reward(reward, weight).to(own.device)
