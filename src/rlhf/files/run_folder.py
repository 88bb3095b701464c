"""A stage's folder: whether it is new, unfinished or finished, and which run it belongs to."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf.config import StageConfig, config_to_yaml, result_fields
from rlhf.config.describe import leaf_fields
from rlhf.errors import InputError
from rlhf.files import storage
from rlhf.files.disk import remove_unfinished, settle
from rlhf.files.lease import LOCK, Lease, lease
from rlhf.files.output import PARTIAL_SUMS, RESULT_FILE, RESUMING, RUN_FILE, Output, path_in
from rlhf.files.text import to_json, write_text
from rlhf.hardware import dtype_name
from rlhf.untrusted import read_json

CONFIG_FILE = "config.yaml"


class Status(Enum):
    """What `output_dir` already holds of the requested run."""

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
        saved: Patterns of files worth continuing from.
        status: What was found in the folder.
        lease: The right to write to the folder, while it is held.
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
        """Hold the folder's lease for the duration of a block, unless this run already holds it.

        Args:
            look: Whether to inspect the folder again, now that no other process writes to it.

        Raises:
            InputError: Another process holds it, or has since put something else in the folder.
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
        """Find out what the folder holds, without writing to it.

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
        # If no record is readable, everything in it is damaged: start over.
        begun = begun and earlier is not None
        self.status = Status.FINISHED if finished else Status.CONTINUE if begun else Status.FRESH

    def start(self) -> None:
        """Record what the run is made of, run.json before anything else."""
        remove_unfinished(self.output.path)
        write_text(self.output.path / RUN_FILE, to_json(self.identity))
        write_text(self.output.path / CONFIG_FILE, self.config_text)
        self.output.publish()

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, the mark of a finished run, after everything else is in place."""
        result = {**metrics, "finished": True}
        if not self.output.remote:
            settle(self.output.path)
        write_text(self.output.path / RESULT_FILE, to_json(result))
        self.output.publish()
        self.output.remove(*RESUMING)
        return result

    def conclude(self) -> dict[str, Any]:
        """Remove what a killed process left in a finished run's folder.

        Returns:
            The final metrics.
        """
        with suppress(OSError):  # the folder may be read-only for us
            remove_unfinished(self.output.path)
        self.output.remove(*RESUMING)
        if not self.output.remote and (self.output.path / LOCK).exists():
            with suppress(InputError), self.held(look=False):  # removes a killed holder's files
                pass
        return read_json(self.output.path / RESULT_FILE) or {}

    def file(self, *names: str) -> str:
        """Return the path where the user finds something of this run."""
        return path_in(self.output.folder, *names)

    def _recorded_identity(self, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the identity of the run in the folder, from run.json or else from what it saved.

        If run.json is damaged, checkpoints and inference's checksums hold it too.
        """
        states = [name for name in names if fnmatch(name, "checkpoints/step-*/state.json")]
        for name in (RUN_FILE, *sorted(states, reverse=True), PARTIAL_SUMS):
            self.output.fetch(name)
            if (found := _identity_in(self.output.path / name)) is not None:
                return found
        return None

    def _only_config(self, names: Sequence[str]) -> bool:
        """Return whether the folder holds only the configuration that this run would write."""
        if list(names) != [CONFIG_FILE]:
            return False
        self.output.fetch(CONFIG_FILE)
        path = self.output.path / CONFIG_FILE
        return path.read_text(encoding="utf-8", errors="replace") == self.config_text


def _identity_in(path: Path) -> Mapping[str, Any] | None:
    """Return a run's identity from run.json, a checkpoint's state, or the first JSON line."""
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
    commits: Mapping[str, str] | None = None,
    saved: Sequence[str] = ("checkpoints/step-*/manifest.json",),
) -> Run:
    """Decide what to do with `output_dir`, without writing to it.

    A run with the same data and the same result-affecting fields is continued or, if finished, left
    alone. Other runs are refused, unless the earlier attempt failed before saving anything.

    Args:
        config: A stage's configuration.
        data_fingerprints: Content hash of each data set (and of anything else that matters).
        stage: Name of the stage.
        commits: Commits of the data sets that come from the Hub, as USER/SET@COMMIT.
        saved: Patterns of files worth continuing from.

    Raises:
        InputError: The folder holds another run, files of no run, or anything at all with
            `resume: never`; or it cannot be written to.
    """
    contents = {f"{name} (content)": value for name, value in data_fingerprints.items()}
    contents |= {f"{name} (commit)": value for name, value in (commits or {}).items()}
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
    """Refuse a path that is not a folder, or a folder that cannot be written to."""
    if path.is_file():
        raise InputError(f"output_dir: {path} is a file; expected a folder")
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise InputError(f"output_dir: cannot write to {path}: {existing} is no folder")
    finished = (path / RESULT_FILE).is_file()  # may be someone else's, only to be read
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
    # A field that did not exist when the run began acted as its default does.
    old, new = _defaults(type(config)) | earlier.get("fields", {}), now["fields"]
    changed = [
        name
        for name in {**earlier.get("fields", {}), **new}
        if _addresses(old.get(name)) != _addresses(new.get(name)) and not _is_moved(name, old, new)
    ]
    if changed:
        changes = {n: f"{n}: changed from {old.get(n)!r} to {new.get(n)!r}" for n in changed}
        if "dtype" in changes and config.dtype == "auto" and old.get("dtype") != "auto":
            changes["dtype"] += (
                f", which is what auto means on this machine; give {old.get('dtype')} to continue"
            )
        for name in changes:
            if name.endswith(" (commit)") and old.get(name):
                changes[name] += f"; give {old[name]} to continue with the old rows"
        raise InputError(
            [
                *changes.values(),
                f"output_dir: {folder} holds a run made with the old values; choose another "
                "output_dir, or empty the folder",
            ]
        )


def _defaults(cls: type[StageConfig]) -> dict[str, Any]:
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in leaf_fields(cls)
        if not field.is_required()
    }


def _is_moved(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether an address only moved and the content is the same at its new place."""
    plain = "base_model" if name == "revision" else name.removesuffix(" (commit)")
    content = f"{plain} (content)"
    return bool(old.get(content)) and old.get(content) == new.get(content)


def _addresses(value: Any) -> str:
    """Return the value as JSON, with one spelling for addresses in buckets."""
    return json.dumps(value).replace(f'"{storage.MOUNT}/', '"gs://')
