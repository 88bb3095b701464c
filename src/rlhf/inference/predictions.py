"""What inference says of each row: the file it grows in, its figures, its samples for reading."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlhf.config import InferenceConfig
from rlhf.evaluation import bootstrap_interval, corpus_rouge, text_statistics, win_rate
from rlhf.files.text import write_text
from rlhf.untrusted import as_code, printable

FinishReason = Literal["eos", "length"]
SAMPLES = 16


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl.

    Attributes:
        input_text: The row's input as it was given.
        prediction: The tuned model's response.
        baseline: The untuned model's response.
        reference: The human reference, several as a list, None without.
        reward: Reward of `prediction`; None without a reward model.
        baseline_reward: Reward of `baseline`.
        kl: Sum over the prediction's tokens of log p_tuned - log p_untuned, nats (k1).
        kl_k3: The same by the estimator that is never negative.
        prompt_tokens: Tokens of the prompt as the model read it.
        tokens: Tokens of the prediction, end of sequence included.
        baseline_tokens: Tokens of the baseline.
        finish_reason: "eos" if the response ended by itself, "length" if the limit cut it.
        baseline_finish_reason: The same of the baseline.
    """

    input_text: str
    prediction: str
    baseline: str
    reference: str | list[str] | None
    reward: float | None
    baseline_reward: float | None
    kl: float
    kl_k3: float
    prompt_tokens: int
    tokens: int
    baseline_tokens: int
    finish_reason: FinishReason
    baseline_finish_reason: FinishReason

    @property
    def references(self) -> list[str]:
        """The references as a list, empty without any."""
        if self.reference is None:
            return []
        return [self.reference] if isinstance(self.reference, str) else self.reference

    def line(self) -> bytes:
        """The JSON line, with its newline."""
        return json_line(asdict(self))


def json_line(row: Mapping[str, Any], *, allow_nan: bool = False) -> bytes:
    """One line of JSON Lines in UTF-8, readable in every script."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=allow_nan)
    # Half of a surrogate pair is legal in a JSON escape but not in UTF-8; this keeps the escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_predictions(path: Path) -> Iterator[Prediction]:
    """The predictions of a file, up to the first line that is not a whole one."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # half written: the machine went down
                return
            try:
                prediction = Prediction(**json.loads(line))
            except (ValueError, TypeError):
                return
            yield prediction


