"""Measure how much of some work is spent inside certain calls."""

import functools
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from worker import synchronize


class Watch:
    """Seconds spent inside calls; nested calls count once.

    Waiting for the GPU before and after a call attributes its GPU work to it, so no reported figure
    is measured under a watch.

    Attributes:
        seconds: Total so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is added to `seconds`."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            synchronize()
            self._inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                self.seconds += time.perf_counter() - start
                self._inside = False

        return watched


def seconds_inside(
    work: Callable[[], object], methods: Iterable[tuple[type, str]]
) -> tuple[float, float]:
    """Do the work; return its total seconds and those spent in the methods."""
    watch = Watch()
    with ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(patch.object(owner, name, watch.wrap(getattr(owner, name))))
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start, watch.seconds
