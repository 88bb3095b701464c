"""One writer per folder: whoever writes to it holds a lease.

On this machine the lease is an operating-system lock on `.rlhf.lock`, released when the process
ends. In a bucket it is the object `.lease.json`, created only if there is none
(`ifGenerationMatch=0`) and renewed as long as its holder lives; a lease that is no longer renewed
is taken over. In stores without conditional writes the note is written and then read back, which
can fail for two processes that start at the same instant.
"""

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf.errors import InputError, StorageError
from rlhf.files.compat import request, upload_address
from rlhf.files.owners import Process
from rlhf.files.storage import as_url, find_files, locate, open_store, reason, storage_errors

logger = logging.getLogger(__name__)

LOCK, NOTE = ".rlhf.lock", ".lease.json"
SECONDS_BETWEEN_RENEWALS = 10.0
# A lease that has not changed for this long has lost its holder.
SECONDS_TO_EXPIRE = 60.0
_SECONDS_BETWEEN_LOOKS = 1.0
_OURS: set[str] = set()  # tokens of the leases this process holds in stores


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        host: Name of the machine.
        machine: See `Process`.
        pid: Number of the process.
        started: See `Process`.
        command: The command it runs.
        since: When it took the lease, UTC.
        token: Distinguishes this lease from every other.
    """

    host: str
    machine: str
    pid: int
    started: int
    command: str
    since: str
    token: str

    @classmethod
    def this(cls, command: str) -> "Holder":
        """Return a new holder for the calling process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        process = asdict(Process.this())
        return cls(**process, command=command, since=since, token=secrets.token_hex(8))

    @classmethod
    def read(cls, content: bytes | str) -> "Holder | None":
        """Return the holder named in a note; None if the note is damaged."""
        try:
            value = json.loads(content)
            return cls(**{field.name: value[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def note(self) -> bytes:
        """Return the note that `read` parses."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def is_this_process(self) -> bool:
        """Return whether the calling process took the lease."""
        me = Process.this()
        return (self.machine, self.pid, self.started) == (me.machine, me.pid, me.started)

    def lives(self) -> bool | None:
        """Return whether its process is running; None if that cannot be seen from here."""
        try:
            return Process(self.host, self.machine, int(self.pid), int(self.started)).lives()
        except (TypeError, ValueError):
            return None


def _refusal(folder: str, holder: Holder | None) -> InputError:
    who = "another process"
    if holder is not None:
        who = f"{holder.command!r} (process {holder.pid} on {holder.host}, since {holder.since})"
    return InputError(
        f"output_dir: {folder} is being written by {who}; wait until it has finished or "
        "stop it, or choose another output_dir"
    )


class Lease:
    """The right to write to a folder; given up by `release` and when the process ends.

    Args:
        folder: Local folder, `/gcs/…` or an fsspec URL.
        command: The holder's command, shown to processes that are refused.

    Raises:
        InputError: Another process holds it, or the folder cannot be written to.
        StorageError: The store failed.
    """

    def __init__(self, folder: str, command: str) -> None:
        self.folder = folder
        holder = Holder.this(command)
        remote = "://" in as_url(folder)
        self._held: _Local | _Remote = (
            _Remote(folder, holder) if remote else _Local(Path(folder), holder)
        )

    def check(self) -> None:
        """Make sure before a write that the lease is still ours.

        Raises:
            StorageError: It could not be renewed in time and was lost.
        """
        self._held.check()

    def release(self) -> None:
        """Release the lease, so that others can take it."""
        self._held.release()


@contextlib.contextmanager
def lease(folder: str, command: str) -> Iterator[Lease]:
    """Hold a lease for the duration of a block; see `Lease`."""
    held = Lease(folder, command)
    try:
        yield held
    finally:
        held.release()


class _Local:
    def __init__(self, folder: Path, holder: Holder) -> None:
        self._folder, self._note = folder, folder / NOTE
        self._made = [path for path in [folder, *folder.parents] if not path.exists()]
        self._lock = FileLock(folder / LOCK, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0.5, poll_interval=0.05)
            try:
                self._note.write_bytes(holder.note())
            except BaseException:
                self.release()
                raise
        except Timeout as error:
            raise _refusal(str(folder), self._read()) from error
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"output_dir: cannot write to {folder}: {why}") from error

    def check(self) -> None:
        """Do nothing: the lock lasts as long as the process."""

    def release(self) -> None:
        if not self._lock.is_locked:
            return
        # Still holding the lock: a process waiting on the removed file's lock tries again.
        for path in (self._note, self._folder / LOCK):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):  # folders we made and left empty
            for path in self._made:
                path.rmdir()

    def _read(self) -> Holder | None:
        with contextlib.suppress(OSError):
            return Holder.read(self._note.read_bytes())
        return None


class _Remote:
    def __init__(self, folder: str, holder: Holder) -> None:
        self._folder, self._holder = folder, holder
        self._what = f"output_dir: cannot write {folder.rstrip('/')}/{NOTE}"
        try:
            filesystem, root = _reachable(folder)
        except (ImportError, ValueError) as error:
            raise InputError(f"output_dir: cannot write to {folder}: {error}") from error
        path = f"{root.rstrip('/')}/{NOTE}"
        conditional = "gs" in filesystem.protocol
        self._object = _Object(filesystem, path) if conditional else _PlainFile(filesystem, path)
        self._version = self._take()
        _OURS.add(holder.token)
        self._renewed = time.monotonic()
        self._lost: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, daemon=True, name="rlhf-lease")
        self._thread.start()

    def check(self) -> None:
        if time.monotonic() - self._renewed > SECONDS_TO_EXPIRE / 2:
            self._renew()  # the machine was asleep, or the store is unreachable
        if self._lost is not None:
            hint = "what was saved before is whole; the same command continues from it"
            raise StorageError(f"{self._what}: {self._lost}; {hint}")

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        _OURS.discard(self._holder.token)
        if self._lost is None:
            with contextlib.suppress(Exception):  # it expires anyway
                self._object.remove(self._version)

    def _take(self) -> str:
        """Make the lease, or take over one that is no longer renewed; return its version."""
        seen, since = "", time.monotonic()
        while True:
            with self._errors():
                version = self._object.write(self._holder.note(), "")
                if version is not None:
                    return version
                content, version = self._object.read()
            holder = Holder.read(content)
            if version is None:  # removed in the meantime
                continue
            if holder is not None and holder.token == self._holder.token:
                return version  # made by a request whose response was lost
            alive = None if holder is None else holder.lives()
            if alive and holder is not None and holder.is_this_process():
                alive = holder.token in _OURS  # else left behind when the store was away
            if alive or (seen and version != seen):
                raise _refusal(self._folder, holder)
            if not seen:
                seen, since = version, time.monotonic()
                if alive is None:
                    logger.info(
                        "%s: waiting up to %.0f s to see whether its writer lives",
                        self._folder, SECONDS_TO_EXPIRE,
                    )  # fmt: skip
            if alive is False or time.monotonic() - since > SECONDS_TO_EXPIRE:
                with self._errors():
                    taken = self._object.write(self._holder.note(), version)
                if taken is None:
                    raise _refusal(self._folder, holder)
                return taken
            time.sleep(min(_SECONDS_BETWEEN_LOOKS, SECONDS_TO_EXPIRE / 10))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors(self._what):
                yield
        except InputError as error:
            raise InputError(f"{self._what}: {error}") from error

    def _renew_on(self) -> None:
        while self._lost is None and not self._over.wait(SECONDS_BETWEEN_RENEWALS):
            self._renew()

    def _renew(self) -> None:
        try:
            version = self._object.write(self._holder.note(), self._version)
            if version is None:
                content, found = self._object.read()
                other = Holder.read(content)
                if found is not None and other is not None and other.token == self._holder.token:
                    version = found  # written by a request whose response was lost
        except Exception as error:  # the store is unreachable; it may come back
            if time.monotonic() - self._renewed > SECONDS_TO_EXPIRE:
                self._lost = f"the lease could not be renewed: {reason(error)}"
            return
        if version is None:
            who = "was removed" if found is None else "is another process's now"
            self._lost = f"the lease {who}; nothing more is written"
            return
        self._version, self._renewed = version, time.monotonic()


def _reachable(folder: str) -> tuple[Any, str]:
    """Return a folder's store; for a mounted bucket the bucket itself, if it can be reached."""
    filesystem, root = open_store(as_url(folder))
    if locate(folder) != as_url(folder):
        try:
            find_files(filesystem, root)
        except Exception:  # each store raises its own errors
            return open_store(folder)
    return filesystem, root


class _Object:
    """The note in Google Cloud Storage, written conditionally."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._bucket, self._key, _ = filesystem.split_path(path)

    def write(self, content: bytes, version: str) -> str | None:
        """Write if the current version is this one ("": no object); return None otherwise."""
        head = json.dumps({"name": self._key, "contentType": "application/json"}).encode()
        parts = [b"--=lease=\nContent-Type: application/json; charset=UTF-8\n\n", head]
        parts += [b"\n--=lease=\nContent-Type: application/json\n\n", content, b"\n--=lease=--"]
        answer = self._call(
            "POST",
            upload_address(self._filesystem, self._bucket),
            uploadType="multipart",
            ifGenerationMatch=version or "0",
            headers={"Content-Type": 'multipart/related; boundary="=lease="'},
            data=b"".join(parts),
            json_out=True,
        )
        return None if answer is None else str(answer["generation"])

    def read(self) -> tuple[bytes, str | None]:
        """Return content and version; the version is None if there is no note."""
        found: Mapping[str, Any] | None = self._call(
            "GET", "b/{}/o/{}", self._bucket, self._key, json_out=True
        )
        if found is None:
            return b"", None
        answer = self._call("GET", "b/{}/o/{}", self._bucket, self._key, alt="media")
        return (b"", None) if answer is None else (answer[1], str(found["generation"]))

    def remove(self, version: str) -> None:
        """Remove the note if it has this version."""
        self._call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=version)

    def _call(self, *args: Any, **options: Any) -> Any:
        """Return the store's response; None for an unmet condition or a missing object."""
        try:
            return request(self._filesystem, *args, **options)
        except FileExistsError:  # how gcsfs reports 412
            return None
        except FileNotFoundError:
            if args[0] == "POST":
                raise InputError(f"there is no bucket {self._bucket}") from None
            return None
        except OSError as error:
            if str(error).startswith("Forbidden"):
                raise InputError(str(error).splitlines()[-1]) from error
            raise


class _PlainFile:
    """The note in a store without conditional writes: written, then read back."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    def write(self, content: bytes, version: str) -> str | None:
        """Write if the current version is this one ("": no file); return None otherwise."""
        if (self.read()[1] or "") != version:
            return None
        self._filesystem.makedirs(self._path.rpartition("/")[0], exist_ok=True)
        mine = secrets.token_hex(8)  # every renewal is a new version
        self._filesystem.pipe_file(self._path, content + f"{mine}\n".encode())
        return mine if self.read()[1] == mine else None

    def read(self) -> tuple[bytes, str | None]:
        """Return content and version; the version is None if there is no note."""
        try:
            content = self._filesystem.cat_file(self._path)
        except FileNotFoundError:
            return b"", None
        note, _, version = content.rstrip(b"\n").rpartition(b"\n")
        # An empty file is a note that is just being written, not a missing one.
        return note, version.decode("ascii", "replace") or "empty"

    def remove(self, version: str) -> None:
        """Remove the note if it has this version."""
        if self.read()[1] == version:
            self._filesystem.rm_file(self._path)
