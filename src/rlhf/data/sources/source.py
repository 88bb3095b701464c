"""What holds rows: the one thing that every kind of source is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.data.sources.record import Record


@dataclass(frozen=True)
class Entry:
    """One of the data sets that a field names; it may consist of several sources.

    Attributes:
        index: Its index in the field.
        name: What the user calls it.
        weight: Its share of the rows to train on, relative to the others; None if none has one.
        limit: How many of its first rows are used; None for all.
        commit: The commit of the Hub that it is read from, as USER/SET@COMMIT; "" if from none.
    """

    index: int = 0
    name: str = ""
    weight: float | None = None
    limit: int | None = None
    commit: str = ""


class Source(ABC):
    """A file, or anything else that holds rows.

    Attributes:
        name: What messages call it; rows are `NAME:NUMBER`.
        entry: The data set that it belongs to.
    """

    name: str
    entry: Entry = Entry()

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


def place(sources: Sequence[Source], record: Record) -> str:
    """Return where a record is, for messages: `SOURCE:ROW`, or the source as a whole."""
    name = sources[record.file].name
    return f"{name}:{record.line}" if record.line else name
