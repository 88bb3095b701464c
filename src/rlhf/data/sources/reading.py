"""Sources of rows and the one way to read them all."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data.sources.files import expand_paths, open_file
from rlhf.data.sources.formats import read_stream
from rlhf.data.sources.record import BrokenSourceError, Record
from rlhf.errors import InputError
from rlhf.files.storage import is_remote, open_store


class Source(ABC):
    """Something that holds rows.

    Attributes:
        name: What messages call it; rows are `NAME:NUMBER`.
    """

    name: str

    @abstractmethod
    def records(self, number: int) -> Iterator[Record]:
        """Yield every row.

        Args:
            number: Index of this source in its list.

        Raises:
            BrokenSourceError: It cannot be read any further.
            InputError: It cannot be read at all.
            OSError: The same, in the system's or a store's words.
        """

    @abstractmethod
    def stamp(self) -> tuple[object, ...]:
        """Return a value that changes whenever the content does."""


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
        data: A path, a glob, a folder, an fsspec address, or a list of these.
        name: The field, for messages.

    Raises:
        InputError: Something that it names is not there.
    """
    return [FileSource(path) for path in expand_paths(data, name)]


def read_records(sources: Sequence[Source]) -> Iterator[Record]:
    """Yield every row of all sources; what is wrong with a source is its last record."""
    for number, source in enumerate(sources):
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


def place(sources: Sequence[Source], record: Record) -> str:
    """Return where a record is, for messages: `SOURCE:ROW`, or the source as a whole."""
    name = sources[record.file].name
    return f"{name}:{record.line}" if record.line else name
