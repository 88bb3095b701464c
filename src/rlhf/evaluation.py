"""Evaluation of generated texts and rewards: pure functions without models.

Every share and mean that is compared between models has a percentile bootstrap interval over rows
(Efron 1979), seeded so that the same rows give the same figures.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000
_INDICES_AT_ONCE = 1 << 21  # 16 MB of int64: limits the memory of a bootstrap over many rows
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    def metrics(self, name: str) -> dict[str, float]:
        """Return `name`, `name_low` and `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean over rows and its percentile bootstrap interval.

    Args:
        values: (N,) finite numbers, one per row, N at least 1.
        level: Coverage of the interval.
        resamples: Number of resampled means.
        seed: Calls with the same seed and N resample the same rows.

    Raises:
        ValueError: If there are no values, or some are not finite.
    """
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError("an interval needs at least one value, and finite ones")
    generator = np.random.default_rng(seed)
    per_draw = max(1, _INDICES_AT_ONCE // len(array))
    means = [
        array[generator.integers(len(array), size=(min(per_draw, resamples - done), len(array)))]
        .mean(axis=1)
        for done in range(0, resamples, per_draw)
    ]  # fmt: skip
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(array.mean()), float(low), float(high))


def win_rate(tuned: ArrayLike, baseline: ArrayLike, *, seed: int = 0) -> Interval:
    """Return how often the tuned reward exceeds the baseline's; a tie counts one half.

    Args:
        tuned: (N,) rewards.
        baseline: (N,) rewards of the same rows.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there are no rows, their numbers differ, or values are not finite.
    """
    return bootstrap_interval(_wins(tuned, baseline), seed=seed)


def _wins(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"{one.shape} and {other.shape} are not pairs of rows")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("rewards must be finite")
    return 0.5 * (1 + np.sign(one - other))


# ROUGE


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer  # imports nltk, so only when used

    return rouge_scorer.RougeScorer(list(ROUGE_METRICS))


def split_sentences(text: str) -> str:
    """Put one sentence on each line, as rougeLsum expects; keep a text with newlines unchanged.

    nltk's splitter, which rouge-score offers, would need a download.
    """
    text = text.strip()
    return text if "\n" in text else _SENTENCE_END.sub("\n", text)


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Return F-measures of `ROUGE_METRICS` by rouge-score (Lin 2004), without stemming.

    Args:
        prediction: A text.
        references: At least one text; each metric uses the reference with the highest score.

    Note:
        rouge-score only reads the letters a-z and digits: texts in other scripts score 0.
    """
    if not references:
        raise ValueError("ROUGE needs a reference")
    targets = [split_sentences(reference) for reference in references]
    scores = _rouge_scorer().score_multi(targets, split_sentences(prediction))
    return {name: float(scores[name].fmeasure) for name in ROUGE_METRICS}


def corpus_rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, seed: int = 0
) -> dict[str, Interval]:
    """Return mean ROUGE over the rows with references, and intervals; {} without such rows."""
    rows = [
        rouge(prediction, targets)
        for prediction, targets in zip(predictions, references, strict=True)
        if targets
    ]
    if not rows:
        return {}
    return {
        name: bootstrap_interval([row[name] for row in rows], seed=seed) for name in ROUGE_METRICS
    }


# Length, diversity, repetition


def length_statistics(lengths: Sequence[int]) -> dict[str, float]:
    """Return mean, standard deviation and quantiles of response lengths in tokens.

    Returns:
        `tokens_mean`, `tokens_std`, `tokens_p10`, `tokens_p50`, `tokens_p90`, `tokens_max`.
    """
    array = np.asarray(lengths, dtype=np.float64)
    if not len(array):
        raise ValueError("length statistics need at least one response")
    p10, p50, p90 = np.percentile(array, [10, 50, 90])
    figures = (array.mean(), array.std(), p10, p50, p90, array.max())
    names = ("mean", "std", "p10", "p50", "p90", "max")
    return {f"tokens_{name}": float(figure) for name, figure in zip(names, figures, strict=True)}


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def distinct(texts: Iterable[str], n: int) -> float:
    """Return the number of distinct n-grams of lower-cased words over all of them, corpus-wide.

    Li et al. 2016 (arXiv 1510.03055). Decreases with the number of texts, so only compare corpora
    of equal size. 0 when there is no n-gram at all.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        ngrams = _ngrams(text, n)
        seen.update(ngrams)
        total += len(ngrams)
    return len(seen) / total if total else 0.0


def repetition(text: str, n: int = 3) -> float:
    """Return the share of a text's word n-grams that already occurred in it; 0 for short texts.

    seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319).
    """
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def text_statistics(
    texts: Sequence[str], lengths: Sequence[int], finished: Sequence[bool]
) -> dict[str, float]:
    """Return statistics of a set of responses that need no reference and no reward.

    Args:
        texts: Responses.
        lengths: Their lengths in tokens, end of sequence included.
        finished: Whether each ended by itself; the others were cut off by the length limit.

    Returns:
        Those of `length_statistics`, `eos_rate`, `distinct_1`, `distinct_2`, `repetition`
        (mean over responses) and `empty_rate` (share of responses that are all white space).
    """
    return {
        **length_statistics(lengths),
        "eos_rate": float(np.mean(np.asarray(finished, dtype=np.float64))),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": float(np.mean([repetition(text) for text in texts])),
        "empty_rate": float(np.mean([not text.strip() for text in texts])),
    }


# The reward model against preferences


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose stated confidence is in [low, high), or [low, high] for the last bin."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class PreferenceEvaluation:
    """How well rewards agree with human choices.

    Attributes:
        accuracy: Share of pairs whose chosen candidate has the higher reward; ties count one half.
        log_loss: Mean of -log sigmoid(r_chosen - r_rejected), nats.
        calibration_error: Expected calibration error over `bins`, every pair weighing the same.
        bins: Confidence sigmoid(|r_0 - r_1|) against accuracy; empty bins are left out.
        longer_accuracy: Accuracy of always taking the longer candidate.
        count: Number of pairs.
    """

    accuracy: Interval
    log_loss: float
    calibration_error: float
    bins: tuple[CalibrationBin, ...]
    longer_accuracy: Interval
    count: int

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return every figure except the bins, flat, with `prefix` before each name."""
        figures = {
            **self.accuracy.metrics("accuracy"),
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
            **self.longer_accuracy.metrics("longer_accuracy"),
            "pairs": float(self.count),
        }
        return {prefix + name: figure for name, figure in figures.items()}


def evaluate_preferences(
    chosen: ArrayLike,
    rejected: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    rows: ArrayLike | None = None,
    seed: int = 0,
) -> PreferenceEvaluation:
    """Evaluate a reward model on preference pairs.

    Args:
        chosen: (N,) rewards of the candidates that people preferred.
        rejected: (N,) rewards of the others.
        chosen_lengths: (N,) their lengths in any unit.
        rejected_lengths: (N,) lengths of the others.
        rows: (N,) any number that is the same for the pairs of one row, such as those of one
            ranking. Rows weigh the same, and the bootstrap is over them. By default every pair has
            its own.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there are no pairs, their numbers differ, or values are not finite.
    """
    correct = _wins(chosen, rejected)
    longer = _wins(chosen_lengths, rejected_lengths)
    margin = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    bins = calibration_bins(1 / (1 + np.exp(-np.abs(margin))), correct)
    gap = sum(row.count * abs(row.accuracy - row.confidence) for row in bins)
    return PreferenceEvaluation(
        accuracy=bootstrap_interval(_row_means(correct, rows), seed=seed),
        log_loss=float(_row_means(np.logaddexp(0, -margin), rows).mean()),
        calibration_error=gap / len(correct),
        bins=bins,
        longer_accuracy=bootstrap_interval(_row_means(longer, rows), seed=seed),
        count=len(correct),
    )


def _row_means(values: NDArray[np.float64], rows: ArrayLike | None) -> NDArray[np.float64]:
    """Return the mean of each row's values, in the order of the rows' numbers."""
    if rows is None:
        return values
    _, index = np.unique(np.asarray(rows), return_inverse=True)
    means: NDArray[np.float64] = np.bincount(index, weights=values) / np.bincount(index)
    return means


def calibration_bins(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = 10
) -> tuple[CalibrationBin, ...]:
    """Group binary predictions by their confidence (Guo et al. 2017, arXiv 1706.04599).

    Confidences are in [0.5, 1]: the order of candidates in a pair means nothing, so each pair is
    seen from the candidate with the higher reward.

    Args:
        confidence: (N,) probability of the predicted choice, in [0.5, 1].
        correct: (N,) 1 if that choice was right, 0 if wrong, 0.5 for a tie.
        num_bins: Bins of equal width; those without pairs are left out of the result.
    """
    stated = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    edges = np.linspace(0.5, 1, num_bins + 1)
    index = np.clip(np.searchsorted(edges, stated, side="right") - 1, 0, num_bins - 1)
    rows = []
    for number in range(num_bins):
        members = index == number
        if members.any():
            low, high = float(edges[number]), float(edges[number + 1])
            mean_stated, mean_right = float(stated[members].mean()), float(right[members].mean())
            rows.append(CalibrationBin(low, high, int(members.sum()), mean_stated, mean_right))
    return tuple(rows)
