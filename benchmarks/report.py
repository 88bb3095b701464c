"""Tables from measured rounds."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = list[str]


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def seconds(side: Mapping[str, Any]) -> list[float]:
    """Return the seconds of every round."""
    return [one["seconds"] for one in side["rounds"]]


def speedups(side: Mapping[str, Any], peer: Mapping[str, Any]) -> tuple[float, float]:
    """Return our speed relative to the peer: ratio of medians, and median of per-round ratios."""
    own, other = seconds(side), seconds(peer)
    pairs = [b / a for a, b in zip(own, other, strict=False)]
    return median(other) / median(own), median(pairs)


def comparison_rows(name: str, entry: Mapping[str, Any]) -> list[Row]:
    """Return one row per side: name, seconds, speed and memory relative to the peer."""
    rows = []
    peer = entry["sides"].get(entry["baseline"], {"rounds": []})
    for side_name, side in entry["sides"].items():
        rows.append([name if not rows else "", side_name, *_figures(side, peer)])
    return rows


def phase_rows(name: str, entry: Mapping[str, Any]) -> list[Row]:
    """Return one row per phase of each of our sides: seconds, FLOPs, share of measured rates."""
    rows: list[Row] = []
    for side_name, side in entry["sides"].items():
        if not (side["ours"] and side["rounds"]):
            continue
        for phase, spent in phases(side).items():
            label = [name if not rows else "", side_name]
            share = f"{100 * spent / median(seconds(side)):.0f} %"
            rates = _rates(side, phase, entry["machine"])
            rows.append([*label, phase, f"{spent:.3g} s", share, *rates])
        outside = side["facts"].get("outside_model_calls")
        if outside is not None:
            row = ["", side_name, "outside model calls", "", f"{100 * outside:.1f} %"]
            rows.append([*row, *[""] * 3])
    return rows


def phases(side: Mapping[str, Any]) -> dict[str, float]:
    """Return each phase's median seconds and, if there are several, the time outside (overhead)."""
    names = side["rounds"][0]["phases"]
    found = {name: median(one["phases"][name] for one in side["rounds"]) for name in names}
    if len(found) < 2:
        return found
    outside = [one["seconds"] - sum(one["phases"].values()) for one in side["rounds"]]
    return found | {"overhead": median(outside)}


def scaling_rows(entries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return one row per point: sizes, seconds (also as a multiple of the base's), phases."""
    rows = []
    base = entries["scaling_base"]["sides"]["defaults"] if "scaling_base" in entries else {}
    for entry in entries.values():
        side = next(iter(entry["sides"].values()))
        sizes = [str(entry["batch"]), str(entry["lengths"]["prompt"])]
        sizes = [entry["model"], *sizes, str(entry["lengths"]["response"])]
        if not side["rounds"]:
            rows.append([*sizes, side.get("error", "")])
            continue
        parts = phases(side)
        shown = (parts.get(name, 0.0) for name in ("rollout", "score", "experience", "update"))
        memory = _memory(side.get("peak_mib"))
        growth = ""
        if base.get("rounds"):
            growth = f"{median(seconds(side)) / median(seconds(base)):.2f}x"
        rows.append([*sizes, _range(side), growth, *(f"{part:.2f}" for part in shown), memory])
    return rows


MAIN = ["comparison", "side", "seconds", "speed", "by rounds", "target", "memory", "of peer"]
PHASES = ["comparison", "side", "phase", "seconds", "share", "GFLOP", "of matmul", "of bandwidth"]
SCALING = ["model", "batch", "prompt", "response", "seconds", "of base", "rollout", "score"]
SCALING += ["experience", "update", "memory"]


def tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[Row]]]:
    """Return title, header and rows of each table."""
    entries = results["comparisons"]
    main = {name: entry for name, entry in entries.items() if entry["group"] == "main"}
    scaling = {name: entry for name, entry in entries.items() if entry["group"] == "scaling"}
    compared = [row for name, entry in main.items() for row in comparison_rows(name, entry)]
    parts = [row for name, entry in main.items() for row in phase_rows(name, entry)]
    named = [
        ("Against the peers", MAIN, compared),
        ("Where our time goes", PHASES, parts),
        ("How our cost grows", SCALING, scaling_rows(scaling)),
    ]
    return [table for table in named if table[2]]


def markdown(results: Mapping[str, Any]) -> str:
    """Return all tables, and a description of the machine."""
    blocks = [describe(results["machine"])]
    for title, header, rows in tables(results):
        blocks.append("\n".join([f"### {title}", "", *table_lines(header, rows)]))
    return "\n\n".join(blocks) + "\n"


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def describe(machine: Mapping[str, Any]) -> str:
    """Describe the machine in a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    known = f" ({machine['instructions']})" if machine.get("instructions") else ""
    return (
        f"Measured {machine['date']} on {machine['device']}{known}, {machine['threads']} threads: "
        f"matrix products {machine['flops']['float32'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{machine['flops']['bfloat16'] / 1e9:.0f} in bfloat16, copying "
        f"{machine['bytes'] / 1e9:.1f} GB/s (bytes read and written). {versions}."
    )


def insert(page: str, section: str, text: str) -> str:
    """Return the page with `text` between the section's markers."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    pattern = re.compile(rf"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n{end}", page)


def _figures(side: Mapping[str, Any], peer: Mapping[str, Any]) -> Row:
    if not side["rounds"]:
        return [f"failed: {side.get('error', '')}", *[""] * 5]
    target = "" if side["target"] is None else f"{side['target']:g}x"
    memory, ratio, wanted = _peak(side), "", side.get("memory")
    speed: Sequence[str] = ("", "")
    if side is not peer and peer["rounds"]:
        speed = [f"{value:.2f}x" for value in speedups(side, peer)]
        if memory and _peak(peer):
            ratio = f"{memory / _peak(peer):.2f}x"
            ratio += "" if wanted is None else f" (target {wanted:g}x)"
    note = f" (then failed: {side['error']})" if "error" in side else ""
    return [_range(side) + note, *speed, target, _memory(memory), ratio]


def _rates(side: Mapping[str, Any], phase: str, machine: Mapping[str, Any]) -> Row:
    facts = side["facts"]
    work = facts.get("flops", {}).get(phase)
    spent = phases(side)[phase]
    row = ["", "", ""]
    dtype = facts.get("dtype", "float32")
    if work:
        row[0] = f"{work / 1e9:.3g}"
        row[1] = f"{100 * work / spent / machine['flops'][dtype]:.0f} %"
    if phase in ("decode", "rollout") and "decode_bytes" in facts:
        row[2] = f"{100 * facts['decode_bytes'] / spent / machine['bytes']:.0f} %"
    return row


def _range(side: Mapping[str, Any]) -> str:
    values = seconds(side)
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _peak(side: Mapping[str, Any]) -> float:
    peak: float = side.get("cuda_peak_mib") or side.get("peak_mib") or 0.0
    return peak


def _memory(mib: float | None) -> str:
    return f"{mib / 1024:.2f} GiB" if mib else ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
