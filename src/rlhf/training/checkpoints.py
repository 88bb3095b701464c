"""Checkpoints of a run: everything training changes, in full precision, as safetensors and JSON.

`checkpoints/step-000120/` holds `model.safetensors` (trainable tensors), `optimizer.safetensors`
(Adam's moments and counters), `state.json`, and `manifest.json` with the size and SHA-256 of each
file. A folder is written under a hidden name and then renamed; on stores without atomic renames the
manifest is uploaded last. A folder without a valid manifest is therefore not a checkpoint, and the
previous one is used. `best/trainable.safetensors` holds the trainable tensors of the best
evaluation and their checksum.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import StorageError
from rlhf.files.disk import checksum, rename, settle
from rlhf.files.text import appears_whole, json_safe, to_json, write_text
from rlhf.untrusted import read_json

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
BEST = "best/trainable.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to resume exactly.

    Attributes:
        step: Completed training steps.
        model: Trainable tensors by name.
        optimizer: Adam's state, `<tensor name>.exp_avg`, `.exp_avg_sq` and `.step`.
        state: Everything else, JSON-serializable.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        step: Completed training steps at that evaluation.
        metric: Name of the metric.
        value: Its value.
        evaluation: All metrics of that evaluation.
    """

    step: int
    metric: str
    value: float
    evaluation: Mapping[str, float]


def save_checkpoint(output_path: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Args:
        output_path: The stage's folder.
        checkpoint: What to write.
        keep: How many checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.
    """
    root = output_path / FOLDER
    name = f"step-{checkpoint.step:06d}"
    temporary, target = root / f".{name}", root / name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_checkpoint(temporary, checkpoint)
    except BaseException:  # on a full disk, free the space again
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)  # a damaged checkpoint of the same step
    rename(temporary, target)
    # Later checkpoints are damaged; otherwise this run would have resumed from them.
    later = [folder for folder in _folders(output_path) if _step_of(folder) > checkpoint.step]
    earlier = [folder for folder in _folders(output_path) if _step_of(folder) < checkpoint.step]
    for folder in [*later, *earlier[max(keep, 1) - 1 :]]:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(_on_cpu(checkpoint.model), folder / "model.safetensors")
    save_file(_on_cpu(checkpoint.optimizer), folder / "optimizer.safetensors")
    write_text(folder / "state.json", to_json({"step": checkpoint.step, **checkpoint.state}))
    settle(folder)  # before the manifest that vouches for the files
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    write_text(folder / "manifest.json", to_json({"step": checkpoint.step, "files": files}))


def load_checkpoint(output_path: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint; return None if there is none.

    Damaged checkpoints are skipped with a warning that says what is wrong with them.
    """
    for folder in _folders(output_path):
        problem = find_damage(folder)
        if problem is None:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(
                step=state.pop("step"),
                model=load_file(folder / "model.safetensors"),
                optimizer=load_file(folder / "optimizer.safetensors"),
                state=state,
            )
        logger.warning("%s is passed over: %s", folder, problem)
    return None


def find_damage(folder: Path) -> str | None:
    """Return what makes a checkpoint folder unusable, or None if it is intact."""
    manifest = read_json(folder / "manifest.json")
    files = (manifest or {}).get("files")
    if not isinstance(files, dict):
        return "it has no valid manifest.json"
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        if name not in files:
            return f"its manifest lacks {name}"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _describe(folder / name) != expected:
            return f"{name} does not match its checksum"
    return None


def remove_checkpoints(output_path: Path) -> None:
    """Remove all checkpoints."""
    shutil.rmtree(output_path / FOLDER, ignore_errors=True)


def remove_best(output_path: Path) -> None:
    """Remove the best tensors."""
    (output_path / BEST).unlink(missing_ok=True)


def save_best(output_path: Path, tensors: Mapping[str, Tensor], best: Best) -> None:
    """Replace the best trainable tensors: one file with its own checksum, so it is atomic."""
    here = _on_cpu(tensors)
    # One entry, because safetensors writes several in arbitrary order.
    metadata = {"best": json.dumps(json_safe(asdict(best)) | {"sha256": _digest(here)})}
    with appears_whole(output_path / BEST) as partial:
        save_file(here, partial, metadata=metadata)


def read_best(output_path: Path) -> Best | None:
    """Return which evaluation the saved best tensors belong to; None if there are none."""
    try:
        with safe_open(output_path / BEST, framework="pt") as file:
            values = json.loads(file.metadata()["best"])
            values.pop("sha256", None)
            return Best(**values)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
        return None


def load_best(output_path: Path) -> dict[str, Tensor]:
    """Return the best trainable tensors by name.

    Raises:
        StorageError: They are damaged.
    """
    path = output_path / BEST
    try:
        with safe_open(path, framework="pt") as file:
            expected = json.loads(file.metadata()["best"])["sha256"]
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if _digest(tensors) != expected:
        raise StorageError(f"{path} does not match its checksum; the same command makes it again")
    return tensors


def restore_best(output_path: Path, checkpoint: Checkpoint) -> bool:
    """Make sure that the best tensors this checkpoint records, or later ones, are on disk.

    If they are damaged or missing and the checkpoint itself is of the best step, they are
    restored from it.

    Returns:
        False if they are lost, so that training must start over to find them again.
    """
    expected = checkpoint.state.get("best")
    found = read_best(output_path)
    try:
        load_best(output_path)
    except StorageError as error:
        found = None
        if (output_path / BEST).exists():
            logger.warning("%s", error)
        remove_best(output_path)
    if expected is None or (found is not None and found.step >= expected["step"]):
        return True
    if expected["step"] != checkpoint.step:
        logger.warning("%s is lost: training starts over to find it again", output_path / BEST)
        return False
    save_best(output_path, checkpoint.model, Best(**expected))
    return True


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and contents of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def _folders(output_path: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted((output_path / FOLDER).glob("step-*"), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    suffix = folder.name.removeprefix("step-")
    return int(suffix) if suffix.isdigit() else -1


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": checksum(path)}
