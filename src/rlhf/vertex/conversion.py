"""Conversion between parameter dicts and configurations, in both directions."""

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rlhf.config import PipelineConfig, cloud_names
from rlhf.config.describe import nearest
from rlhf.config.loading import nested, validation_problems
from rlhf.errors import InputError
from rlhf.vertex.addresses import RUN_NAME, not_in_the_cloud
from rlhf.vertex.base_models import AMBIGUOUS, HUB_NAMES, hub_name
from rlhf.vertex.machines import problems_of_run
from rlhf.vertex.parameters import PARAMETERS, REQUIRED, SECTIONS, Parameter

# Numbers travel as doubles.
LARGEST = 2**53
# Each stage's base and steps, by configuration section.
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
# Fields that a stage may lack or set differently from the rest of the pipeline.
_OWN_IN_SECTIONS = frozenset({"eval_dataset"})
# Fields that the pipeline itself passes to its stages.
_HANDED_OVER = frozenset(
    {"output_dir", "policy_path", "reward_model_path", "eval_dataset", "dry_run"}
)


def to_config(parameters: Mapping[str, Any]) -> PipelineConfig:
    """Build the configuration that a parameter dict describes.

    Args:
        parameters: Parameter name to value; missing ones get their defaults. `null` counts as
            missing, and whole numbers may be written as 64.0, as REST does.

    Raises:
        InputError: If parameters are unknown, mistyped, missing or clash; lists all by name.
    """
    problems = [
        f"{name}: unknown parameter{nearest(name, PARAMETERS)}"
        for name in parameters
        if name not in PARAMETERS
    ]
    values: dict[str, Any] = {}
    wrong: set[str] = set()  # already reported; their consequences are not
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
        # Otherwise the policy's revision would be requested from the reward model's base.
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
    """Write a configuration as a parameter dict from which `to_config` gives the same stages.

    Raises:
        InputError: If the pipeline cannot do it: an SFT stage, or stages that differ in a setting
            that is a single parameter.
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
        # A stage that counts epochs, or uses its default, must not get the pipeline's step count.
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
                        "stages; give it at the top level"
                    )
            elif field in own or field not in _HANDED_OVER:
                rest[field] = value
        values[name] = rest
    if {"base_model", "revision"} & set(config.section("reward_model")):
        scorer = config.stage_config("reward_model")
        values["reward_model_reference"] = scorer.base_model or config.base_model
        if scorer.revision:
            values["reward_model_revision"] = scorer.revision
    if problems:
        raise InputError(problems)
    return values


def problems_in_the_cloud(config: PipelineConfig, cuda: int | None = None) -> list[str]:
    """List, by parameter name, what an otherwise valid run cannot do on Vertex AI.

    Args:
        config: The run.
        cuda: torch's CUDA build in the image, 126 for 12.6, 0 for none; None: derive it from the
            image's tag.
    """
    found = [*not_in_the_cloud(config), *problems_of_run(config, cuda)]
    return list(map(_in_parameters, found))


def _not_in_the_pipeline(config: PipelineConfig) -> list[str]:
    """List what `rlhf run` does and the Vertex pipeline does not, or does differently."""
    problems = []
    if "sft" in config.stages():
        problems.append(
            "sft_dataset: the Vertex pipeline has no SFT stage; run `rlhf sft` first and give its "
            "merged/ folder as base_model"
        )
    if config.reward_model_path is not None:
        problems.append(
            "reward_model_path: the Vertex pipeline always trains a reward model; leave it out and "
            "give preference_dataset"
        )
    if "dpo" in config.stages():
        problems.append(
            "dpo: the Vertex pipeline has no DPO stage; run `rlhf dpo` on its own and leave the "
            "section out"
        )
    if config.eval_dataset is None and "eval_dataset" in config.section("inference"):
        problems.append(
            "inference.eval_dataset: the Vertex pipeline ends after PPO without an eval_dataset "
            "on top; give it there"
        )
    bases = {"base_model": config.base_model}
    bases["reward_model.base_model"] = config.section("reward_model").get("base_model")
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
    """Convert a value to the parameter's type; ValueError says what was expected."""
    if value is REQUIRED:
        raise ValueError("is required, but not given")
    if isinstance(value, int | float) and LARGEST < abs(value) != math.inf:
        raise ValueError(f"expected at most {LARGEST}, which is what a parameter can hold exactly")
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
    """Interpret a value of the right type; ValueError if it cannot be used."""
    if name in ("large_model_reference", "reward_model_reference") and value:
        return hub_name(value)
    if name in ("prompt_dataset", "preference_dataset", "eval_dataset") and value.startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f'expected an address, or a JSON list ["gs://…", "gs://…"], got {value!r:.200}'
            ) from None
    if name == "output_directory":
        if not value:
            raise ValueError("is required, but not given")
        if not value.startswith(("gs://", "/gcs/")):
            raise ValueError(f"expected gs://BUCKET/FOLDER, got {value!r:.200}")
        if wrong := cloud_names.address(value, written=True):
            raise ValueError(wrong)
    if name == "run_name" and not value:
        raise ValueError("is required, but not given")
    if name == "run_name" and not RUN_NAME.fullmatch(value):
        raise ValueError(f"expected letters, digits, ., - and _, at most 100, got {value!r:.200}")
    return value


def _section_clashes(name: str, section: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Return the problem of each field in a section's JSON that has its own parameter."""
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
    """Replace the field in a configuration problem with the parameter it belongs to."""
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
