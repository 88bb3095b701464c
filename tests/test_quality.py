"""The benchmark of methods on the built-in corpus: its tables, and one small run."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality
from report import table_lines


def line(method: str, seed: int, gain: float, kl: float, seconds: float) -> dict[str, object]:
    figures = {"gold_gain": gain, "kl": kl, "seconds": seconds, "reward_after": 2 * gain}
    points = [
        {"step": step, "gold_gain": gain * step / 4, "kl": kl * step / 4, "seconds": seconds * step}
        for step in (2, 4)
    ]
    return {"arch": "t5", "method": method, "seed": seed, **figures, "curve": points}


def test_tables_are_means_over_seeds() -> None:
    found = [
        line("rloo", 0, 9.0, 9.0, 9.0),
        line("ppo_n1", 0, 1.0, 2.0, 40.0),
        line("ppo_n1", 1, 1.5, 4.0, 50.0),
        line("rloo", 0, 0.5, 1.0, 10.0),  # the line of a later run
    ]
    text = table_lines(quality.HEADER, quality.rows(found))
    assert text[2:] == [
        "| t5 | ppo_n1 | 2 | +1.25 (+1.00 to +1.50) | 2.50 | 3.0 | 45 |",
        "| t5 | rloo | 1 | +0.50 | 1.00 | 1.0 | 10 |",
    ]
    assert quality.curve_rows(found) == [
        ["t5", "ppo_n1", "+0.62 (1.5) at 90 s, +1.25 (3.0) at 180 s"],
        ["t5", "rloo", "+0.25 (0.5) at 20 s, +0.50 (1.0) at 40 s"],
    ]


@pytest.mark.slow
def test_runs_leave_one_line_each_and_are_not_repeated(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    options = Namespace(results=results, folder=tmp_path, threads=1)
    options.arch, options.seeds, options.quick = ["t5"], [0], True
    names = ["ppo_n4", "dpo", "best_of_16"]
    for _ in range(2):
        assert quality.run_all(names, options) == 0
    found = [json.loads(text) for text in results.read_text().splitlines()]
    assert [(one["arch"], one["seed"], one["method"]) for one in found] == [
        ("t5", 0, name) for name in names
    ]
    for one in found:
        assert {"gold_gain", "reward_after", "kl", "reward_model_accuracy"} <= set(one)
    ppo, dpo, best = found
    assert ppo["responses"] == 2 * 8
    assert [point["step"] for point in ppo["curve"]] == [1, 2]
    assert 0 < ppo["curve"][0]["seconds"] < ppo["curve"][1]["seconds"] == ppo["seconds"]
    assert dpo["pairs"] == 2 * 4
    assert best["kl"] == pytest.approx(math.log(16) - 15 / 16)
    assert best["reward_after"] > best["reward_before"]