class PredictionFile:
    """A file of predictions that survives an interruption, and damage to what it has.

    Beside it grows a file of checksums, JSON Lines: first whose rows they are, then for each piece
    its rows, bytes and SHA-256. What has no matching checksum is cut off and computed again.

    Args:
        path: Where it grows.
        sums: Where the checksums are.
        chunk: Rows are appended in pieces of this size. Whole pieces are kept and the rest is cut
            off: what is computed again then meets in the same batches, hence the same bytes.
        total: Rows in the end.
        identity: What the rows are made of.

    Attributes:
        count: Rows that are there.
    """

    def __init__(
        self, path: Path, sums: Path, chunk: int, total: int, identity: Mapping[str, Any]
    ) -> None:
        self.path, self.sums = path, sums
        self.count, size = 0, 0
        self._head = json_line({"run": identity})
        kept = [self._head]
        for line, content in self._pieces():
            rows = content.count(b"\n")
            if rows != min(chunk, total - self.count):
                break
            self.count += rows
            size += len(content)
            kept.append(line)
        if path.exists():
            os.truncate(path, size)
        if path.exists() or sums.exists():
            write_text(sums, b"".join(kept).decode())

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Adds one piece and makes sure that it is on the disk."""
        content = b"".join(prediction.line() for prediction in predictions)
        if not self.sums.exists():
            write_text(self.sums, self._head.decode())
        _append(self.path, content)
        _append(self.sums, json_line(_sum(content)))
        self.count += len(predictions)

    def _pieces(self) -> Iterator[tuple[bytes, bytes]]:
        """Lines of checksums and the pieces that match them, up to the first that does not."""
        if not self.path.is_file() or not self.sums.is_file():
            return
        with self.path.open("rb") as file, self.sums.open("rb") as sums:
            left = self.path.stat().st_size
            next(sums, None)
            for line in sums:
                try:
                    size = json.loads(line)["bytes"]
                    content = file.read(size) if 0 < size <= left else b""
                except (ValueError, TypeError, KeyError, RecursionError):
                    return
                if line != json_line(_sum(content)):
                    return
                left -= size
                yield line, content


def write_sums(path: Path, sums: Path, chunk: int, identity: Mapping[str, Any]) -> None:
    """Writes the checksums of a whole file of predictions, as `PredictionFile` reads them."""
    lines = [json_line({"run": identity})]
    with path.open("rb") as file:
        while content := b"".join(islice(file, chunk)):
            lines.append(json_line(_sum(content)))
    write_text(sums, b"".join(lines).decode())


def _sum(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _append(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def prediction_metrics(predictions: Sequence[Prediction], *, seed: int = 0) -> dict[str, float]:
    """All figures that need nothing but the predictions.

    Args:
        predictions: At least one.
        seed: Of the bootstrap; `NAME_low` and `NAME_high` are the ends of 95 % intervals.

    Returns:
        `rows`; for the tuned model and, behind `baseline_`, the untuned one: `rouge1` … over rows
        with references, those of `rlhf.evaluation.text_statistics`, `reward`; `reward_gain` (row
        by row), `win_rate` (ties half), `kl`, `kl_k3`.
    """
    metrics: dict[str, float] = {"rows": len(predictions)}
    sides = {
        "": [(row.prediction, row.tokens, row.finish_reason) for row in predictions],
        "baseline_": [
            (row.baseline, row.baseline_tokens, row.baseline_finish_reason) for row in predictions
        ],
    }
    references = [row.references for row in predictions]
    for prefix, side in sides.items():
        texts, lengths, reasons = zip(*side, strict=True)
        for name, interval in corpus_rouge(texts, references, seed=seed).items():
            metrics |= interval.metrics(prefix + name)
        statistics = text_statistics(texts, lengths, [reason == "eos" for reason in reasons])
        metrics |= {prefix + name: figure for name, figure in statistics.items()}
    metrics |= bootstrap_interval([row.kl for row in predictions], seed=seed).metrics("kl")
    metrics["kl_k3"] = fmean(row.kl_k3 for row in predictions)
    return metrics | _reward_metrics(predictions, seed)


def _reward_metrics(predictions: Sequence[Prediction], seed: int) -> dict[str, float]:
    pairs = [
        (row.reward, row.baseline_reward)
        for row in predictions
        if row.reward is not None and row.baseline_reward is not None
    ]
    if not pairs:
        return {}
    rewards, baseline = zip(*pairs, strict=True)
    gains = [reward - before for reward, before in pairs]
    return {
        **bootstrap_interval(rewards, seed=seed).metrics("reward"),
        **bootstrap_interval(baseline, seed=seed).metrics("baseline_reward"),
        **bootstrap_interval(gains, seed=seed).metrics("reward_gain"),
        **win_rate(rewards, baseline, seed=seed).metrics("win_rate"),
    }


def samples_markdown(predictions: Sequence[Prediction], count: int = SAMPLES) -> str:
    """Before and after side by side, for rows spread evenly over the file: none is chosen."""
    count = min(count, len(predictions))
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
    for character in "*_`[~":  # would vanish, change what follows or fetch a picture
        text = text.replace(character, "\\" + character)
    return text


def _quote(text: str) -> str:
    return "".join(f"> {_escape(line)}  \n" for line in text.strip().splitlines() or [""])


def table_cell(text: str) -> str:
    """Markdown of a text that stays inside its table cell, whatever a model wrote."""
    lines = text.strip().splitlines()
    return "<br>".join(_escape(line).replace("|", "\\|") for line in lines) or "*(empty)*"


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
    """The folder's README: the figures that matter, before and after."""
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
    """The figures that compare the two models, one a line."""
    return [f"{title}: {_figure(metrics, name)}" for name, title in _COMPARED if name in metrics]


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    text = f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
    return text
