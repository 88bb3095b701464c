"""Output for people: the only module that writes to stdout and stderr.

A failing terminal or pipe never stops a run, and no file's contents can control the terminal.
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
    """A text stream whose writes always succeed; whatever cannot be written is dropped.

    Args:
        stream: The stream, or None if the process has none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(OSError, ValueError, AttributeError):
            return cast(TextIO, self._stream).isatty()
        return False

    def write(self, text: str) -> int:
        """Write text, with escapes for what the stream's encoding lacks."""
        try:
            if self._stream is not None:
                encoding = getattr(self._stream, "encoding", None) or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer, as far as possible."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        """Redirect a broken pipe to nowhere, so that flushing its buffer cannot fail at exit."""
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
    """Write problems to stderr, one per line, whatever they quote."""
    for problem in problems:
        say(f"rlhf: {' '.join(problem.split(chr(10)))}")


def _write(stream: TextIO | None, text: str) -> None:
    steady = SteadyStream(stream)
    steady.write(printable(without_secrets(text)) + "\n")
    steady.flush()


class SayHandler(logging.Handler):
    """Handler that writes log records as lines to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        say(self.format(record))


def steady_streams() -> None:
    """Replace the process's own streams with ones that always accept writes.

    A file opened while descriptor 2 is closed would get that number, and with it every warning that
    a library writes there.
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
