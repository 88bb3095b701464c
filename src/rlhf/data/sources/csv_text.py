"""Comma- and tab-separated values with a header line."""

import csv
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from rlhf.data.sources import record
from rlhf.data.sources.json_text import UTF16, UTF16_BOMS
from rlhf.data.sources.record import BrokenSourceError, Record, too_long

# Fields of the library's rows that are never texts: a cell of theirs is read as JSON if it is JSON.
_JSON_FIELDS = frozenset(("messages", "candidates", "ranking", "margin"))
_PIECE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|$)")
_BAD_BYTE = re.compile("[\udc80-\udcff]")


def read_csv(stream: IO[bytes], number: int) -> Iterator[Record]:
    """Yield every row of comma-separated values; cells are texts, and empty ones are missing.

    Args:
        stream: The text.
        number: Index of the source.

    Raises:
        BrokenSourceError: It is none, or cannot be read to its end.
    """
    return _read(stream, number, ",")


def read_tsv(stream: IO[bytes], number: int) -> Iterator[Record]:
    """Yield every row of tab-separated values; see `read_csv`."""
    return _read(stream, number, "\t")


class _TooLongError(Exception):
    """A row goes on and on."""


class _Lines:
    """The lines of a text, numbered.

    Attributes:
        number: Number of the last line, from 1.
        size: Bytes read since it was last set to 0.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.number = self.size = 0
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        while raw := self._stream.readline(record.MAX_ROW_BYTES + 1):
            if not self.number:
                if raw.startswith(UTF16_BOMS):
                    raise BrokenSourceError(UTF16)
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            # Bytes that are not UTF-8 stay visible, as half characters.
            text = raw.decode("utf-8", "surrogateescape")
            for piece in _PIECE.findall(text) if "\r" in text else (text,):
                if piece:
                    self.number += 1
                    self.size += len(piece)
                    if self.size > record.MAX_ROW_BYTES:
                        raise _TooLongError
                    yield piece


def _read(stream: IO[bytes], number: int, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), record.MAX_ROW_BYTES))
    lines = _Lines(stream)
    rows = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line, lines.size = lines.number + 1, 0
        try:
            cells = next(rows)
        except StopIteration:
            break
        except _TooLongError:
            raise BrokenSourceError(f"{too_long()} (a quote left open?)", line) from None
        except csv.Error as error:
            kind = "CSV" if delimiter == "," else "TSV"
            raise BrokenSourceError(f"is not {kind} ({error})", line) from None
        if not cells:  # a blank line
            continue
        if names is None:
            names = _header(cells, line, delimiter)
        else:
            yield _row(names, cells, number, line)
    if names is None:
        raise BrokenSourceError("is empty, expected a header line with the names of the columns")


def _header(cells: list[str], line: int, delimiter: str) -> list[str]:
    """Return the names of the columns; "" for an unnamed one, such as the index of pandas."""
    twice = next((name for name in cells if name and cells.count(name) > 1), None)
    if twice is not None:
        raise BrokenSourceError(f"has two columns called {twice:.100}, expected one", line)
    others = [mark for mark in (",", "\t", ";") if mark != delimiter and mark in cells[0]]
    if len(cells) == 1 and others:
        what = "commas" if delimiter == "," else "tabs (.csv has commas)"
        raise BrokenSourceError(f"has a header of one column, expected {what} between them", line)
    return cells


def _row(names: list[str], cells: list[str], number: int, line: int) -> Record:
    if len(cells) != len(names):
        count = f"has {len(cells)} cell{'' if len(cells) == 1 else 's'}"
        problem = f"{count}, expected the {len(names)} of the header"
        return Record(number, line, problem=problem)
    if any(map(_BAD_BYTE.search, cells)):
        return Record(number, line, problem="is not UTF-8, expected UTF-8")
    value: dict[str, Any] = {
        name: cell for name, cell in zip(names, cells, strict=True) if cell and name
    }
    for name in _JSON_FIELDS & value.keys():
        try:
            value[name] = json.loads(value[name])
        except (ValueError, RecursionError):  # the text is judged like any other value
            continue
    return Record(number, line, value)
