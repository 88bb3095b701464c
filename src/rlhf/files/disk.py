"""Files that survive crashes and full disks and stay private: syncing, modes, cleanup, errors."""

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from rlhf.files.owners import owner_of

# Errors caused by the disk rather than by the program.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}
# Temporary names of safetensors 0.8 and of earlier versions of this library.
_UNDER_WAY = re.compile(r"\.tmp\w{6}|\..+\.tmp")
# A process on another machine may still be running: its files count as abandoned after this time.
_SECONDS_UNTOUCHED = 24 * 3600
_PRIVATE = 0o600
_umask_lock = threading.Lock()


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> None:
    """Flush a file, or all files in a folder, to disk so that they survive a power failure.

    Weights also get the default mode for new files: safetensors 0.8 makes them readable by the
    owner only, whatever the umask.
    """
    if path.is_dir():
        for child in path.iterdir():
            settle(child)
        _sync(path)
    elif path.is_file():
        if path.suffix in (".safetensors", ".partial") and path.stat().st_mode & 0o777 == _PRIVATE:
            path.chmod(0o666 & ~umask())
        _sync(path)


def cache_folder() -> Path:
    """Return the folder for things that can be recreated: `$RLHF_CACHE` or ~/.cache/rlhf."""
    return Path(os.environ.get("RLHF_CACHE", Path.home() / ".cache" / "rlhf"))


def umask() -> int:
    """Return the process's umask."""
    with _umask_lock:  # reading it requires setting it
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its final name, durably: a power failure does not undo it."""
    os.replace(source, target)
    _sync(target.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove files and hidden checkpoint folders that a killed process was still writing."""
    for path in [*folder.rglob(".*")]:
        if _is_unfinished(path):
            path.unlink(missing_ok=True)
        elif path.name.startswith(".step-"):
            shutil.rmtree(path, ignore_errors=True)


def _is_unfinished(path: Path) -> bool:
    """Return whether this is a temporary file that no running process is going to rename."""
    with suppress(FileNotFoundError):  # it was renamed just now
        touched = path.stat().st_mtime
        owner = owner_of(path.name)
        if not path.is_file():
            return False
        if owner is None:
            return bool(_UNDER_WAY.fullmatch(path.name))
        if (lives := owner.lives()) is not None:
            return not lives
        return time.time() - touched > _SECONDS_UNTOUCHED
    return False


def disk_problem(error: BaseException | None) -> str | None:
    """Return the disk's error in one line; None for any other kind of error.

    Libraries wrap such errors in their own: safetensors says `I/O error: … (os error 28)`.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(found[1])
        if number in DISK_ERRORS:
            where = getattr(error, "filename", None)
            return f"{where or 'output_dir'}: {os.strerror(number)}"
        error = error.__cause__ or error.__context__
    return None


def _sync(path: Path) -> None:
    """Flush a file or folder to disk; do nothing for folders where the system cannot flush them."""
    refusals = (OSError,) if path.is_dir() else ()
    with suppress(*refusals):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
