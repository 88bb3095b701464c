"""`failure.json`: why a stage failed, written to its folder, and whether a retry makes sense."""

import hashlib
import json
import re
import time
import traceback
from dataclasses import asdict, dataclass

import torch

from rlhf.errors import InputError
from rlhf.files.output import Output, path_in
from rlhf.files.storage import as_url, open_store
from rlhf.vertex.executor import write_file

FAILURE_FILE = "failure.json"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_CHECKPOINT = re.compile(r"checkpoints/step-(\d+)/manifest\.json")
# Exceptions of the standard library, requests, httpx and google-auth, aiohttp, google-api-core.
_TRANSIENT = {
    "ConnectionError",
    "TimeoutError",
    "Timeout",
    "TransportError",
    "ClientConnectionError",
    "ServerError",
    "TooManyRequests",
    "RetryError",
}


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed.

    Attributes:
        cause: What was wrong, one problem per line.
        fix: What to do about it.
        kind: Name of the exception.
        permanent: Whether the same attempt would fail the same way.
        attempt: Fingerprint of the job's arguments, the same after a restart but not in a new run.
        checkpoint: The newest complete checkpoint at that time, or "".
        time: When it failed, UTC.
        details: The traceback, if the library did not foresee the problem.
    """

    cause: str
    fix: str
    kind: str
    permanent: bool
    attempt: str
    checkpoint: str
    time: str
    details: str = ""


def arguments_hash(arguments: list[str]) -> str:
    """Return a hash shared by restarts of a job but not by a new submission (other outputs)."""
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:16]


def repeated_failure(folder: str, attempt: str) -> Failure | None:
    """Return this very job's earlier permanent failure, unless it has made progress since."""
    earlier = read_failure(folder)
    if earlier is None or not earlier.permanent or earlier.attempt != attempt:
        return None
    return earlier if earlier.checkpoint == newest_checkpoint(folder) else None


def describe_failure(error: BaseException, folder: str, attempt: str) -> Failure:
    """Describe why an attempt failed and whether a restart can help.

    Bad input and insufficient memory are permanent. Anything else (a network failure, even one that
    surfaces as an unreadable input, or a library's bug) is retried once; if it fails the same way
    again with no new checkpoint in between, it is permanent too.
    """
    details = ""
    if isinstance(error, InputError) and not _transient(error):
        fix, permanent = "Correct what the cause names and submit again.", True
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        fix = (
            "Lower micro_batch_size, max_tokens_per_micro_batch or rollout_batch_size, set "
            "gradient_checkpointing, or give a larger machine_type; none of these changes results."
        )
        permanent = True
    else:
        fix = "See details. The same run_name continues from the last checkpoint."
        details = "".join(traceback.format_exception(error))
        permanent = False
    cause = str(error) or type(error).__name__
    try:
        checkpoint = newest_checkpoint(folder)
    except InputError:  # the folder cannot be read, which may itself be the error
        checkpoint = ""
    earlier = read_failure(folder)
    if earlier is not None and not permanent:
        permanent = (earlier.attempt, earlier.checkpoint, earlier.kind, earlier.cause) == (
            attempt,
            checkpoint,
            type(error).__name__,
            cause,
        )
    return Failure(
        cause=cause,
        fix=fix,
        kind=type(error).__name__,
        permanent=permanent,
        attempt=attempt,
        checkpoint=checkpoint,
        time=time.strftime(TIME_FORMAT, time.gmtime()),
        details=details,
    )


def newest_checkpoint(folder: str) -> str:
    """Return the name of a stage's newest complete checkpoint, or ""."""
    found = map(_CHECKPOINT.fullmatch, Output(as_url(folder)).names())
    steps = [int(match[1]) for match in found if match]
    return f"step-{max(steps)}" if steps else ""


def _transient(error: BaseException | None) -> bool:
    """Return whether the network or a service caused an error, however it was wrapped."""
    while error is not None:
        # By name, because every client library has its own classes.
        if _TRANSIENT & {cls.__name__ for cls in type(error).__mro__}:
            return True
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return False


def read_failure(folder: str) -> Failure | None:
    """Return the failure recorded in a stage's folder, if any."""
    try:
        filesystem, path = open_store(as_url(path_in(folder, FAILURE_FILE)))
        filesystem.invalidate_cache()
        return Failure(**json.loads(filesystem.cat_file(path)))
    except Exception:  # missing, truncated or unreachable: every store raises its own kind
        return None


def write_failure(folder: str, failure: Failure) -> None:
    """Record a failure in a stage's folder."""
    text = json.dumps(asdict(failure), indent=2, ensure_ascii=False) + "\n"
    write_file(path_in(folder, FAILURE_FILE), text)


def clear_failure(folder: str) -> None:
    """Remove an earlier attempt's failure after success."""
    filesystem, path = open_store(as_url(path_in(folder, FAILURE_FILE)))
    if filesystem.exists(path):
        filesystem.rm_file(path)
