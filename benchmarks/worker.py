"""One side of a comparison, in a process of its own.

    python worker.py MODULE SPEC        SPEC: JSON, see `rounds.Worker`

The module's `main(spec, session)` sets its side up and repeats its work for ever, calling
`session.round_done` after each round; that answers the driver and waits for its next command. So a
library whose training loop is its own is measured from a callback in that loop.

Every message is a line of JSON: on standard input {"do": "round"} or {"do": "end"}, on what was
standard output the answers. The first round is a warm-up and its answer means ready.
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
    """The driver has seen enough; not an Exception, so that no library holds it up."""


class Session:
    """The worker's end of the conversation.

    Args:
        answers: Where answers go.
        commands: Where commands come from.
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
        """Says that a round is over, and returns when the next one should begin.

        Args:
            phases: Seconds of parts of the round.
            facts: What the side knows about its work; said with the warm-up.
            seconds: What counts as the round, if not all the time since it began.

        Raises:
            Finished: There is no next one.
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
        """Sends one message."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def synchronize() -> None:
    """Waits for the GPU, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """MiB: the most that was ever resident and, where a GPU is used, allocated on it."""
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    peaks = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peaks["cuda_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def run(module: str, spec: dict[str, Any], session: Session) -> int:
    """Runs a side until the driver ends it; an exception becomes its last message."""
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
    """Keeps standard output for the protocol: whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return run(sys.argv[1], json.loads(sys.argv[2]), Session(answers, sys.stdin))


if __name__ == "__main__":
    # Sides import this module by its name: it must be the one that runs.
    sys.modules["worker"] = sys.modules["__main__"]
    sys.stdout.flush()
    code = main()
    sys.stderr.flush()
    os._exit(code)  # libraries' threads and exit handlers are not ours to wait for
