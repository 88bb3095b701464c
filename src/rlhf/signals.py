"""SIGTERM and SIGINT: stop a run within a micro-batch or a decoded token, losing nothing."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from rlhf.errors import StoppedBySignal

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command may be run again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_guards: list["SignalGuard"] = []


class StopRequested(StoppedBySignal):
    """Abort an unfinished step; `Trainer.train` and inference turn it into a regular stop."""


def stop_point() -> None:
    """Abort the current step if a signal arrived.

    Stages call this between micro-batches and between decoded tokens, wherever only the step itself
    is unfinished. The step's results are discarded; it is later repeated exactly.

    Raises:
        StopRequested: If a signal arrived and a guard is active.
    """
    if any(guard.requested for guard in _guards):
        raise StopRequested


class SignalGuard:
    """Context in which SIGTERM and SIGINT end the work.

    A second SIGINT ends it without saving anything.

    Args:
        at_once: Whether to end as soon as a signal arrives, because there is nothing to save.
            Otherwise a signal only sets `requested`, for `stop_point` and for the code that saves.

    Attributes:
        requested: Whether a signal has arrived.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested = False
        self._at_once = at_once
        self._step: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalGuard":
        # Python allows handlers only in the main thread; elsewhere the caller has to stop us.
        if threading.current_thread() is threading.main_thread():
            self.requested = any(guard.requested for guard in _guards)
            _guards.append(self)
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            _guards.remove(self)
        self._previous.clear()

    def wait(self) -> None:
        """Make further signals wait for the next stop point."""
        self._at_once = False

    def all_saved(self, step: int | None = None) -> None:
        """Make further signals end the work at once, as nothing is left to save.

        Args:
            step: Training steps (or batches) that are done and saved.

        Raises:
            StoppedBySignal: If a signal has already arrived.
        """
        self._step, self._at_once = step, True
        if self.requested:
            raise StoppedBySignal(step)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second request: do not wait for saving
        if self._at_once:
            raise StoppedBySignal(self._step)
        if not again:
            with suppress(OSError):
                os.write(2, b"\nstopping, saving...\n")
