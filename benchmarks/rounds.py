"""Runs the sides of a comparison in turn, each in a process of its own.

Needs nothing but Python: what the driver holds in memory, processes that it starts would count as
their own peak.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparisons import Comparison, Side
from environments import prepare

HERE = Path(__file__).parent
SECONDS_PER_MESSAGE = 3600.0


class SideFailed(Exception):  # noqa: N818 (says what happened)
    """A side could not be set up or broke down; the message says why."""


class Worker:
    """The driver's end of the conversation with a side; see worker.py for the other end.

    Args:
        side: What to start.
        spec: What the side is told: `folder` of assets, `side` (its name), `model`, `batch`,
            `lengths`, `device`, `threads`, `options`.
        log: File for what it prints.

    Raises:
        SideFailed: Its environment could not be made.
    """

    def __init__(self, side: Side, spec: Mapping[str, Any], log: Path) -> None:
        self._log = log
        try:
            interpreter = prepare(side.environment)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SideFailed(f"environment {side.environment}: {error}") from error
        path = [] if interpreter.packages is None else [str(interpreter.packages)]
        self._process = subprocess.Popen(
            [interpreter.python, str(HERE / "worker.py"), side.module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment(spec["threads"]) | {"PYTHONPATH": os.pathsep.join(path)},
        )

    def receive(self) -> dict[str, Any]:
        """The next message; the first one comes after the warm-up.

        Raises:
            SideFailed: It broke down, or took longer than an hour.
        """
        assert self._process.stdout is not None
        timer = threading.Timer(SECONDS_PER_MESSAGE, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        message: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in message:
            raise SideFailed(message["error"])
        return message

    def send(self, command: str) -> dict[str, Any]:
        """Gives a command, "round" or "end", and returns the answer.

        Raises:
            SideFailed: It broke down.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._last_words()) from None
        return self.receive()

    def stop(self) -> None:
        """Ends the process, however far it is."""
        self._process.kill()
        self._process.communicate()

    def _last_words(self) -> str:
        status, last = self._process.wait(), log_tail(self._log, 1)
        return f"ended with status {status}: {last[0] if last else 'no output'}"


def log_tail(log: Path, count: int = 30) -> list[str]:
    """The last lines of what a side printed."""
    return log.read_text(errors="replace").strip().splitlines()[-count:] if log.is_file() else []


def environment(threads: int) -> dict[str, str]:
    """Environment variables that all sides get alike."""
    count = str(threads)
    fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def compare(
    comparison: Comparison, folder: Path, *, rounds: int, device: str, threads: int
) -> dict[str, Any]:
    """Measures all sides, one at a time, taking turns in every round.

    Args:
        comparison: What to measure.
        folder: An empty folder for weights, data and logs.
        rounds: How many, after one of warm-up.
        device: "cpu" or "cuda".
        threads: Of every process.

    Returns:
        Sizes, and per side its rounds (seconds and phases), facts, peaks, or its error.
    """
    rounds = min(rounds, comparison.rounds or rounds)
    base = {
        "folder": str(folder),
        "model": comparison.model,
        "batch": comparison.batch,
        "lengths": asdict(comparison.lengths),
        "device": device,
        "threads": threads,
    }
    make_assets(comparison, folder, base | {"steps": rounds + 1})
    sides: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in comparison.sides}
    workers: dict[str, Worker] = {}
    logs = {name: folder / f"{slug(name)}.log" for name in sides}

    def attempt(name: str, command: str | None) -> dict[str, Any]:
        """The answer of a side; what breaks down says so in the result and takes part no more."""
        side = comparison.sides[name]
        try:
            if command is None:
                spec = base | {"side": slug(name), "options": dict(side.options)}
                workers[name] = Worker(side, spec, logs[name])
                return workers[name].receive()
            return workers[name].send(command)
        except SideFailed as error:
            print(f"{name} failed: {error}", *log_tail(logs[name]), sep="\n", file=sys.stderr)
            sides[name]["error"] = str(error)
            return {}

    def working() -> list[str]:
        return [name for name in comparison.sides if "error" not in sides[name]]

    try:
        for name in working():
            sides[name]["facts"] = attempt(name, None).get("facts", {})
        for number in range(rounds):
            names = working()
            for name in names[number % len(names) :] + names[: number % len(names)]:
                answer = attempt(name, "round")
                if answer:
                    parts = {part: answer[part] for part in ("seconds", "phases")}
                    sides[name]["rounds"].append(parts)
        for name in working():
            sides[name] |= attempt(name, "end")
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "group": comparison.group,
        "baseline": comparison.baseline,
        **{name: base[name] for name in ("model", "batch", "lengths", "threads")},
        "sides": {
            name: {"target": side.target, "ours": is_ours(side), **sides[name]}
            for name, side in comparison.sides.items()
        },
    }


def make_assets(comparison: Comparison, folder: Path, spec: Mapping[str, Any]) -> None:
    """Writes the weights and data of a comparison, in a process of its own.

    Raises:
        subprocess.CalledProcessError: That failed.
    """
    asking = {
        slug(name): side.options["config"].get("lora")
        for name, side in comparison.sides.items()
        if side.options.get("reward") == "model"
    }
    pairs = any(side.module.endswith("_reward") for side in comparison.sides.values())
    spec = {**spec, "reward_models": asking, "pairs": pairs}
    subprocess.run(
        [sys.executable, str(HERE / "assets.py"), str(folder), json.dumps(spec)],
        check=True,
        stdout=sys.stderr,
        env=environment(spec["threads"]),
    )


def is_ours(side: Side) -> bool:
    """Whether a side is this library and not a peer."""
    return side.module.startswith("workers.ours_")


def slug(name: str) -> str:
    """A side's name as part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
