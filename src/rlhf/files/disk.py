"""What a crash, a full disk or another user's eyes may find: durable files, their modes, errors."""

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

# Errors of the disk rather than of the program.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}
# What safetensors 0.8 writes, to rename it, and what earlier versions of ours did.
_UNDER_WAY = re.compile(r"\.tmp\w{6}|\..+\.tmp")
# Of a process on another machine, which may still live: files that nobody wrote for so long.
_SECONDS_UNTOUCHED = 24 * 3600
_PRIVATE = 0o600
_umask_lock = threading.Lock()


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> None:
    """Make sure that a file, or all files below a folder, survive a power cut.

    Weights also get the mode that every new file has: safetensors 0.8 writes them for the owner
    alone, whatever the umask.
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
    """Return where things are kept that can be made again: `$RLHF_CACHE` or ~/.cache/rlhf."""
    return Path(os.environ.get("RLHF_CACHE", Path.home() / ".cache" / "rlhf"))


def umask() -> int:
    """Return the bits that new files lack."""
    with _umask_lock:  # there is no way to read it but to set it
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def rename(source: Path, target: Path) -> None:
    """Give a file or a folder its final name, for good: a power cut does not undo it."""
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
    """Return whether this is a file that nobody is still writing and nobody will rename."""
    with suppress(FileNotFoundError):  # it has just got its name
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
    """Return what the disk refused, in one line; None for an error of another kind.

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
    """Flush a file or a folder to the disk; where folders cannot be flushed, nothing happens."""
    refusals = (OSError,) if path.is_dir() else ()
    with suppress(*refusals):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
