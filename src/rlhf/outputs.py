"""A stage's folder: local or remote, new, half done or finished.

Remote folders (`gs://…`, any other fsspec URL, and `/gcs/…`, which is a bucket mounted as a folder)
are written in a local working copy and published as whole files, because object stores can neither
append to a file nor rename a folder.
"""

import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf import storage
from rlhf.config import StageConfig, config_to_yaml, result_fields
from rlhf.disk import remove_unfinished, rename, settle
from rlhf.errors import InputError
from rlhf.hardware import dtype_name
from rlhf.lease import LOCK, Lease, lease
from rlhf.processes import temporary_folder
from rlhf.storage import find_files, open_store, reason, storage_errors, upload
from rlhf.untrusted import inner_names, read_json

RUN_FILE = "run.json"
RESULT_FILE = "metrics.json"
CONFIG_FILE = "config.yaml"
# Inference's checksums of the rows that it has; see `rlhf.predictions.PredictionFile`.
PARTIAL_SUMS = "predictions.partial.sums.jsonl"
# What continuing needs and a finished run does not.
RESUMING = ("checkpoints/*", "predictions.partial.*")
# What a folder may hold already and still count as empty: a shell's log of this very run, say, or
# what the Vertex entry point says of an attempt that failed.
IGNORED = (".*", "*.log", "failure.json")


def is_remote(folder: str) -> bool:
    """True for a folder that must be published rather than written in place."""
    return "://" in folder or folder.startswith(f"{storage.MOUNT}/")


