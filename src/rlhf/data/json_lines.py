"""From paths to lines to JSON values, robust to any file contents, in bounded memory."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf.errors import InputError, closest
from rlhf.files import storage
from rlhf.files.storage import is_remote, locate, open_store, reason

MAX_PROBLEMS = 20  # reported in full; the rest are only counted
MAX_LINE_BYTES = 16 * 2**20
# Half an emoji, left where JavaScript or Java cut a text; Arrow and tokenizers reject it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # json.loads without what lines do not need
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class JsonLine(NamedTuple):
    """One non-blank line.

    Attributes:
        file: Index of the file in its list.
        line: Line number, from 1.
        value: The JSON value; meaningless if there is a problem.
        problem: What is wrong, or "".
        whole_file: Whether the problem concerns the whole file, so that no further lines follow.
        mended: Whether half characters (lone surrogates) were replaced with U+FFFD.
        raw: The line itself, stripped of surrounding whitespace.
    """

    file: int
    line: int
    value: Any = None
    problem: str = ""
    whole_file: bool = False
    mended: bool = False
    raw: bytes = b""


def expand_paths(paths: str | Sequence[str], name: str) -> list[str]:
    """Expand paths and globs into the files that they name.

    Args:
        paths: A path, a glob, an fsspec address (`gs://…`, globs too), or a list of these.
        name: Configuration field to name in messages.

    Returns:
        Existing files, each pattern's matches sorted.

    Raises:
        InputError: If a path is missing or a folder, or a glob has no match.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files: list[str] = []
    problems: list[str] = [] if listed else [f"{name}: names no file, expected at least one"]
    for path in map(locate, map(str, listed)):
        try:
            files += _remote_matches(path) if is_remote(path) else _local_matches(path)
        except InputError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    return files


def _local_matches(path: str) -> list[str]:
    if os.path.isdir(path):
        raise InputError(
            f"{path} is a folder, expected a file (perhaps {path.rstrip('/')}/*.jsonl)"
        )
    if os.path.exists(path):
        return [path]
    if not glob.has_magic(path):
        raise InputError(f"{path} does not exist{_similar(path)}")
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        raise InputError(f"{path} matches no file")
    return matches


def _similar(path: str) -> str:
    with contextlib.suppress(OSError):
        folder = Path(path).parent
        if not folder.is_dir():
            return f" (there is no folder {folder})"
        names = [entry.name for entry in folder.iterdir()]
        near = closest(Path(path).name, names)
        if near:
            return f" (did you mean {folder / near}?)"
    return ""


def _remote_matches(path: str) -> list[str]:
    def find(filesystem: Any, root: str) -> list[str]:
        filesystem.invalidate_cache()  # listings are cached for the life of the process
        if glob.has_magic(root):
            found = filesystem.glob(root, detail=True)
            return sorted(name for name, info in found.items() if info["type"] == "file")
        try:  # `isfile` returns False on every error
            return [root] if filesystem.info(root)["type"] == "file" else []
        except FileNotFoundError:
            return []

    found = _with_filesystem(path, find)
    if not found:
        raise InputError(f"{path} matches no file that can be read")
    scheme = path.split("://")[0]
    return [f"{scheme}://{name.lstrip('/') if scheme == 'gs' else name}" for name in found]


def _with_filesystem(path: str, use: Any) -> Any:
    """Call `use(filesystem, root)`; retry anonymously if a bucket refuses our credentials."""
    attempts: list[dict[str, Any]] = [{}]
    if path.startswith(("gs://", "gcs://")):
        attempts.append({"token": "anon"})
    problem: Exception | None = None
    for options in attempts:
        try:
            result = use(*open_store(path, **options))
            if result:
                return result
        except Exception as error:  # every store raises its own kind
            # The first refusal is more informative than the anonymous one.
            problem = problem or error
    if problem is not None:
        raise InputError(f"{path} cannot be read: {reason(problem)}") from problem
    return None


