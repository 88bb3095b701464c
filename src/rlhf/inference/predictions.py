"""Predictions: one per row, and the file they are written to as they are made."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlhf.files.text import write_text

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class Response:
    """One of the responses to a row.

    Attributes:
        text: Its text.
        tokens: Its tokens, end of sequence included.
        finish_reason: "eos" if it ended by itself, "length" if the limit cut it off.
        reward: What the reward model gives it; None without one.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    reward: float | None


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl.

    Attributes:
        input_text: The row's input as given.
        prediction: The tuned model's response.
        baseline: The untuned model's response.
        reference: The human reference; a list if there are several, None if there is none.
        reward: Reward of `prediction`; None without a reward model.
        baseline_reward: Reward of `baseline`.
        kl: Sum over the prediction's tokens of log p_tuned - log p_untuned, nats (k1).
        kl_k3: The same with the k3 estimator, which is never negative.
        prompt_tokens: Tokens of the prompt as the model read it.
        tokens: Tokens of the prediction, end of sequence included.
        baseline_tokens: Tokens of the baseline.
        finish_reason: "eos" if the response ended by itself, "length" if the limit cut it off.
        baseline_finish_reason: The same for the baseline.
        best_of_n: That of `best_of` samples of the untuned model which the reward model likes
            best; None, as are the next three, if there are none.
        best_of_n_reward: Its reward.
        best_of_n_tokens: Its tokens.
        best_of_n_finish_reason: How it ended.
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
    best_of_n: str | None = None
    best_of_n_reward: float | None = None
    best_of_n_tokens: int | None = None
    best_of_n_finish_reason: FinishReason | None = None

    @property
    def responses(self) -> dict[str, Response]:
        """The responses by the prefix of their metrics: tuned, untuned, and best of n if made."""
        untuned = self.baseline, self.baseline_tokens, self.baseline_finish_reason
        found = {
            "": Response(self.prediction, self.tokens, self.finish_reason, self.reward),
            "baseline_": Response(*untuned, self.baseline_reward),
        }
        text, tokens, reason = self.best_of_n, self.best_of_n_tokens, self.best_of_n_finish_reason
        if text is not None and tokens is not None and reason is not None:
            found["best_of_n_"] = Response(text, tokens, reason, self.best_of_n_reward)
        return found

    @property
    def references(self) -> list[str]:
        """The references as a list, which may be empty."""
        if self.reference is None:
            return []
        return [self.reference] if isinstance(self.reference, str) else self.reference

    def line(self) -> bytes:
        """Return the JSON line, with its newline."""
        return json_line(asdict(self))


def json_line(row: Mapping[str, Any], *, allow_nan: bool = False) -> bytes:
    """Return one line of JSON Lines in UTF-8, readable in every script."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=allow_nan)
    # Half of a surrogate pair is legal in a JSON escape but not in UTF-8; this keeps the escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield the predictions of a file, up to the first incomplete line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # incomplete: the machine went down
                return
            try:
                prediction = Prediction(**json.loads(line))
            except (ValueError, TypeError):
                return
            yield prediction


class PredictionFile:
    """A file of predictions that survives interruptions and damage.

    A file of checksums, JSON Lines, grows next to it: first the identity of the rows, then rows,
    bytes and SHA-256 of each chunk. Content without a matching checksum is cut off and recomputed.

    Args:
        path: The growing file.
        sums: The file of checksums.
        chunk: Rows appended at a time. Whole chunks are kept and the rest is cut off, so that
            recomputed rows share the same batches and hence give the same bytes.
        total: Rows of the finished file.
        identity: What determines the rows.

    Attributes:
        count: Rows present.
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
        """Append one chunk and flush it to disk."""
        content = b"".join(prediction.line() for prediction in predictions)
        if not self.sums.exists():
            write_text(self.sums, self._head.decode())
        _append(self.path, content)
        _append(self.sums, json_line(_sum(content)))
        self.count += len(predictions)

    def _pieces(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield checksum lines with the chunks they match, up to the first mismatch."""
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
    """Write the checksums of a complete file of predictions, as `PredictionFile` reads them."""
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
