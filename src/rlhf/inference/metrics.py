"""Metrics of predictions: rewards, ROUGE, lengths, repetition, KL, before and after."""

import math
from collections.abc import Sequence
from statistics import fmean

from rlhf.evaluation import bootstrap_interval, corpus_rouge, text_statistics, win_rate
from rlhf.inference.predictions import Prediction, Response


def prediction_metrics(
    predictions: Sequence[Prediction], *, seed: int = 0, best_of: int = 1
) -> dict[str, float]:
    """Return all metrics that can be computed from the predictions alone.

    Args:
        predictions: At least one.
        seed: Seed of the bootstrap; `NAME_low` and `NAME_high` are the ends of 95 % intervals.
        best_of: Samples that the best of n was chosen from.

    Returns:
        `rows`; for the tuned model and, prefixed with `baseline_`, the untuned one, and with
        `best_of_n_` the best of n if there is one: `rouge1` … over rows with references, those of
        `rlhf.evaluation.text_statistics`, `reward`; for all except the untuned one `reward_gain`
        over it (paired by row) and `win_rate` (ties count one half); `kl`, `kl_k3`;
        `best_of_n_kl_bound`, see `kl_bound`.
    """
    metrics: dict[str, float] = {"rows": len(predictions)}
    references = [row.references for row in predictions]
    sides = responses_by_prefix(predictions)
    for prefix, responses in sides.items():
        texts = [response.text for response in responses]
        for name, interval in corpus_rouge(texts, references, seed=seed).items():
            metrics |= interval.metrics(prefix + name)
        statistics = text_statistics(
            texts,
            [response.tokens for response in responses],
            [response.finish_reason == "eos" for response in responses],
        )
        metrics |= {prefix + name: figure for name, figure in statistics.items()}
    metrics |= bootstrap_interval([row.kl for row in predictions], seed=seed).metrics("kl")
    metrics["kl_k3"] = fmean(row.kl_k3 for row in predictions)
    if "best_of_n_" in sides:
        metrics |= {"best_of": best_of, "best_of_n_kl_bound": kl_bound(best_of)}
    return metrics | _reward_metrics(sides, seed)


def responses_by_prefix(predictions: Sequence[Prediction]) -> dict[str, list[Response]]:
    """Return the responses of all rows by the prefix of their metrics, see `Prediction`."""
    found: dict[str, list[Response]] = {}
    for row in predictions:
        for prefix, response in row.responses.items():
            found.setdefault(prefix, []).append(response)
    return found


def kl_bound(n: int) -> float:
    """Return log n - (n - 1)/n, the most nats by which best of n can differ from its base.

    Stiennon et al. 2020 (arXiv 2009.01325) use it as KL(best of n, base). That it is an upper
    bound, reached by rewards without ties on ever finer distributions, is shown by Beirami et al.
    2024 (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def _reward_metrics(sides: dict[str, list[Response]], seed: int) -> dict[str, float]:
    rewards = {
        prefix: [response.reward for response in responses if response.reward is not None]
        for prefix, responses in sides.items()
    }
    metrics: dict[str, float] = {}
    baseline = rewards["baseline_"]
    for prefix, ours in rewards.items():
        if not ours or not baseline:
            continue
        metrics |= bootstrap_interval(ours, seed=seed).metrics(f"{prefix}reward")
        if prefix != "baseline_":
            gains = [reward - before for reward, before in zip(ours, baseline, strict=True)]
            metrics |= bootstrap_interval(gains, seed=seed).metrics(f"{prefix}reward_gain")
            metrics |= win_rate(ours, baseline, seed=seed).metrics(f"{prefix}win_rate")
    return metrics
