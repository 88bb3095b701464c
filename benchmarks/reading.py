"""Measure how fast preference files are checked, and how much memory that takes.

    python benchmarks/reading.py --rows 1000000
    python benchmarks/reading.py --rows 1000000 --like preferences.jsonl

Writes rows shaped like the quickstart's corpus (`short`, 360 bytes), like TL;DR (`long`, 1.6 kB:
the same sentences, more of them), and like the rows of a given file (`like`). Each command runs in
its own process.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.quickstart import corpus

Row = dict[str, Any]
LIMITS = ["--prompt_sequence_length", "512", "--target_sequence_length", "64"]


def main() -> None:
    """Print a table."""
    options = parse()
    print("| rows | command | seconds | of CPU | rows a second | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="rlhf-reading-") as folder:
        for name, rows in shapes(options.like).items():
            path = Path(folder) / f"{name}.jsonl"
            size = write(path, rows, options.rows)
            for label, command in commands(path, options.base_model):
                measure(f"{name}, {size} bytes", label, command, options.rows)
            path.unlink()


def parse() -> argparse.Namespace:
    """Parse the command line."""
    toy_t5 = Path(corpus.__file__).parent / "assets" / "toy_t5"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--base_model", default=str(toy_t5), help="for the dry run")
    parser.add_argument("--like", help="JSON Lines whose rows are repeated")
    return parser.parse_args()


def shapes(like: str | None) -> dict[str, list[Row]]:
    """Return some rows of each shape, to be repeated."""
    short = toy_rows(2000)
    posts = itertools.cycle(row["input_text"].removesuffix(corpus.CUE) for row in short)
    long = [
        row | {"input_text": " ".join(itertools.islice(posts, 7)) + corpus.CUE}
        for row in toy_rows(500)
    ]
    found = {"short": short, "long": long}
    if like is not None:
        lines = Path(like).read_text(encoding="utf-8").split("\n")
        found["like"] = [json.loads(line) for line in lines if line.strip()]
    return found


def toy_rows(count: int) -> list[Row]:
    """Return rows of the quickstart's corpus."""
    with tempfile.TemporaryDirectory() as folder:
        corpus.write_corpus(folder, 0, corpus.CorpusSizes(preferences=count))
        return corpus.read_rows(Path(folder) / "preferences.jsonl")


def write(path: Path, rows: list[Row], count: int) -> int:
    """Write rows with different beginnings; return their mean size in bytes."""
    numbered: Iterator[Row] = (
        row | {"input_text": f"{random.Random(number).random()} {row['input_text']}"}
        for number, row in zip(range(count), itertools.cycle(rows), strict=False)
    )
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in numbered)
    return path.stat().st_size // count


def commands(path: Path, base_model: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands to measure: a name and the arguments of `rlhf`."""
    yield "data check", ["data", "check", str(path)]
    run = ["run", "--base_model", base_model, "--preference_dataset", str(path), *LIMITS]
    yield "run --dry_run", [*run, "--output_dir", str(path.with_suffix("")), "--dry_run"]


def measure(rows: str, label: str, command: list[str], count: int) -> None:
    """Run a command in a process that starts no others, and print a line of the table."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *command], stdout=subprocess.DEVNULL)
    usage = wait(process)
    seconds = time.monotonic() - start
    figures = [f"{seconds:.1f}", f"{usage.ru_utime + usage.ru_stime:.1f}"]
    figures += [f"{count / seconds:,.0f}", f"{usage.ru_maxrss / 2**20:.2f} GiB"]
    print(f"| {rows} | `{label}` | {' | '.join(figures)} |", flush=True)


def wait(process: "subprocess.Popen[bytes]") -> resource.struct_rusage:
    """Wait for a process to end; return its resource usage."""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"rlhf ended with status {status}")
    return usage


if __name__ == "__main__":
    main()
