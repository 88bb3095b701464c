"""A row as it comes from a source, before anyone looks at its fields."""

import re
from typing import Any, NamedTuple

MAX_PROBLEMS = 20  # reported in full; the rest are only counted
MAX_ROW_BYTES = 16 * 2**20
# Half an emoji, left where JavaScript or Java cut a text; Arrow and tokenizers reject it.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One row of a source.

    Attributes:
        file: Index of the source in its list.
        line: Its number, from 1: the line where it begins in a text file, otherwise the row.
        value: What it holds, as JSON values; meaningless if there is a problem.
        problem: What is wrong, or "".
        whole_file: Whether the problem ends the source: no further rows follow.
        mended: Whether half characters (lone surrogates) were replaced with U+FFFD.
        raw: Its line of JSON without surrounding white space; b"" if the source has no such lines.
    """

    file: int
    line: int
    value: Any = None
    problem: str = ""
    whole_file: bool = False
    mended: bool = False
    raw: bytes = b""


class BrokenSourceError(Exception):
    """A source cannot be read any further.

    Args:
        problem: What is wrong and what to do, in words that follow the source's name.
        row: Number of the row where it happened; 0 if it concerns the source as a whole.
    """

    def __init__(self, problem: str, row: int = 0) -> None:
        super().__init__(problem)
        self.problem = problem
        self.row = row


def too_long() -> str:
    """Return the problem of a row that is larger than any row may be."""
    return f"is longer than {MAX_ROW_BYTES // 2**20} MiB, expected one row"


def mend(value: Any) -> Any:
    """Replace half characters in all texts of a JSON value with U+FFFD."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [mend(item) for item in value]
    if isinstance(value, dict):
        return {mend(key): mend(item) for key, item in value.items()}
    return value
