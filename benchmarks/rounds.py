"""Run the sides of a comparison, interleaved, each in its own process.

Needs nothing but Python: memory held by the driver would count towards the peak of the processes
that it starts.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparisons import Comparison, Side
from environments import prepare

HERE = Path(__file__).parent
SECONDS_PER_MESSAGE = 3600.0


class SideFailed(Exception):  # noqa: N818 (says what happened)
    """A side could not be set up or crashed; the message says why."""


class Worker:
    """The driver's end of the connection to a side; see worker.py for the other end.

    Args:
        side: The side to start.
        spec: Input for the side: `folder` of assets, `side` (its name), `model`, `batch`,
            `responses_per_prompt`, `lengths`, `device`, `threads`, `options`.
        log: File for its output.

    Raises:
        SideFailed: If its environment could not be created.
    """

    def __init__(self, side: Side, spec: Mapping[str, Any], log: Path) -> None:
        self.log = log
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
        """Return the next message; the first one comes after the warm-up.

        Raises:
            SideFailed: If it crashed, or took longer than an hour.
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
        """Send a command, "round" or "end", and return the answer.

        Raises:
            SideFailed: If it crashed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._last_words()) from None
        return self.receive()

    def stop(self) -> None:
        """Kill the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def _last_words(self) -> str:
        status, last = self._process.wait(), log_tail(self.log, 1)
        return f"ended with status {status}: {last[0] if last else 'no output'}"


def log_tail(log: Path, count: int = 30) -> list[str]:
    """Return the last lines of a side's output."""
    return log.read_text(errors="replace").strip().splitlines()[-count:] if log.is_file() else []


def environment(threads: int) -> dict[str, str]:
    """Return environment variables that are the same for all sides."""
    count = str(threads)
    fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


class Contest:
    """The sides of a comparison; one that fails records why and drops out.

    Args:
        comparison: What to measure.
        spec: Input for all sides, see `Worker`.
    """

    def __init__(self, comparison: Comparison, spec: Mapping[str, Any]) -> None:
        self._comparison = comparison
        self._spec = spec
        self._workers: dict[str, Worker] = {}
        self.sides: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in comparison.sides}

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stop()

    def working(self, first: int = 0) -> list[str]:
        """Return the sides that have not failed, rotated by `first`."""
        names = [name for name, side in self.sides.items() if "error" not in side]
        start = first % len(names) if names else 0
        return names[start:] + names[:start]

    def start(self, name: str) -> None:
        """Set a side up and let it warm up."""
        log = Path(self._spec["folder"]) / f"{slug(name)}.log"
        with self._failing(name, log):
            side = self._comparison.sides[name]
            own = {"side": slug(name), "options": dict(side.options)}
            self._workers[name] = Worker(side, {**self._spec, **own}, log)
            self.sides[name]["facts"] = self._workers[name].receive()["facts"]

    def round(self, name: str) -> None:
        """Let a side run one round."""
        with self._failing(name, self._workers[name].log):
            answer = self._workers[name].send("round")
            times = {part: answer[part] for part in ("seconds", "phases")}
            self.sides[name]["rounds"].append(times)

    def end(self, name: str) -> None:
        """Request a side's peak memory."""
        with self._failing(name, self._workers[name].log):
            self.sides[name] |= self._workers[name].send("end")

    @contextmanager
    def _failing(self, name: str, log: Path) -> Iterator[None]:
        try:
            yield
        except SideFailed as error:
            print(f"{name} failed: {error}", *log_tail(log), sep="\n", file=sys.stderr)
            self.sides[name]["error"] = str(error)


def compare(
    comparison: Comparison, folder: Path, *, rounds: int, device: str, threads: int
) -> dict[str, Any]:
    """Measure all sides, one at a time, interleaved in every round.

    Args:
        comparison: What to measure.
        folder: An empty folder for weights, data and logs.
        rounds: Number of rounds, after one warm-up.
        device: "cpu" or "cuda".
        threads: Threads per process.

    Returns:
        See `entry`.
    """
    rounds = min(rounds, comparison.rounds or rounds)
    lengths = asdict(comparison.lengths)
    spec = {"folder": str(folder), "model": comparison.model, "batch": comparison.batch}
    spec |= {"lengths": lengths, "device": device, "threads": threads}
    spec |= {"responses_per_prompt": comparison.responses_per_prompt}
    make_assets(comparison, folder, spec | {"steps": rounds + 1})
    with Contest(comparison, spec) as contest:
        for name in contest.working():
            contest.start(name)
        for number in range(rounds):
            for name in contest.working(first=number):
                contest.round(name)
        for name in contest.working():
            contest.end(name)
    return entry(comparison, contest.sides)


def entry(comparison: Comparison, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entry for a comparison in the results.

    Args:
        comparison: The comparison.
        sides: Per side its `rounds` (seconds and phases) and, as far as it got, `facts`, `peak_mib`
            and `error`.
    """
    return {
        "group": comparison.group,
        "baseline": comparison.baseline,
        "model": comparison.model,
        "batch": comparison.batch,
        "responses_per_prompt": comparison.responses_per_prompt,
        "lengths": asdict(comparison.lengths),
        "sides": {
            name: {"target": side.target, "memory": side.memory, "ours": is_ours(side)}
            | dict(sides[name])
            for name, side in comparison.sides.items()
        },
    }


def make_assets(comparison: Comparison, folder: Path, spec: Mapping[str, Any]) -> None:
    """Write the weights and data of a comparison, in a separate process.

    Raises:
        SideFailed: If it crashed.
    """
    asking = {
        slug(name): side.options["config"].get("lora")
        for name, side in comparison.sides.items()
        if side.options.get("reward") == "model"
    }
    pairs = any(side.module.endswith("_reward") for side in comparison.sides.values())
    spec = {**spec, "reward_models": asking, "pairs": pairs}
    log = folder / "assets.log"
    done = subprocess.run(
        [sys.executable, str(HERE / "assets.py"), str(folder), json.dumps(spec)],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env=environment(spec["threads"]),
    )
    if done.returncode:
        raise SideFailed("\n".join(["assets.py failed:", *log_tail(log)]))


def is_ours(side: Side) -> bool:
    """Return whether a side is this library and not a peer."""
    return side.module.startswith("workers.ours_")


def slug(name: str) -> str:
    """Return a side's name in a form suitable for file names."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
