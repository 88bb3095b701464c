"""A step's page in the console: its metrics, and samples from before and after."""

import json
import math
from collections.abc import Mapping
from typing import Any

from rlhf.files.output import Output
from rlhf.inference.report import table_cell

SHOWN_ROWS = 8


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among a stage's metrics, under names that KFP's Metrics accepts."""
    return {
        name.replace("/", "_"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def markdown(stage: str, folder: str, metrics: Mapping[str, Any], notes: list[str]) -> str:
    """Return the page for a finished stage, in Markdown.

    Args:
        stage: reward_model, ppo or inference.
        folder: Its folder.
        metrics: Its final metrics.
        notes: Lines for the top: locations, warnings.
    """
    output = Output(folder)
    output.fetch("samples.md", "samples.jsonl")
    parts = [f"# {stage}", "\n".join(f"- {note}" for note in notes), "## Metrics", _table(metrics)]
    page = output.path / "samples.md"
    if page.exists():
        parts.append(page.read_text(encoding="utf-8").replace("# Samples", "## Samples", 1))
    elif (output.path / "samples.jsonl").exists():
        lines = (output.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        parts.append(_first_and_last([json.loads(line) for line in lines]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {value:.6g} |" for name, value in finite_numbers(metrics).items()]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def _first_and_last(rows: list[dict[str, Any]]) -> str:
    """Return the logged samples of the first and the last step."""
    if not rows:
        return ""
    parts = []
    steps = sorted({row["step"] for row in rows})
    for title, step in (("Before", steps[0]), ("After", steps[-1])):
        chosen = [row for row in rows if row["step"] == step][:SHOWN_ROWS]
        names = [name for name in chosen[0] if name != "step"]
        parts += [
            f"## {title}: samples of step {step}",
            "\n".join(
                [
                    f"| {' | '.join(map(_cell, names))} |",
                    f"|{' --- |' * len(names)}",
                    *(
                        f"| {' | '.join(_cell(row.get(name)) for name in names)} |"
                        for row in chosen
                    ),
                ]
            ),
        ]
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else table_cell(str(value))
