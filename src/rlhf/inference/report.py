"""Inference's output for people: README, samples to read, lines for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.config import InferenceConfig
from rlhf.inference.predictions import FinishReason, Prediction
from rlhf.untrusted import as_code, printable

SAMPLES = 16

_REPORTED = (
    ("reward", "reward"),
    ("rouge1", "ROUGE-1"),
    ("rouge2", "ROUGE-2"),
    ("rougeL", "ROUGE-L"),
    ("rougeLsum", "ROUGE-Lsum"),
    ("tokens_mean", "tokens, mean"),
    ("tokens_p90", "tokens, 90 % quantile"),
    ("eos_rate", "ended by itself"),
    ("empty_rate", "empty"),
    ("distinct_1", "distinct-1"),
    ("distinct_2", "distinct-2"),
    ("repetition", "repeated 3-grams"),
)
_COMPARED = (
    ("win_rate", "win rate under the reward model (ties half)"),
    ("reward_gain", "gain of reward, row by row"),
    ("kl", "KL to the untuned model, nats per response"),
    ("reward_model_accuracy", "accuracy of the reward model on this file's pairs"),
    ("reward_model_longer_accuracy", "accuracy of always taking the longer candidate"),
)


def report_markdown(config: InferenceConfig, metrics: Mapping[str, Any]) -> str:
    """Return the folder's README: the most important metrics, before and after."""
    sampling = "greedy"
    if config.sampling_strategy == "temperature_sampling":
        sampling = f"sampled at temperature {config.temperature:g}, seed {config.seed}"
    lines = [
        "# Before and after\n",
        f"{as_code(config.policy_path)} against {as_code(str(config.base_model))} "
        f"on {metrics['rows']} rows, "
        f"{sampling}. Brackets are 95 % bootstrap intervals over rows.\n",
        "| | before | after |",
        "| --- | --- | --- |",
    ]
    for name, title in _REPORTED:
        if name in metrics:
            before, after = _figure(metrics, f"baseline_{name}"), _figure(metrics, name)
            lines.append(f"| {title} | {before} | {after} |")
    lines.append("")
    lines += [f"- {line}" for line in summary_lines(metrics)]
    if "reward" in metrics:
        lines.append(
            "\nThe reward is a model's judgment, not a person's. If it rises while KL is large or "
            "samples.md reads badly, the reward model is being exploited."
        )
    lines.append(
        "\nEvery response is in predictions.jsonl, all figures in metrics.json, settings in "
        "config.yaml."
    )
    return "\n".join(lines) + "\n"


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the metrics that compare the two models, one per line."""
    return [f"{title}: {_figure(metrics, name)}" for name, title in _COMPARED if name in metrics]


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    text = f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
    return text


def samples_markdown(predictions: Sequence[Prediction]) -> str:
    """Return rows spread evenly over the file, before and after side by side; no cherry-picking."""
    count = min(SAMPLES, len(predictions))
    rows = [index * len(predictions) // count for index in range(count)]
    parts = [
        "# Samples\n",
        f"{count} of {len(predictions)} rows, evenly spread. Before: the untuned model; after: "
        "the tuned one. All rows are in predictions.jsonl.\n",
    ]
    for index in rows:
        parts += [f"## Row {index + 1}\n", _quote(predictions[index].input_text)]
        parts.append(_comparison(predictions[index]))
    return "\n".join(parts).encode("utf-8", "replace").decode()  # half characters cannot be shown


def _comparison(row: Prediction) -> str:
    lines = [
        "| | before | after |",
        "| --- | --- | --- |",
        f"| **response** | {table_cell(row.baseline)} | {table_cell(row.prediction)} |",
    ]
    if row.reward is not None and row.baseline_reward is not None:
        lines.append(f"| reward | {row.baseline_reward:.3f} | {row.reward:.3f} |")
    before = _length(row.baseline_tokens, row.baseline_finish_reason)
    lines.append(f"| tokens | {before} | {_length(row.tokens, row.finish_reason)} |")
    lines.append(f"| KL, nats | | {row.kl:.2f} |")
    lines += [f"\nReference:\n\n{_quote(reference)}".rstrip() for reference in row.references]
    return "\n".join(lines) + "\n"


def _length(tokens: int, reason: FinishReason) -> str:
    return str(tokens) if reason == "eos" else f"{tokens} (cut by the limit)"


def _escape(text: str) -> str:
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for character in "*_`[~":  # would vanish, change what follows or fetch an image
        text = text.replace(character, "\\" + character)
    return text


def _quote(text: str) -> str:
    return "".join(f"> {_escape(line)}  \n" for line in text.strip().splitlines() or [""])


def table_cell(text: str) -> str:
    """Return Markdown for a text that stays inside its table cell, whatever a model wrote."""
    lines = text.strip().splitlines()
    return "<br>".join(_escape(line).replace("|", "\\|") for line in lines) or "*(empty)*"
