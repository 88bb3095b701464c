"""One side of a comparison, in its own process.

    python worker.py MODULE SPEC        SPEC: JSON, see `rounds.Worker`

The module's `main(spec, session)` sets its side up and repeats its work forever, calling
`session.round_done` after each round, which answers the driver and waits for its next command. So a
library with its own training loop can be measured from a callback in that loop.

Every message is a line of JSON: commands {"do": "round"} or {"do": "end"} on standard input,
answers on the original standard output. The first round is a warm-up; its answer means ready.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, TextIO


class Finished(BaseException):
    """The driver needs no more rounds; not an Exception, so that no library catches it."""


class Session:
    """The worker's end of the connection.

    Args:
        answers: Stream for answers.
        commands: Stream of commands.
    """

    def __init__(self, answers: TextIO, commands: TextIO) -> None:
        self._answers = answers
        self._commands = commands
        self._start = time.perf_counter()

    def round_done(
        self,
        phases: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Report the end of a round, and return when the next one should begin.

        Args:
            phases: Seconds of parts of the round.
            facts: What the side knows about its work; sent with the warm-up.
            seconds: Duration of the round, if not all the time since it began.

        Raises:
            Finished: If there is no next round.
        """
        synchronize()
        if seconds is None:
            seconds = time.perf_counter() - self._start
        self.answer({"seconds": seconds, "phases": dict(phases or {}), "facts": dict(facts or {})})
        command = json.loads(self._commands.readline() or '{"do": "end"}')
        if command["do"] == "end":
            self.answer(peak_memory())
            raise Finished
        self._start = time.perf_counter()

    def answer(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """Return MiB: peak resident memory and, if a GPU is used, peak memory allocated on it."""
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    peaks = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peaks["cuda_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def run(module: str, spec: dict[str, Any], session: Session) -> int:
    """Run a side until the driver ends it; an exception becomes its last message."""
    try:
        import torch

        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        importlib.import_module(module).main(spec, session)
    except Finished:
        return 0
    except Exception as error:
        traceback.print_exc()
        session.answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    return 1


def main() -> int:
    """Reserve standard output for the protocol; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return run(sys.argv[1], json.loads(sys.argv[2]), Session(answers, sys.stdin))


if __name__ == "__main__":
    # Sides import this module by name: they must get the one that is running.
    sys.modules["worker"] = sys.modules["__main__"]
    sys.stdout.flush()
    code = main()
    sys.stderr.flush()
    os._exit(code)  # do not wait for libraries' threads and exit handlers
