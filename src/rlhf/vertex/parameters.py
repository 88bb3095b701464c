"""The pipeline's parameters: one table from their names to the fields of `PipelineConfig`.

The table makes the pipeline's signature, turns a parameter dict (Google's `rlhf_pipeline` has the
same names and defaults) into a configuration, and a configuration into a parameter dict.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlhf.config import PipelineConfig, VertexConfig
from rlhf.config.describe import leaf_fields, nearest
from rlhf.config.loading import nested, validation_problems
from rlhf.config.pipeline import STAGE_CLASSES
from rlhf.errors import InputError
from rlhf.vertex.base_models import AMBIGUOUS, HUB_NAMES, hub_name

REQUIRED = object()
# It becomes part of folder and job names.
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Sections whose remaining fields travel as JSON, by the parameter that carries them.
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
        default: Its default; REQUIRED without one. Empty text, and 0 steps, mean "not given".
        field: Dotted field of `PipelineConfig` that it sets; "" for what is not one field.
        text: What it is for; "" for the field's own description.
    """

    name: str
    type: type
    default: Any
    field: str
    text: str = ""


# Google's `rlhf_pipeline` has these, with these defaults. deploy_model alone differs: there it was
# true and did nothing for T5 and LLaMA.
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
    """The cloud's other fields are parameters under their own names."""
    known = {parameter.field for parameter in _GOOGLE}
    return tuple(
        Parameter(
            name,
            type(field.get_default(call_default_factory=True)),
            field.get_default(call_default_factory=True),
            f"vertex.{name}",
        )
        for name, field in VertexConfig.model_fields.items()
        if f"vertex.{name}" not in known and name != "pipeline_root"
    )


PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter for parameter in (*_GOOGLE, *_OURS, *_of_the_schema())
}
# Each stage's base and steps, by the section that they belong to.
_NAMED_IN_SECTION = {
    section: {
        parameter.field.removeprefix(f"{section}."): parameter.name
        for parameter in PARAMETERS.values()
        if parameter.field.startswith(f"{section}.")
    }
    for section in SECTIONS.values()
}
_NAMED_ON_TOP = {
    parameter.field: parameter.name
    for parameter in PARAMETERS.values()
    if parameter.field and "." not in parameter.field
}
# A stage may do without the evaluation rows, or have others.
_OWN_IN_SECTIONS = frozenset({"eval_dataset"})
# What stages get from the pipeline itself.
_HANDED_OVER = frozenset(
    {"output_dir", "policy_path", "reward_model_path", "eval_dataset", "dry_run"}
)
_DESCRIPTIONS = {name: field.description or "" for name, field in leaf_fields(PipelineConfig)}


def description(parameter: Parameter) -> str:
    """Say what a parameter is for, in the schema's words where it is a field."""
    own = parameter.text or _DESCRIPTIONS.get(parameter.field, "")
    if own:
        return own
    section, _, name = parameter.field.partition(".")
    return STAGE_CLASSES[section].model_fields[name].description or ""


