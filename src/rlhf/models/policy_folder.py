"""Find out what a `policy_path` holds before reading anything large."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.config.loading import parse_yaml
from rlhf.data.sources.files import open_file
from rlhf.errors import InputError
from rlhf.files.hub import is_hub_id
from rlhf.files.local_copy import local_folder
from rlhf.files.storage import is_remote
from rlhf.models.content import ORIGIN, read_origin, weights_fingerprint
from rlhf.models.plain_lora import ADAPTER_WEIGHTS, read_adapter_config


@dataclass(frozen=True)
class PolicySource:
    """A tuned model on disk and what it was tuned from.

    Attributes:
        kind: "adapter" on a base, or "full" weights.
        folder: Local folder of the adapter or of the full model.
        base_model: The untuned model; None if that is not recorded.
        revision: Hub revision of the untuned model.
        settings: Configuration of the stage that made it; empty if it is not stored alongside.
        fingerprint: Changes when the weights do.
    """

    kind: Literal["adapter", "full"]
    folder: Path
    base_model: str | None
    revision: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


def find_policy(path: str) -> PolicySource:
    """Recognize a stage's folder, an adapter or a full model.

    Args:
        path: Folder of `rlhf ppo`, `rlhf dpo` or `rlhf sft` (its adapter is used if it has one),
            their adapter/ or merged/, a plain peft adapter, or any checkpoint; local, remote or a
            Hub id.

    Raises:
        InputError: The folder does not exist, or is none of these.
    """
    folder, settings = _localize(path)
    if not folder.is_dir():
        raise InputError(f"policy_path: there is no folder {path}")
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return _adapter(candidate, settings or _settings(candidate))
    for candidate in (folder, folder / "merged"):
        if (candidate / "config.json").is_file():
            return _full(candidate, settings or _settings(candidate))
    raise InputError(
        f"policy_path: {path} holds no policy; expected the folder of `rlhf ppo`, `rlhf dpo` "
        "or `rlhf sft`, its adapter/ or merged/"
    )


def _adapter(folder: Path, settings: Mapping[str, Any]) -> PolicySource:
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise InputError(f"policy_path: {folder} is incomplete: it has no {ADAPTER_WEIGHTS}")
    config, origin = read_adapter_config(folder), _origin(folder)
    if origin is None:  # plain peft: no fingerprint, but the base's name
        origin = {"base_model": config.base_model_name_or_path, "revision": config.revision}
    base = origin.get("base_model") or None
    fingerprint = weights_fingerprint(str(folder), with_base=False)
    return PolicySource("adapter", folder, base, origin.get("revision"), settings, fingerprint)


def _full(folder: Path, settings: Mapping[str, Any]) -> PolicySource:
    origin = _origin(folder) or settings
    base = origin.get("base_model") or None
    fingerprint = weights_fingerprint(str(folder))
    return PolicySource("full", folder, base, origin.get("revision"), settings, fingerprint)


def _localize(path: str) -> tuple[Path, Mapping[str, Any]]:
    """Return a local folder, and the stage's settings if they are not in that folder."""
    if is_hub_id(path):
        try:
            return local_folder(path), {}
        except InputError as error:
            raise InputError([f"policy_path: {one}" for one in error.problems]) from error
    if not is_remote(path):
        return Path(path).expanduser().resolve(), {}
    # A stage's folder also holds checkpoints and the merged model: fetch the adapter alone.
    stage = path.rstrip("/").removesuffix("/adapter").removesuffix("/merged")
    try:
        with open_file(f"{stage}/config.yaml") as file:
            settings = _parse(stage, file.read())
    except (InputError, OSError):
        settings = {}
    for part in ("adapter", "merged") if stage == path.rstrip("/") else ():
        try:
            return local_folder(f"{stage}/{part}"), settings
        except InputError:
            continue
    return local_folder(path), settings


def _settings(folder: Path) -> Mapping[str, Any]:
    """Return the stage's config.yaml, found above its adapter/ or merged/."""
    path = folder.parent / "config.yaml"
    if folder.name not in ("adapter", "merged") or not path.is_file():
        return {}
    return _parse(path, _read(path))


def _origin(folder: Path) -> dict[str, Any] | None:
    try:
        return read_origin(folder)
    except ValueError as error:
        raise InputError(f"policy_path: {folder / ORIGIN} is broken: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"policy_path: {path} cannot be read: {error}") from error


def _parse(where: Path | str, content: bytes) -> dict[str, Any]:
    """Parse a mapping from YAML, and hence also from JSON."""
    return parse_yaml(content, f"policy_path: {where}")
