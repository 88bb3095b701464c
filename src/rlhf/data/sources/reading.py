"""From what a field of a configuration names to records, whatever holds them."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rlhf.config.sources import GivenRows, SourceEntry, entries, parse_sources
from rlhf.data.sources.files import expand_path, open_file
from rlhf.data.sources.formats import read_stream
from rlhf.data.sources.given import GivenSource
from rlhf.data.sources.hub import hub_id, hub_sources, is_hub_address
from rlhf.data.sources.record import BrokenSourceError, Record
from rlhf.data.sources.source import Entry, Source
from rlhf.errors import InputError
from rlhf.files.storage import is_remote, open_store


class FileSource(Source):
    """A file of any format, here or in a store.

    Args:
        path: Its path or fsspec address.
    """

    def __init__(self, path: str) -> None:
        self.name = path

    def records(self, number: int) -> Iterator[Record]:
        """Yield every row; see `Source`."""
        with open_file(self.name) as stream:
            yield from read_stream(self.name, stream, number)

    def stamp(self) -> tuple[object, ...]:
        """Return a value that changes whenever the content does."""
        try:
            if is_remote(self.name):
                filesystem, root = open_store(self.name)
                return self.name, filesystem.ukey(root)
            about = os.stat(self.name)
        except Exception:  # every store raises its own kind; reading will report the problem
            return self.name, object()
        return self.name, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def find_sources(data: Any, name: str) -> list[Source]:
    """Return the sources that a field of a configuration names.

    Args:
        data: What `rlhf.config.Sources` holds, or what becomes that: a path, a glob, a folder, an
            fsspec address, rows, an entry with weight and limit, or a list of these.
        name: The field, for messages.

    Raises:
        InputError: Something that it names is not there; lists everything that is not.
    """
    found: list[Source] = []
    problems: list[str] = []
    listed = entries(parse_sources(data, name))
    weighted = any(one.weight is not None for one in listed)
    for index, given in enumerate(listed):
        place = name if len(listed) == 1 else f"{name}[{index}]"
        try:
            sources, commit = _sources(given, name, place)
        except InputError as error:
            problems += error.problems
            continue
        entry = Entry(
            index,
            place if isinstance(given.path, GivenRows) else given.path,
            (given.weight or 1.0) if weighted else None,
            given.limit,
            commit,
        )
        for source in sources:
            source.entry = entry
        found += sources
    if problems:
        raise InputError(problems)
    return found


def _sources(given: SourceEntry, name: str, place: str) -> tuple[list[Source], str]:
    """Return the sources of one entry of a field, and their commit if they are on the Hub."""
    path = given.path
    if isinstance(path, GivenRows):
        return [GivenSource(path.rows, place)], ""
    if is_hub_address(path) or hub_id(path) is not None:
        return hub_sources(path, name)
    return [FileSource(file) for file in expand_path(path, name)], ""


def read_records(sources: Sequence[Source]) -> Iterator[Record]:
    """Yield every row of all sources; what is wrong with a source is its last record."""
    read: Counter[int] = Counter()  # rows of each entry that has a limit
    for number, source in enumerate(sources):
        entry = source.entry
        if entry.limit is None:
            yield from _records(source, number)
        elif left := entry.limit - read[entry.index]:
            for record in islice(_records(source, number), left):
                read[entry.index] += 1
                yield record


def _records(source: Source, number: int) -> Iterator[Record]:
    try:
        yield from source.records(number)
    except BrokenSourceError as error:
        yield Record(number, error.row, problem=error.problem, whole_file=True)
    except InputError as error:
        problem = error.problems[0].removeprefix(f"{source.name} ")
        yield Record(number, 0, problem=problem, whole_file=True)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        yield Record(number, 0, problem=problem, whole_file=True)
