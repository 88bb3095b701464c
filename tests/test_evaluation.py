"""Figures over texts and rewards, against hand-worked values and slow plain-Python versions."""

import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from rlhf import evaluation
from rlhf.errors import InputError
from rlhf.inference.local_metrics import metric_script, module_metrics

numbers = st.lists(st.floats(-20, 20), min_size=1, max_size=30)
pairs_of_numbers = st.lists(
    st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=30
)
words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat"]), max_size=12).map(" ".join)


# Bootstrap


def test_bootstrap_interval_is_the_normal_one_for_many_rows() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    interval = evaluation.bootstrap_interval(values, resamples=4000)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.03)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        sample = generator.random(100) < 0.3
        interval = evaluation.bootstrap_interval(sample, resamples=300, level=0.9)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.84 <= hits / 300 <= 0.95


def test_bootstrap_in_pieces_is_the_same_kind_of_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=200)
    whole = evaluation.bootstrap_interval(values, resamples=2000)
    monkeypatch.setattr(evaluation, "_INDICES_AT_ONCE", 1000)
    pieces = evaluation.bootstrap_interval(values, resamples=2000)
    assert pieces.low == pytest.approx(whole.low, abs=0.02)
    assert pieces.high == pytest.approx(whole.high, abs=0.02)


@given(numbers)
@settings(max_examples=30, deadline=None)
def test_bootstrap_interval_is_seeded_and_ordered(values: list[float]) -> None:
    interval = evaluation.bootstrap_interval(values, resamples=50, seed=7)
    assert interval == evaluation.bootstrap_interval(values, resamples=50, seed=7)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        evaluation.bootstrap_interval(values)


@given(pairs_of_numbers)
@settings(max_examples=50, deadline=None)
def test_win_rate_counts_ties_as_half(pairs: list[tuple[float, float]]) -> None:
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    tuned, baseline = zip(*pairs, strict=True)
    rate = evaluation.win_rate(tuned, baseline)
    assert rate.mean == pytest.approx(statistics.fmean(points))
    assert rate.mean + evaluation.win_rate(baseline, tuned).mean == pytest.approx(1)


def test_win_rate_of_equal_rewards_is_one_half_for_sure() -> None:
    assert evaluation.win_rate([1.0, 2.0], [1.0, 2.0]) == evaluation.Interval(0.5, 0.5, 0.5)


