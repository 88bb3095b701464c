"""The pipeline's parameters: one table from their names to the fields of `PipelineConfig`.

The table defines the pipeline's signature; `conversion` uses it in both directions. Names and
defaults match Google's `rlhf_pipeline`.
"""

from dataclasses import dataclass
from typing import Any

from rlhf.config import PipelineConfig, VertexConfig
from rlhf.config.describe import leaf_fields
from rlhf.config.stages import STAGE_CONFIGS

REQUIRED = object()
# Decided when a run is submitted, before there is a pipeline.
_BEFORE_THE_PIPELINE = frozenset({"pipeline_root", "check_inputs"})
# Sections whose remaining fields are passed as JSON, by the parameter that carries them.
SECTIONS = {
    "reward_model_config": "reward_model",
    "ppo_config": "ppo",
    "inference_config": "inference",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the pipeline.

    Attributes:
        name: Its name.
        type: str, int, float, bool or dict.
        default: Its default; REQUIRED if it has none. Empty text, and 0 steps, mean "not given".
        field: Dotted field of `PipelineConfig` that it sets, or "".
        text: Its description; "" to use the field's own.
    """

    name: str
    type: type
    default: Any
    field: str
    text: str = ""


# Parameters of Google's `rlhf_pipeline`, with its defaults. Only deploy_model differs: there it was
# true and had no effect for T5 and LLaMA.
_GOOGLE = (
    Parameter("prompt_dataset", str, REQUIRED, "prompt_dataset", "Rows with prompts for PPO."),
    Parameter("preference_dataset", str, REQUIRED, "preference_dataset"),
    Parameter(
        "large_model_reference",
        str,
        REQUIRED,
        "base_model",
        "Base model: t5-small, t5-large, t5-xl, t5-xxl, llama-2-7b, llama-2-13b (also -chat), a "
        "Hub id, or a gs:// folder.",
    ),
    Parameter("model_display_name", str, "", "vertex.model_display_name"),
    Parameter("prompt_sequence_length", int, 512, "prompt_sequence_length"),
    Parameter("target_sequence_length", int, 64, "target_sequence_length"),
    Parameter(
        "reward_model_learning_rate_multiplier",
        float,
        1.0,
        "reward_model.learning_rate_multiplier",
    ),
    Parameter("reinforcement_learning_rate_multiplier", float, 1.0, "ppo.learning_rate_multiplier"),
    Parameter("reward_model_train_steps", int, 1000, "reward_model.train_steps"),
    Parameter("reinforcement_learning_train_steps", int, 1000, "ppo.train_steps"),
    Parameter("kl_coeff", float, 0.1, "ppo.kl_coeff"),
    Parameter("instruction", str, "", "instruction"),
    Parameter("deploy_model", bool, False, "vertex.deploy_model"),
    Parameter(
        "eval_dataset",
        str,
        "",
        "eval_dataset",
        "Held-out rows: those with candidates evaluate the reward model, all go to inference. "
        "Default: none, and the pipeline ends after PPO.",
    ),
    Parameter("project", str, "", "vertex.project"),
    Parameter("accelerator_type", str, "GPU", "vertex.accelerator_type"),
    Parameter("location", str, "", "vertex.location"),
    Parameter("encryption_spec_key_name", str, "", "vertex.encryption_spec_key_name"),
    Parameter("tensorboard_resource_id", str, "", "vertex.tensorboard_resource_id"),
)
_OURS = (
    Parameter("revision", str, "", "revision"),
    Parameter(
        "reward_model_reference",
        str,
        "",
        "reward_model.base_model",
        "Base of the reward model. Default: large_model_reference.",
    ),
    Parameter(
        "reward_model_revision",
        str,
        "",
        "reward_model.revision",
        "Branch, tag or commit of reward_model_reference on the Hub.",
    ),
    *(
        Parameter(
            name,
            dict,
            {},
            "",
            f"Any other field of `rlhf {command}`, such as {example}.",
        )
        for name, command, example in (
            ("reward_model_config", "reward-model", '{"lora": {"rank": 4}}'),
            ("ppo_config", "ppo", '{"temperature": 0.7}'),
            ("inference_config", "infer", '{"sampling_strategy": "greedy"}'),
        )
    ),
    Parameter(
        "output_directory",
        str,
        "",
        "",
        "gs:// folder of all runs; stages write into OUTPUT_DIRECTORY/RUN_NAME.",
    ),
    Parameter(
        "run_name",
        str,
        "",
        "",
        "Name of this run. The same name again continues it, or returns its results.",
    ),
)


def _of_the_schema() -> tuple[Parameter, ...]:
    """Return parameters for the remaining cloud fields, under their own names."""
    known = {parameter.field for parameter in _GOOGLE}
    return tuple(
        Parameter(
            name,
            type(field.get_default(call_default_factory=True)),
            field.get_default(call_default_factory=True),
            f"vertex.{name}",
        )
        for name, field in VertexConfig.model_fields.items()
        if f"vertex.{name}" not in known and name not in _BEFORE_THE_PIPELINE
    )


PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter for parameter in (*_GOOGLE, *_OURS, *_of_the_schema())
}
_DESCRIPTIONS = {name: field.description or "" for name, field in leaf_fields(PipelineConfig)}


def description(parameter: Parameter) -> str:
    """Describe a parameter, with the schema's text if it is a field."""
    own = parameter.text or _DESCRIPTIONS.get(parameter.field, "")
    if own:
        return own
    section, _, name = parameter.field.partition(".")
    return STAGE_CONFIGS[section].model_fields[name].description or ""
