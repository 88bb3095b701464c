"""The fields of each stage."""

from typing import Any, ClassVar, Literal

from rlhf.config.common import (
    LARGEST_WEIGHT,
    MOST_ROWS,
    MOST_TOKENS,
    SMALLEST_RATE,
    Device,
    NonEmpty,
    Paths,
    Schema,
    StageConfig,
    TrainingConfig,
    option,
)

_PATHS = "JSON Lines: a path, a glob, a gs:// address, or a list of these"


def _compile_decode() -> Any:
    return option(
        False,
        "Decode with one compiled step (torch.compile; a CUDA graph on a GPU) instead of layer by "
        "layer: about a minute to compile, then fewer kernel launches. Needs Triton on a GPU, "
        "a C++ compiler on a CPU. Batches and prompts are padded to their limits, finished rows "
        "stay in the batch, and the cache is never freed. Rounding differs, so bfloat16 draws "
        "other samples from the same distribution.",
    )


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on demonstrations."""

    stage: ClassVar[str] = "sft"
    folder: ClassVar[str] = "sft"
    base_rate: ClassVar[str | None] = "sft"

    dataset: Paths = option(..., f"Rows with a prompt and output_text. {_PATHS}.")
    eval_dataset: Paths | None = option(
        None, "Demonstrations on which the loss is evaluated during training. Default: none."
    )

    @classmethod
    def runs_in(cls, pipeline: Any) -> bool:
        """Whether there are demonstrations."""
        return pipeline.sft_dataset is not None or "dataset" in pipeline.section("sft")

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the demonstrations; the pipeline's evaluation rows may lack output_text."""
        data = {} if pipeline.sft_dataset is None else {"dataset": pipeline.sft_dataset}
        return {"eval_dataset": None} | data


class RewardModelConfig(TrainingConfig):
    """A reward model from preference pairs."""

    stage: ClassVar[str] = "reward_model"
    folder: ClassVar[str] = "reward_model"
    base_rate: ClassVar[str | None] = "reward_model"

    preference_dataset: Paths = option(..., f"Preference rows. {_PATHS}.")
    eval_dataset: Paths | None = option(
        None,
        "Preference rows for evaluation. Default: 5 % of the training rows, "
        "at most 1000, held out by prompt.",
    )
    centering_coeff: float = option(
        0.0,
        "Weight of a penalty on (r_chosen + r_rejected)^2, which keeps scores near 0 "
        "(Eisenstein et al. 2023, arXiv 2312.09244).",
        ge=0,
        le=LARGEST_WEIGHT,
    )
    normalization: Literal["mean", "mean_std", "none"] = option(
        "mean",
        "After training, shift scores to mean 0 over the reference responses (mean), and also "
        "scale them to standard deviation 1 (mean_std).",
    )
    normalization_dataset: Paths | None = option(
        None,
        "Demonstrations (rows with output_text) to use as reference responses. "
        f"Default: the candidates of the training rows. {_PATHS}.",
    )

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the base that the SFT stage tunes, if it runs."""
        return _tuned_base(pipeline)


class PPOConfig(TrainingConfig):
    """Proximal policy optimization against a reward model (Schulman et al. 2017)."""

    stage: ClassVar[str] = "ppo"
    folder: ClassVar[str] = "policy"
    set_by_pipeline: ClassVar[frozenset[str]] = frozenset({"output_dir", "reward_model_path"})
    base_rate: ClassVar[str | None] = "ppo"
    default_train_steps: ClassVar[int | None] = 200

    prompt_dataset: Paths = option(..., f"Rows with prompts. {_PATHS}.")
    eval_dataset: Paths | None = option(
        None, "Rows with prompts for evaluation during training. Default: none."
    )
    reward_model_path: NonEmpty | None = option(
        None,
        "Folder written by `rlhf reward-model`, or any Hugging Face sequence classifier with one "
        "label; not needed with reward_fn.",
    )
    kl_coeff: float = option(
        0.1,
        "Weight of the KL penalty to the untuned policy, reward per nat.",
        ge=0,
        le=LARGEST_WEIGHT,
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
    ppo_epochs: int = option(4, "Passes over each rollout.", ge=1, le=10_000)
    num_minibatches: int = option(
        1, "Optimizer steps per pass; divides batch_size.", ge=1, le=MOST_ROWS
    )
    rollout_batch_size: int | None = option(
        None,
        "Responses generated at once; smaller saves memory without changing samples. "
        "Default: batch_size.",
        affects_result=False,
        ge=1,
        le=MOST_ROWS,
    )
    compile_decode: bool = _compile_decode()
    temperature: float = option(
        1.0,
        "Divides the logits in the rollout, the reference and the update alike.",
        ge=1e-3,
        le=1e3,
    )
    advantage: NonEmpty = option("gae", "Advantage estimator: gae, or one registered in Python.")
    gamma: float = option(1.0, "Discount per token.", gt=0, le=1)
    gae_lambda: float = option(
        0.95, "Lambda of generalized advantage estimation (Schulman et al. 2015).", ge=0, le=1
    )
    clip_range: float = option(0.2, "Clip range of the probability ratio.", gt=0, le=LARGEST_WEIGHT)
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
        if self.batch_size % self.num_minibatches:
            problems.append(
                f"num_minibatches: {self.num_minibatches} does not divide "
                f"batch_size {self.batch_size}"
            )
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            problems.append("missing_eos_penalty, missing_eos_score: give one of them, not both")
        if self.kl_target is not None and self.kl_coeff == 0:
            problems.append(
                "kl_target, kl_coeff: a kl_coeff of 0 charges no KL, so there is nothing to adapt; "
                "give the kl_coeff to start from, or leave kl_target out"
            )
        if self.min_response_length > self.target_sequence_length:
            problems.append(
                f"min_response_length: {self.min_response_length} is more than "
                f"target_sequence_length {self.target_sequence_length}"
            )
        return problems

    def resolved(self) -> dict[str, Any]:
        """Return plain data in which rates and alpha are numbers, not defaults."""
        return super().resolved() | {"critic_learning_rate": self.effective_critic_learning_rate}

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the tuned base, the prompts and the folder of the reward model."""
        given = pipeline.prompt_dataset is not None
        return _tuned_base(pipeline) | {
            "prompt_dataset": pipeline.prompt_dataset if given else pipeline.preference_dataset,
            "reward_model_path": pipeline.stage_dir("reward_model"),
        }


