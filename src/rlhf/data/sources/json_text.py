"""JSON in text files: one object per line, or one array of objects; in bounded memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from rlhf.data.sources import record
from rlhf.data.sources.record import BrokenSourceError, Record, mend, too_long

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
UTF16 = "is UTF-16, expected UTF-8"
_MANY_DIGITS = "has a number of thousands of digits, expected a smaller one"
_DECODER = json.JSONDecoder()
_scan = _DECODER.scan_once  # type: ignore[attr-defined]  # json.loads without what lines do not need
_SPACE = re.compile(r"[ \t\r\n]*")
_AFTER = re.compile(r"[ \t\r\n,\]]")
_CHUNK = 2**18


def read_json_text(stream: IO[bytes], number: int) -> Iterator[Record]:
    """Yield every row of a text that is JSON Lines or one JSON array.

    Args:
        stream: The text, with a buffer to look ahead.
        number: Index of the source.

    Raises:
        BrokenSourceError: It is neither, or cannot be read to its end.
    """
    start = stream.peek(2**12)  # type: ignore[attr-defined]
    if start.removeprefix(_UTF8_BOM).lstrip().startswith(b"["):
        return _read_array(stream, number)
    return _read_lines(stream, number)


def _read_lines(stream: IO[bytes], number: int) -> Iterator[Record]:
    first = True
    for line, raw in _lines(stream):
        if first:
            if raw.startswith(UTF16_BOMS):
                raise BrokenSourceError(UTF16)
            raw = raw.removeprefix(_UTF8_BOM)
        raw = raw.strip(b" \t")
        if not raw:
            continue
        if first and raw == b"{":
            raise BrokenSourceError(
                "is one JSON value over several lines, expected one object per line, or an array"
            )
        first = False
        yield _parse_line(raw, number, line)
    if first:
        raise BrokenSourceError("is empty, expected one JSON object per line")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends (LF, CRLF or CR), cut just above the limit."""
    number = 0
    limit = record.MAX_ROW_BYTES + 2
    while raw := stream.readline(limit):
        complete = raw.endswith(b"\n") or len(raw) < limit
        # A raw carriage return is not allowed inside JSON text, so it ends a line too.
        for piece in raw.splitlines():
            number += 1
            yield number, piece
        while not complete:
            rest = stream.readline(2**20)
            complete = not rest or rest.endswith(b"\n")


def _parse_line(raw: bytes, file: int, line: int) -> Record:
    if len(raw) > record.MAX_ROW_BYTES:
        return Record(file, line, problem=too_long())
    try:
        text = raw.decode("utf-8")
        try:
            value, end = _scan(text, 0)
        except StopIteration:
            end = -1
        if end != len(text):
            value = json.loads(text)  # says what is wrong
        if _SURROGATE_ESCAPE.search(raw) and (mended := mend(value)) != value:
            return Record(file, line, mended, mended=True, raw=raw)
        return Record(file, line, value, "", False, False, raw)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        return Record(file, line, problem=f"is not UTF-8 ({byte}), expected UTF-8")
    except RecursionError:
        return Record(file, line, problem="is nested too deeply, expected a flat object")
    except json.JSONDecodeError as error:
        where = f"{error.msg.lower()} at column {error.colno}"
        return Record(file, line, problem=f"is not JSON ({where}), expected one JSON object")
    except ValueError:  # Python refuses to convert integers this long
        return Record(file, line, problem=_MANY_DIGITS)


class _Window:
    """The part of a text that is being read, with a place in it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._text, self._place, self._at_end = "", 0, False
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def next_character(self) -> str:
        """Move past white space; return the character there, "" at the end of the text."""
        while True:
            space = _SPACE.match(self._text, self._place)
            self._place = space.end() if space else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if self._at_end:
                return ""
            self._read_on()

    def step(self) -> None:
        """Move past one character."""
        self._place += 1

    def value(self) -> tuple[Any, str]:
        """Move past the JSON value that begins here; return it and its text.

        Raises:
            ValueError: It is no JSON value, or a number of thousands of digits.
            RecursionError: It is nested too deeply.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                # The start of a number is a number: what follows must show that it is whole.
                if self._at_end or _AFTER.match(self._text, end) or self._is_full():
                    text = self._text[self._place : end]
                    self._place = end
                    return value, text
            except json.JSONDecodeError:  # if only because the rest is not read yet
                if self._at_end or self._is_full():
                    raise
            self._read_on()

    def _is_full(self) -> bool:
        return len(self._text) - self._place > record.MAX_ROW_BYTES

    def _read_on(self) -> None:
        """Drop what lies behind; read at least as much again as lies ahead."""
        rest = self._text[self._place :]
        raw = self._stream.read(max(_CHUNK, len(rest)))
        self._at_end = not raw
        self._text = rest + self._decoder.decode(raw, final=self._at_end)
        self._place = 0


def _read_array(stream: IO[bytes], number: int) -> Iterator[Record]:
    window, row = _Window(stream), 0
    try:
        window.next_character()
        window.step()
        if window.next_character() == "]":
            raise BrokenSourceError("is an empty array, expected objects")
        more = True
        while more:
            row += 1
            window.next_character()
            yield _parse_item(window, number, row)
            end = window.next_character()
            if end not in (",", "]"):
                what = f"{end} follows" if end else "nothing follows: it is cut off"
                raise BrokenSourceError(f"is not one JSON array ({what}), expected , or ]", row)
            more = end == ","
            window.step()
        if window.next_character():
            raise BrokenSourceError("has more text after its JSON array, expected one array")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise BrokenSourceError(f"is not UTF-8 ({byte}), expected UTF-8", row) from error


def _parse_item(window: _Window, number: int, row: int) -> Record:
    try:
        value, text = window.value()
    except RecursionError:
        raise BrokenSourceError("is nested too deeply, expected a flat object", row) from None
    except json.JSONDecodeError as error:
        if len(error.doc) > record.MAX_ROW_BYTES:
            raise BrokenSourceError(too_long(), row) from None
        what = error.msg.lower()
        raise BrokenSourceError(f"is not JSON ({what}), expected one JSON object", row) from None
    except UnicodeDecodeError:
        raise
    except ValueError:  # Python refuses to convert integers this long
        raise BrokenSourceError(_MANY_DIGITS, row) from None
    if len(text) > record.MAX_ROW_BYTES:
        return Record(number, row, problem=too_long())
    if _SURROGATE_ESCAPE.search(text.encode()) and (mended := mend(value)) != value:
        return Record(number, row, mended, mended=True)
    return Record(number, row, value)
