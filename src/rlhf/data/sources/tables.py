"""Tables of columns: parquet and Arrow, a few rows in memory at a time."""

import datetime
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import IO, Any

from rlhf.data.sources import record
from rlhf.data.sources.record import BrokenSourceError, Record, too_long
from rlhf.errors import StorageError

PARQUET, ARROW_FILE = b"PAR1", b"ARROW1"
# Rows become Python objects in pieces of at most so many, and of no more bytes than a row may have.
_ROWS = 64
_BUFFER = 2**20
_MEMORY = 2**29


def read_parquet(stream: IO[bytes], number: int) -> Iterator[Record]:
    """Yield every row of a parquet file, numbered from 1.

    Args:
        stream: The file.
        number: Index of the source.

    Raises:
        BrokenSourceError: It is none, or cannot be read to its end.
    """
    with _seekable(stream) as file, _arrow_errors("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = pq.ParquetFile(pa.PythonFile(file, mode="r"), buffer_size=_BUFFER)
        rows = _rows_at_once(source.metadata)
        yield from read_batches(source.iter_batches(batch_size=rows), number)


def _rows_at_once(metadata: Any) -> int:
    """Return how many rows fit in memory whatever they are.

    In a few bytes many rows may refer to one huge text of a column's dictionary. It is at most as
    large as the column's piece in a row group.
    """
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY":
                largest = max(largest, column.total_uncompressed_size)
    return max(1, min(_ROWS, _MEMORY // largest))


def read_arrow(stream: IO[bytes], number: int) -> Iterator[Record]:
    """Yield every row of an Arrow IPC file or stream, numbered from 1; see `read_parquet`."""
    import pyarrow as pa

    if stream.peek(8).startswith(ARROW_FILE):  # type: ignore[attr-defined]
        with _seekable(stream) as file, _arrow_errors("Arrow"):
            source = pa.ipc.open_file(pa.PythonFile(file, mode="r"))
            batches = map(source.get_batch, range(source.num_record_batches))
            yield from read_batches(_valid(batches), number)
        return
    with _arrow_errors("Arrow"):
        source = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"))
        yield from read_batches(_valid(source), number)


def _valid(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield record batches as they are in a file, once it is safe to look into them."""
    for batch in batches:
        batch.validate(full=True)  # offsets that point anywhere would crash the process
        yield batch


def read_batches(batches: Iterable[Any], number: int) -> Iterator[Record]:
    """Yield the rows of Arrow record batches, numbered from 1, as JSON values.

    Args:
        batches: Record batches of one schema.
        number: Index of the source.

    Raises:
        BrokenSourceError: Two columns have the same name.
    """
    row, convert = 0, None
    for batch in batches:
        if convert is None:
            _check_names(batch.schema.names)
            convert = not all(map(_is_plain, batch.schema.types))
        for start in range(0, batch.num_rows, _ROWS):
            for values in _values(batch.slice(start, _ROWS)):
                row += 1
                if isinstance(values, str):
                    yield Record(number, row, problem=values)
                    continue
                # A column cannot tell whether a field is null or missing.
                given = {name: value for name, value in values.items() if value is not None}
                yield Record(number, row, json_value(given) if convert else given)


def json_value(value: Any) -> Any:
    """Return a value of a column as JSON has it.

    Dates and times become texts (ISO 8601), decimals numbers, and bytes text, or null if they are
    not UTF-8: pictures, say.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, Decimal):
        whole = value == value.to_integral_value() if value.is_finite() else False
        return int(value) if whole else float(value)
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    return str(value)


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a record batch as dicts, or what is wrong with a row."""
    if batch.nbytes > record.MAX_ROW_BYTES and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _values(batch.slice(0, half))
        yield from _values(batch.slice(half))
        return
    if batch.num_rows == 1 and _row_bytes(batch) > record.MAX_ROW_BYTES:
        yield too_long()
        return
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # no UTF-8, or a time outside of Python's
        if batch.num_rows > 1:
            for place in range(batch.num_rows):
                yield from _values(batch.slice(place, 1))
        elif isinstance(error, UnicodeDecodeError):
            yield f"is not UTF-8 (byte 0x{error.object[error.start]:02x}), expected UTF-8"
        else:
            yield f"holds a value that cannot be read ({error!s:.100}), expected JSON values"


def _row_bytes(batch: Any) -> int:
    """Return the size of a single row; of a dictionary only what the row takes of it."""
    import pyarrow as pa

    decoded = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return sum(column.nbytes for column in decoded)


def _is_plain(kind: Any) -> bool:
    """Return whether the values of a column are JSON values already."""
    import pyarrow as pa

    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    return any(
        test(kind)
        for test in (
            types.is_string,
            types.is_large_string,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_null,
        )
    )


def _check_names(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BrokenSourceError(f"has two columns called {twice:.100}, expected one")


@contextmanager
def _seekable(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the stream, or a copy on disk if one cannot move in it (from web servers)."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, _BUFFER)
        copy.seek(0)
        yield copy


@contextmanager
def _arrow_errors(kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, StorageError) or getattr(error, "errno", None):
            raise  # not about the content
        reason = str(error).splitlines() or [type(error).__name__]
        raise BrokenSourceError(
            f"is not {kind}, or is cut off or damaged ({reason[0]:.200}); copy it again"
        ) from error
