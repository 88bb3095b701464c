"""The fields of PPO."""

from typing import Any, ClassVar, Literal

from rlhf.config.common import (
    LARGEST_WEIGHT,
    MOST_ROWS,
    MOST_TOKENS,
    SMALLEST_RATE,
    NonEmpty,
    TrainingConfig,
    option,
)
from rlhf.config.rewards import RewardEntry, name_problems
from rlhf.config.shared import PATHS, compile_decode, reward_model_of, tuned_base
from rlhf.config.sources import Sources, UnweightedSources

# Estimators that compare the responses to one prompt.
COMPARING = frozenset({"rloo", "grpo", "reinforce_pp_baseline"})


class PPOConfig(TrainingConfig):
    """Proximal policy optimization against a reward model (Schulman et al. 2017)."""

    stage: ClassVar[str] = "ppo"
    folder: ClassVar[str] = "policy"
    set_by_pipeline: ClassVar[frozenset[str]] = frozenset({"output_dir", "reward_model_path"})
    base_rate: ClassVar[str | None] = "ppo"
    default_train_steps: ClassVar[int | None] = 200

    prompt_dataset: Sources = option(..., f"Rows with prompts. {PATHS}.")
    eval_dataset: UnweightedSources | None = option(
        None, "Rows with prompts for evaluation during training. Default: none."
    )
    reward_model_path: NonEmpty | None = option(
        None,
        "Folder written by `rlhf reward-model`, or any Hugging Face sequence classifier (or peft "
        "adapter of one) with one label: a reward of weight 1, named reward_model. Not needed with "
        "rewards or reward_fn.",
    )
    rewards: list[RewardEntry] = option(
        [],
        "Rewards whose weighted sum is the score, with that of reward_model_path if it is given: "
        "mappings of path or function, label, weight and name, or the paths alone; see "
        "docs/rewards.md.",
    )
    reward_timeout: float | None = option(
        None,
        "Longest time that one call of a reward function may take, s. Default: no limit.",
        affects_result=False,
        gt=0,
        le=10**6,
    )
    kl_coeff: float = option(
        0.1,
        "Weight of the KL penalty to the untuned policy, reward per nat.",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    kl_placement: Literal["reward", "loss"] = option(
        "reward",
        "reward: the KL penalty is part of each token's reward (Ziegler et al. 2019); loss: it is "
        "a term of the loss (Shao et al. 2024), which ignores how a token changes later KL.",
    )
    kl_estimator: NonEmpty = option(
        "k1",
        "Estimator of the KL penalty, k1, k2 or k3 (Schulman 2020), or one registered in Python. "
        "Unbiased: k1 as a reward, k2 in the loss; docs/estimators.md says what others pull to.",
    )
    kl_target: float | None = option(
        None,
        "KL to aim for by adapting kl_coeff, nats per response (Ziegler et al. 2019). "
        "Default: kl_coeff is fixed.",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    kl_horizon: int = option(
        10_000,
        "Time scale of the adaptive kl_coeff, episodes; used with kl_target.",
        ge=1,
        le=10**12,
    )
    target_kl: float | None = option(
        None,
        "End a step's epochs early when the mean KL to the rollout policy exceeds 1.5 times this, "
        "nats per token. Default: never.",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    responses_per_prompt: int | None = option(
        None,
        "Responses sampled for each prompt, which all models then read only once; divides "
        "batch_size. Default: 1 with advantage gae, else 4.",
        ge=1,
        le=MOST_ROWS,
    )
    ppo_epochs: int = option(4, "Passes over each rollout.", ge=1, le=10_000)
    num_minibatches: int = option(
        1,
        "Optimizer steps per pass; divides the prompts of a batch, batch_size / "
        "responses_per_prompt.",
        ge=1,
        le=MOST_ROWS,
    )
    rollout_batch_size: int | None = option(
        None,
        "Responses generated at once; smaller saves memory without changing samples. "
        "Default: batch_size.",
        affects_result=False,
        ge=1,
        le=MOST_ROWS,
    )
    compile_decode: bool = compile_decode()
    temperature: float = option(
        1.0,
        "Divides the logits in the rollout, the reference and the update alike.",
        ge=1e-3,
        le=1e3,
    )
    advantage: NonEmpty = option(
        "gae",
        "Advantage estimator: gae, which trains a critic; rloo (Ahmadian et al. 2024), grpo (Shao "
        "et al. 2024), reinforce_pp or reinforce_pp_baseline (Hu 2025), which need none; or one "
        "registered in Python.",
    )
    grpo_std: bool = option(
        True,
        "Whether grpo divides by the standard deviation of a prompt's rewards; Dr. GRPO (Liu et "
        "al. 2025) does not.",
    )
    gamma: float = option(
        1.0, "Discount per token of gae, reinforce_pp and reinforce_pp_baseline.", gt=0, le=1
    )
    gae_lambda: float = option(
        0.95, "Lambda of generalized advantage estimation (Schulman et al. 2015).", ge=0, le=1
    )
    clip_range: float = option(0.2, "Clip range of the probability ratio.", gt=0, le=LARGEST_WEIGHT)
    clip_range_high: float | None = option(
        None,
        "Clip range above 1, where it differs (DAPO, Yu et al. 2025). Default: clip_range.",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    loss_average: Literal["token", "sequence", "constant"] = option(
        "token",
        "Losses are averaged over the tokens of a minibatch (token), over the means of its "
        "responses (sequence; Shao et al. 2024), or summed and divided by responses times "
        "target_sequence_length, whatever the lengths (constant; Dr. GRPO, Liu et al. 2025).",
    )
    value_clip_range: float = option(
        0.2, "Clip range of the change in a value.", gt=0, le=LARGEST_WEIGHT
    )
    vf_coef: float = option(0.1, "Weight of the value loss.", ge=0, le=LARGEST_WEIGHT)
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", ge=0, le=LARGEST_WEIGHT)
    critic: Literal["adapter", "head"] = option(
        "adapter",
        "adapter: the critic has its own adapter (its own model under full fine-tuning), started "
        "from the reward model; head: a value head on the policy's trunk.",
    )
    critic_learning_rate: float | None = option(
        None,
        "Peak learning rate of the critic. Default: its base rate times learning_rate_multiplier.",
        ge=SMALLEST_RATE,
        le=1,
    )
    whiten_rewards: bool = option(
        False, "Scale token rewards to unit variance without shifting them."
    )
    reward_clip: float | None = option(
        None,
        "Clip scores to at most this much above or below 0 (Zheng et al. 2023, §5.3.1). "
        "Default: no clip.",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    length_penalty: float = option(
        0.0,
        "Subtracted from the score for each token of a response beyond length_penalty_start "
        "(as the overlong punishment of DAPO, Yu et al. 2025, §3.4).",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    length_penalty_start: int = option(
        0, "Tokens of a response, EOS included, that cost nothing.", ge=0, le=MOST_TOKENS
    )
    missing_eos_penalty: float | None = option(
        None,
        "Subtracted from the score of a response without EOS. Default: none.",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    missing_eos_score: float | None = option(
        None,
        "Replaces the score of a response without EOS. Default: none.",
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
    )
    min_response_length: int = option(
        0,
        "EOS cannot be sampled before this many tokens, in rollout and update alike.",
        ge=0,
        le=MOST_TOKENS,
    )

    @property
    def reward_models(self) -> list[RewardEntry]:
        """The rewards that are reward models or classifiers, that of `reward_model_path` first."""
        own = [entry for entry in self.rewards if entry.path is not None]
        if self.reward_model_path is None:
            return own
        return [RewardEntry(path=self.reward_model_path, name="reward_model"), *own]

    @property
    def effective_responses_per_prompt(self) -> int:
        """`responses_per_prompt`, or its default."""
        return self.responses_per_prompt or (1 if self.advantage == "gae" else 4)

    @property
    def effective_clip_range_high(self) -> float:
        """`clip_range_high`, or its default."""
        return self.clip_range if self.clip_range_high is None else self.clip_range_high

    @property
    def rows_per_step(self) -> int:
        """Prompts of a step."""
        return self.batch_size // self.effective_responses_per_prompt

    @property
    def effective_rollout_batch_size(self) -> int:
        """`rollout_batch_size`, or its default; responses."""
        return self.rollout_batch_size or self.batch_size

    @property
    def effective_critic_learning_rate(self) -> float:
        """Peak learning rate of the critic."""
        return self._rate(self.critic_learning_rate, "critic")

    def _scaled_rates(self) -> list[float]:
        """Return the rates that the multiplier makes."""
        given = self.critic_learning_rate is not None
        critic = [] if given else [self.effective_critic_learning_rate]
        return super()._scaled_rates() + critic

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields that are each valid, one line each."""
        problems = super().cross_problems()
        per_prompt = self.effective_responses_per_prompt
        if self.batch_size % per_prompt:
            problems.append(
                f"responses_per_prompt: {per_prompt} does not divide batch_size {self.batch_size}"
            )
        elif self.batch_size // per_prompt % self.num_minibatches:
            prompts = "" if per_prompt == 1 else f" / responses_per_prompt {per_prompt}"
            problems.append(
                f"num_minibatches: {self.num_minibatches} does not divide "
                f"batch_size {self.batch_size}{prompts}"
            )
        if self.advantage in COMPARING and per_prompt == 1:
            problems.append(
                f"advantage, responses_per_prompt: {self.advantage} compares the responses to one "
                "prompt; set responses_per_prompt to 2 or more, or leave it out for 4"
            )
        named = ["reward_model"] if self.reward_model_path is not None else []
        problems += name_problems(named + [entry.effective_name for entry in self.rewards])
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            problems.append("missing_eos_penalty, missing_eos_score: give one of them, not both")
        if self.kl_target is not None and self.kl_coeff == 0:
            problems.append(
                "kl_target, kl_coeff: a kl_coeff of 0 charges no KL, so there is nothing to adapt; "
                "give the kl_coeff to start from, or leave kl_target out"
            )
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            problems.append(
                "kl_placement, kl_estimator: the gradient of k1 in the loss is 0 on average, so it "
                "would not hold the policy near the reference; use kl_estimator k2 (unbiased) or "
                "k3, or kl_placement reward"
            )
        if self.length_penalty_start and not self.length_penalty:
            problems.append(
                "length_penalty_start: does nothing without length_penalty, the cost of each token "
                "beyond it"
            )
        elif self.length_penalty and self.length_penalty_start >= self.target_sequence_length:
            problems.append(
                f"length_penalty_start: no response is longer than target_sequence_length "
                f"{self.target_sequence_length}, so that {self.length_penalty_start} would never "
                "cost anything"
            )
        if self.min_response_length > self.target_sequence_length:
            problems.append(
                f"min_response_length: {self.min_response_length} is more than "
                f"target_sequence_length {self.target_sequence_length}"
            )
        return problems

    def resolved(self) -> dict[str, Any]:
        """Return plain data in which numbers that depend on others are given, not left out."""
        return super().resolved() | {
            "critic_learning_rate": self.effective_critic_learning_rate,
            "clip_range_high": self.effective_clip_range_high,
            "responses_per_prompt": self.effective_responses_per_prompt,
        }

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the tuned base, the prompts and the folder of the reward model."""
        given = pipeline.prompt_dataset is not None
        return tuned_base(pipeline) | {
            "prompt_dataset": pipeline.prompt_dataset if given else pipeline.preference_dataset,
            "reward_model_path": reward_model_of(pipeline),
        }
