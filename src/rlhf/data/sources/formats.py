"""The formats of files: which one a file has, by its name and its first bytes.

Another format is a line of `FORMATS` and the function that it names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from rlhf.data.sources.compression import COMPRESSIONS, decompressed, without_suffix
from rlhf.data.sources.csv_text import read_csv, read_tsv
from rlhf.data.sources.json_text import read_json_text
from rlhf.data.sources.record import BrokenSourceError, Record
from rlhf.data.sources.tables import ARROW_FILE, PARQUET, read_arrow, read_parquet


@dataclass(frozen=True)
class Format:
    """One format of files.

    Attributes:
        name: Its name for people.
        suffixes: How names of such files end.
        read: Yields the rows of a stream, given the index of the source.
        magic: The first bytes of every such file; b"" for text.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[IO[bytes], int], Iterator[Record]]
    magic: bytes = b""

    @property
    def is_text(self) -> bool:
        """Whether it is text, which may be compressed as a whole."""
        return self.read not in (read_parquet, read_arrow)


JSON = Format("JSON Lines", (".jsonl", ".ndjson", ".json"), read_json_text)
FORMATS = (
    JSON,
    Format("parquet", (".parquet", ".pq"), read_parquet, PARQUET),
    Format("CSV", (".csv",), read_csv),
    Format("TSV", (".tsv",), read_tsv),
    Format("Arrow", (".arrow", ".feather", ".ipc"), read_arrow),
)
# What people have and no reader takes, by the first bytes.
_REFUSED = {
    b"PK\x03\x04": "is a zip archive (or a spreadsheet), expected a data file; unpack it, or save "
    "the sheet as CSV",
    b"FEA1": "is Feather version 1, expected Arrow or parquet; write it again",
    b"\x89HDF": "is HDF5, expected JSON Lines, parquet, CSV or Arrow",
}


def format_of(name: str) -> Format | None:
    """Return the format that a file's name promises; None if it promises none.

    Args:
        name: A path or an address, possibly with the suffix of a compression.
    """
    plain, _ = without_suffix(name.partition("?")[0] if "://" in name else name)
    suffix = PurePosixPath(plain).suffix.lower()
    return next((one for one in FORMATS if suffix in one.suffixes), None)


def read_stream(name: str, stream: IO[bytes], number: int) -> Iterator[Record]:
    """Yield every row of a file.

    Args:
        name: Its path or address.
        stream: The file, with a buffer to look ahead.
        number: Index of the source.

    Raises:
        BrokenSourceError: It is no file of rows, or cannot be read to its end.
    """
    start = stream.peek(16)[:16]  # type: ignore[attr-defined]
    promised = format_of(name)
    for magic, problem in _REFUSED.items():
        if start.startswith(magic):
            raise BrokenSourceError(problem)
    _, compression = without_suffix(name)
    if promised is not None and not promised.is_text:
        if compression is not None:
            raise BrokenSourceError(
                f"is {promised.name} and {compression.name} at once, expected one; unpack it"
            )
        if not start.startswith(promised.magic):
            raise BrokenSourceError(f"is no {promised.name} file, as its name says, or is damaged")
        yield from promised.read(stream, number)
        return
    if found := _table(start):
        if promised is not None:
            raise BrokenSourceError(f"is {found.name}, expected {promised.name} as its name says")
        yield from found.read(stream, number)
        return
    with decompressed(stream, start, compression) as text:
        yield from (promised or JSON).read(text, number)


def _table(start: bytes) -> Format | None:
    """Return the format of columns that a file's first bytes show."""
    if start.startswith(ARROW_FILE):
        return FORMATS[-1]
    return next((one for one in FORMATS if one.magic and start.startswith(one.magic)), None)


def suffixes() -> str:
    """List how names of data files end, for messages."""
    plain = [suffix for one in FORMATS for suffix in one.suffixes]
    return ", ".join([*plain, *(f"…{one.suffix}" for one in COMPRESSIONS)])
