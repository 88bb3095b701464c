"""All stages on generated data, in minutes: reward model, PPO, inference, and a comparison.

The corpus has a known gold reward (`rlhf.quickstart.corpus`), which PPO never sees. So the final
table tells whether the policy became better, or only better at pleasing the reward model.
"""

import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.config import PipelineConfig
from rlhf.config.loading import read_yaml
from rlhf.console import SteadyStream
from rlhf.files.lease import lease
from rlhf.files.output import RESULT_FILE
from rlhf.files.text import to_json, write_text
from rlhf.inference.predictions import Prediction, read_predictions
from rlhf.pipeline import check_inputs, run_stages
from rlhf.quickstart import corpus
from rlhf.stages import RunResult
from rlhf.untrusted import printable

Arch = Literal["t5", "llama"]
ASSETS = Path(__file__).parent / "assets"
SAMPLES = 3


def run_quickstart(arch: Arch = "t5", output_dir: str | None = None, seed: int = 0) -> RunResult:
    """Generate the corpus, tune a shipped checkpoint on it and print what happened.

    Args:
        arch: "t5" or "llama".
        output_dir: Default: `runs/quickstart-<arch>`.
        seed: Seed of the corpus and of every stage.

    Raises:
        InputError: If the folder holds another run.
        StoppedBySignal: After SIGTERM or SIGINT, once everything so far is saved.
    """
    start = time.monotonic()
    output = Path(output_dir or f"runs/quickstart-{arch}")
    config = quickstart_config(arch, output, seed)
    with lease(str(output), "rlhf quickstart"):
        return _run(config, output, seed, start)


def _run(config: PipelineConfig, output: Path, seed: int, start: float) -> RunResult:
    corpus.write_corpus(output / "data", seed)
    check_inputs(config)
    result = run_stages(config, start)
    predictions = list(read_predictions(output / "inference" / "predictions.jsonl"))
    metrics = dict(result.metrics)
    if "gold_reward_after" not in metrics:
        inference = metrics["inference"]
        metrics |= summarize(
            predictions, inference, corpus.read_rows(output / "data" / "eval.jsonl")
        )
        metrics["seconds"] = time.monotonic() - start
        write_text(output / RESULT_FILE, to_json(metrics))
    report(metrics, predictions, output, Console(file=cast(TextIO, SteadyStream(sys.stdout))))
    return RunResult(str(output), metrics)


def quickstart_config(arch: Arch, output_dir: str | Path, seed: int = 0) -> PipelineConfig:
    """Return the shipped configuration with this installation's checkpoint and a given folder."""
    values = read_yaml(str(ASSETS / f"quickstart_{arch}.yaml"))
    data = Path(output_dir) / "data"
    return PipelineConfig.model_validate(
        values
        | {
            "base_model": str(ASSETS / f"toy_{arch}"),
            "output_dir": str(output_dir),
            "seed": seed,
            "preference_dataset": str(data / "preferences.jsonl"),
            "prompt_dataset": str(data / "prompts.jsonl"),
            "eval_dataset": str(data / "eval.jsonl"),
        }
    )


def summarize(
    predictions: list[Prediction],
    inference: Mapping[str, Any],
    eval_rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the metrics of the quickstart.

    Before and after are sampled at the training temperature on held-out prompts, which no stage
    used for training or for choosing weights.

    Args:
        predictions: Predictions for the held-out prompts.
        inference: Metrics of the inference stage.
        eval_rows: The held-out rows, with candidates.

    Returns:
        `gold_reward_before`, `gold_reward_after` and `gold_reward_std_before` (over responses);
        `gold_gain` in those standard deviations; `reward_before`, `reward_after` under the reward
        model; `kl`, nats per response on the tuned policy's own samples;
        `reward_model_accuracy` on the held-out pairs and `reward_model_accuracy_allowed`, the
        ceiling set by label noise; ROUGE-L and tokens before and after.
    """
    before = [corpus.gold_reward(row.input_text, row.baseline) for row in predictions]
    after = [corpus.gold_reward(row.input_text, row.prediction) for row in predictions]
    spread = statistics.stdev(before)
    return {
        "gold_reward_before": statistics.fmean(before),
        "gold_reward_after": statistics.fmean(after),
        "gold_reward_std_before": spread,
        "gold_gain": (statistics.fmean(after) - statistics.fmean(before)) / spread,
        "reward_before": inference["baseline_reward"],
        "reward_after": inference["reward"],
        "kl": inference["kl"],
        "reward_model_accuracy": inference["reward_model_accuracy"],
        "reward_model_accuracy_allowed": corpus.allowed_accuracy(eval_rows),
        "rouge_before": inference["baseline_rougeL"],
        "rouge_after": inference["rougeL"],
        "tokens_before": statistics.fmean(row.baseline_tokens for row in predictions),
        "tokens_after": statistics.fmean(row.tokens for row in predictions),
    }


def report(
    metrics: Mapping[str, Any],
    predictions: list[Prediction],
    output: Path,
    console: Console,
) -> None:
    """Print the table, samples and where everything is."""
    table = Table(title=f"Before and after PPO, {len(predictions)} held-out prompts")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, key in (
        ("gold reward (what the annotator wants)", "gold_reward"),
        ("proxy reward (what PPO saw)", "reward"),
        ("ROUGE-L against careful summaries", "rouge"),
        ("length, tokens", "tokens"),
    ):
        table.add_row(name, f"{metrics[f'{key}_before']:.2f}", f"{metrics[f'{key}_after']:.2f}")
    table.add_row("KL to the untuned policy, nats", "0.00", f"{metrics['kl']:.2f}")
    console.print(table)
    console.print(
        f"Gold reward: {metrics['gold_gain']:+.2f} standard deviations. Reward model: "
        f"{metrics['reward_model_accuracy']:.1%} of held-out pairs right; the ceiling set by label "
        f"noise is {metrics['reward_model_accuracy_allowed']:.1%}."
    )
    for row in predictions[:SAMPLES]:
        console.print(f"\n[bold]post[/]    {escape(printable(row.input_text))}", highlight=False)
        for name, text in (("before", row.baseline), ("after", row.prediction)):
            gold = corpus.gold_reward(row.input_text, text)
            line = f"[bold]{name:7}[/] {escape(printable(text.strip()))}  [dim](gold {gold:.2f})[/]"
            console.print(line, highlight=False)
    places = {
        "inference/samples.md": "more samples",
        "inference/predictions.jsonl": "all of them",
        "policy/merged": "the tuned model, for plain transformers",
        "policy/adapter": "its LoRA adapter, for plain peft",
        "reward_model": "the reward model",
        "data": "the corpus",
        "metrics.json": "these figures",
        "config.yaml": "the configuration; `rlhf run` takes it with your own files",
    }
    console.print(f"\nIn {escape(printable(str(output)))}, {metrics['seconds']:.0f} seconds:")
    for name, what in places.items():
        console.print(f"  {name:28} {what}", highlight=False)
