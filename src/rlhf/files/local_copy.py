"""Local copies of folders in object stores."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.files.disk import cache_folder, umask
from rlhf.files.owners import temporary_folder
from rlhf.files.storage import find_files, is_remote, open_store, storage_errors
from rlhf.untrusted import inner_names, without_secrets

# Weights: slow to copy, and not needed for checks or tokenizers.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")


def local_folder(path: str, *, weights: bool = True) -> Path:
    """Return a local folder with the contents of a path; remote contents are copied once.

    Copies are kept in `$RLHF_CACHE` or ~/.cache/rlhf; if an object changes (in size or checksum), a
    new copy is made.

    Args:
        path: Local folder, returned as is, or one in any store that fsspec supports.
        weights: Whether weight files are needed too.

    Raises:
        InputError: There is no such store, or nothing at this address.
        StorageError: It cannot be read.
    """
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


def recorded_base(name: str, where: str) -> str:
    """Return the base that an untrusted file names, if it may be loaded from there.

    Folders, Hub ids and gs:// addresses may; other addresses only if the user gives them.

    Args:
        name: The base that the file names.
        where: The file, for the message.

    Raises:
        InputError: It is any other address.
    """
    if "::" in name or ("://" in name and not name.startswith(("gs://", "gcs://"))):
        raise InputError(
            f"{where} names {without_secrets(name)!r} as its base, which is no folder, Hub id or "
            "gs:// address; nothing was read from there: give the base yourself, as base_model"
        )
    return name


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
