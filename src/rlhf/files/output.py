"""A folder to write to, local or remote.

Remote folders (`gs://…`, any other fsspec URL, and `/gcs/…`, a bucket mounted as a folder) are
written to a local working copy and published as whole files, because object stores can neither
append to a file nor rename a folder.
"""

import shutil
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from rlhf.errors import InputError
from rlhf.files import storage
from rlhf.files.owners import temporary_folder
from rlhf.files.storage import find_files, open_store, reason, storage_errors, upload
from rlhf.untrusted import inner_names

RUN_FILE = "run.json"
RESULT_FILE = "metrics.json"
# Checksums of the rows that inference has; see `rlhf.inference.predictions.PredictionFile`.
PARTIAL_SUMS = "predictions.partial.sums.jsonl"
# Needed to resume, but not by a finished run.
RESUMING = ("checkpoints/*", "predictions.partial.*")
# Files that may be in a folder that still counts as empty: a shell's log of this very run, say, or
# what the Vertex entry point wrote about a failed attempt.
IGNORED = (".*", "*.log", "failure.json")


def needs_publishing(folder: str) -> bool:
    """Return whether a folder must be published to rather than written in place."""
    return "://" in folder or folder.startswith(f"{storage.MOUNT}/")


def path_in(folder: str, *names: str) -> str:
    """Return the path of something inside a local or remote folder."""
    return "/".join([folder.rstrip("/"), *names])


class Output:
    """A folder to write to, local or remote.

    Args:
        folder: Local folder, `/gcs/…` or an fsspec URL.

    Attributes:
        folder: As given.
        path: Where files are written: the folder itself, or the working copy of a remote one.
        remote: Whether `publish` has work to do.
        guard: Called before anything is published; raises if another process now writes there.

    Raises:
        InputError: The folder's file system is unknown or its package is not installed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.remote = needs_publishing(folder)
        self.guard: Callable[[], None] | None = None
        self._copies: list[_Copy] = []
        if not self.remote:
            self.path = Path(folder)
            return
        self.path = temporary_folder("output")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._store = _Copy(self.path, folder, "output_dir")
        self._copies.append(self._store)

    def names(self) -> list[str]:
        """Return the relative paths of all files in the folder except ignored ones."""
        if self.remote:
            files = self._store.names()
        else:
            files = [
                path.relative_to(self.path).as_posix()
                for path in self.path.rglob("*")
                if path.is_file()
            ]
        return sorted(name for name in files if not _ignored(name))

    def refetch(self, *names: str) -> None:
        """Copy remote files into the working copy in their current state."""
        if self.remote:
            for name in names:
                self._store.forget(name)
            self.fetch(*names)

    def fetch(self, *patterns: str) -> None:
        """Copy remote files whose relative path matches a pattern to the working copy, once."""
        if not self.remote:
            return
        for name in self._store.names():
            if any(fnmatch(name, pattern) for pattern in patterns):
                self._store.fetch(name)

    def also_publish(self, part: str, folder: str) -> None:
        """Make `publish` also send a part of this folder, such as "tensorboard", to another folder.

        Raises:
            InputError: That folder's file system is unknown or its package is not installed.
        """
        source = self.path / part
        if needs_publishing(folder) or Path(folder).resolve() != source.resolve():
            self._copies.append(_Copy(source, folder, f"{part}_dir"))

    def remove(self, *patterns: str) -> None:
        """Remove files whose relative path matches a pattern, locally and in the store.

        Files that cannot be removed stay; nothing depends on their removal.
        """
        for name in self.names():
            if any(fnmatch(name, pattern) for pattern in patterns):
                with suppress(OSError):
                    (self.path / name).unlink(missing_ok=True)
                if self.remote:
                    self._store.remove(name)
        for folder in sorted(self.path.rglob("*"), reverse=True):
            name = folder.relative_to(self.path).as_posix()
            if folder.is_dir() and any(fnmatch(f"{name}/", pattern) for pattern in patterns):
                with suppress(OSError):
                    folder.rmdir()

    def publish(self) -> None:
        """Upload what changed since the last call and delete remotely what was deleted locally.

        run.json, which identifies the run, goes first; what vouches for other files (manifests,
        checksums) follows them, and the final metrics go last, so that whatever looks complete is
        complete.

        Raises:
            StorageError: The store fails for longer than its library retries. What was complete
                there before still is.
        """
        if self.guard is not None:
            self.guard()
        for copy in self._copies:
            copy.send()


class _Copy:
    """A folder elsewhere that mirrors the files of a local one.

    Args:
        source: The local folder; it need not exist yet.
        folder: The other folder, an fsspec URL or a path.
        field: Configuration field that names it, for messages.
    """

    def __init__(self, source: Path, folder: str, field: str) -> None:
        self.source, self.folder, self.field = source, folder, field
        self._sent: dict[str, tuple[int, int]] = {}
        try:
            self._filesystem, root = open_store(folder)
        except (ImportError, ValueError) as error:
            raise InputError(f"{field}: cannot write to {folder}: {error}") from error
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """Return the relative paths of the files in the other folder."""
        try:
            found = find_files(self._filesystem, self._root)
        # Every file system raises its own errors; to the user they all mean the same.
        except Exception as error:
            raise InputError(f"{self.field}: cannot read {self.folder}: {reason(error)}") from error
        return [str(PurePosixPath(name).relative_to(self._root)) for name in found]

    def fetch(self, name: str) -> None:
        """Download a file, unless there is already one of that name."""
        inner_names([name], f"{self.field}: {self.folder}")
        target = self.source / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage_errors(f"{self.field}: cannot read {path_in(self.folder, name)}"):
            self._filesystem.get_file(f"{self._root}/{name}", str(target))
        self._sent[name] = _signature(target)

    def send(self) -> None:
        """Upload what changed since the last call, and delete there what has been deleted here."""
        present = {
            path.relative_to(self.source).as_posix(): path
            for path in self.source.rglob("*")
            if path.is_file()
        }
        present = {name: path for name, path in present.items() if not _ignored(name)}
        for name in sorted(present, key=_publishing_order):
            signature = _signature(present[name])
            if self._sent.get(name) != signature:
                with self._writing(name):
                    upload(self._filesystem, str(present[name]), f"{self._root}/{name}")
                self._sent[name] = signature
        for name in sorted(set(self._sent) - set(present), key=_publishing_order, reverse=True):
            # A repeated request whose first response was lost finds nothing to remove.
            with self._writing(name), suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._root}/{name}")
            del self._sent[name]

    def remove(self, name: str) -> None:
        """Remove a file from the other folder, if possible."""
        with suppress(Exception):  # each store raises its own errors
            self._filesystem.rm_file(f"{self._root}/{name}")
        self._sent.pop(name, None)

    def forget(self, name: str) -> None:
        """Drop the local copy of a file, so that `fetch` downloads its current state."""
        (self.source / name).unlink(missing_ok=True)
        self._sent.pop(name, None)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        hint = "what was saved there before is whole; the same command continues from it"
        return storage_errors(f"{self.field}: cannot write {path_in(self.folder, name)}", hint)


def _ignored(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in IGNORED)


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _publishing_order(name: str) -> tuple[int, str]:
    last = {"manifest.json": 1, PARTIAL_SUMS: 1, RESULT_FILE: 2}
    rank = -1 if name == RUN_FILE else last.get(name.rsplit("/", 1)[-1], 0)
    return rank, name
