"""The fields of the other stages, and all stages by name."""

from typing import Any, ClassVar, Literal

from rlhf.config.columns import ColumnNames
from rlhf.config.common import (
    LARGEST_WEIGHT,
    MOST_ROWS,
    MOST_SAMPLES,
    MOST_TOKENS,
    Device,
    NonEmpty,
    Schema,
    StageConfig,
    TrainingConfig,
    chat_template_options,
    option,
)
from rlhf.config.dpo import DPOConfig
from rlhf.config.mappings import ChatTemplateOptions
from rlhf.config.ppo import PPOConfig
from rlhf.config.shared import (
    PATHS,
    compile_decode,
    reward_model_label,
    reward_model_of,
    ties,
    tuned_base,
)
from rlhf.config.sources import Sources, UnweightedSources, weightless


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on demonstrations."""

    stage: ClassVar[str] = "sft"
    folder: ClassVar[str] = "sft"
    base_rate: ClassVar[str | None] = "sft"

    dataset: Sources = option(..., f"Rows with a prompt and output_text. {PATHS}.")
    eval_dataset: UnweightedSources | None = option(
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

    preference_dataset: Sources = option(
        ..., f"Preference rows, of two candidates or of a ranking of several. {PATHS}."
    )
    eval_dataset: UnweightedSources | None = option(
        None,
        "Preference rows for evaluation. Default: 5 % of the training rows, "
        "at most 1000, held out by prompt.",
    )
    ties: Literal["drop", "keep"] = ties()
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
    normalization_dataset: UnweightedSources | None = option(
        None,
        "Demonstrations (rows with output_text) to use as reference responses. "
        f"Default: the candidates of the training rows. {PATHS}.",
    )

    @classmethod
    def runs_in(cls, pipeline: Any) -> bool:
        """Whether none is given."""
        return pipeline.reward_model_path is None

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the base that the SFT stage tunes, if it runs."""
        return tuned_base(pipeline)


class InferenceConfig(StageConfig):
    """Generation with the tuned and the untuned model, and its evaluation."""

    stage: ClassVar[str] = "inference"
    folder: ClassVar[str] = "inference"
    set_by_pipeline: ClassVar[frozenset[str]] = frozenset({"output_dir", "policy_path"})

    base_model: NonEmpty | None = option(
        None, "The untuned model. Default: the one recorded in the policy's adapter."
    )
    policy_path: NonEmpty = option(
        ...,
        "Folder written by `rlhf ppo`, `rlhf dpo` or `rlhf sft`, the adapter/ or merged/ inside "
        "it, or a checkpoint or peft adapter (folder or Hub id).",
    )
    eval_dataset: UnweightedSources = option(
        ..., f"Rows with prompts, with or without references. {PATHS}."
    )
    reward_model_path: NonEmpty | None = option(
        None, "Reward model that scores both models' responses. Default: no scores."
    )
    reward_model_label: int | str | None = reward_model_label()
    sampling_strategy: Literal["greedy", "temperature_sampling"] = option(
        "greedy", "How responses are generated."
    )
    temperature: float = option(
        1.0, "Divides the logits under temperature_sampling and for best_of.", ge=1e-3, le=1e3
    )
    min_response_length: int = option(
        0,
        "EOS cannot be generated before this many tokens.",
        ge=0,
        le=MOST_TOKENS,
    )
    best_of: int = option(
        1,
        "Also sample this many responses of the untuned model per row, at `temperature`, and "
        "compare the one that the reward model likes best; 1: off. At most batch_size responses "
        "are in memory at once. Needs reward_model_path.",
        ge=1,
        le=MOST_SAMPLES,
    )
    compile_decode: bool = compile_decode()
    extra_metrics: list[NonEmpty] = option(
        [], "Folders of local `evaluate` modules to compute as well."
    )

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields that are each valid, one line each."""
        problems = super().cross_problems()
        if self.best_of > 1 and self.reward_model_path is None:
            problems.append(
                "best_of: needs reward_model_path, the reward model that chooses among the samples"
            )
        return problems

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the folders of policy and reward model, and the held-out rows."""
        given = pipeline.eval_dataset is not None
        return {
            "base_model": None,
            "revision": None,
            "policy_path": pipeline.stage_dir("ppo"),
            "reward_model_path": reward_model_of(pipeline),
            "eval_dataset": (
                pipeline.eval_dataset if given else weightless(pipeline.preference_dataset)
            ),
        }


# The stages of the pipeline by name, in the order in which they run.
STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    cls.stage: cls for cls in (SFTConfig, RewardModelConfig, PPOConfig, DPOConfig, InferenceConfig)
}


class ScoreConfig(Schema):
    """Reward scores for the rows of a file."""

    reward_model_path: NonEmpty = option(
        ...,
        "Folder written by `rlhf reward-model`, or a Hugging Face sequence classifier or peft "
        "adapter of one.",
    )
    reward_model_label: int | str | None = reward_model_label()
    dataset: UnweightedSources = option(
        ...,
        f"Rows with a prompt and candidates, or a prediction, response or output_text. {PATHS}.",
    )
    output: NonEmpty = option(
        ..., "JSON Lines file to write: the rows with their scores.", affects_result=False
    )
    instruction: str = option(
        "", "Text put before every input. Default: what the reward model was trained with."
    )
    chat_template_options: ChatTemplateOptions = chat_template_options()
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
    columns: ColumnNames = option(
        {},
        'Columns of the data by our names for them: {"prompt": "question"}. Dots lead into '
        "objects. As a flag JSON.",
    )
    on_bad_rows: Literal["error", "skip"] = option(
        "error", "What to do with rows that cannot be read."
    )
