"""Where paths lead: this machine, a bucket, or a bucket mounted as a folder.

The only module that accesses object stores. Retries are left to the store's library: gcsfs repeats
a request five times with growing pauses after 408, 429, 500 to 504 and broken connections. Set here
is what it leaves open: timeouts, checksums of uploads, stale listings.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

from rlhf.errors import InputError, StoppedBySignal, StorageError

# Where Vertex mounts every bucket that a job may read.
MOUNT = "/gcs"
READ_BUFFER = 2**20
SECONDS_TO_CONNECT, SECONDS_OF_SILENCE, SECONDS_A_REQUEST = 30, 60, 1800


def locate(path: str) -> str:
    """Return the path under which something can be found from here.

    `/gcs/bucket/x`, as Vertex writes addresses, becomes `gs://bucket/x` if that bucket is not
    mounted; every other path is returned unchanged.
    """
    bucket = path.removeprefix(f"{MOUNT}/").split("/")[0]
    if not bucket or os.path.isdir(f"{MOUNT}/{bucket}"):
        return path
    return as_url(path)


def as_url(path: str) -> str:
    """Return `gs://bucket/x` for `/gcs/bucket/x`, mounted or not; any other path unchanged."""
    return f"gs://{path.removeprefix(f'{MOUNT}/')}" if path.startswith(f"{MOUNT}/") else path


def is_remote(path: str) -> bool:
    """Return whether a path is not a local file: gs://bucket/rows.jsonl, say."""
    return "://" in locate(path)


def exists(path: str) -> bool:
    """Return whether there is a file or a non-empty folder.

    Raises:
        StorageError: The store cannot tell.
    """
    if not is_remote(path):
        return os.path.exists(path)
    filesystem, root = open_store(path)
    with storage_errors(f"{path} cannot be read"):
        try:
            return bool(find_files(filesystem, root))
        except FileNotFoundError:  # a whole bucket
            return False


def open_store(path: str, **options: Any) -> tuple[Any, str]:
    """Return the file system for an address, and the address as that file system writes it.

    Args:
        path: An fsspec URL, or a path.
        **options: Options of the file system.

    Raises:
        ImportError: The file system's package is not installed.
        ValueError: There is no such file system.
    """
    import fsspec

    path = locate(path)
    if path.startswith(("gs://", "gcs://")):
        import aiohttp

        # gcsfs 2026.10 sets no timeout: a connection that goes silent would hang forever. With
        # one, silence counts as a broken connection, which is retried.
        options = {
            "requests_timeout": aiohttp.ClientTimeout(
                total=SECONDS_A_REQUEST,
                sock_connect=SECONDS_TO_CONNECT,
                sock_read=SECONDS_OF_SILENCE,
            ),
            **options,
        }
    filesystem, root = fsspec.core.url_to_fs(path, **options)
    return filesystem, str(root)


def upload(filesystem: Any, local: str, remote: str) -> None:
    """Upload a local file in one piece and, if the store can, with a checksum."""
    if "gs" in filesystem.protocol:
        # Objects need no folder, and gcsfs would look up the bucket, which takes a permission
        # that writing does not.
        filesystem.put_file(local, remote, consistency="md5")
    else:
        filesystem.makedirs(str(PurePosixPath(remote).parent), exist_ok=True)
        filesystem.put_file(local, remote)


class _Readable(io.RawIOBase):
    """A file in a store; whatever errors the store raises become StorageErrors."""

    def __init__(self, file: IO[bytes], what: str, seekable: bool) -> None:
        super().__init__()
        self._file, self._what, self._seekable = file, what, seekable

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._what):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seekable(self) -> bool:
        return self._seekable and self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def open_stored(filesystem: Any, root: str) -> IO[bytes]:
    """Open a file in a store for reading; its errors are StorageErrors.

    The buffer adds what files from fsspec 2026.9 lack: reading a line up to a given length.
    """
    # Not every web server sends parts of a file, so that they are read from start to end.
    web = "http" in filesystem.protocol
    stream = filesystem.open(root, "rb", **({"block_size": 0} if web else {}))
    file = _Readable(stream, f"{root} could not be read to its end", seekable=not web)
    return io.BufferedReader(file, READ_BUFFER)


def find_files(filesystem: Any, root: str) -> dict[str, dict[str, Any]]:
    """Return the details of all files in a folder, by their paths in the store."""
    # fsspec caches file systems and their listings for the whole process; others write too.
    filesystem.invalidate_cache()
    found = filesystem.find(root, detail=True)
    # Except the empty objects with which Google's console marks folders.
    return {
        name: details
        for name, details in found.items()
        if details["type"] == "file" and not name.endswith("/")
    }


@contextmanager
def storage_errors(what: str, hint: str = "") -> Iterator[None]:
    """Turn the errors of a store, each of which raises its own, into one kind with a message.

    Args:
        what: The message if something goes wrong: "output_dir: cannot write gs://bucket/x".
        hint: What to do.

    Raises:
        StorageError: For every error from the store.
    """
    try:
        yield
    except (InputError, StoppedBySignal):
        raise
    except Exception as error:
        raise StorageError(f"{what}: {reason(error)}{hint and f'; {hint}'}") from error


def reason(error: BaseException) -> str:
    """Return an error's message, or its type's name if it has none, as with timeouts."""
    return str(error) or type(error).__name__
