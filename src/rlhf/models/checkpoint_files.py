"""Check the files of a checkpoint before anything loads them.

This runs before transformers, which opens whatever the index or config.json names and builds a
model of whatever size config.json gives.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rlhf.errors import InputError
from rlhf.models.compat import attention_kind
from rlhf.models.family import Family
from rlhf.untrusted import inner_names, parse_json

INDEX = "model.safetensors.index.json"
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json", INDEX)
# safetensors' own limit.
_LONGEST_HEADER = 100_000_000
# (smallest, largest) value of each size in config.json; the largest is far beyond any real model.
_SIZES: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**18),
    "num_hidden_layers": (1, 2000),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "num_layers": (1, 2000),
    "num_heads": (1, 4096),
    "d_model": (1, 2**18),
    "head_dim": (1, 2**16),
    "intermediate_size": (1, 2**20),
    "max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
    "num_decoder_layers": (1, 2000),
    "d_kv": (1, 2**16),
    "d_ff": (1, 2**20),
    "local_radius": (1, 2**20),
    "global_block_size": (1, 2**20),
    "relative_attention_num_buckets": (4, 2**16),
    "relative_attention_max_distance": (2, 2**31),
}
# May be null.
_SELDOM = frozenset(
    {
        "head_dim",
        "intermediate_size",
        "num_decoder_layers",
        "num_key_value_heads",
        "sliding_window",
    }
)
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def check_checkpoint(folder: Path, where: str) -> None:
    """Refuse a checkpoint that would load anything other than its own safetensors files.

    Args:
        folder: A local folder.
        where: The setting that names it, for messages.

    Raises:
        InputError: A JSON file is invalid, or the index names other files.
    """
    for description in _DESCRIPTIONS:
        if (folder / description).is_file():
            values = _json_object(folder / description, where)
            if description == "config.json" and (problems := _wrong_sizes(values, where)):
                raise InputError(problems)
    if (folder / INDEX).is_file():
        _shards(folder / INDEX, where)


def count_stored(folder: Path, where: str) -> int | None:
    """Count the numbers in a local folder's weights from the file headers; None without weights.

    Raises:
        InputError: A file is missing, damaged or truncated.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():
        return _count([whole], where)
    if not (folder / INDEX).is_file():
        return None
    return _count([folder / shard for shard in _shards(folder / INDEX, where)], where)


def _count(files: Iterable[Path], where: str) -> int:
    return sum(
        math.prod(tensor["shape"])
        for file in files
        for name, tensor in _header(file, where).items()
        if name != "__metadata__"
    )


def _shards(index: Path, where: str) -> list[str]:
    """Return the file names in an index, each of them a safetensors file beside it."""
    files = _json_object(index, where).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{where}: {INDEX}: weight_map: expected tensor names with their files")
    names = inner_names(sorted(set(files.values())), f"{where}: {INDEX}")
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise InputError(
                f"{where}: {INDEX} names {name!r}; only .safetensors files beside it are loaded, "
                "other formats can run code: save the model again with save_pretrained"
            )
    return names


def _json_object(path: Path, where: str) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {path.name} cannot be read: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {path.name}: expected one JSON object")
    return value


def _header(path: Path, where: str) -> dict[str, Any]:
    """Read the tensor descriptions in a safetensors file's header."""
    broken = f"{where}: {path.name} is damaged or cut short"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise InputError(f"{broken}: its header has an invalid length; download it again")
            header: dict[str, Any] = parse_json(file.read(length))
        ends = [0]
        for name, tensor in header.items():
            if name != "__metadata__":
                ends.append(int(tensor["data_offsets"][1]))
                if any(type(number) is not int or number < 0 for number in tensor["shape"]):
                    raise ValueError(f"tensor {name!r:.80} has no shape")
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{broken}: {error!s:.200}; download it again") from error
    if max(ends) != size - 8 - length:
        raise InputError(
            f"{broken}: it has {size} bytes, but its header says {max(ends) + 8 + length}; "
            "download it again"
        )
    return header


def check_config(config: PretrainedConfig, family: type[Family], where: str) -> None:
    """Refuse a config.json from which the family cannot build a model.

    Raises:
        InputError: Lists every problem.
    """
    given = {name: getattr(config, name) for name in _SIZES if hasattr(config, name)}
    problems = _wrong_sizes(given, where)
    where = f"{where}: config.json"
    for name in _EPSILONS:
        value = getattr(config, name, 1e-6)
        if type(value) not in (int, float) or not 0 <= value < 1:
            problems.append(f"{where}: {name}: expected a number from 0 to 1, got {value!r:.80}")
    if not problems:
        problems += [f"{where}: {problem}" for problem in family.config_problems(config)]
    for name in ("quantization_config", "transformers_weights", "auto_map"):
        if getattr(config, name, None):
            problems.append(f"{where}: {name} is not supported; save a plain model")
    if (kind := attention_kind(config)) not in (None, "eager", "sdpa"):
        problems.append(f"{where}: attn_implementation: expected eager or sdpa, got {kind!r:.80}")
    if problems:
        raise InputError(problems)


def _wrong_sizes(values: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{where}: config.json: {name}: expected {low} to {high}, got {values[name]!r:.80}"
        for name, (low, high) in _SIZES.items()
        if name in values
        and not (values[name] is None and name in _SELDOM)
        and not (type(values[name]) is int and low <= values[name] <= high)
    ]
