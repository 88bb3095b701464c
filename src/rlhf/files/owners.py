"""Which process owns a file, so that what a killed process left behind can be recognized."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_NAME = re.compile(
    r".+-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}\.partial"
)


@dataclass(frozen=True)
class Process:
    """A process, identified so that others can look it up.

    Attributes:
        host: Name of its machine, for messages.
        machine: Distinguishes machines, their boots, and containers, because process ids are only
            meaningful within one of them.
        pid: Its process id.
        started: When it started, because process ids are reused.
    """

    host: str
    machine: str
    pid: int
    started: int

    @classmethod
    def this(cls) -> "Process":
        """Return the calling process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or 0)

    def lives(self) -> bool | None:
        """Return whether it is running; None if that cannot be seen from here."""
        if self.machine != _machine():
            return None
        return _started(self.pid) == self.started


def temporary_name(prefix: str) -> str:
    """Return a unique name that identifies its owner: prefix, process, and a random part."""
    me = Process.this()
    return f"{prefix}-{me.machine}-{me.pid}-{me.started}-{secrets.token_hex(4)}.partial"


def owner_of(name: str) -> Process | None:
    """Return the process that owns a name from `temporary_name`; None for any other name."""
    found = _NAME.fullmatch(name)
    return found and Process("", found["machine"], int(found["pid"]), int(found["started"]))


def temporary_folder(kind: str, parent: Path | None = None) -> Path:
    """Make a folder for this process, and remove those that killed processes left beside it.

    Args:
        kind: What it is for; part of its name, `rlhf-KIND-….partial`.
        parent: Where to make it; default: the system's folder for temporary files.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_abandoned(parent, "rlhf-")
    folder = parent / temporary_name(f"rlhf-{kind}")
    folder.mkdir(mode=0o700)
    return folder


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove unfinished files that dead processes of this machine left in a folder.

    Args:
        parent: The folder; if it cannot be read, nothing is done.
        prefix: Prefix of the names; see `temporary_name`.
    """
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            owner = owner_of(path.name) if path.name.startswith(prefix) else None
            if owner is None or owner.lives() is not False:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(kind: str) -> Iterator[Path]:
    """Make a folder that is removed at the end of the block, or at the next start after a kill."""
    folder = temporary_folder(kind)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _machine() -> str:
    """Return a string that differs between machines, their boots, and containers."""
    marks = [socket.gethostname(), str(int(psutil.boot_time()))]
    with contextlib.suppress(OSError):
        marks = [Path("/proc/sys/kernel/random/boot_id").read_text()]
    with contextlib.suppress(OSError):
        marks.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(marks).encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """Return when a process started, in some fixed unit; None if there is no such process."""
    try:
        # Ticks since boot: seconds since 1970 shift when the clock is set.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else int(fields[18])
    except OSError:
        pass
    try:
        return int(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
