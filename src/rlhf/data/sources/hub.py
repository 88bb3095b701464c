"""Data sets of the Hugging Face Hub: their files, all of one commit.

`datasets` knows which files make up a configuration and a split; they are read like any others, so
that a bad row has a place and no second copy is written. Only where it has to interpret files
(formats that are not in `formats`, options in the data set's card) it reads them itself. Scripts of
data sets are never run: `datasets` from version 4 has none.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.sources.files import expand_path, open_file
from rlhf.data.sources.formats import format_of, read_stream
from rlhf.data.sources.given import GivenSource
from rlhf.data.sources.record import Record
from rlhf.data.sources.source import Source
from rlhf.errors import InputError
from rlhf.files.disk import cache_folder
from rlhf.files.hub import hub_errors, silent_bar
from rlhf.files.text import write_text

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ID = re.compile(
    rf"(?:hf://datasets/)?({_NAME})(?:@([^:]+))?(?::(?:([^/:]+)/)?([^/:]+))?", re.ASCII
)
_ADDRESS = re.compile(rf"hf://datasets/({_NAME})(?:@([^/]+))?/(.+)", re.ASCII)
# Splits with more bytes are read piece by piece instead of being downloaded.
_LARGE = 4 * 2**30
_PATHS_AT_ONCE = 500
# Branch or tag to snapshot, by cache and revision: a process must not see a branch move.
_SNAPSHOTS: dict[tuple[str, str, str | None], Path] = {}


class HubId(NamedTuple):
    """What USER/SET[@REVISION][:[CONFIG/]SPLIT] says.

    Attributes:
        name: USER/SET.
        revision: Branch, tag or commit; None for the main branch.
        config: Name of its configuration; None if there is one.
        split: Name of the split; None for the only one, or train.
    """

    name: str
    revision: str | None
    config: str | None
    split: str | None


def hub_id(path: str) -> HubId | None:
    """Return what a path says if it can be a data set of the Hub; None if it is anything else.

    Whatever exists here under this name, or is called like a data file, is a path.
    """
    found = _ID.fullmatch(path)
    if found is None or os.path.exists(path):
        return None
    if not path.startswith("hf://") and found[4] is None and format_of(path) is not None:
        return None
    return HubId(*found.groups())


def is_hub_address(path: str) -> bool:
    """Return whether a path is the address of files of a data set, hf://datasets/USER/SET/…."""
    return _ADDRESS.fullmatch(path) is not None


class HubFile(Source):
    """One file of a data set.

    Args:
        repository: Name of the data set, USER/SET.
        commit: Its commit.
        path: The file's path in it.
        stream: Whether to read it piece by piece, without a copy on disk.
    """

    def __init__(self, repository: str, commit: str, path: str, *, stream: bool = False) -> None:
        self.name = f"hf://datasets/{repository}/{path}"
        self._repository, self._commit, self._path = repository, commit, path
        self._stream = stream

    def records(self, number: int) -> Iterator[Record]:
        """Yield every row; see `Source`."""
        from huggingface_hub import hf_hub_download

        with hub_errors(self._repository, self._commit, "dataset"):
            if self._stream:
                address = f"hf://datasets/{self._repository}@{self._commit}/{self._path}"
                file = open_file(address)
            else:
                local = hf_hub_download(
                    self._repository, self._path, repo_type="dataset", revision=self._commit
                )
                file = open_file(local)
        with file:
            yield from read_stream(self.name, file, number)

    def stamp(self) -> tuple[object, ...]:
        """Return a value that changes whenever the content does: a commit never does."""
        return self._repository, self._commit, self._path


def hub_sources(path: str, field: str) -> tuple[list[Source], str]:
    """Return the files of a data set of the Hub, and its commit.

    Args:
        path: What `hub_id` or `is_hub_address` knows.
        field: Configuration field to name in messages.

    Returns:
        The sources, and USER/SET@COMMIT.

    Raises:
        InputError: It is not there, cannot be read, or has no such configuration or split.
    """
    try:
        if (address := _ADDRESS.fullmatch(path)) is not None:
            return _of_address(*address.groups())
        said = hub_id(path)
        if said is None:
            raise InputError(f"{path} is no data set of the Hub")
        return _of_id(said)
    except InputError as error:
        raise InputError([f"{field}: {problem}" for problem in error.problems]) from error


def _of_address(name: str, revision: str | None, inner: str) -> tuple[list[Source], str]:
    folder = _snapshot(name, revision)
    commit = folder.name
    root = str(folder) if is_offline() else f"hf://datasets/{name}@{commit}"
    try:
        files = expand_path(f"{root}/{inner}", "")
    except InputError as error:
        problems = [one.removeprefix(": ").replace(f"@{commit}", "") for one in error.problems]
        raise InputError(problems) from error
    paths = [file.removeprefix(f"{root}/") for file in files]
    return _files(name, commit, paths), f"{name}@{commit}"


