"""A stage's folder: local or remote, new, half done or finished.

Remote folders (`gs://…`, any other fsspec URL, and `/gcs/…`, which is a bucket mounted as a folder)
are written in a local working copy and published as whole files, because object stores can neither
append to a file nor rename a folder.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf import storage
from rlhf.config import StageConfig, config_to_yaml, result_fields
from rlhf.errors import InputError
from rlhf.hardware import dtype_name
from rlhf.storage import find_files, open_store, reason, storage_errors, upload

RUN_FILE = "run.json"
RESULT_FILE = "metrics.json"
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
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


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

    Raises:
        InputError: If the folder's file system is unknown or its package is not installed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.remote = is_remote(folder)
        self._copies: list[_Copy] = []
        if not self.remote:
            self.path = Path(folder)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="rlhf-output-")
        self.path = Path(self._temporary.name)
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

    def publish(self) -> None:
        """Uploads what changed since the last call and removes remotely what is gone locally.

        A checkpoint's manifest goes after its other files and the final metrics go last, so that
        what looks complete is complete.

        Raises:
            StorageError: If the store fails for longer than its library retries. What was complete
                there before is so still.
        """
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

    def _writing(self, name: str) -> AbstractContextManager[None]:
        hint = "what was saved there before is whole; the same command continues from it"
        return storage_errors(f"{self.field}: cannot write {join(self.folder, name)}", hint)


def _ignored(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in IGNORED)


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _publishing_order(name: str) -> tuple[int, str]:
    rank = {"manifest.json": 1, RESULT_FILE: 2}.get(name.rsplit("/", 1)[-1], 0)
    return rank, name


class Status(Enum):
    """What `output_dir` holds of the run that is asked for."""

    FRESH = "nothing worth keeping"
    CONTINUE = "an unfinished run with something saved"
    FINISHED = "the whole run"


@dataclass(frozen=True)
class Run:
    """One stage's run and the folder it lives in.

    Attributes:
        status: What was found.
        output: The folder.
        identity: What determines the results: stage, configuration fields, data fingerprints.
        config_text: The resolved configuration as YAML.
    """

    status: Status
    output: Output
    identity: Mapping[str, Any]
    config_text: str

    def start(self) -> None:
        """Claims the folder: writes what the run is made of."""
        write_text(self.output.path / "config.yaml", self.config_text)
        write_text(self.output.path / RUN_FILE, to_json(self.identity))
        self.output.publish()

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes metrics.json, the mark of a finished run, after everything else is in place."""
        result = {**metrics, "finished": True}
        write_text(self.output.path / RESULT_FILE, to_json(result))
        self.output.publish()
        return result

    def metrics(self) -> dict[str, Any]:
        """The final metrics of a finished run."""
        return read_json(self.output.path / RESULT_FILE) or {}

    def file(self, *names: str) -> str:
        """Where the user finds something of this run."""
        return join(self.output.folder, *names)


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
            `resume: never`.
    """
    contents = {f"{name} (content)": value for name, value in data_fingerprints.items()}
    resolved = config.model_copy(update={"dtype": dtype_name(config.dtype, config.device)})
    fields = {**result_fields(resolved), **contents}
    identity = json.loads(json.dumps({"stage": stage, "fields": fields}, default=str))
    output = Output(config.output_dir)
    if Path(config.output_dir).is_file() and not output.remote:
        raise InputError(f"output_dir: {config.output_dir} is a file; expected a folder")
    names = output.names()
    output.fetch(RUN_FILE, RESULT_FILE)
    earlier = read_json(output.path / RUN_FILE)
    begun = [name for name in names if any(fnmatch(name, pattern) for pattern in saved)]
    finished = bool((read_json(output.path / RESULT_FILE) or {}).get("finished"))

    if names and config.resume == "never":
        raise InputError(
            f"output_dir: {config.output_dir} is not empty and resume is never; choose another "
            "output_dir, empty the folder, or set resume to auto"
        )
    if names and earlier is None:
        raise InputError(
            f"output_dir: {config.output_dir} holds files of no run of rlhf ({names[0]}, …); "
            "choose another output_dir or empty the folder"
        )
    if earlier is not None and (finished or begun):
        _refuse_changes(config, earlier, identity)
    status = Status.FINISHED if finished else Status.CONTINUE if begun else Status.FRESH
    return Run(status, output, identity, config_to_yaml(resolved))


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
        name for name in {**old, **new} if _addresses(old.get(name)) != _addresses(new.get(name))
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


def _addresses(value: Any) -> str:
    """The value as JSON, with one way to write what is in a bucket."""
    return json.dumps(value).replace(f'"{storage.MOUNT}/', '"gs://')
