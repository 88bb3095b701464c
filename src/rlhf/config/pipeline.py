"""The configuration of `rlhf run`: common fields on top, a section per stage for what differs."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from rlhf.config.common import NonEmpty, StageConfig, TrainingConfig, option
from rlhf.config.loading import InnerFieldsError, merged, validation_problems
from rlhf.config.shared import ties
from rlhf.config.sources import GivenRows, Sources, UnweightedSources, entries
from rlhf.config.stages import STAGE_CONFIGS
from rlhf.config.vertex import VertexConfig

_ANYTHING = "given"  # stands for required fields while a section is looked at alone


class PipelineConfig(TrainingConfig):
    """All stages, one after the other, with a section for each of `STAGE_CONFIGS`."""

    needed_on_load: ClassVar[tuple[str, ...]] = ("base_model",)

    preference_dataset: Sources | None = option(
        None, "Preference rows for the reward model. Needed unless reward_model_path is given."
    )
    reward_model_path: NonEmpty | None = option(
        None,
        "Reward model to use instead of training one: a folder that `rlhf reward-model` wrote, or "
        "a Hugging Face sequence classifier or a LoRA adapter of one (folder or Hub id).",
    )
    prompt_dataset: Sources | None = option(
        None, "Rows with prompts for PPO. Default: the preference rows' prompts."
    )
    sft_dataset: Sources | None = option(
        None, "Demonstrations to fine-tune base_model on first. Default: no SFT stage."
    )
    eval_dataset: UnweightedSources | None = option(
        None,
        "Held-out rows: those with candidates evaluate the reward model, all go to inference. "
        "Default: the preference rows that the reward model holds out.",
    )
    ties: Literal["drop", "keep"] = ties()
    vertex: VertexConfig = Field(
        default_factory=VertexConfig,
        description="Where `rlhf vertex submit` runs the stages; ignored by `rlhf run`.",
    )

    @field_validator("*")
    @classmethod
    def _check_section(cls, value: Any, info: ValidationInfo) -> Any:
        stage = info.field_name or ""
        if stage in STAGE_CONFIGS and (problems := section_problems(stage, value)):
            raise InnerFieldsError("\n".join(problems))
        return value

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields, in each stage as the pipeline would run it."""
        problems = super().cross_problems() + self._missing_data()
        if problems:
            return problems
        for stage in self.stages():
            try:
                self.stage_config(stage)
            except ValidationError as error:
                problems += validation_problems(STAGE_CONFIGS[stage], error, f"{stage}.")
        return problems

    def _missing_data(self) -> list[str]:
        """Say which data sets are missing, and what stands against a reward model that is given."""
        if self.reward_model_path is None:
            if self.preference_dataset is None:
                return ["preference_dataset: is required, but not given (or reward_model_path)"]
            return []
        problems = [
            f"{name}: is required, but not given; without preference_dataset there is no other"
            for name, rows in (
                ("prompt_dataset", self.prompt_dataset),
                ("eval_dataset", self.eval_dataset),
            )
            if rows is None and self.preference_dataset is None
        ]
        if self.section("reward_model"):
            problems.append(
                "reward_model: no reward model is trained when reward_model_path is given; "
                "leave one of them out"
            )
        if self.reward_model_path.rstrip("/") == self.stage_dir("reward_model"):
            problems.append(
                "reward_model_path: is the folder of this pipeline's own reward model; leave it out"
            )
        return problems

    def stages(self) -> list[str]:
        """Return the names of the stages that run, in order."""
        return [stage for stage, cls in STAGE_CONFIGS.items() if cls.runs_in(self)]

    def section(self, stage: str) -> dict[str, Any]:
        """Return a stage's section: the fields that differ for it alone."""
        fields: dict[str, Any] = getattr(self, stage)
        return fields

    def stage_dir(self, stage: str) -> str:
        """Return the folder that a stage writes: OUT/sft, reward_model, policy or inference."""
        return f"{self.output_dir.rstrip('/')}/{STAGE_CONFIGS[stage].folder}"

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
        cls = STAGE_CONFIGS[stage]
        common = {
            name: value
            for name, value in self.model_dump(exclude_unset=True).items()
            if name in cls.model_fields
        }
        if common.get("tensorboard_dir"):  # runs that share a folder are drawn as one
            common["tensorboard_dir"] = f"{self.tensorboard_dir}/{cls.folder}"
        data = merged(merged(common, cls.handed_over(self)), fields)
        data = merged(data, self.section(stage))
        return cls.model_validate(data | {"output_dir": self.stage_dir(stage)})

    def resolved(self) -> dict[str, Any]:
        """Return plain data; defaults that depend on a stage are in the stage's own folder."""
        return self.model_dump(mode="json")


def add_section(cls: type[StageConfig], before: str | None = None) -> None:
    """Add a stage to the pipeline: a section of the configuration, and its turn to run.

    Args:
        cls: Its configuration.
        before: Name of the stage that runs next; None adds it as the last one.

    Raises:
        ValueError: The pipeline has a field of its name, or no stage `before`.
    """
    if cls.stage in PipelineConfig.model_fields:
        raise ValueError(f"the pipeline has a field {cls.stage!r} already")
    order = list(STAGE_CONFIGS)
    order.insert(len(order) if before is None else order.index(before), cls.stage)
    STAGE_CONFIGS[cls.stage] = cls
    for name in order:  # a dict keeps the order of insertion
        STAGE_CONFIGS[name] = STAGE_CONFIGS.pop(name)
    _declare_sections()


def remove_section(stage: str) -> None:
    """Take back what `add_section` did."""
    del STAGE_CONFIGS[stage], PipelineConfig.model_fields[stage]
    _declare_sections()


def _declare_sections() -> None:
    """Make the sections of `STAGE_CONFIGS` fields, in their order and before `vertex`."""
    fields = PipelineConfig.model_fields
    for stage, cls in STAGE_CONFIGS.items():
        section: Any = Field(
            default_factory=dict,
            description=f"Fields of {cls.__name__} that this stage overrides.",
            json_schema_extra={"affects_result": True},
        )
        fields.pop(stage, None)
        fields[stage] = FieldInfo.from_annotated_attribute(dict[str, Any], section)
    fields["vertex"] = fields.pop("vertex")
    PipelineConfig.model_rebuild(force=True)


_declare_sections()


def section_problems(stage: str, section: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with the fields of a section, each looked at alone.

    Args:
        stage: The section's name.
        section: Its fields, as in the YAML file.
    """
    cls = STAGE_CONFIGS[stage]
    problems = [
        f"{name}: is set by the pipeline and cannot be given here"
        for name in section
        if name in cls.set_by_pipeline
    ]
    required = {name: _ANYTHING for name, field in cls.model_fields.items() if field.is_required()}
    try:
        config = cls.model_validate(required | dict(section))
        problems += [
            f"{name}: rows given from Python belong at the top level, not in a section"
            for name in section
            if any(isinstance(one.path, GivenRows) for one in entries(getattr(config, name, None)))
        ]
    except ValidationError as error:
        of_fields = [detail for detail in error.errors() if detail["loc"]]
        if of_fields:
            problems += validation_problems(cls, error)
    return problems
