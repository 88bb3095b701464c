"""The fields that stages have in common, and how a field is declared."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlhf.config.columns import ColumnNames
from rlhf.config.describe import nearest, type_name
from rlhf.config.loading import InnerFieldsError, unreadable_character
from rlhf.config.mappings import ChatTemplateOptions

# Learning rates at `learning_rate_multiplier` 1.0, by what is trained and whether it is LoRA
# (`lora.rank` > 0) or all weights. The only place where they are set.
BASE_LEARNING_RATES: dict[str, dict[Literal["lora", "full"], float]] = {
    "sft": {"lora": 3e-4, "full": 3e-5},
    "reward_model": {"lora": 3e-4, "full": 1e-5},
    "ppo": {"lora": 1e-4, "full": 3e-6},
    "dpo": {"lora": 1e-5, "full": 1e-6},
    "critic": {"lora": 1e-4, "full": 1e-5},
}
# No number of a configuration is larger: arithmetic with it stays exact in 64 bits.
LARGEST_INTEGER = 10**18
# Bounds that no sensible run comes near, so that a slip of the keyboard is not a run without end.
MOST_ROWS = MOST_TOKENS = 2**20
MOST_STEPS = 10**9
MOST_SAMPLES = 2**12
LARGEST_WEIGHT = 1e6
SMALLEST_RATE = 1e-30
# Names that accelerate knows.
TRACKERS = (
    "tensorboard",
    "wandb",
    "comet_ml",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
)


def _known_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {value!r}")
    return value


Device = Annotated[str, AfterValidator(_known_device)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


def option(default: Any, description: str, *, affects_result: bool = True, **bounds: Any) -> Any:
    """Declare a field; `...` as default makes it required."""
    extra: dict[str, Any] = {"affects_result": affects_result}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def chat_template_options() -> Any:
    """Declare the field of what the chat template gets besides the conversation."""
    return option(
        {},
        "Variables for the tokenizer's chat template, such as enable_thinking: false. As a flag "
        "JSON, or one by one: --chat_template_options.enable_thinking false.",
    )


class Schema(BaseModel):
    """Base of all configurations: no unknown fields, no NaN, checked on assignment too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=()
    )
    needed_on_load: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1, so YAML's `batch_size: true` would pass.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"expected {type_name(field)}, got {value}")
        if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
            raise ValueError(f"expected {type_name(field)}, got one of more than 18 digits")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (bad := unreadable_character(text)):
                raise ValueError(f"expected {type_name(field)}, got a text with {bad}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = self.cross_problems()
        if problems:
            raise InnerFieldsError("\n".join(problems))
        return self

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields that are each valid, one line each."""
        return []

    def resolved(self) -> dict[str, Any]:
        """Return plain data with the defaults that depend on other fields filled in."""
        return self.model_dump(mode="json")


class LoRAConfig(Schema):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = option(8, "Adapter rank; 0 trains all weights instead.", ge=0, le=4096)
    alpha: float | None = option(
        None,
        "Scale: updates are multiplied by alpha / rank. Default: 2 * rank.",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    dropout: float = option(
        0.0, "Dropout before the adapters; SFT and reward model only.", ge=0, lt=1
    )
    target_modules: list[NonEmpty] | None = option(
        None,
        "Names of the linear layers that get an adapter, such as q_proj. "
        "Default: all attention and feed-forward layers.",
        min_length=1,
    )
    where: Literal["all", "encoder", "decoder"] = option(
        "all", "Which stack gets adapters; encoder and decoder need an encoder-decoder."
    )
    use_rslora: bool = option(
        False, "Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)."
    )

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or its default."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def resolved(self) -> dict[str, Any]:
        """Return plain data with alpha filled in."""
        return super().resolved() | ({"alpha": self.effective_alpha} if self.rank else {})


class StageConfig(Schema):
    """What every stage takes, and its place in the pipeline.

    Attributes:
        stage: Its name, which is that of its section in the pipeline's configuration.
        folder: Its folder inside the pipeline's.
        set_by_pipeline: Fields that the pipeline sets, so that its section cannot.
    """

    stage: ClassVar[str] = ""
    folder: ClassVar[str] = ""
    set_by_pipeline: ClassVar[frozenset[str]] = frozenset({"output_dir"})

    base_model: NonEmpty | None = option(
        None,
        "Hub id or folder (local, /gcs/..., gs://...) of a model, or of a LoRA adapter, which is "
        "merged into its base.",
    )
    revision: str | None = option(None, "Branch, tag or commit of base_model on the Hub.")
    output_dir: NonEmpty = option(
        ..., "Folder for this stage's results; created if missing.", affects_result=False
    )
    seed: int = option(0, "Random seed.", ge=0, lt=2**31)
    device: Device = option(
        "auto", "auto (cuda, else cpu), cpu, cuda, cuda:N or mps.", affects_result=False
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Data type of the frozen weights and of computation; trained weights stay float32. "
        "auto: bfloat16 on hardware with native support (AVX-512 BF16, AMX, ARM BF16, GPUs).",
    )
    batch_size: int = option(
        64,
        "Rows per training step (demonstrations, preferences or episodes); in inference, rows per "
        "batch and responses of one model decoded at once.",
        ge=1,
        le=MOST_ROWS,
    )
    attn_implementation: Literal["auto", "eager", "sdpa"] = option(
        "auto",
        "Attention implementation in transformers; auto lets it choose.",
        affects_result=False,
    )
    prompt_sequence_length: int = option(512, "Longest prompt, tokens.", ge=1, le=MOST_TOKENS)
    target_sequence_length: int = option(64, "Longest response, tokens.", ge=1, le=MOST_TOKENS)
    truncation_side: Literal["left", "right"] = option(
        "left", "Which end of an overlong input is cut; instruction and chat template stay whole."
    )
    instruction: str = option("", "Text put before every input; docs/data.md says how.")
    chat_template_options: ChatTemplateOptions = chat_template_options()
    on_bad_rows: Literal["error", "skip"] = option(
        "error", "What to do with rows that cannot be read."
    )
    columns: ColumnNames = option(
        {},
        'Columns of the data by our names for them: {"prompt": "question"}. Dots lead into '
        "objects. As a flag JSON.",
    )
    resume: Literal["auto", "never"] = option(
        "auto",
        "auto: continue an unfinished run in output_dir and leave a finished one alone; "
        "never: refuse a folder that is not empty.",
        affects_result=False,
    )
    dry_run: bool = option(
        False,
        "Check data, configuration and limits, and print steps and memory; load no weights.",
        affects_result=False,
    )

    @classmethod
    def runs_in(cls, pipeline: Any) -> bool:  # noqa: ARG003 (for those that override it)
        """Whether a pipeline, given as its `PipelineConfig`, has this stage."""
        return True

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:  # noqa: ARG003 (as above)
        """Return the fields that a `PipelineConfig` gives this stage beside those on top."""
        return {}


class TrainingConfig(StageConfig):
    """What every stage that trains takes."""

    base_rate: ClassVar[str | None] = None
    default_train_steps: ClassVar[int | None] = None
    needed_on_load: ClassVar[tuple[str, ...]] = ("base_model",)

    micro_batch_size: int | None = option(
        None,
        "Rows per forward and backward pass; smaller saves memory without changing results. "
        "Default: batch_size, at most 16.",
        affects_result=False,
        ge=1,
        le=MOST_ROWS,
    )
    max_tokens_per_micro_batch: int = option(
        4096,
        "Tokens per forward and backward pass, padding included; rows of similar length are "
        "grouped. Smaller saves memory without changing results.",
        affects_result=False,
        ge=1,
        le=2**40,
    )
    train_steps: int | None = option(
        None,
        "Training steps of batch_size rows; data repeats, reshuffled. Or num_epochs.",
        ge=1,
        le=MOST_STEPS,
    )
    num_epochs: float | None = option(
        None,
        "Passes over the training rows; fractions allowed. "
        "Default if train_steps is not given: 1, except 200 steps for PPO.",
        gt=0,
        le=1e6,
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate. Default: the stage's base rate times learning_rate_multiplier.",
        ge=SMALLEST_RATE,
        le=1,
    )
    learning_rate_multiplier: float = option(
        1.0, "Multiplies the stage's base learning rate.", gt=0, le=LARGEST_WEIGHT
    )
    lr_scheduler: Literal["linear", "cosine", "constant"] = option(
        "linear", "Learning rate after the warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = option(
        0, "Training steps over which the learning rate rises from 0.", ge=0, le=MOST_STEPS
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.", ge=0, le=100)
    max_grad_norm: float = option(
        1.0, "Gradient norm to which each group of weights is clipped.", gt=0, le=1e12
    )
    lora: LoRAConfig = Field(default_factory=LoRAConfig, description="Low-rank adapters.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", affects_result=False
    )
    log_every: int = option(
        1, "Training steps between log lines.", ge=1, le=MOST_STEPS, affects_result=False
    )
    log_with: list[str] = option(
        ["tensorboard"],
        f"Trackers: {', '.join(TRACKERS)}; `none` for none.",
        affects_result=False,
    )
    tensorboard_dir: NonEmpty | None = option(
        None,
        "Second folder for the TensorBoard files, local or gs://. "
        "Default: output_dir/tensorboard only.",
        affects_result=False,
    )
    eval_every: int | None = option(
        None,
        "Training steps between evaluations. Default: a tenth of the run.",
        ge=1,
        le=MOST_STEPS,
    )
    save_every: int | None = option(
        None,
        "Training steps between checkpoints. Default: a tenth of the run.",
        ge=1,
        le=MOST_STEPS,
        affects_result=False,
    )
    save_total_limit: int = option(
        2,
        "Checkpoints to keep in addition to the best one.",
        ge=1,
        le=MOST_STEPS,
        affects_result=False,
    )

    @field_validator("log_with", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if names in (["none"], None):
            return []
        for name in names if isinstance(names, list) else []:
            if name not in TRACKERS:
                raise ValueError(f"unknown tracker {name!r}{nearest(str(name), TRACKERS)}")
        return names

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields that are each valid, one line each."""
        problems = super().cross_problems()
        if self.train_steps is not None and self.num_epochs is not None:
            problems.append("train_steps, num_epochs: give one of them, not both")
        if self.learning_rate is not None and self.learning_rate_multiplier != 1:
            problems.append(
                "learning_rate, learning_rate_multiplier: the multiplier is for the base rate; "
                "give one of them, not both"
            )
        problems += [
            f"learning_rate_multiplier: {self.learning_rate_multiplier:g} makes a learning rate of "
            f"{rate:.3g}; expected one above {SMALLEST_RATE:g} and up to 1"
            for rate in self._scaled_rates()
            if not SMALLEST_RATE <= rate <= 1
        ][:1]
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            problems.append(
                f"micro_batch_size: {self.micro_batch_size} is more than "
                f"batch_size {self.batch_size}"
            )
        if self.train_steps is not None and self.warmup_steps >= self.train_steps:
            problems.append(
                f"warmup_steps: {self.warmup_steps} leaves nothing of {self.train_steps} "
                "train_steps; expected fewer"
            )
        return problems

    @property
    def rows_per_step(self) -> int:
        """Rows of the data that a training step visits."""
        return self.batch_size

    @property
    def effective_micro_batch_size(self) -> int:
        """`micro_batch_size`, or its default; rows."""
        return self.micro_batch_size or min(self.batch_size, 16)

    @property
    def micro_batch_limits(self) -> tuple[int, int]:
        """Most rows and most tokens of a forward and backward pass."""
        return self.effective_micro_batch_size, self.max_tokens_per_micro_batch

    @property
    def effective_learning_rate(self) -> float:
        """Peak learning rate of the stage's adapter or weights."""
        return self._rate(self.learning_rate, self.base_rate)

    def _scaled_rates(self) -> list[float]:
        """Return the rates that the multiplier makes."""
        given = self.learning_rate is not None or self.base_rate is None
        return [] if given else [self.effective_learning_rate]

    def _rate(self, given: float | None, base: str | None) -> float:
        if given is not None:
            return given
        if base is None:
            raise ValueError(f"{type(self).__name__} has no base learning rate of its own")
        kind: Literal["lora", "full"] = "lora" if self.lora.rank else "full"
        return BASE_LEARNING_RATES[base][kind] * self.learning_rate_multiplier

    def total_steps(self, rows: int) -> int:
        """Return how many training steps the run has.

        Args:
            rows: Number of training rows after validation.
        """
        if self.train_steps is not None:
            return self.train_steps
        if self.num_epochs is None and self.default_train_steps is not None:
            return self.default_train_steps
        return max(1, -int(-(self.num_epochs or 1.0) * rows // self.rows_per_step))

    def eval_interval(self, total_steps: int) -> int:
        """Return the training steps between evaluations in a run of `total_steps`."""
        return self.eval_every or max(1, total_steps // 10)

    def save_interval(self, total_steps: int) -> int:
        """Return the training steps between checkpoints in a run of `total_steps`."""
        return self.save_every or max(1, total_steps // 10)

    def resolved(self) -> dict[str, Any]:
        """Return plain data in which learning rate and alpha are numbers, not defaults."""
        data = super().resolved() | {"lora": self.lora.resolved()}
        if self.base_rate is not None:
            data["learning_rate"] = self.effective_learning_rate
            data["learning_rate_multiplier"] = 1.0
        return data
