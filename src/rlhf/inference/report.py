"""Inference's output for people: README, samples to read, lines for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.config import InferenceConfig
from rlhf.inference.predictions import Prediction, Response
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
    ("best_of_n_reward", "best of {n} untuned samples: reward, by the model that chose it"),
    ("best_of_n_win_rate", "best of {n} untuned samples: win rate under that model"),
    ("best_of_n_kl_bound", "best of {n} untuned samples: KL to the untuned model, at most"),
    ("reward_model_accuracy", "accuracy of the reward model on this file's pairs"),
    ("reward_model_longer_accuracy", "accuracy of always taking the longer candidate"),
)


def report_markdown(config: InferenceConfig, metrics: Mapping[str, Any]) -> str:
    """Return the folder's README: the most important metrics, before and after."""
    sampling = "greedy"
    if config.sampling_strategy == "temperature_sampling":
        sampling = f"sampled at temperature {config.temperature:g}, seed {config.seed}"
    columns = {"baseline_": "before", "": "after"}
    if "best_of" in metrics:
        columns["best_of_n_"] = f"best of {metrics['best_of']} before"
    lines = [
        "# Before and after\n",
        f"{as_code(config.policy_path)} against {as_code(str(config.base_model))} "
        f"on {metrics['rows']} rows, "
        f"{sampling}. Brackets are 95 % bootstrap intervals over rows.\n",
        *_table_head(columns.values()),
    ]
    for name, title in _REPORTED:
        if name in metrics:
            cells = [_figure(metrics, prefix + name) for prefix in columns]
            lines.append(_table_row(title, cells))
    if "best_of" in metrics:
        wins = [_figure(metrics, f"{prefix}win_rate") for prefix in ("", "best_of_n_")]
        bound = f"at most {_figure(metrics, 'best_of_n_kl_bound')}"
        lines.append(_table_row("win rate against before", ["", *wins]))
        lines.append(_table_row("KL to before, nats", ["", _figure(metrics, "kl"), bound]))
    lines.append("")
    lines += [f"- {line}" for line in summary_lines(metrics)]
    if "reward" in metrics:
        lines.append(
            "\nThe reward is a model's judgment, not a person's. If it rises while KL is large or "
            "samples.md reads badly, the reward model is being exploited."
        )
    if "best_of" in metrics:
        lines.append(
            f"\nBest of {metrics['best_of']}: the sample of the untuned model, at temperature "
            f"{config.temperature:g}, that the reward model likes best. Its reward and win rate "
            "are by the judge that it was chosen by. Its KL is bounded by log n - (n - 1)/n."
        )
    lines.append(
        "\nEvery response is in predictions.jsonl, all figures in metrics.json, settings in "
        "config.yaml."
    )
    return "\n".join(lines) + "\n"


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the metrics that compare the two models, one per line."""
    return [
        f"{title.format(n=metrics.get('best_of'))}: {_figure(metrics, name)}"
        for name, title in _COMPARED
        if name in metrics
    ]


def _table_head(titles: Iterable[str]) -> list[str]:
    titles = list(titles)
    return [_table_row("", titles), _table_row("---", ["---"] * len(titles))]


def _table_row(title: str, cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in [title, *cells]) + "|"


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    text = f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
    return text


def samples_markdown(predictions: Sequence[Prediction]) -> str:
    """Return rows spread evenly over the file, before and after side by side; no cherry-picking."""
    count = min(SAMPLES, len(predictions))
    rows = [index * len(predictions) // count for index in range(count)]
    best = ""
    if any(row.best_of_n is not None for row in predictions):
        best = "; best of n: the untuned model's sample that the reward model likes best"
    parts = [
        "# Samples\n",
        f"{count} of {len(predictions)} rows, evenly spread. Before: the untuned model; after: "
        f"the tuned one{best}. All rows are in predictions.jsonl.\n",
    ]
    for index in rows:
        parts += [f"## Row {index + 1}\n", _quote(predictions[index].input_text)]
        parts.append(_comparison(predictions[index]))
    return "\n".join(parts).encode("utf-8", "replace").decode()  # half characters cannot be shown


def _comparison(row: Prediction) -> str:
    columns = {"baseline_": "before", "": "after", "best_of_n_": "best of n"}
    found = {
        columns[prefix]: row.responses[prefix] for prefix in columns if prefix in row.responses
    }
    rewards = [response.reward for response in found.values() if response.reward is not None]
    kl = ["", f"{row.kl:.2f}", *[""] * (len(found) - 2)]
    lines = [
        *_table_head(found),
        _table_row("**response**", [table_cell(response.text) for response in found.values()]),
        *([_table_row("reward", [f"{reward:.3f}" for reward in rewards])] if rewards else []),
        _table_row("tokens", [_length(response) for response in found.values()]),
        _table_row("KL, nats", kl),
    ]
    lines += [f"\nReference:\n\n{_quote(reference)}".rstrip() for reference in row.references]
    return "\n".join(lines) + "\n"


def _length(response: Response) -> str:
    cut = "" if response.finish_reason == "eos" else " (cut by the limit)"
    return f"{response.tokens}{cut}"


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
