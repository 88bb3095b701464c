"""Compare this library with its peers and write the tables of benchmarks/README.md.

`bench.py` measures everything, `bench.py --only 'ppo_*'` part of it (other rows are kept), and
`bench.py --quick` checks that every side runs and keeps no figures.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import report
from comparisons import COMPARISONS, Comparison, quick
from rounds import HERE, compare, entry, environment

RESULTS = HERE / "results"
PAGE = HERE / "README.md"


def main() -> int:
    """Run what the command line asks for; return 1 if any side failed."""
    options = parse()
    chosen = choose(options.only, options.device)
    if options.quick:  # which makes all points of a scaling identical
        chosen = {n: one for n, one in chosen.items() if one.group == "main" or n == "scaling_base"}
    section = options.section or options.device
    path = RESULTS / f"{section}.json"
    if report.insert(PAGE.read_text(), section, "new") == PAGE.read_text():
        sys.exit(f"--section: {PAGE.name} has no markers <!-- {section}: begin --> and end")
    here = machine(options.device, options.threads)
    results = start(path, here, keep=bool(options.only) and not options.quick)
    for number, (name, comparison) in enumerate(chosen.items(), 1):
        print(f"[{number}/{len(chosen)}] {name}", file=sys.stderr)
        measured = measure(quick(comparison) if options.quick else comparison, options)
        found = results["comparisons"] | {name: measured | {"machine": here}}
        results["comparisons"] = {name: found[name] for name in COMPARISONS if name in found}
        if not options.quick:
            write(results, path, section)
    show(results, list(chosen))
    sides = [side for name in chosen for side in results["comparisons"][name]["sides"].values()]
    return int(any("error" in side for side in sides))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="after one of warm-up")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, * matches anything")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every process")
    parser.add_argument(
        "--section", help="of README.md, for another machine's figures; default: the device"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    return parser.parse_args()


def choose(patterns: list[str] | None, device: str) -> dict[str, Comparison]:
    """Return the comparisons that match, among those that run on the device."""
    here = {name: one for name, one in COMPARISONS.items() if device in one.devices}
    for pattern in patterns or ():
        if not fnmatch.filter(here, pattern):
            sys.exit(f"--only {pattern}: expected one of {', '.join(here)}")
    wanted = patterns or ["*"]
    return {n: one for n, one in here.items() if any(fnmatch.fnmatch(n, p) for p in wanted)}


def machine(device: str, threads: int) -> dict[str, Any]:
    """Return measured rates, names and versions."""
    command = [sys.executable, str(HERE / "machine.py"), device, str(threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment(threads))
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, **json.loads(output.stdout)}


def start(path: Path, here: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """Return the results to add to: an earlier run's if to be kept and from this machine."""
    earlier = json.loads(path.read_text()) if keep and path.is_file() else None
    same = ("device", "instructions", "threads")
    if earlier and all(earlier["machine"].get(name) == here[name] for name in same):
        return {"machine": here, "comparisons": earlier["comparisons"]}
    if earlier:
        print(
            f"{path}: of another machine, instruction set or number of threads; starting anew",
            file=sys.stderr,
        )
    return {"machine": here, "comparisons": {}}


def measure(comparison: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """Run one comparison in a temporary folder; any failure becomes its result."""
    sizes = {"rounds": options.rounds, "device": options.device, "threads": options.threads}
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
        try:
            return compare(comparison, Path(folder), **sizes)
        except Exception as error:
            traceback.print_exc()
            failed = {"rounds": [], "error": " ".join(str(error).split())[-300:]}
            return entry(comparison, dict.fromkeys(comparison.sides, failed))


def write(results: dict[str, Any], path: Path, section: str) -> None:
    """Save what has been measured so far, raw and as tables."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(report.insert(PAGE.read_text(), section, report.markdown(results)))


def show(results: dict[str, Any], names: list[str]) -> None:
    """Print the tables of these comparisons."""
    chosen = {name: results["comparisons"][name] for name in names}
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.describe(results["machine"]))
    for title, header, rows in report.tables(results | {"comparisons": chosen}):
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
