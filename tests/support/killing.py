"""Kill a small pipeline before each of its file operations, then run the same command again.

```
python tests/support/killing.py [--aimed 100] [--random 100] [--arch t5] [--seed 0]
```
prints one line of figures: how many kills, how many failed restarts, how many temporary files left
behind, how many differing results. All of torch is loaded once; each attempt is a fork of that
process, killed by SIGKILL at the chosen operation (a Python audit event, see `OPERATIONS`) or, for
a random kill, at a random moment.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPERATIONS = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate",
    "shutil.rmtree",
}  # fmt: skip
WORDS = "the cat sat and the dog ran to a post"
# Results of a pipeline that depend on the clock or on the machine's memory.
UNSTABLE = ("seconds", "time/", "perf/")


@dataclass
class Figures:
    """Outcome of the kills.

    Attributes:
        operations: File operations in an undisturbed run.
        kills: Attempts that were killed.
        refused: Restarts that failed, with their place.
        leaked: Temporary files left behind, with the kill's place.
        different: Results that differ, with the kill's place.
    """

    operations: int = 0
    kills: int = 0
    refused: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"{self.operations} operations, {self.kills} kills: {len(self.refused)} refused, "
            f"{len(self.leaked)} leaked, {len(self.different)} different"
        )


def make_inputs(arch: str, folder: Path) -> dict[str, Any]:
    """Write a base and data; return the pipeline's fields."""
    from support.tiny import make_tokenizer, tiny_model

    folder.mkdir(parents=True)
    base = folder / "base"
    tiny_model(arch).save_pretrained(base)
    make_tokenizer(arch).save_pretrained(base)
    pairs = [
        {"input_text": f"{n} {WORDS}", "candidate_0": " the cat", "candidate_1": f" a dog {n}",
         "choice": n % 2}
        for n in range(12)
    ]  # fmt: skip
    demonstrations = [{"input_text": f"{n} {WORDS}", "output_text": " the cat"} for n in range(6)]
    for name, rows in (("pairs", pairs), ("sft", demonstrations)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return {
        "base_model": str(base), "preference_dataset": str(folder / "pairs.jsonl"),
        "sft_dataset": str(folder / "sft.jsonl"), "prompt_sequence_length": 48,
        "target_sequence_length": 6, "batch_size": 4, "train_steps": 2, "save_every": 1,
        "eval_every": 1, "save_total_limit": 1, "log_with": "none", "device": "cpu",
        "dtype": "float32", "inference": {"batch_size": 1},
    }  # fmt: skip


class Killer:
    """Runs a function in forks, and kills them.

    Args:
        run: The function to run in a fork.
        watched: Only operations below these folders count.
        log: File for the forks' output.
    """

    def __init__(self, run: Callable[[], Any], watched: list[Path], log: Path) -> None:
        self.run, self.log = run, log
        self.watched = tuple(str(path) for path in watched)

    def attempt(self, kill_at: int | None = None, after: float | None = None) -> tuple[int, int]:
        """Run once.

        Args:
            kill_at: Index of the operation before which to kill.
            after: Seconds after which to kill.

        Returns:
            The exit code (negative: the signal), and the number of operations.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._child(writing, kill_at)
        os.close(writing)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading, "rb") as pipe:
            count = len(pipe.read())
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), count

    def _child(self, writing: int, kill_at: int | None) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in OPERATIONS or not self._counts(event, arguments):
                return
            seen += 1
            os.write(writing, b".")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.addaudithook(hook)
            self.run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _counts(self, event: str, arguments: tuple[Any, ...]) -> bool:
        path = arguments[0]
        if not isinstance(path, str | Path) or not str(path).startswith(self.watched):
            return False
        # Reading changes nothing, so opening files for it does not count.
        return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def results(out: Path) -> dict[str, Any]:
    """Return a pipeline's results by file, without what depends on the clock."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or "tensorboard" in name:
            continue
        if path.name in ("metrics.json", "metrics.jsonl"):
            found[name] = [_stable(json.loads(text)) for text in _documents(path)]
        else:
            found[name] = path.read_bytes()
    return found


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if not k.startswith(UNSTABLE)}
    return value


def kill_pipeline(arch: str, folder: Path, aimed: int, at_random: int, seed: int = 0) -> Figures:
    """Kill a pipeline, each time in a fresh folder, and continue it.

    Args:
        arch: "t5" or "llama".
        folder: Folder to work in.
        aimed: Number of operations to kill before, evenly spread; all if there are fewer.
        at_random: Number of kills at random moments.
        seed: Seed of the moments.
    """
    import torch

    from rlhf.config import PipelineConfig
    from rlhf.pipeline import run_pipeline

    torch.set_num_threads(1)  # threads do not survive a fork
    fields = make_inputs(arch, folder / "in")
    out, temporary = folder / "out", folder / "tmp"
    temporary.mkdir()
    os.environ["RLHF_CACHE"] = str(folder / "cache")
    tempfile.tempdir = str(temporary)
    config = PipelineConfig.model_validate(fields | {"output_dir": str(out)})
    killer = Killer(lambda: run_pipeline(config), [out, temporary], folder / "log.txt")
    begun = time.monotonic()
    code, operations = killer.attempt()
    seconds = time.monotonic() - begun
    assert code == 0, (folder / "log.txt").read_text()
    whole = results(out)
    figures = Figures(operations)
    moments = random.Random(seed)
    step = max(1, operations // aimed) if aimed else 0
    places: list[dict[str, Any]] = []
    if aimed:
        places += [{"kill_at": n} for n in range(1, operations + 1, step)][:aimed]
    places += [{"after": moments.uniform(0, seconds)} for _ in range(at_random)]
    for place in places:
        shutil.rmtree(out)
        code, _ = killer.attempt(**place)
        if code != -signal.SIGKILL:  # it finished first
            continue
        figures.kills += 1
        where = json.dumps(place)
        if killer.attempt()[0] != 0:
            figures.refused.append(where)
            continue
        left = [path for path in out.rglob("*") if path.name.startswith(".")]
        left += [*temporary.iterdir(), *out.rglob("*.partial"), *out.rglob("checkpoints")]
        if left:
            figures.leaked.append(f"{where}: {left[0]}")
        now = results(out)
        if now != whole:
            names = [name for name in {**whole, **now} if whole.get(name) != now.get(name)]
            figures.different.append(f"{where}: {names}")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--aimed", type=int, default=100)
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--arch", default="t5")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = kill_pipeline(given.arch, Path(name), given.aimed, given.random, given.seed)
    print(figures.line())
    problems = [*figures.refused, *figures.leaked, *figures.different]
    print("\n".join(problems))
    return bool(problems)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
