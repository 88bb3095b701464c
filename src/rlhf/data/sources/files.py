"""From paths to files, wherever they are: this machine, or any store that fsspec reaches."""

import contextlib
import glob
import os
from pathlib import Path
from typing import IO, Any

from rlhf.data.sources.folders import data_files
from rlhf.errors import InputError, closest
from rlhf.files import storage
from rlhf.files.storage import is_remote, locate, open_store, reason


def expand_path(path: str, name: str) -> list[str]:
    """Return the files that a path names.

    Args:
        path: A path, a glob, a folder, or an fsspec address (`gs://…`, also of globs and folders).
        name: Configuration field to name in messages.

    Returns:
        Existing files; those of a glob or folder are sorted.

    Raises:
        InputError: If nothing is there, or a folder is no data set.
    """
    path = locate(path)
    try:
        return _remote_matches(path) if is_remote(path) else _local_matches(path)
    except InputError as error:
        raise InputError([f"{name}: {problem}" for problem in error.problems]) from error


def _local_matches(path: str) -> list[str]:
    if os.path.isdir(path):
        return _files_of_folder(path)
    if os.path.exists(path):
        return [path]
    if not glob.has_magic(path):
        raise InputError(f"{path} does not exist{_similar(path)}")
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        raise InputError(f"{path} matches no file")
    return matches


def _files_of_folder(path: str) -> list[str]:
    folder = path.rstrip("/") or path
    try:
        entries = [(entry.name, entry.is_file()) for entry in os.scandir(folder)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    found = data_files(
        folder,
        [name for name, is_file in entries if is_file],
        [name for name, is_file in entries if not is_file],
        lambda name: open_file(f"{folder}/{name}"),
    )
    return [f"{folder}/{name}" for name in found]


def _similar(path: str) -> str:
    with contextlib.suppress(OSError):
        folder = Path(path).parent
        if not folder.is_dir():
            return f" (there is no folder {folder})"
        names = [entry.name for entry in folder.iterdir()]
        near = closest(Path(path).name, names)
        if near:
            return f" (did you mean {folder / near}?)"
    return ""


def _remote_matches(path: str) -> list[str]:
    web = path.startswith(("http://", "https://"))

    def find(filesystem: Any, root: str) -> list[str]:
        filesystem.invalidate_cache()  # listings are cached for the life of the process
        if "*" in root or (glob.has_magic(root) and not web):  # ? begins a query there
            found = filesystem.glob(root, detail=True)
            return sorted(name for name, info in found.items() if info["type"] == "file")
        try:  # `isfile` returns False on every error
            kind = filesystem.info(root)["type"]
        except FileNotFoundError:
            return []
        return [root] if kind == "file" else _stored_files(filesystem, root, path)

    found = _with_filesystem(path, find)
    if not found:
        raise InputError(f"{path} matches no file that can be read")
    if web:
        return list(found)
    scheme = path.split("://")[0]
    return [f"{scheme}://{name.lstrip('/') if scheme == 'gs' else name}" for name in found]


def _stored_files(filesystem: Any, root: str, path: str) -> list[str]:
    """Return the data files of a folder in a store."""
    root = root.rstrip("/")
    kinds = {
        details["name"].rstrip("/").rpartition("/")[2]: details["type"]
        for details in filesystem.ls(root, detail=True)
        if not details["name"].endswith("/")  # marks of empty folders
    }
    found = data_files(
        path.rstrip("/"),
        [name for name, kind in kinds.items() if kind == "file"],
        [name for name, kind in kinds.items() if kind != "file"],
        lambda name: storage.open_stored(filesystem, f"{root}/{name}"),
    )
    return [f"{root}/{name}" for name in found]


def _with_filesystem(path: str, use: Any) -> Any:
    """Call `use(filesystem, root)`; retry anonymously if a bucket refuses our credentials."""
    attempts: list[dict[str, Any]] = [{}]
    if path.startswith(("gs://", "gcs://")):
        attempts.append({"token": "anon"})
    problem: Exception | None = None
    for options in attempts:
        try:
            result = use(*open_store(path, **options))
            if result:
                return result
        except InputError:
            raise
        except Exception as error:  # every store raises its own kind
            # The first refusal is more informative than the anonymous one.
            problem = problem or error
    if problem is not None:
        raise InputError(f"{path} cannot be read: {reason(problem)}") from problem
    return None


def open_file(path: str) -> IO[bytes]:
    """Open a local or remote file for reading.

    Raises:
        InputError: If it cannot be opened.
    """
    path = locate(path)
    if is_remote(path):
        stream: IO[bytes] = _with_filesystem(path, storage.open_stored)
        return stream
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
