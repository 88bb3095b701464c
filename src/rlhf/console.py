"""What is said to people: the one place that writes to stdout and stderr.

Nothing that happens to a terminal or a pipe stops a run, and nothing that a file contains acts on
the terminal.
"""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO, cast

from rlhf.untrusted import printable, without_secrets


class SteadyStream:
    """A text stream to which writing always succeeds; what cannot be written is dropped.

    Args:
        stream: The stream, or None where the process has none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether somebody watches."""
        with suppress(OSError, ValueError, AttributeError):
            return cast(TextIO, self._stream).isatty()
        return False

    def write(self, text: str) -> int:
        """Write what the stream's encoding has, escapes for the rest."""
        try:
            if self._stream is not None:
                encoding = getattr(self._stream, "encoding", None) or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Send what is buffered, as far as somebody takes it."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        """Point a broken pipe nowhere, so that what is still buffered cannot fail at exit."""
        if not isinstance(error, OSError) or error.errno != errno.EPIPE or self._stream is None:
            return
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def say(text: str) -> None:
    """Write a line, or several, to stderr; stdout is for results."""
    _write(sys.stderr, text)


def show(text: str) -> None:
    """Write a result to stdout."""
    _write(sys.stdout, text)


def complain(problems: Sequence[str]) -> None:
    """Write problems to stderr, each on one line whatever it quotes."""
    for problem in problems:
        say(f"rlhf: {' '.join(problem.split(chr(10)))}")


def _write(stream: TextIO | None, text: str) -> None:
    steady = SteadyStream(stream)
    steady.write(printable(without_secrets(text)) + "\n")
    steady.flush()


class SayHandler(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        say(self.format(record))


def steady_streams() -> None:
    """Make the process's own streams ones to which anybody can write at any time.

    A file that is opened while descriptor 2 is closed would get that number, and with it every
    warning that a library writes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream or open(os.devnull, "w")))  # noqa: SIM115
