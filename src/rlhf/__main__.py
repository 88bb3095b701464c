"""The process behind the command `rlhf` and `python -m rlhf`."""

import os
import signal
import sys

_STOPPED = 75  # EXIT_STOPPED of rlhf.signals, which may not be imported yet when it is needed


def main() -> int:
    """Run the command line and return its exit code, even if a signal arrives."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    from rlhf.cli import main as run  # click and pydantic take a while

    code = run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # no traceback while Python shuts down
    return code


def _end(*_: object) -> None:
    """Exit at once, with one line: nothing has started, so nothing needs undoing."""
    try:
        os.write(2, b"rlhf: stopped by a signal\n")
    finally:
        os._exit(_STOPPED)


if __name__ == "__main__":
    sys.exit(main())
