"""The configuration of `rlhf run`: common fields on top, a section per stage for what differs."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from rlhf.config.common import Paths, Schema, TrainingConfig, option
from rlhf.config.loading import InnerFieldsError, merged, validation_problems
from rlhf.config.stages import InferenceConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf.config.vertex import VertexConfig

STAGE_CLASSES: dict[str, type[Schema]] = {
    "sft": SFTConfig,
    "reward_model": RewardModelConfig,
    "ppo": PPOConfig,
    "inference": InferenceConfig,
}
# What the pipeline itself decides, so that its folders are where the next stage looks.
_FIXED: dict[str, frozenset[str]] = {
    "sft": frozenset({"output_dir"}),
    "reward_model": frozenset({"output_dir"}),
    "ppo": frozenset({"output_dir", "reward_model_path"}),
    "inference": frozenset({"output_dir", "policy_path"}),
}
_FOLDERS = {"sft": "sft", "reward_model": "reward_model", "ppo": "policy", "inference": "inference"}
_ANYTHING = "given"  # stands for required fields while a section is looked at alone


def _section(stage: str) -> Any:
    return Field(
        default_factory=dict,
        description=f"Fields of {STAGE_CLASSES[stage].__name__} that this stage overrides.",
        json_schema_extra={"affects_result": True},
    )


class PipelineConfig(TrainingConfig):
    """All stages, one after the other."""

    needed_on_load: ClassVar[tuple[str, ...]] = ("base_model",)

    preference_dataset: Paths = option(..., "Preference rows for the reward model, JSON Lines.")
    prompt_dataset: Paths | None = option(
        None, "Rows with prompts for PPO. Default: the preference rows' prompts."
    )
    sft_dataset: Paths | None = option(
        None, "Demonstrations to fine-tune base_model on first. Default: no SFT stage."
    )
    eval_dataset: Paths | None = option(
        None,
        "Held-out rows: those with candidates evaluate the reward model, all go to inference. "
        "Default: the preference rows that the reward model holds out.",
    )
    sft: dict[str, Any] = _section("sft")
    reward_model: dict[str, Any] = _section("reward_model")
    ppo: dict[str, Any] = _section("ppo")
    inference: dict[str, Any] = _section("inference")
    vertex: VertexConfig = Field(
        default_factory=VertexConfig,
        description="Where `rlhf vertex submit` runs the stages; ignored by `rlhf run`.",
    )

    @field_validator(*STAGE_CLASSES)
    @classmethod
    def _check_section(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        stage = info.field_name or ""
        problems = section_problems(stage, value)
        if problems:
            raise InnerFieldsError("\n".join(problems))
        return value

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields, in each stage as the pipeline would run it."""
        problems = super().cross_problems()
        if problems:
            return problems
        for stage in self.stages():
            try:
                self.stage_config(stage)
            except ValidationError as error:
                problems += validation_problems(STAGE_CLASSES[stage], error, f"{stage}.")
        return problems

    def stages(self) -> list[str]:
        """Return the names of the stages that run, in order."""
        with_sft = self.sft_dataset is not None or "dataset" in self.sft
        return [stage for stage in STAGE_CLASSES if stage != "sft" or with_sft]

    def stage_dir(self, stage: str) -> str:
        """Return the folder that a stage writes: OUT/sft, reward_model, policy or inference."""
        return f"{self.output_dir.rstrip('/')}/{_FOLDERS[stage]}"

    def stage_config(self, stage: str, **fields: Any) -> Any:
        """Build the full configuration of one stage.

        Args:
            stage: One of sft, reward_model, ppo, inference.
            **fields: Values of the pipeline that win over those on top, and lose to the section.

        Returns:
            An object of the stage's configuration class.

        Raises:
            pydantic.ValidationError: The fields do not fit together in this stage.
        """
        cls = STAGE_CLASSES[stage]
        common = {
            name: value
            for name, value in self.model_dump(exclude_unset=True).items()
            if name in cls.model_fields
        }
        if common.get("tensorboard_dir"):  # runs that share a folder are drawn as one
            common["tensorboard_dir"] = f"{self.tensorboard_dir}/{_FOLDERS[stage]}"
        data = merged(merged(common, self._handed_over(stage)), fields)
        data = merged(data, getattr(self, stage))
        return cls.model_validate(data | {"output_dir": self.stage_dir(stage)})

    def _handed_over(self, stage: str) -> dict[str, Any]:
        """Return what a stage gets from the stages before it and from the pipeline's data."""
        if stage == "sft":
            # Its rows need output_text, which the pipeline's evaluation rows may lack.
            data = {} if self.sft_dataset is None else {"dataset": self.sft_dataset}
            return {"eval_dataset": None} | data
        if stage == "inference":
            held_out = self.preference_dataset if self.eval_dataset is None else self.eval_dataset
            return {
                "base_model": None,
                "revision": None,
                "policy_path": self.stage_dir("ppo"),
                "reward_model_path": self.stage_dir("reward_model"),
                "eval_dataset": held_out,
            }
        tuned = {"base_model": f"{self.stage_dir('sft')}/merged", "revision": None}
        base = tuned if "sft" in self.stages() else {}
        if stage == "reward_model":
            return base
        given = self.prompt_dataset is not None
        return base | {
            "prompt_dataset": self.prompt_dataset if given else self.preference_dataset,
            "reward_model_path": self.stage_dir("reward_model"),
        }

    def resolved(self) -> dict[str, Any]:
        """Return plain data; defaults that depend on a stage stand in the stage's own folder."""
        return self.model_dump(mode="json")


def section_problems(stage: str, section: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with the fields of a section, each looked at alone.

    Args:
        stage: The section's name.
        section: Its fields, as in the YAML file.
    """
    cls = STAGE_CLASSES[stage]
    problems = [
        f"{name}: is set by the pipeline and cannot be given here"
        for name in section
        if name in _FIXED[stage]
    ]
    required = {name: _ANYTHING for name, field in cls.model_fields.items() if field.is_required()}
    try:
        cls.model_validate(required | dict(section))
    except ValidationError as error:
        of_fields = [detail for detail in error.errors() if detail["loc"]]
        if of_fields:
            problems += validation_problems(cls, error)
    return problems