def to_config(parameters: Mapping[str, Any]) -> PipelineConfig:
    """Build the configuration that a parameter dict means.

    Args:
        parameters: Parameter name to value; those left out have their defaults. `null` counts as
            left out, and whole numbers may come as 64.0, as REST writes them.

    Raises:
        InputError: All unknown, mistyped, missing or clashing parameters, by the parameter's name.
    """
    problems = [
        f"{name}: unknown parameter{nearest(name, PARAMETERS)}"
        for name in parameters
        if name not in PARAMETERS
    ]
    values: dict[str, Any] = {}
    wrong: set[str] = set()  # named already; what follows from them is not said too
    for name, parameter in PARAMETERS.items():
        given = parameters.get(name)
        try:
            value = _typed(parameter, parameter.default if given is None else given)
            values[name] = _meant(name, value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            wrong.add(name)
            values[name] = {} if parameter.type is dict else ""
    fields: dict[str, Any] = {}
    for name, parameter in PARAMETERS.items():
        value = values[name]
        steps = parameter.field.endswith(".train_steps")
        if parameter.field and value != "" and not (steps and value == 0):
            fields[parameter.field] = value
    data = nested(fields)
    if values["reward_model_reference"]:
        # Without this the policy's revision would be asked of the reward model's base.
        data["reward_model"].setdefault("revision", None)
    elif values["reward_model_revision"] and "reward_model_reference" not in wrong:
        problems.append("reward_model_revision: is for a reward_model_reference, give one")
    for name, section in SECTIONS.items():
        clashes = _section_clashes(name, section, values)
        problems += clashes.values()
        rest = {field: value for field, value in values[name].items() if field not in clashes}
        data[section] = {**rest, **data.get(section, {})}
    data["output_dir"] = f"{values['output_directory'].rstrip('/')}/{values['run_name']}"
    try:
        config = PipelineConfig.model_validate(data)
    except ValidationError as error:
        found = map(_in_parameters, validation_problems(PipelineConfig, error))
        problems += [problem for problem in found if problem.split(":")[0] not in wrong]
    if problems:
        raise InputError(problems)
    return config


def to_parameters(config: PipelineConfig) -> dict[str, Any]:
    """Write a configuration as a parameter dict, so that `to_config` gives the same stages.

    Raises:
        InputError: What the pipeline cannot do: an SFT stage, or stages that differ in what is one
            parameter.
    """
    problems = _not_in_the_pipeline(config)
    folder, _, run_name = config.output_dir.rstrip("/").rpartition("/")
    values: dict[str, Any] = {"output_directory": folder, "run_name": run_name}
    top = config.model_dump(mode="json", exclude_unset=True)
    for field, name in _NAMED_ON_TOP.items():
        if top.get(field) is not None:
            given = top[field]
            values[name] = json.dumps(given) if isinstance(given, list) else given
    if config.prompt_dataset is None:
        values["prompt_dataset"] = values["preference_dataset"]
    values |= {
        name: value
        for name, value in top.get("vertex", {}).items()
        if name in PARAMETERS and value != ""
    }
    for name, section in SECTIONS.items():
        stage = config.stage_config(section).model_dump(mode="json", exclude_unset=True)
        own = getattr(config, section)
        named = _NAMED_IN_SECTION[section]
        # A stage that goes by epochs, or by its default, must not get the pipeline's step count.
        values |= {
            parameter: 0 for field, parameter in named.items() if field.endswith("train_steps")
        }
        rest = {}
        for field, value in stage.items():
            if field in named and field not in _NAMED_ON_TOP:
                if value is not None:
                    values[named[field]] = value
            elif field in _NAMED_ON_TOP and field not in _OWN_IN_SECTIONS:
                if field in own and field not in named and value != getattr(config, field):
                    problems.append(
                        f"{section}.{field}: the pipeline has one {_NAMED_ON_TOP[field]} for all "
                        "stages; give it on top"
                    )
            elif field in own or field not in _HANDED_OVER:
                rest[field] = value
        values[name] = rest
    if {"base_model", "revision"} & set(config.reward_model):
        judge = config.stage_config("reward_model")
        values["reward_model_reference"] = judge.base_model or config.base_model
        if judge.revision:
            values["reward_model_revision"] = judge.revision
    if problems:
        raise InputError(problems)
    return values


def _not_in_the_pipeline(config: PipelineConfig) -> list[str]:
    """What `rlhf run` does and the Vertex pipeline does not, or not in the same way."""
    problems = []
    if "sft" in config.stages():
        problems.append(
            "sft_dataset: the Vertex pipeline has no SFT stage; run `rlhf sft` first and give its "
            "merged/ folder as base_model"
        )
    if config.eval_dataset is None and "eval_dataset" in config.inference:
        problems.append(
            "inference.eval_dataset: the Vertex pipeline ends after PPO without an eval_dataset "
            "on top; give it there"
        )
    bases = {"base_model": config.base_model}
    bases["reward_model.base_model"] = config.reward_model.get("base_model")
    for name, base in bases.items():
        if base in AMBIGUOUS:
            problems.append(
                f"{name}: {base} is another model on the Hub than in Google's pipeline; give "
                f"{HUB_NAMES[base]}, or google-t5/{base} for the Hub's"
            )
        elif base is not None:
            try:
                hub_name(base)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    return problems


def _typed(parameter: Parameter, value: Any) -> Any:
    """A value of the parameter's type; ValueError says what was expected instead."""
    if value is REQUIRED:
        raise ValueError("is required, but not given")
    if parameter.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if parameter.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    fits = isinstance(value, parameter.type)
    if not fits or (isinstance(value, bool) and parameter.type is not bool):
        words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
        expected = words.get(parameter.type, "a JSON object")
        raise ValueError(f"expected {expected}, got {value!r:.200}")
    if value == "" and parameter.default is REQUIRED:
        raise ValueError("is required, but empty")
    return value


def _meant(name: str, value: Any) -> Any:
    """What a value of the right type stands for; ValueError where it cannot be used."""
    if name in ("large_model_reference", "reward_model_reference") and value:
        return hub_name(value)
    if name in ("prompt_dataset", "preference_dataset", "eval_dataset") and value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(
                f'expected an address, or a JSON list ["gs://…", "gs://…"], got {value!r:.200}'
            ) from None
    if name == "output_directory":
        if not value:
            raise ValueError("is required, but not given")
        if "://" not in value and not value.startswith("/"):
            raise ValueError(f"expected gs://BUCKET/FOLDER, got {value!r:.200}")
    if name == "run_name" and not value:
        raise ValueError("is required, but not given")
    if name == "run_name" and not RUN_NAME.fullmatch(value):
        raise ValueError(f"expected letters, digits, ., - and _, at most 100, got {value!r:.200}")
    return value


def _section_clashes(name: str, section: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Problem by field, of fields in a section's JSON that have a place of their own."""
    named = {**_NAMED_ON_TOP, **_NAMED_IN_SECTION[section]}
    for field in _OWN_IN_SECTIONS:
        named.pop(field, None)
    given = values[name]
    problems = {
        field: f"{name}: {field}: is the parameter {named[field]}; give it there"
        for field in given
        if field in named
    }
    if given.get("dry_run"):
        problems["dry_run"] = f"{name}: dry_run: a job of the pipeline has to run; leave it out"
    steps = _NAMED_IN_SECTION[section].get("train_steps")
    if steps and values[steps] and given.get("num_epochs") is not None:
        problems["num_epochs"] = (
            f"{name}: num_epochs: with it {steps} has to be 0, got {values[steps]}"
        )
    rate = _NAMED_IN_SECTION[section].get("learning_rate_multiplier")
    if rate and values[rate] not in ("", 1.0) and given.get("learning_rate") is not None:
        problems["learning_rate"] = (
            f"{name}: learning_rate: with it {rate} has to be 1, got {values[rate]}"
        )
    if section == "inference" and "eval_dataset" in given and not values["eval_dataset"]:
        problems["eval_dataset"] = (
            f"{name}: eval_dataset: there is no inference without the parameter eval_dataset; "
            "give it there"
        )
    return problems


def _in_parameters(problem: str) -> str:
    """Name the parameter where a problem of the configuration names a field."""
    field, colon, rest = problem.partition(":")
    for parameter in PARAMETERS.values():
        if parameter.field and (
            parameter.field == field or field.startswith(f"{parameter.field}.")
        ):
            return f"{parameter.name}{field.removeprefix(parameter.field)}{colon}{rest}"
    for name, section in SECTIONS.items():
        if field.startswith(f"{section}."):
            return f"{name}: {field.removeprefix(f'{section}.')}{colon}{rest}"
    return problem