class InferenceConfig(StageConfig):
    """Generation with the tuned and the untuned model, and its evaluation."""

    stage: ClassVar[str] = "inference"
    folder: ClassVar[str] = "inference"
    set_by_pipeline: ClassVar[frozenset[str]] = frozenset({"output_dir", "policy_path"})

    base_model: NonEmpty | None = option(
        None, "The untuned model. Default: the one recorded in the policy's adapter."
    )
    policy_path: NonEmpty = option(
        ..., "Folder written by `rlhf ppo` or `rlhf sft`, or the adapter/ or merged/ inside it."
    )
    eval_dataset: Paths = option(..., f"Rows with prompts, with or without references. {_PATHS}.")
    reward_model_path: NonEmpty | None = option(
        None, "Reward model that scores both models' responses. Default: no scores."
    )
    sampling_strategy: Literal["greedy", "temperature_sampling"] = option(
        "greedy", "How responses are generated."
    )
    temperature: float = option(
        1.0, "Divides the logits under temperature_sampling.", ge=1e-3, le=1e3
    )
    min_response_length: int = option(
        0,
        "EOS cannot be generated before this many tokens.",
        ge=0,
        le=MOST_TOKENS,
    )
    compile_decode: bool = _compile_decode()
    extra_metrics: list[NonEmpty] = option(
        [], "Folders of local `evaluate` modules to compute as well."
    )

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the folders of policy and reward model, and the held-out rows."""
        given = pipeline.eval_dataset is not None
        return {
            "base_model": None,
            "revision": None,
            "policy_path": pipeline.stage_dir("ppo"),
            "reward_model_path": pipeline.stage_dir("reward_model"),
            "eval_dataset": pipeline.eval_dataset if given else pipeline.preference_dataset,
        }


# The stages of the pipeline by name, in the order in which they run.
STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    cls.stage: cls for cls in (SFTConfig, RewardModelConfig, PPOConfig, InferenceConfig)
}


def _tuned_base(pipeline: Any) -> dict[str, Any]:
    """Return the base of the stages after SFT: its result, or what the user gave."""
    if "sft" not in pipeline.stages():
        return {}
    return {"base_model": f"{pipeline.stage_dir('sft')}/merged", "revision": None}


class ScoreConfig(Schema):
    """Reward scores for the rows of a file."""

    reward_model_path: NonEmpty = option(
        ...,
        "Folder written by `rlhf reward-model`, or a Hugging Face sequence classifier with one "
        "label.",
    )
    dataset: Paths = option(
        ...,
        "Rows with a prompt and two candidates, or a prediction, response or output_text. "
        f"{_PATHS}.",
    )
    output: NonEmpty = option(
        ..., "JSON Lines file to write: the rows with their scores.", affects_result=False
    )
    instruction: str = option(
        "", "Text put before every input. Default: what the reward model was trained with."
    )
    batch_size: int = option(
        32, "Responses scored at once.", ge=1, le=MOST_ROWS, affects_result=False
    )
    device: Device = option(
        "auto", "auto (cuda, else cpu), cpu, cuda, cuda:N or mps.", affects_result=False
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Data type of weights and computation; auto: bfloat16 on hardware with native support.",
    )
    on_bad_rows: Literal["error", "skip"] = option(
        "error", "What to do with rows that cannot be read."
    )
