"""The one schema of every stage: Python arguments, YAML files, command-line flags and `--help`.

Every field says its unit, bounds and default. A field that cannot change a result (where things
are written, how often something is logged, how the work is cut to fit memory) is marked so, and
may differ when a run is continued; see `result_fields`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from rlhf.config.common import (
    BASE_LEARNING_RATES,
    LoRAConfig,
    Schema,
    StageConfig,
    TrainingConfig,
)
from rlhf.config.describe import leaf_fields
from rlhf.config.dpo import DPOConfig
from rlhf.config.loading import load, to_yaml
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.rewards import RewardEntry
from rlhf.config.sources import SourceEntry, Sources
from rlhf.config.stages import (
    InferenceConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from rlhf.config.vertex import VertexConfig
from rlhf.untrusted import without_secrets

__all__ = [
    "BASE_LEARNING_RATES",
    "DPOConfig",
    "InferenceConfig",
    "LoRAConfig",
    "PPOConfig",
    "PipelineConfig",
    "RewardEntry",
    "RewardModelConfig",
    "SFTConfig",
    "Schema",
    "ScoreConfig",
    "SourceEntry",
    "Sources",
    "StageConfig",
    "TrainingConfig",
    "VertexConfig",
    "config_to_yaml",
    "load_config",
    "result_fields",
]

ConfigT = TypeVar("ConfigT", bound=Schema)


def load_config(
    cls: type[ConfigT],
    path: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    required: tuple[str, ...] = (),
) -> ConfigT:
    """Read a configuration from a YAML file and lay overrides over it.

    Args:
        cls: A configuration class, such as `PPOConfig`.
        path: A YAML file, or None for the overrides alone.
        overrides: Dotted field name (`lora.rank`) to value.
        required: Optional fields that the caller cannot do without, such as `reward_model_path`;
            `a|b` for one of the two.

    Raises:
        InputError: All problems at once; unknown names come with the nearest valid one.
    """
    return load(cls, path, overrides or {}, required=(*cls.needed_on_load, *required))


def config_to_yaml(config: Schema) -> str:
    """Write a configuration as YAML, the defaults that depend on others as numbers.

    Addresses lose their passwords and tokens, because the file is copied and published.
    """
    return to_yaml(_without_secrets(config.resolved()))


def result_fields(config: Schema) -> dict[str, Any]:
    """Return dotted name to resolved value of the fields that can change a result.

    Two runs with the same seed, data and these fields give the same result up to rounding, so a
    run may be continued exactly when they are equal. A multiplier shows in its learning rate, a
    password or token of an address not at all.
    """
    data = _without_secrets(config.resolved())
    fields = {}
    for name, field in leaf_fields(type(config)):
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_result", True):
            value: Any = data
            for part in name.split("."):
                value = value[part]
            fields[name] = value
    return fields


def _without_secrets(value: Any, name: str = "") -> Any:
    """Return plain data in which no address holds a secret; what models read stays as it is."""
    if isinstance(value, str):
        return value if name == "instruction" else without_secrets(value)
    if isinstance(value, list):
        return [_without_secrets(item, name) for item in value]
    if isinstance(value, dict) and name != "chat_template_options":
        return {key: _without_secrets(item, key) for key, item in value.items()}
    return value
