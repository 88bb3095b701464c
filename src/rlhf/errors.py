"""Exceptions that the caller has to act on."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

# Comparison time grows with the product of the lengths, and names from files may have any length.
_LONGEST_NAME = 100
_MOST_NAMES = 1000


class InputError(Exception):
    """Bad input or configuration; the command line prints it and exits with 2.

    Args:
        problems: One message or several, each saying where, what is wrong and how to fix it.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def together(*checks: Callable[[], Any]) -> list[Any]:
    """Run independent checks and return the result of each.

    Raises:
        InputError: The problems of all checks that failed, without duplicates.
    """
    results: list[Any] = []
    errors: list[InputError] = []
    for check in checks:
        try:
            results.append(check())
        except InputError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise InputError(list(dict.fromkeys(problems))) from errors[0]
    return results


class StorageError(OSError):
    """An object store kept failing after the library's retries; the command line exits with 1."""


class NumericalError(RuntimeError):
    """Numbers left the range in which the run is meaningful; the command line exits with 1."""


class TrainingDiverged(NumericalError):  # noqa: N818 (says what happened)
    """Several updates in a row failed; the message says why and what to change."""


class StoppedBySignal(BaseException):
    """A signal asked the run to stop, and its state is saved: exit code 75 (try again).

    Stopping on request is not an error: like KeyboardInterrupt it passes `except Exception`, which
    libraries use to turn anything that happens during loading into their own errors.

    Args:
        step: Number of training steps that are done and saved; None if they are not counted.
    """

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        after = "" if step is None else f" after step {step}"
        super().__init__(
            f"stopped by a signal{after}; the same command continues from what is saved"
        )


def closest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate most similar to a misspelled name, or None; looks at a thousand at most.

    Args:
        name: As the user wrote it.
        candidates: What may have been meant; long ones are skipped.
        cutoff: From 0 (anything) to 1 (identical).
    """
    if len(name) > _LONGEST_NAME:
        return None
    short = [one for one in islice(candidates, _MOST_NAMES) if len(one) <= _LONGEST_NAME]
    return next(iter(difflib.get_close_matches(name, short, n=1, cutoff=cutoff)), None)
