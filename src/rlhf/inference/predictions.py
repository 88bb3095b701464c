"""Predictions: one row each, and the file they are written to as they are made."""

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