def join(folder: str, *names: str) -> str:
    """Path of something in a local or remote folder."""
    return "/".join([folder.rstrip("/"), *names])


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or one in pieces, so that a reader (or a crash) sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not know (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"


class Output:
    """A folder to write to, wherever it is.

    Args:
        folder: Local folder, `/gcs/…` or an fsspec URL.

    Attributes:
        folder: As given.
        path: Where files are written: the folder itself, or the working copy of a remote one.
        remote: True if `publish` has work to do.
        guard: Called before anything is published: raises if somebody else writes there now.

    Raises:
        InputError: If the folder's file system is unknown or its package is not installed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.remote = is_remote(folder)
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
        """Relative paths of all files that are there, ignored ones left out."""
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
        """Copies remote files into the working copy as they are now."""
        if self.remote:
            for name in names:
                self._store.forget(name)
            self.fetch(*names)

    def fetch(self, *patterns: str) -> None:
        """Copies remote files whose relative path matches a pattern into the working copy."""
        if not self.remote:
            return
        for name in self._store.names():
            if any(fnmatch(name, pattern) for pattern in patterns):
                self._store.fetch(name)

    def also_publish(self, part: str, folder: str) -> None:
        """Has `publish` send a part of this folder, such as "tensorboard", to another folder too.

        Raises:
            InputError: If that folder's file system is unknown or its package is not installed.
        """
        source = self.path / part
        if is_remote(folder) or Path(folder).resolve() != source.resolve():
            self._copies.append(_Copy(source, folder, f"{part}_dir"))

    def remove(self, *patterns: str) -> None:
        """Removes files whose relative path matches a pattern, here and in the store.

        What cannot be removed stays: nothing depends on it.
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
        """Uploads what changed since the last call and removes remotely what is gone locally.

        run.json, which tells whose the files are, goes first, what vouches for files (manifests,
        checksums) after them and the final metrics last, so that what looks complete is complete.

        Raises:
            StorageError: If the store fails for longer than its library retries. What was complete
                there before is so still.
        """
        if self.guard is not None:
            self.guard()
        for copy in self._copies:
            copy.send()


class _Copy:
    """A folder elsewhere that is to have the files of a local one.

    Args:
        source: The local folder; need not exist yet.
        folder: The other one, an fsspec URL or a path.
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
        """Relative paths of the files that are there."""
        try:
            found = find_files(self._filesystem, self._root)
        # Every file system raises its own kinds of errors; all mean the same to the user.
        except Exception as error:
            raise InputError(f"{self.field}: cannot read {self.folder}: {reason(error)}") from error
        return [str(PurePosixPath(name).relative_to(self._root)) for name in found]

    def fetch(self, name: str) -> None:
        """Brings a file here, unless there is one of its name already."""
        inner_names([name], f"{self.field}: {self.folder}")
        target = self.source / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage_errors(f"{self.field}: cannot read {join(self.folder, name)}"):
            self._filesystem.get_file(f"{self._root}/{name}", str(target))
        self._sent[name] = _signature(target)

    def send(self) -> None:
        """Uploads what changed since the last call, removes there what has gone here since."""
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
            # A store that loses its answer and is asked again has nothing to remove.
            with self._writing(name), suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._root}/{name}")
            del self._sent[name]

    def remove(self, name: str) -> None:
        """Removes a file there, if it can be."""
        with suppress(Exception):  # each store raises its own kinds
            self._filesystem.rm_file(f"{self._root}/{name}")
        self._sent.pop(name, None)

    def forget(self, name: str) -> None:
        """Drops the local copy of a file, so that `fetch` brings it as it is there now."""
        (self.source / name).unlink(missing_ok=True)
        self._sent.pop(name, None)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        hint = "what was saved there before is whole; the same command continues from it"
        return storage_errors(f"{self.field}: cannot write {join(self.folder, name)}", hint)


def _ignored(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in IGNORED)


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _publishing_order(name: str) -> tuple[int, str]:
    last = {"manifest.json": 1, PARTIAL_SUMS: 1, RESULT_FILE: 2}
    rank = -1 if name == RUN_FILE else last.get(name.rsplit("/", 1)[-1], 0)
    return rank, name


class Status(Enum):
    """What `output_dir` holds of the run that is asked for."""

    FRESH = "nothing worth keeping"
    CONTINUE = "an unfinished run with something saved"
    FINISHED = "the whole run"


@dataclass
class Run:
    """One stage's run and the folder it lives in.

    Attributes:
        config: The stage's configuration.
        output: The folder.
        identity: What determines the results: stage, configuration fields, data fingerprints.
        config_text: The resolved configuration as YAML.
        saved: Patterns of files that are worth continuing from.
        status: What was found.
        lease: The right to write there, while it is held.
    """

    config: StageConfig
    output: Output
    identity: Mapping[str, Any]
    config_text: str
    saved: Sequence[str]
    status: Status = Status.FRESH
    lease: Lease | None = None

    @contextmanager
    def held(self, *, look: bool = True) -> Iterator[None]:
        """Holds the folder's lease for the time of a block, unless this run does so already.

        Args:
            look: Whether to look again at what the folder holds, now that nobody else writes.

        Raises:
            InputError: Somebody else holds it, or has made something else of the folder.
        """
        if self.lease is not None:
            yield
            return
        with lease(self.output.folder, f"rlhf {self.identity['stage']}") as held:
            self.lease, self.output.guard = held, held.check
            try:
                if look:
                    self.look()
                yield
            finally:
                self.lease, self.output.guard = None, None

    def look(self) -> None:
        """Finds out what the folder holds; writes nothing there.

        Raises:
            InputError: See `prepare_output`.
        """
        folder, names = self.output.folder, self.output.names()
        self.output.refetch(RUN_FILE, RESULT_FILE)
        finished = bool((read_json(self.output.path / RESULT_FILE) or {}).get("finished"))
        begun = any(fnmatch(name, pattern) for name in names for pattern in self.saved)
        earlier = self._recorded_identity(names)
        if names and self.config.resume == "never":
            raise InputError(
                f"output_dir: {folder} is not empty and resume is never; choose another "
                "output_dir, empty the folder, or set resume to auto"
            )
        if earlier is None and names and RUN_FILE not in names and not self._only_config(names):
            raise InputError(
                f"output_dir: {folder} holds files of no run of rlhf ({names[0]}, …); "
                "choose another output_dir or empty the folder"
            )
        if earlier is None and finished:
            raise InputError(
                f"output_dir: {folder} holds a finished run whose {RUN_FILE} is damaged, so nobody "
                f"can tell what it was made of; restore {RUN_FILE} or choose another output_dir"
            )
        if earlier is not None and (finished or begun):
            _refuse_changes(self.config, earlier, self.identity)
        # Without any record, what was begun is damaged as a whole: it starts anew.
        begun = begun and earlier is not None
        self.status = Status.FINISHED if finished else Status.CONTINUE if begun else Status.FRESH

    def start(self) -> None:
        """Writes what the run is made of, whose it is before all else."""
        remove_unfinished(self.output.path)
        write_text(self.output.path / RUN_FILE, to_json(self.identity))
        write_text(self.output.path / CONFIG_FILE, self.config_text)
        self.output.publish()

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes metrics.json, the mark of a finished run, after everything else is in place."""
        result = {**metrics, "finished": True}
        if not self.output.remote:
            settle(self.output.path)
        write_text(self.output.path / RESULT_FILE, to_json(result))
        self.output.publish()
        self.output.remove(*RESUMING)
        return result

    def conclude(self) -> dict[str, Any]:
        """Removes what a kill left behind in a finished run's folder.

        Returns:
            The final metrics.
        """
        with suppress(OSError):  # others may lend us a folder to read
            remove_unfinished(self.output.path)
        self.output.remove(*RESUMING)
        if not self.output.remote and (self.output.path / LOCK).exists():
            with suppress(InputError), self.held(look=False):  # a killed holder's files go
                pass
        return read_json(self.output.path / RESULT_FILE) or {}

    def file(self, *names: str) -> str:
        """Where the user finds something of this run."""
        return join(self.output.folder, *names)

    def _recorded_identity(self, names: Sequence[str]) -> Mapping[str, Any] | None:
        """What the run there is made of, by run.json or, where that is damaged, by what it saved.

        Checkpoints and inference's checksums say it too.
        """
        states = [name for name in names if fnmatch(name, "checkpoints/step-*/state.json")]
        for name in (RUN_FILE, *sorted(states, reverse=True), PARTIAL_SUMS):
            self.output.fetch(name)
            if (found := _identity_in(self.output.path / name)) is not None:
                return found
        return None

    def _only_config(self, names: Sequence[str]) -> bool:
        """True if all there is is the configuration that this run would write."""
        if list(names) != [CONFIG_FILE]:
            return False
        self.output.fetch(CONFIG_FILE)
        path = self.output.path / CONFIG_FILE
        return path.read_text(encoding="utf-8", errors="replace") == self.config_text


def _identity_in(path: Path) -> Mapping[str, Any] | None:
    """A run's identity from run.json, a checkpoint's state, or the first of several JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    for part in (text, text.partition("\n")[0]):
        with suppress(ValueError):
            value = json.loads(part)
            value = value.get("run", value) if isinstance(value, dict) else None
            if isinstance(value, dict) and isinstance(value.get("fields"), dict):
                return value
    return None


def prepare_output(
    config: StageConfig,
    data_fingerprints: Mapping[str, str],
    *,
    stage: str,
    saved: Sequence[str] = ("checkpoints/step-*/manifest.json",),
) -> Run:
    """Decides what to do with `output_dir`; writes nothing.

    The same result-affecting fields and data continue, or repeat the answer. Others are refused,
    unless the earlier attempt failed before it had saved anything.

    Args:
        config: A stage's configuration.
        data_fingerprints: Content hash of each data set (and of anything else that counts).
        stage: Name of the stage.
        saved: Patterns of files that are worth continuing from.

    Raises:
        InputError: If the folder holds another run, files of no run, or anything at all with
            `resume: never`; if it cannot be written.
    """
    contents = {f"{name} (content)": value for name, value in data_fingerprints.items()}
    resolved = config.model_copy(update={"dtype": dtype_name(config.dtype, config.device)})
    fields = {**result_fields(resolved), **contents}
    identity = json.loads(json.dumps({"stage": stage, "fields": fields}, default=str))
    output = Output(config.output_dir)
    if not output.remote:
        _check_writable(output.path)
    run = Run(config, output, identity, config_to_yaml(resolved), saved)
    run.look()
    return run


def _check_writable(path: Path) -> None:
    """Refuses a folder that is none, or in which nothing can be written."""
    if path.is_file():
        raise InputError(f"output_dir: {path} is a file; expected a folder")
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise InputError(f"output_dir: cannot write to {path}: {existing} is no folder")
    finished = (path / RESULT_FILE).is_file()  # may be somebody else's, to be read only
    if not finished and not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output_dir: cannot write to {path}: no permission for {existing}")


def _refuse_changes(
    config: StageConfig, earlier: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    folder = config.output_dir
    if earlier.get("stage") != now["stage"]:
        raise InputError(
            f"output_dir: {folder} holds a run of {earlier.get('stage')}, not of {now['stage']}; "
            "choose another output_dir"
        )
    old, new = earlier.get("fields", {}), now["fields"]
    changed = [
        name
        for name in {**old, **new}
        if _addresses(old.get(name)) != _addresses(new.get(name)) and not _is_moved(name, old, new)
    ]
    if changed:
        changes = {n: f"{n}: changed from {old.get(n)!r} to {new.get(n)!r}" for n in changed}
        if "dtype" in changes and config.dtype == "auto" and old.get("dtype") != "auto":
            changes["dtype"] += (
                f", which is what auto means on this machine; give {old.get('dtype')} to continue"
            )
        raise InputError(
            [
                *changes.values(),
                f"output_dir: {folder} holds a run made with the old values; choose another "
                "output_dir, or empty the folder",
            ]
        )


def _is_moved(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True for the address of something that is the same at its new place."""
    content = f"{'base_model' if name == 'revision' else name} (content)"
    return bool(old.get(content)) and old.get(content) == new.get(content)


def _addresses(value: Any) -> str:
    """The value as JSON, with one way to write what is in a bucket."""
    return json.dumps(value).replace(f'"{storage.MOUNT}/', '"gs://')
