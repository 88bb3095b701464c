"""The peers' environments, created on first use.

A peer that runs with our own torch and transformers is a folder on top of our interpreter's
packages; one that needs older versions gets a virtual environment. To use the CPU build of torch
there, set PIP_EXTRA_INDEX_URL as the README describes.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).parent / ".peers"
OURS = "ours"


@dataclass(frozen=True)
class Environment:
    """What pip installs.

    Attributes:
        requirements: Exact versions.
        own: Whether it is a virtual environment rather than a folder on top of ours.
    """

    requirements: tuple[str, ...]
    own: bool = False


ENVIRONMENTS = {
    # The last TRL with PPO for decoder-only models.
    "trl-1.12.0": Environment(("trl==1.12.0",)),
    "trl-1.16.0": Environment(("trl==1.16.0",)),
    # The last TRL whose PPO supports T5; it needs packages of its time, and Python 3.12 or older.
    "trl-0.11.4": Environment(
        (
            "trl==0.11.4",
            "torch==2.13.0",
            "transformers==4.44.2",
            "peft==0.12.0",
            "accelerate==0.34.2",
            "datasets==2.21.0",
            "numpy<2",
            "pyarrow==17.0.0",  # later versions require numpy 2
            "rich",
        ),
        own=True,
    ),
}


@dataclass(frozen=True)
class Interpreter:
    """How to run Python in an environment.

    Attributes:
        python: The executable.
        packages: Folder that precedes its own packages, or None.
    """

    python: str
    packages: Path | None = None


def prepare(name: str) -> Interpreter:
    """Return an environment's interpreter; create it if it is missing or out of date.

    Raises:
        subprocess.CalledProcessError: If pip fails.
    """
    if name == OURS:
        return Interpreter(sys.executable)
    environment, folder = ENVIRONMENTS[name], PEERS / name
    python = str(folder / "bin" / "python") if environment.own else sys.executable
    stamp = folder / ".complete"
    wanted = "\n".join(environment.requirements)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        if environment.own:
            _run(sys.executable, "-m", "venv", str(folder))
        where = [] if environment.own else ["--no-deps", "--target", str(folder)]
        _run(python, "-m", "pip", "install", "--quiet", *where, *environment.requirements)
        stamp.write_text(wanted)
    return Interpreter(python, None if environment.own else folder)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)
