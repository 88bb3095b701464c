"""Calls of reward functions: with a time limit, and several async functions at once."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rlhf.signals import stop_point

# How often a waiting call looks for a signal to stop, s.
_LOOK_EVERY = 0.1
# What a coroutine gets on top of its limit to leave after it was cancelled, s.
_GRACE = 1.0


class CallTimedOut(Exception):  # noqa: N818 (says what happened)
    """A call took longer than its limit."""


class Pending:
    """A call whose result is not there yet.

    Args:
        future: Where the result, or the exception, arrives.
        limit: Longest time to wait, s, from now on; None for no limit.
    """

    def __init__(self, future: "concurrent.futures.Future[Any]", limit: float | None) -> None:
        self._future = future
        self._end = None if limit is None else time.monotonic() + limit

    def result(self) -> Any:
        """Wait for the result; a signal to stop ends the wait.

        Raises:
            CallTimedOut: After the limit. A coroutine is cancelled; a thread cannot be: its call
                goes on unseen, and ends with the process.
            StopRequested: A signal arrived. The call is abandoned in the same way.
        """
        try:
            while True:
                stop_point()
                done, _ = concurrent.futures.wait([self._future], self._wait())
                if done:
                    return self._future.result()
                if self._end is not None and time.monotonic() >= self._end:
                    raise CallTimedOut
        except BaseException:
            self._future.cancel()
            raise

    def _wait(self) -> float:
        if self._end is None:
            return _LOOK_EVERY
        return min(_LOOK_EVERY, max(0.0, self._end - time.monotonic()))


def in_thread(call: Callable[[], Any], limit: float) -> Pending:
    """Start a call in a thread of its own, which does not keep the process alive.

    Args:
        call: The call.
        limit: Longest time that it may take, s.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # SystemExit too: it belongs to the caller
            future.set_exception(error)

    threading.Thread(target=run, name="reward function", daemon=True).start()
    return Pending(future, limit)


class EventLoop:
    """An event loop in a thread of its own, started by the first coroutine.

    It lives as long as the process, so that sessions and locks that a function keeps from one call
    to the next stay valid, and it works where the caller's thread already runs a loop (notebooks).
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, coroutine: Coroutine[Any, Any, Any], limit: float | None) -> Pending:
        """Start a coroutine beside those that run already.

        Args:
            coroutine: The coroutine.
            limit: Longest time that it may take, s; None for no limit.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=self._loop.run_forever, name="reward functions", daemon=True
            ).start()
        future = asyncio.run_coroutine_threadsafe(_limited(coroutine, limit), self._loop)
        # The loop keeps the time itself; the caller only looks after a loop that is blocked.
        return Pending(future, None if limit is None else limit + _GRACE)


async def _limited(coroutine: Coroutine[Any, Any, Any], limit: float | None) -> Any:
    """Await a coroutine for a limited time, telling its own TimeoutError from ours."""
    task = asyncio.ensure_future(coroutine)
    try:
        done, _ = await asyncio.wait([task], timeout=limit)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise CallTimedOut
    return task.result()


LOOP = EventLoop()
