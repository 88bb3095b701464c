"""Best of n: the sample of the untuned model that the reward model likes best.

A baseline without any training: what the reward model can get from the untuned model by choosing,
and how far that moves from it (Stiennon et al. 2020, arXiv 2009.01325).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rlhf.config import InferenceConfig
from rlhf.data.batching import TokenBatch, chunks
from rlhf.data.schema import PromptRow
from rlhf.inference.before_and_after import Answer, Models, finish_reasons, round_figure
from rlhf.inference.predictions import Prediction
from rlhf.models.generation import Generation, rollout_uniforms


@dataclass(frozen=True)
class Sample:
    """One response of the untuned model.

    Attributes:
        answer: Its text and how it ended.
        tokens: Its tokens, end of sequence included.
        reward: What the reward model gives it.
    """

    answer: Answer
    tokens: int
    reward: float


def add_best(
    predictions: Sequence[Prediction],
    models: Models,
    config: InferenceConfig,
    rows: Sequence[PromptRow],
    start: int,
) -> list[Prediction]:
    """Return the predictions of one batch of rows with the best of `config.best_of` samples.

    Args:
        predictions: Those of the rows.
        models: What is loaded, reward model included.
        config: Sampling and limits.
        rows: The rows.
        start: Number of the first of them: sampling depends on it, not on the batch.
    """
    best = [choose(samples) for samples in sample_rows(models, config, rows, start)]
    return [
        replace(
            prediction,
            best_of_n=sample.answer[0],
            best_of_n_reward=round_figure(sample.reward),
            best_of_n_tokens=sample.tokens,
            best_of_n_finish_reason=sample.answer[1],
        )
        for prediction, sample in zip(predictions, best, strict=True)
    ]


def choose(samples: Sequence[Sample]) -> Sample:
    """Return the sample with the highest reward; of equal ones, the first."""
    return max(samples, key=lambda sample: sample.reward)


@torch.no_grad()
def sample_rows(
    models: Models, config: InferenceConfig, rows: Sequence[PromptRow], start: int
) -> list[list[Sample]]:
    """Return `config.best_of` samples of the untuned model for each row, always at `temperature`.

    At most `batch_size` responses are in memory as tensors at a time, of as many rows as it takes.
    The random numbers of a response depend on seed, row and sample alone.
    """
    assert models.scorer is not None
    prompts = models.codec.prompts([row.prompt for row in rows]).to(models.base.device)
    rewards: dict[tuple[int, Answer], float] = {}  # equal answers to a row are scored once
    found: list[tuple[int, Answer, int]] = []
    every = [(row, sample) for row in range(len(rows)) for sample in range(config.best_of)]
    for part in chunks(every, config.batch_size):
        generation = _generate(models, config, prompts, part, start)
        texts = models.codec.decode_rows(generation.responses.tolists())
        answers = list(zip(texts, finish_reasons(generation), strict=True))
        keys = [(row, answer) for (row, _), answer in zip(part, answers, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in rewards]
        scores = models.scorer.score(
            [rows[row].prompt for row, _ in new],
            [text for _, (text, _) in new],
            config.batch_size,
            finished=[end == "eos" for _, (_, end) in new],
        )
        rewards |= dict(zip(new, scores.tolist(), strict=True))
        lengths = generation.responses.lengths.tolist()
        found += [(row, answer, size) for (row, answer), size in zip(keys, lengths, strict=True)]
    samples = [Sample(answer, size, rewards[row, answer]) for row, answer, size in found]
    return [list(part) for part in chunks(samples, config.best_of)]


def _generate(
    models: Models,
    config: InferenceConfig,
    prompts: TokenBatch,
    wanted: Sequence[tuple[int, int]],
    start: int,
) -> Generation:
    """Sample responses: `wanted` has row and sample of each, in order; each prompt is read once.

    Rows are counted from `start`.
    """
    uniforms = [
        rollout_uniforms(
            config.seed,
            sample,
            range(start + row, start + row + 1),
            config.target_sequence_length,
            "best_of",
        )
        for row, sample in wanted
    ]
    first = wanted[0][0]
    rows = torch.tensor([row for row, _ in wanted], device=prompts.ids.device)
    with models.base.inference(), models.base.using(None):
        return models.generator(
            models.base,
            prompts.select_rows(range(first, wanted[-1][0] + 1)),
            max_new_tokens=config.target_sequence_length,
            temperature=config.temperature,
            uniforms=torch.cat(uniforms),
            min_response_length=config.min_response_length,
            groups=rows - first,
        )
