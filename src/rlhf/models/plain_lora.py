"""Adapters saved by plain peft: an allow-list of those that rlhf reproduces exactly.

peft's LoRA has dozens of variants in one configuration. Anything but plain LoRA on linear layers
would give other predictions here than in peft, so it is refused by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.errors import InputError
from rlhf.models.compat import rank_of
from rlhf.models.content import check_written
from rlhf.models.targets import adapted_layers, linear_sizes, target_problems
from rlhf.untrusted import parse_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The heads of sequence classifiers, in the classes of transformers.
HEADS = ("score", "classifier", "classification_head")
# Fields that do not affect what a loaded adapter computes.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "fan_in_fan_out",  # peft itself corrects it by the type of each layer
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "task_type",
    }
)
_FIX = (
    "only plain LoRA on linear layers is reproduced exactly; merge the adapter into its base with "
    "peft (merge_and_unload, save_pretrained) and give that full model"
)

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
Names = str | list[str]


class _PlainLoRA(BaseModel):
    """The supported fields; every other field must be empty."""

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Alpha
    target_modules: Names
    exclude_modules: Names | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: Literal["none"] = "none"
    # The other initializations change the base's weights too.
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal"] = True
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def refused(self) -> dict[str, Any]:
        """Return the fields that ask for more than plain LoRA, in file order."""
        more = (self.model_extra or {}).items()
        return {name: value for name, value in more if value and name not in _WITHOUT_EFFECT}

    def patterns(self) -> list[str]:
        """Return all regular expressions in the configuration."""
        groups = (self.rank_pattern, self.alpha_pattern)
        names = (self.target_modules, self.exclude_modules, self.layers_pattern)
        written = [name for name in names[:2] if isinstance(name, str)]
        layers = names[2] or []
        written += [layers] if isinstance(layers, str) else layers
        return [*written, *(key for group in groups for key in group or {})]


def read_adapter_config(folder: Path, *, head: bool = False) -> LoraConfig:
    """Read the adapter_config.json of a plain LoRA adapter, without reading weights.

    Args:
        folder: A local folder.
        head: Whether the adapter may come with the head of a sequence classifier.

    Raises:
        InputError: It cannot be read, or asks for something that is not reproduced exactly.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object of peft's fields, got {values!r:.80}")
    saved = values.get("modules_to_save") or []
    if head and isinstance(saved, list) and all(name in HEADS for name in saved):
        values["modules_to_save"] = None
    else:
        saved = []
    try:
        plain = _PlainLoRA.model_validate(values)
    except ValidationError as error:
        raise InputError(_problems(error, path)) from error
    if refused := plain.refused():
        shown = ", ".join(f"{name}: {value!r:.60}" for name, value in refused.items())
        raise InputError(f"{path}: {shown}: {_FIX}")
    for pattern in plain.patterns():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{path}: {pattern!r:.80} is not a regular expression: {error}"
            ) from error
    return _as_peft(plain, saved, path)


def _as_peft(plain: _PlainLoRA, saved: list[str], path: Path) -> LoraConfig:
    """Return peft's configuration of a plain adapter, with the modules that it brings whole."""
    try:
        return LoraConfig(
            r=plain.r,
            lora_alpha=plain.lora_alpha,
            target_modules=plain.target_modules,
            exclude_modules=plain.exclude_modules,
            use_rslora=plain.use_rslora,
            rank_pattern=plain.rank_pattern or {},
            alpha_pattern=plain.alpha_pattern or {},
            layers_to_transform=plain.layers_to_transform,
            layers_pattern=plain.layers_pattern,
            lora_dropout=plain.lora_dropout,
            modules_to_save=saved or None,
            base_model_name_or_path=plain.base_model_name_or_path,
            revision=plain.revision,
        )
    except ValueError as error:  # fields that peft does not accept together
        raise InputError(f"{path}: {error}") from error


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors, with the names that peft uses in files.

    Raises:
        InputError: The file is missing, damaged or changed.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{folder} is incomplete: it has no {ADAPTER_WEIGHTS} (other formats are not loaded "
            "because they can run code)"
        )
    check_written(folder)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError, TypeError) as error:
        raise InputError(f"{folder}: the adapter cannot be read: {error}") from error


def lora_names(layer: str) -> tuple[str, str]:
    """Return the names of A and B of a layer's adapter in peft's files."""
    return f"{_PREFIX}{layer}.lora_A.weight", f"{_PREFIX}{layer}.lora_B.weight"


def head_names(module: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Map the parameters of a classifier's head to their names in peft's files."""
    return {
        name: f"{_PREFIX}{name}"
        for name, _ in module.named_parameters()
        if name.split(".")[0] in (config.modules_to_save or ())
    }


def check_fit(module: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Return why an adapter's tensors do not fit a base, before the base is touched.

    Args:
        module: The base.
        config: The adapter's configuration.
        state: The adapter's tensors, with the names that peft uses in files.
    """
    problems = target_problems(module, config)
    if problems:
        return [f"target_modules: {problem}; {_FIX}" for problem in problems]
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in adapted_layers(module, config).items():
        rank, (inputs, outputs) = rank_of(config, name), linear_sizes(layer)
        a, b = lora_names(name)
        expected[a] = (rank, inputs)
        expected[b] = (outputs, rank)
    for name, saved in head_names(module, config).items():
        expected[saved] = tuple(module.get_parameter(name).shape)
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [n for n, shape in expected.items() if n in state and tuple(state[n].shape) != shape]
    if missing or unknown or shapes:
        some = [*unknown, *missing, *shapes][0]
        return [
            f"{len(missing)} tensors are missing, {len(unknown)} are too many and {len(shapes)} "
            f"have the wrong shape, such as {some}; {_FIX}"
        ]
    broken = [n for n, t in state.items() if not t.is_floating_point() or not t.isfinite().all()]
    return [f"{broken[0]} holds NaN or infinite numbers"] if broken else []


def _problems(error: ValidationError, path: Path) -> list[str]:
    """Return one line per invalid field, however many types the field accepts."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else "file"
        got = "" if problem["type"] == "missing" else f", got {problem['input']!r:.60}"
        fix = f"; {_FIX}" if problem["type"] == "literal_error" else ""
        lines.setdefault(name, f"{path}: {name}: {problem['msg']}{got}{fix}")
    return list(lines.values())