def _of_id(said: HubId) -> tuple[list[Source], str]:
    folder = _snapshot(said.name, said.revision)
    commit = f"{said.name}@{folder.name}"
    known = _record(said, folder)
    if is_offline() and known.is_file():
        paths = json.loads(known.read_text(encoding="utf-8"))
        return _files(said.name, folder.name, paths), commit
    place, revision = (str(folder), None) if is_offline() else (said.name, folder.name)
    builder, config = _builder(said, place, revision)
    files: Mapping[str, Any] = builder.config.data_files or {}
    split = _split(said, config, [str(name) for name in files])  # of `datasets`' own type
    root = f"{folder}/" if is_offline() else f"hf://datasets/{said.name}@{folder.name}/"
    urls = [str(file) for file in files[split]]
    if _is_plain(builder) and all(format_of(url) and url.startswith(root) for url in urls):
        paths = [url.removeprefix(root) for url in urls]
        with suppress(OSError):  # the folder may be full, or not ours
            write_text(known, json.dumps(paths))
        return _files(said.name, folder.name, paths), commit
    from datasets import load_dataset

    with _dataset_errors(said):
        rows = load_dataset(place, config, split=split, revision=revision, streaming=True)
    return [GivenSource(rows, f"hf://datasets/{said.name}:{config}/{split}")], commit


def is_offline() -> bool:
    """Return whether only the cache of the Hub may be used."""
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def _record(said: HubId, folder: Path) -> Path:
    """Return where the files of a split are noted, for when there is no Hub to ask."""
    key = "\n".join(map(str, (folder, said.name, said.config, said.split)))
    return cache_folder() / "hub" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _snapshot(name: str, revision: str | None) -> Path:
    """Return the folder in which the Hub's cache keeps the commit of a revision."""
    from huggingface_hub import constants, snapshot_download

    key = f"{constants.ENDPOINT} {constants.HF_HUB_CACHE}", name, revision
    if key not in _SNAPSHOTS:
        with hub_errors(name, revision, "dataset"):
            _SNAPSHOTS[key] = Path(
                snapshot_download(
                    name,
                    repo_type="dataset",
                    revision=revision,
                    allow_patterns=["README.md", ".gitattributes"],
                    tqdm_class=silent_bar(),
                )
            )
    return _SNAPSHOTS[key]


def _builder(said: HubId, place: str, revision: str | None) -> tuple[Any, str | None]:
    """Return the object of `datasets` that knows the files, and the configuration it is for."""
    from datasets import get_dataset_config_names, load_dataset_builder

    with _dataset_errors(said):
        names = get_dataset_config_names(place, revision=revision)
        config = said.config or (names[0] if len(names) == 1 else None)
        if config is None and "default" in names:
            config = "default"
        if config is None and said.split in names:
            raise InputError(
                f"{said.name} on the Hub has {said.split} as a configuration, not as a split; give "
                f"{said.name}:{said.split}/SPLIT"
            )
        if config not in names:
            has = "has no" if config else "has several configurations, expected one; it has no"
            what = f"configuration {config}" if config else "default"
            example = f"{said.name}:{names[0] if names else 'CONFIG'}/{said.split or 'train'}"
            raise InputError(
                f"{said.name} on the Hub {has} {what}; give one of {', '.join(names)}: {example}"
            )
        return load_dataset_builder(place, config, revision=revision), config


def _split(said: HubId, config: str | None, names: Sequence[str]) -> str:
    """Return the split that is meant."""
    split = said.split or (names[0] if len(names) == 1 else "train")
    if split in names:
        return split
    where = f"{said.name}:{config}/" if said.config else f"{said.name}:"
    hint = f"give one of {', '.join(names)}: {where}{names[0]}" if names else "it has no data files"
    if is_offline():
        hint += " (or another while the Hub can be reached: HF_HUB_OFFLINE forbids it)"
    raise InputError(f"{said.name} on the Hub has no split {split}; {hint}")


def _files(name: str, commit: str, paths: Sequence[str]) -> list[Source]:
    """Return the sources of some files, which are not copied if they are large."""
    from huggingface_hub import HfApi

    size = 0
    for start in range(0, 0 if is_offline() else len(paths), _PATHS_AT_ONCE):
        part = list(paths[start : start + _PATHS_AT_ONCE])
        with hub_errors(name, commit, "dataset"):
            found = HfApi().get_paths_info(name, part, revision=commit, repo_type="dataset")
        size += sum(getattr(one, "size", 0) for one in found)
    return [HubFile(name, commit, path, stream=size > _LARGE) for path in paths]


def _is_plain(builder: Any) -> bool:
    """Return whether the data set's card says nothing of how to read its files."""
    given, plain = builder.config, type(builder.config)()
    names = vars(plain).keys() - {
        "name", "version", "data_dir", "data_files", "description", "features"
    }  # fmt: skip
    return all(getattr(given, name) == getattr(plain, name) for name in names)


@contextmanager
def _dataset_errors(said: HubId) -> Iterator[None]:
    """Turn what `datasets` raises about the contents of a repository into InputErrors."""
    with hub_errors(said.name, said.revision, "dataset"):
        try:
            yield
        except ValueError as error:  # of the card, the names or the formats of the files
            raise InputError(
                f"{said.name} on the Hub is no data set that can be read: {error!s:.300}"
            ) from error
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            raise InputError(
                f"{said.name} on the Hub is a script that makes the data, and no such script is "
                "run here; give another data set, or the rows as files"
            ) from error
        except FileNotFoundError as error:
            if type(error).__name__ not in ("EmptyDatasetError", "DataFilesNotFoundError"):
                raise
            problem = f"{said.name} on the Hub holds no data files of a known format"
            raise InputError(problem) from error
