"""Local copies of folders in object stores and on the Hub."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.files.disk import cache_folder, umask
from rlhf.files.hub import hub_folder, is_hub_id
from rlhf.files.owners import temporary_folder
from rlhf.files.storage import find_files, is_remote, open_store, storage_errors
from rlhf.untrusted import inner_names, read_json, without_secrets

# Files that loaders of models read besides weights.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "reward_model.json",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
# Fetched from the Hub with them: notes, and adapters, which are small and so are always checked.
_SMALL = (
    *SETTINGS,
    "rlhf.json",
    "adapter_model.safetensors",
    "head.safetensors",
    "adapter/*",
    "merged/*.json",
)

# Weights: slow to copy, and not needed for checks or tokenizers.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")


def local_folder(path: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """Return a local folder with the contents of a path; remote contents are copied once.

    Copies are kept in `$RLHF_CACHE` or ~/.cache/rlhf; if an object changes (in size or checksum), a
    new copy is made. What comes from the Hub is in the cache of its own client.

    Args:
        path: Local folder, returned as is, one in any store that fsspec supports, or a Hub id.
        weights: Whether weight files are needed too.
        revision: Branch, tag or commit, for a Hub id.

    Raises:
        InputError: There is no such store, or nothing at this address.
        StorageError: It cannot be read.
    """
    if is_hub_id(path):
        folder = hub_folder(path, revision, _SMALL, quiet=True)
        if weights:
            hub_folder(path, revision, _weight_files(folder), quiet=False)
        return folder
    if not is_remote(path):
        return Path(path)
    url = path.rstrip("/")
    try:
        filesystem, root = open_store(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be read: {error}") from error
    with storage_errors(f"{url} cannot be read"):
        try:
            found = find_files(filesystem, root)
        except FileNotFoundError:  # a whole bucket
            found = {}
        if not found:
            raise InputError(f"{url}: there is nothing under this address")
        inner_names([_inside(name, root) for name in found], url)
        marks = sorted(
            f"{path} {d['size']} {d.get('etag') or d.get('md5Hash') or d.get('mtime') or ''}"
            for path, d in found.items()
        )
        name = hashlib.sha256("\n".join([url, *marks]).encode()).hexdigest()[:24]
        wanted = [name for name in found if weights or not name.endswith(_WEIGHTS)]
        cache = cache_folder() / "folders"
        target = cache / name
        if not weights and not target.is_dir():  # otherwise the full copy already exists
            target = cache / f"{name}-small"
        if not target.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            _download(filesystem, root, wanted, target)
    return target


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a model's weight files, going by its settings."""
    if (folder / "adapter_config.json").is_file():
        return ["adapter_model.safetensors"]
    index = read_json(folder / "model.safetensors.index.json") or {}
    files = index.get("weight_map")
    names = set(map(str, files.values())) if isinstance(files, dict) else {"model.safetensors"}
    whole = ["merged/*.safetensors"] if (folder / "reward_model.json").is_file() else []
    return [*whole, *sorted(name for name in names if name.endswith(".safetensors"))]


def recorded_base(name: str, where: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return the base that an untrusted file names, and its revision, if it may be loaded.

    Folders, Hub ids and gs:// addresses may; other addresses only if the user gives them. Where a
    base has moved, the user says so in `$RLHF_BASES`: OLD=NEW, several separated by commas.

    Args:
        name: The base that the file names.
        where: The file, for the message.
        revision: The Hub revision that the file names; that of a base that has moved is unknown.

    Raises:
        InputError: It is any other address.
    """
    pairs = os.environ.get("RLHF_BASES", "").split(",")
    moved = {old.strip(): new.strip() for old, _, new in (one.partition("=") for one in pairs)}
    if new := moved.get(name):
        return new, None
    if "::" in name or ("://" in name and not name.startswith(("gs://", "gcs://"))):
        raise InputError(
            f"{where} names {without_secrets(name)!r} as its base, which is no folder, Hub id or "
            "gs:// address; nothing was read from there: give the base yourself, as base_model or "
            "in RLHF_BASES (OLD=NEW)"
        )
    return name, revision


def _inside(name: str, root: str) -> str:
    """Return the path relative to `root`, both as the store writes them."""
    return name.removeprefix(root.rstrip("/")).removeprefix("/")


def _download(filesystem: Any, root: str, names: Sequence[str], target: Path) -> None:
    """Copy files to a folder that appears only when complete, even if several processes try."""
    partial = temporary_folder(target.name, target.parent)
    try:
        for name in names:
            local = partial / _inside(name, root)
            local.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(name, str(local))
        partial.chmod(0o777 & ~umask())  # others who share the cache need to read it
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