def test_win_rate_refuses_rows_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="pairs"):
        evaluation.win_rate([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        evaluation.win_rate([math.inf], [1.0])


# ROUGE


def test_rouge_hand_worked() -> None:
    scores = evaluation.rouge("the cat sat", ["the cat ran away"])
    precision, recall = 2 / 3, 2 / 4
    assert scores["rouge1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == scores["rouge1"]


@given(words, st.lists(words, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_rouge_is_the_best_reference_of_rouge_score(text: str, references: list[str]) -> None:
    scorer = rouge_scorer.RougeScorer(list(evaluation.ROUGE_METRICS))
    each = [scorer.score(reference, text) for reference in references]
    for name, value in evaluation.rouge(text, references).items():
        assert value == pytest.approx(max(score[name].fmeasure for score in each))


def test_rouge_takes_the_best_reference_metric_by_metric() -> None:
    references = ["b a d c", "a b x y z w"]  # all words, no bigram; one bigram, fewer words
    scores = evaluation.rouge("a b c d", references)
    assert scores["rouge1"] == 1
    assert scores["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 5) / (1 / 3 + 1 / 5))


def test_rouge_lsum_reads_sentences_and_rouge_l_does_not() -> None:
    text, reference = "I slept. She ran!", "She ran! I slept."
    scores = evaluation.rouge(text, [reference])
    assert scores["rougeLsum"] == 1  # the same two sentences in the other order
    assert scores["rougeL"] == 0.5
    by_lines = rouge_scorer.RougeScorer(["rougeLsum"])
    assert by_lines.score("She ran!\nI slept.", "I slept.\nShe ran!")["rougeLsum"].fmeasure == 1
    assert evaluation.split_sentences("One. Two\nlines. ") == "One. Two\nlines."


def test_corpus_rouge_skips_rows_without_reference() -> None:
    scores = evaluation.corpus_rouge(["a b", "anything", ""], [["a b"], [], ["a b"]])
    assert scores["rouge1"].mean == 0.5
    assert evaluation.corpus_rouge(["a"], [[]]) == {}


# Texts


def test_length_statistics() -> None:
    lengths = random.Random(0).sample(range(100), 51)
    figures = evaluation.length_statistics(lengths)
    assert figures["tokens_mean"] == pytest.approx(statistics.fmean(lengths))
    assert figures["tokens_std"] == pytest.approx(statistics.pstdev(lengths))
    ordered = sorted(lengths)
    ranks = {"p10": 5, "p50": 25, "p90": 45, "max": 50}
    assert all(figures[f"tokens_{name}"] == ordered[rank] for name, rank in ranks.items())


def test_distinct_hand_worked() -> None:
    texts = ["A b a b", "a c", ""]
    assert evaluation.distinct(texts, 1) == pytest.approx(3 / 6)
    assert evaluation.distinct(texts, 2) == pytest.approx(3 / 4)  # ab ba ab | ac
    assert evaluation.distinct(["a", ""], 2) == 0


@given(words, st.integers(1, 4))
def test_repetition_is_the_share_of_ngrams_seen_before(text: str, n: int) -> None:
    tokens = text.split()
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams))
    assert evaluation.repetition(text, n) == pytest.approx(repeated / max(1, len(ngrams)))


def test_text_statistics() -> None:
    figures = evaluation.text_statistics(
        ["no no no no no", " ", "yes"], [6, 1, 8], [True, True, False]
    )
    assert figures["eos_rate"] == pytest.approx(2 / 3)
    assert figures["empty_rate"] == pytest.approx(1 / 3)
    assert figures["repetition"] == pytest.approx((2 / 3) / 3)
    assert figures["distinct_1"] == pytest.approx(2 / 6)
    assert figures["tokens_mean"] == 5


# The reward model


@given(pairs_of_numbers)
@settings(max_examples=50, deadline=None)
def test_preferences_against_plain_python(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = zip(*pairs, strict=True)
    result = evaluation.evaluate_preferences(chosen, rejected, [2] * len(pairs), [1] * len(pairs))
    losses = [math.log1p(math.exp(-(a - b))) for a, b in pairs]
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    assert result.log_loss == pytest.approx(statistics.fmean(losses))
    assert result.accuracy.mean == pytest.approx(statistics.fmean(points))
    assert result.longer_accuracy.mean == 1
    assert sum(row.count for row in result.bins) == result.count == len(pairs)

    groups: dict[int, list[tuple[float, float]]] = {}
    for (a, b), point in zip(pairs, points, strict=True):
        confidence = 1 / (1 + math.exp(-abs(a - b)))
        number = max(i for i in range(10) if confidence >= np.linspace(0.5, 1, 11)[i])
        groups.setdefault(number, []).append((confidence, point))
    error = sum(
        abs(sum(c for c, _ in rows) - sum(p for _, p in rows)) for rows in groups.values()
    ) / len(pairs)  # fmt: skip
    assert result.calibration_error == pytest.approx(error, abs=1e-9)


@given(st.lists(st.lists(st.floats(-9, 9), min_size=2, max_size=2), min_size=1, max_size=12),
       st.randoms(use_true_random=False))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_rows_weigh_the_same_however_many_pairs_they_have(
    pairs: list[list[float]], rng: random.Random
) -> None:
    rows = [rng.choice([7, 3, 100]) for _ in pairs]
    chosen, rejected = zip(*pairs, strict=True)
    lengths = [[rng.randint(0, 3) for _ in pairs] for _ in range(2)]
    result = evaluation.evaluate_preferences(chosen, rejected, *lengths, rows=rows)
    losses, points, longer = [], [], []
    for row in set(rows):
        own = [number for number, other in enumerate(rows) if other == row]
        losses.append(statistics.fmean(
            math.log1p(math.exp(-(chosen[i] - rejected[i]))) for i in own
        ))  # fmt: skip
        for found, (first, second) in ((points, (chosen, rejected)), (longer, lengths)):
            found.append(statistics.fmean(
                1.0 if first[i] > second[i] else 0.5 if first[i] == second[i] else 0.0 for i in own
            ))  # fmt: skip
    assert result.log_loss == pytest.approx(statistics.fmean(losses))
    assert result.accuracy.mean == pytest.approx(statistics.fmean(points))
    assert result.longer_accuracy.mean == pytest.approx(statistics.fmean(longer))
    assert result.count == len(pairs)
    assert (result.accuracy.low == result.accuracy.high) == (len(set(points)) == 1)


def test_pairs_with_rows_of_their_own_are_as_without() -> None:
    pairs = np.random.default_rng(0).normal(size=(4, 30))
    plain = evaluation.evaluate_preferences(*pairs, seed=2)
    assert evaluation.evaluate_preferences(*pairs, rows=range(30), seed=2) == plain


def test_calibration_hand_worked() -> None:
    bins = evaluation.calibration_bins([0.55, 0.6, 0.95, 1.0], [0, 1, 1, 1], num_bins=2)
    assert [(row.count, row.accuracy) for row in bins] == [(2, 0.5), (2, 1.0)]
    assert bins[0].confidence == pytest.approx(0.575)
    assert (bins[1].low, bins[1].high) == (0.75, 1.0)


def test_a_calibrated_reward_model_has_a_small_error_and_an_overconfident_one_has_not() -> None:
    generator = np.random.default_rng(0)
    margin = generator.normal(0, 2, size=20000)
    chosen_first = generator.random(20000) < 1 / (1 + np.exp(-margin))
    gap = np.where(chosen_first, margin, -margin)
    lengths = np.ones_like(gap)
    fair = evaluation.evaluate_preferences(gap, np.zeros_like(gap), lengths, lengths)
    loud = evaluation.evaluate_preferences(3 * gap, np.zeros_like(gap), lengths, lengths)
    assert fair.calibration_error < 0.01 < 0.1 < loud.calibration_error
    assert fair.longer_accuracy.mean == 0.5


def test_preference_metrics_have_a_prefix() -> None:
    result = evaluation.evaluate_preferences([2.0, 0.0], [1.0, 3.0], [5, 5], [3, 9])
    metrics = result.metrics("reward_model_")
    assert metrics["reward_model_accuracy"] == 0.5
    assert metrics["reward_model_longer_accuracy"] == 0.5
    assert metrics["reward_model_pairs"] == 2
    assert metrics["reward_model_accuracy_low"] == 0


# Local modules of `evaluate`

SCRIPT = """
import datasets
import evaluate


class Shared(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({{"predictions": text, "references": {references}}})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        hits = [{hit} for p, r in zip(predictions, references)]
        return {{"shared": sum(hits) / len(hits), "each": hits, "text": "left out"}}
"""


def write_module(folder: Path, references: str, hit: str) -> Path:
    module = folder / "shared"
    module.mkdir()
    script = SCRIPT.format(references=references, hit=hit)
    (module / "shared.py").write_text(script, encoding="utf-8")
    return module


def test_a_local_evaluate_module_gets_one_reference(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    module = write_module(tmp_path, "text", "float(p == r)")
    figures = module_metrics(str(module), ["a", "b", "c"], [["a", "x"], ["x", "b"], []])
    assert figures == {"shared": 0.5, "shared_each": 0.5}
    assert module_metrics(str(module / "shared.py"), ["a"], [["a"]])["shared"] == 1


def test_a_local_evaluate_module_gets_several_references(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    module = write_module(tmp_path, "datasets.Sequence(text)", "float(p in r)")
    figures = module_metrics(str(module), ["a", "b"], [["a"], ["x", "b"]])
    assert figures["shared"] == 1


def test_metrics_that_are_not_local_are_refused(tmp_path: Path) -> None:
    for name in ("bleu", "someone/metric", str(tmp_path / "missing"), str(tmp_path)):
        with pytest.raises(InputError, match="never downloaded"):
            metric_script(name)
    script = tmp_path / "fetching.py"
    script.write_text("from .helper import it  # From: https://example.org/helper.py\n")
    with pytest.raises(InputError, match="would download code"):
        metric_script(str(script))


def test_a_module_that_fails_is_named(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    module = write_module(tmp_path, "text", "1 / 0")
    with pytest.raises(InputError, match="shared: ZeroDivisionError"):
        module_metrics(str(module), ["a"], [["a"]])
