"""What the library raises when the caller has to do something."""

from collections.abc import Sequence


class InputError(Exception):
    """Bad input or configuration: the command line prints it and exits with 2.

    Args:
        problems: One message or several, each naming where, what is wrong and the fix.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class StorageError(OSError):
    """An object store failed for longer than its library retries: the command line exits with 1."""


class StoppedBySignal(Exception):  # noqa: N818 - stopping when asked is no error
    """A signal asked the run to stop and its state is saved: exit code 75 (try again).

    Args:
        step: The number of training steps that are done and saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(
            f"stopped by a signal after step {step}; the same command continues from there"
        )
