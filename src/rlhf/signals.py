"""SIGTERM and SIGINT: a run stops within a micro-batch or a decoded token, with nothing lost."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from rlhf.errors import StoppedBySignal

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command may be given again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_guards: list["SignalGuard"] = []


class StopRequested(StoppedBySignal):
    """Ends an unfinished step from within; `Trainer.train` and inference turn it into the end."""


def stop_point() -> None:
    """Leave the step that is under way if a signal came.

    Stages call this between micro-batches and between decoded tokens, wherever nothing but the
    step itself is unfinished. What the step has computed is lost: it is made again exactly.

    Raises:
        StopRequested: A signal came, and a guard watches.
    """
    if any(guard.requested for guard in _guards):
        raise StopRequested


class SignalGuard:
    """Turns SIGTERM and SIGINT into the end of the work inside `with`.

    A second SIGINT ends it without saving anything.

    Args:
        at_once: End where the signal comes, because there is nothing to save. Otherwise a signal
            only sets `requested`, for `stop_point` and for whoever saves.

    Attributes:
        requested: True once a signal came.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested = False
        self._at_once = at_once
        self._step: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalGuard":
        # Python allows handlers in the main thread only; elsewhere the caller has to stop us.
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
        """From now on a signal waits for the next stop point."""
        self._at_once = False

    def all_saved(self, step: int | None = None) -> None:
        """From now on a signal ends the work at once: nothing is left to save.

        Args:
            step: Training steps (or batches) that are done and saved.

        Raises:
            StoppedBySignal: A signal came already.
        """
        self._step, self._at_once = step, True
        if self.requested:
            raise StoppedBySignal(step)

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: does not want to wait for the saving
        if self._at_once:
            raise StoppedBySignal(self._step)
        if not again:
            with suppress(OSError):
                os.write(2, b"\nstopping, saving...\n")
