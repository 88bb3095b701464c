"""`failure.json`: why a stage ended, left in its folder, and whether trying again makes sense."""

import hashlib
import json
import time
import traceback
from dataclasses import asdict, dataclass

import torch

from rlhf.errors import InputError
from rlhf.outputs import Output, join
from rlhf.storage import open_store
from rlhf.vertex.executor import as_url, write_file

FAILURE_FILE = "failure.json"


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended.

    Attributes:
        cause: What was wrong, a line each problem.
        fix: What to do about it.
        kind: The exception's name.
        permanent: The same attempt would end the same way.
        attempt: Fingerprint of the job's arguments: a restart has the same, a new run another.
        checkpoint: The newest complete checkpoint at that time; "" for none.
        time: When, UTC.
        details: The traceback, where the library did not foresee the problem.
    """

    cause: str
    fix: str
    kind: str
    permanent: bool
    attempt: str
    checkpoint: str
    time: str
    details: str = ""


def fingerprint(arguments: list[str]) -> str:
    """Tell a restart of a job (same arguments) from a new submission (other output files)."""
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:16]


def repeated_failure(folder: str, attempt: str) -> Failure | None:
    """The permanent failure that this very job had before, unless it has got further since."""
    earlier = read_failure(folder)
    if earlier is None or not earlier.permanent or earlier.attempt != attempt:
        return None
    return earlier if earlier.checkpoint == newest_checkpoint(folder) else None


def describe(error: BaseException, folder: str, attempt: str) -> Failure:
    """Say why an attempt failed and whether a restart can help.

    Bad input and too little memory are permanent. Anything else (a network that broke down, a
    library's bug) is tried once more; the same failure again, with no checkpoint in between, is
    permanent too.
    """
    details = ""
    if isinstance(error, InputError):
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
    checkpoint = newest_checkpoint(folder)
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
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        details=details,
    )


def newest_checkpoint(folder: str) -> str:
    """Name of the newest complete checkpoint of a stage; "" for none."""
    steps = [
        int(name.split("/")[1].removeprefix("step-"))
        for name in Output(as_url(folder)).names()
        if name.startswith("checkpoints/step-") and name.endswith("/manifest.json")
    ]
    return f"step-{max(steps)}" if steps else ""


def read_failure(folder: str) -> Failure | None:
    """The failure that a stage's folder holds, if any."""
    try:
        filesystem, path = open_store(as_url(join(folder, FAILURE_FILE)))
        filesystem.invalidate_cache()
        return Failure(**json.loads(filesystem.cat_file(path)))
    except (OSError, ValueError, TypeError):
        return None


def write_failure(folder: str, failure: Failure) -> None:
    """Leave a failure in a stage's folder."""
    text = json.dumps(asdict(failure), indent=2, ensure_ascii=False) + "\n"
    write_file(join(folder, FAILURE_FILE), text)


def clear_failure(folder: str) -> None:
    """Remove an earlier attempt's failure after success."""
    filesystem, path = open_store(as_url(join(folder, FAILURE_FILE)))
    if filesystem.exists(path):
        filesystem.rm_file(path)
