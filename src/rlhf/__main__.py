"""The process of the command `rlhf`, which `python -m rlhf` is too."""

import os
import signal
import sys

_STOPPED = 75  # EXIT_STOPPED of rlhf.signals, which is not imported yet when it is needed


def main() -> int:
    """Run the command line and return its exit code, whenever a signal comes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    from rlhf.cli import main as run  # click and pydantic take a while

    code = run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # no traceback while Python shuts down
    return code


def _end(*_: object) -> None:
    """End at once, with one line: nothing has begun, so nothing is to be undone."""
    try:
        os.write(2, b"rlhf: stopped by a signal\n")
    finally:
        os._exit(_STOPPED)


if __name__ == "__main__":
    sys.exit(main())
