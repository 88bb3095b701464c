"""What `base_model` names: a whole model, or an adapter that is merged into its base on loading.

An adapter is any folder or Hub repository with an adapter_config.json: of peft, TRL or a stage of
rlhf. Its base may be an adapter again. Whatever is trained on it names the adapter as its base, by
address, commit and content; loading that merges again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Conv1D

from rlhf.errors import InputError
from rlhf.files.hub import hub_commit, is_hub_id
from rlhf.files.local_copy import local_folder, recorded_base
from rlhf.files.storage import is_remote
from rlhf.models.compat import scale_of
from rlhf.models.content import read_origin
from rlhf.models.lora import MERGED_AT_ONCE
from rlhf.models.plain_lora import (
    ADAPTER_CONFIG,
    check_fit,
    lora_names,
    read_adapter_config,
    read_adapter_weights,
)
from rlhf.models.targets import adapted_layers
from rlhf.models.weights import loaded_fingerprint

_DEEPEST = 8  # adapters on adapters


@dataclass(frozen=True)
class Base:
    """A base model as local folders.

    Attributes:
        name: What names it: a folder or a Hub id.
        revision: The commit, for a Hub id; otherwise as given.
        folder: The whole model.
        adapters: Adapters to merge into it, in this order; none for a whole model.
        tokenizer: Where its tokenizer is: the last adapter's own, if it has one.
    """

    name: str
    revision: str | None
    folder: Path
    adapters: tuple[Path, ...]
    tokenizer: Path


def find_base(
    name: str, revision: str | None = None, *, weights: bool = False, where: str = "base_model"
) -> Base:
    """Find what a name stands for; everything remote is copied once.

    Args:
        name: Folder (local or remote) or Hub id, of a whole model or an adapter.
        revision: Branch, tag or commit, for a Hub id.
        weights: Whether the whole model's weights are needed too.
        where: The setting that names it, for messages.

    Raises:
        InputError: There is nothing, or no model, or an adapter that cannot be merged exactly.
    """
    return _find(name, revision, weights, where, _DEEPEST)


def _find(name: str, revision: str | None, weights: bool, where: str, deepest: int) -> Base:
    try:
        if is_hub_id(name):
            revision = hub_commit(name, revision)
        folder = local_folder(name, weights=weights, revision=revision)
        if is_remote(name) and (folder / ADAPTER_CONFIG).is_file():
            folder = local_folder(name)
        _check_folder(name, folder)
    except InputError as error:
        named = deepest < _DEEPEST
        hint = f"; if it has moved, say where to: RLHF_BASES='{name}=NEW'" if named else ""
        raise InputError([f"{where}: {problem}{hint}" for problem in error.problems]) from error
    if not (folder / ADAPTER_CONFIG).is_file():
        return Base(name, revision, folder, (), folder)
    where = f"{where}: {name}"
    try:
        inner, inner_revision = _named_base(folder, where)
    except InputError as error:
        raise InputError([_after(where, problem) for problem in error.problems]) from error
    if not deepest:
        raise InputError(f"{where}: more than {_DEEPEST} adapters on each other, or one on itself")
    base = _find(inner, inner_revision, weights, f"{where}: its base", deepest - 1)
    own = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = folder if own else base.tokenizer
    return Base(name, revision, base.folder, (*base.adapters, folder), tokenizer)


def _named_base(folder: Path, where: str) -> tuple[str, str | None]:
    """Return the base that an adapter names, and its Hub revision.

    Raises:
        InputError: It names none, or one that may not be loaded from there.
    """
    path = folder / ADAPTER_CONFIG
    config, origin = read_adapter_config(folder, head=True), read_origin(folder)
    name, revision = config.base_model_name_or_path, config.revision
    if origin is not None:
        name, revision = origin["base_model"], origin["revision"]
    if not name:
        raise InputError(f"{path}: names no base; set base_model_name_or_path there")
    return recorded_base(name, f"{where}: {path.name}", revision)


def _check_folder(name: str, folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{name} is a file; give the folder that has config.json")
    if not folder.is_dir():
        raise InputError(f"there is no folder {name}")
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        parts = [part for part in ("merged", "adapter") if (folder / part).is_dir()]
        hint = f"; give its {' or '.join(f'{part}/' for part in parts)}" if parts else ""
        raise InputError(
            f"{name} is not a checkpoint: it has no config.json (and no {ADAPTER_CONFIG}){hint}"
        )


def _after(where: str, problem: str) -> str:
    return problem if problem.startswith(where) else f"{where}: {problem}"


def check_adapters(base: Base, module: nn.Module, where: str = "base_model") -> None:
    """Check that a base's adapters fit its model, before any large weights are loaded.

    Args:
        base: The base.
        module: Its whole model; needs no storage.
        where: The setting that names it, for messages.

    Raises:
        InputError: One does not, or asks for more than plain LoRA.
    """
    for folder in base.adapters:
        _read(module, folder, f"{where}: {base.name}")


@torch.no_grad()
def merge_adapters(base: Base, module: Any, where: str = "base_model") -> None:
    """Merge a base's adapters into its whole model, in place and for good.

    Raises:
        InputError: One does not fit, or was trained by rlhf on other weights.
    """
    for folder in base.adapters:
        config, state = _read(module, folder, f"{where}: {base.name}")
        origin = read_origin(folder)
        if origin and origin["fingerprint"] != (found := loaded_fingerprint(module)):
            raise InputError(
                f"{where}: {base.name}: the adapter was trained on {origin['base_model']} with "
                f"weights {origin['fingerprint']}, which has weights {found} now; give the base "
                "of its training"
            )
        add_lora(module, config, state)


def add_lora(module: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Add W ← W + s·BA for each adapted layer, with the sum in float64 and rounded once.

    In float64 the result does not depend on a CPU's order of summing, so a merged base has the same
    content on every machine. Works on one block of rows at a time.
    """
    for name, layer in adapted_layers(module, config).items():
        names, scale = lora_names(name), scale_of(config, name)
        a, b = (state[one].double() for one in names)  # (r, in), (out, r)
        weight = layer.weight.data  # (out, in); (in, out) in GPT-2's layers
        weight = weight.t() if isinstance(layer, Conv1D) else weight
        rows = max(1, MERGED_AT_ONCE // weight.shape[1])
        for target, low in zip(weight.split(rows), b.split(rows), strict=True):
            target.copy_(target.double() + (low @ a).mul_(scale))


def _read(module: nn.Module, folder: Path, where: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    try:
        config, state = read_adapter_config(folder), read_adapter_weights(folder)
        problems = check_fit(module, config, state)
        if problems:
            raise InputError([f"{folder}: {problem}" for problem in problems])
    except InputError as error:
        raise InputError([f"{where}: {problem}" for problem in error.problems]) from error
    return config, state
