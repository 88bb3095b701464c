"""Compressed files: recognized by their first bytes, decompressed as they are read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from rlhf.data.sources.record import BrokenSourceError
from rlhf.errors import StorageError


def _open_zstandard(stream: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


@dataclass(frozen=True)
class Compression:
    """One kind of compression.

    Attributes:
        name: Its name for people.
        suffix: How names of such files end.
        magic: Their first bytes.
        open: Opens a stream of decompressed bytes over a stream of compressed ones.
    """

    name: str
    suffix: str
    magic: bytes
    open: Callable[[IO[bytes]], Any]


COMPRESSIONS = (
    Compression("gzip", ".gz", b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream)),
    Compression("Zstandard", ".zst", b"\x28\xb5\x2f\xfd", _open_zstandard),
    Compression("bzip2", ".bz2", b"BZh", bz2.BZ2File),
    Compression("xz", ".xz", b"\xfd7zXZ\x00", lzma.LZMAFile),
)


def without_suffix(name: str) -> tuple[str, Compression | None]:
    """Return a file's name without the suffix of a compression, and that compression."""
    for compression in COMPRESSIONS:
        if name.lower().endswith(compression.suffix):
            return name[: -len(compression.suffix)], compression
    return name, None


@contextmanager
def decompressed(stream: IO[bytes], start: bytes, expected: Compression | None) -> Iterator[Any]:
    """Yield a stream of a file's text, decompressed if need be.

    Args:
        stream: The file, at its beginning.
        start: Its first bytes.
        expected: The compression that its name promises.

    Raises:
        BrokenSourceError: It is not what its name says, or is cut off or damaged.
    """
    found = next((one for one in COMPRESSIONS if start.startswith(one.magic)), None)
    if expected is not None and found is not expected:
        what = found.name if found else "something else"
        raise BrokenSourceError(
            f"is {what}, expected {expected.name} as its name ends in {expected.suffix}"
            if start
            else f"is empty, expected {expected.name}"
        )
    if found is None:
        yield stream
        return
    try:
        # The buffer brings reading a line up to a given length to those that lack it.
        yield io.BufferedReader(found.open(stream), 2**17)
    except StorageError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise BrokenSourceError(
            f"is cut off or damaged ({found.name}: {error}); copy it again"
        ) from error