def open_file(path: str) -> IO[bytes]:
    """Open a local or remote file for reading.

    Raises:
        InputError: If it cannot be opened.
    """
    path = locate(path)
    if is_remote(path):
        stream: IO[bytes] = _with_filesystem(path, storage.open_stored)
        return stream
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json_lines(files: Sequence[str]) -> Iterator[JsonLine]:
    """Yield every non-blank line of the files, unreadable ones with their problem."""
    for number, path in enumerate(files):
        try:
            with open_file(path) as stream:
                yield from _parse_stream(stream, number)
        except InputError as error:
            yield JsonLine(number, 0, problem=error.problems[0], whole_file=True)
        except OSError as error:
            problem = f"{path} cannot be read: {error.strerror or error}"
            yield JsonLine(number, 0, problem=problem, whole_file=True)


def _parse_stream(stream: IO[bytes], number: int) -> Iterator[JsonLine]:
    first = True
    for line, raw in _lines(stream):
        if first:
            if raw.startswith(_UTF16_BOMS):
                problem = "is UTF-16, expected UTF-8"
                yield JsonLine(number, 0, problem=problem, whole_file=True)
                return
            raw = raw.removeprefix(_UTF8_BOM)
        raw = raw.strip(b" \t")
        if not raw:
            continue
        if first and (problem := _not_lines(raw)):
            yield JsonLine(number, 0, problem=problem, whole_file=True)
            return
        first = False
        yield _parse_line(raw, number, line)
    if first:
        yield JsonLine(
            number, 0, problem="is empty, expected one JSON object per line", whole_file=True
        )


def _not_lines(start: bytes) -> str:
    """Return what is wrong with a file whose first line shows that it is one JSON value."""
    if start.startswith(b"["):
        return "is a JSON array, expected one object per line (use rlhf data convert)"
    if start == b"{":
        return "is one JSON value over several lines, expected one object per line"
    return ""


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends (LF, CRLF or CR), cut just above the limit."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 2):
        complete = raw.endswith(b"\n") or len(raw) < MAX_LINE_BYTES + 2
        # A raw carriage return is not allowed inside JSON text, so it ends a line too.
        for piece in raw.splitlines():
            number += 1
            yield number, piece
        while not complete:
            rest = stream.readline(2**20)
            complete = not rest or rest.endswith(b"\n")


def _parse_line(raw: bytes, file: int, line: int) -> JsonLine:
    if len(raw) > MAX_LINE_BYTES:
        limit = MAX_LINE_BYTES // 2**20
        return JsonLine(file, line, problem=f"is longer than {limit} MiB, expected one row")
    try:
        text = raw.decode("utf-8")
        try:
            value, end = _scan(text, 0)
        except StopIteration:
            end = -1
        if end != len(text):
            value = json.loads(text)  # says what is wrong
        if _SURROGATE_ESCAPE.search(raw) and (mended := mend(value)) != value:
            return JsonLine(file, line, mended, mended=True, raw=raw)
        return JsonLine(file, line, value, "", False, False, raw)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        return JsonLine(file, line, problem=f"is not UTF-8 ({byte}), expected UTF-8")
    except RecursionError:
        return JsonLine(file, line, problem="is nested too deeply, expected a flat object")
    except json.JSONDecodeError as error:
        where = f"{error.msg.lower()} at column {error.colno}"
        return JsonLine(file, line, problem=f"is not JSON ({where}), expected one JSON object")
    except ValueError:  # Python refuses to convert integers this long
        problem = "has a number of thousands of digits, expected a smaller one"
        return JsonLine(file, line, problem=problem)


def mend(value: Any) -> Any:
    """Replace half characters in all texts of a JSON value with U+FFFD."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [mend(item) for item in value]
    if isinstance(value, dict):
        return {mend(key): mend(item) for key, item in value.items()}
    return value
