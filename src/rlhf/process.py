"""What every process of the library has: its exit codes, and what it keeps out of the output.

Exit codes: 0 done; 2 bad input or configuration; 75 stopped by a signal after saving; 1 anything
else.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from rlhf.console import SayHandler, complain, say
from rlhf.errors import InputError, NumericalError, StoppedBySignal, StorageError
from rlhf.files.disk import disk_problem
from rlhf.signals import EXIT_STOPPED, SignalGuard

EXIT_BAD_INPUT = 2


def quiet_third_parties() -> None:
    """Keep libraries' progress bars and advice out of what the user reads."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",  # said, so that no advice comes when git is called
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # peft looks at the cached copy's path; weights are told apart by their fingerprint.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path` was renamed")
    handler = SayHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("rlhf")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False


def exit_code(command: Callable[[], Any]) -> int:
    """Run a click command (not standalone), say what is wrong, and return the exit code.

    A signal ends the command at once, unless it comes while a stage has something to save.
    """
    try:
        with SignalGuard(at_once=True):  # also because the kernel ignores SIGTERM for process 1
            return command() or 0
    except InputError as error:
        complain(error.problems)
        return EXIT_BAD_INPUT
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command
        say(error.format_message())
        return EXIT_BAD_INPUT
    except click.ClickException as error:
        complain([error.format_message()])
        return EXIT_BAD_INPUT
    except StoppedBySignal as error:
        complain([str(error)])
        return EXIT_STOPPED
    except (StorageError, NumericalError) as error:
        complain([str(error)])
        return 1
    except (click.Abort, KeyboardInterrupt):
        complain(["interrupted"])
        return 1
    except Exception as error:
        if (problem := disk_problem(error)) is None:
            raise
        hint = "what was saved before is whole; the same command continues from it"
        complain([f"{problem}; {hint}"])
        return 1
