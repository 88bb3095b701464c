"""Metrics of predictions: rewards, ROUGE, lengths, repetition, KL, before and after."""

from collections.abc import Sequence
from statistics import fmean

from rlhf.evaluation import bootstrap_interval, corpus_rouge, text_statistics, win_rate
from rlhf.inference.predictions import Prediction


def prediction_metrics(predictions: Sequence[Prediction], *, seed: int = 0) -> dict[str, float]:
    """Return all metrics that can be computed from the predictions alone.

    Args:
        predictions: At least one.
        seed: Seed of the bootstrap; `NAME_low` and `NAME_high` are the ends of 95 % intervals.

    Returns:
        `rows`; for the tuned model and, prefixed with `baseline_`, the untuned one: `rouge1` … over
        rows with references, those of `rlhf.evaluation.text_statistics`, `reward`; `reward_gain`
        (paired by row), `win_rate` (ties count one half), `kl`, `kl_k3`.
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
