"""The rewards of a PPO run, ready to score: each alone, and their weighted sum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.rows import PromptData
from rlhf.models.language_model import LanguageModel
from rlhf.models.reward_functions import TOKEN_COLUMNS, RewardFn, Texts
from rlhf.models.reward_model import RewardModel, load_reward_model
from rlhf.models.scorers import Scorer
from rlhf.ppo.experience import Rollout
from rlhf.ppo.reward_parts import RewardPart, named_as, uses_of_rows


class Rewards:
    """The rewards of a run, ready to score.

    Args:
        parts: What they are.
        scorers: A scorer for each.
        fields: Names of the rows' fields, which are the functions' columns; None if there are too
            many to list, so that each call has those of its own rows.

    Attributes:
        scorers: Name to scorer.
        weights: Name to weight.
    """

    def __init__(
        self,
        parts: Sequence[RewardPart],
        scorers: Sequence[Scorer],
        fields: Sequence[str] | None = (),
    ) -> None:
        self.scorers = {part.name: scorer for part, scorer in zip(parts, scorers, strict=True)}
        self.weights = {part.name: part.weight for part in parts}
        self._fields = fields
        self._reads_rows = uses_of_rows(parts) is not None

    @property
    def weighted_scorers(self) -> list[tuple[Scorer, float]]:
        """The scorers with their weights."""
        return [(scorer, self.weights[name]) for name, scorer in self.scorers.items()]

    def scores(self, rollout: Rollout, batch_size: int) -> dict[str, Tensor]:
        """Return the scores of each reward, unweighted: name to (B,) fp32 on the CPU.

        Async functions run while the models score.

        Args:
            rollout: The responses.
            batch_size: Rows per batch of a model; does not affect scores.
        """
        texts = self._texts(rollout)
        waiting = {
            name: scorer.start(texts)
            for name, scorer in self.scorers.items()
            if isinstance(scorer, RewardFn)
        }
        finished = rollout.finished.tolist()
        found: dict[str, Tensor] = {}
        for name, scorer in self.scorers.items():
            if isinstance(scorer, RewardFn):
                continue
            given = (rollout.prompt_texts, rollout.texts, batch_size)
            if isinstance(scorer, RewardModel) and scorer.shares_base:
                found[name] = scorer.score(*given, finished=finished, read=rollout.prompts)
            else:
                found[name] = scorer.score(*given, finished=finished)
        for name in sorted(waiting, key=self._is_async):  # these wait, the others compute
            found[name] = waiting[name]()
        return {name: found[name] for name in self.scorers}

    def add_to_samples(
        self, samples: Sequence[dict[str, Any]], scores: Mapping[str, Tensor]
    ) -> list[dict[str, Any]]:
        """Return samples of the first responses with their scores of each of several rewards."""
        if len(scores) == 1:
            return list(samples)
        return [
            sample | {"rewards": {name: float(score[i]) for name, score in scores.items()}}
            for i, sample in enumerate(samples)
        ]

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of `scores`: (B,) fp32."""
        return sum(
            (self.weights[name] * score for name, score in scores.items()),
            torch.zeros(()),
        )

    def metrics(self, scores: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
        """Return the mean of each reward; nothing if the only one is the score.

        Args:
            scores: What `scores` returned.
            prefix: Of the metrics' names: PREFIX/reward_NAME.
        """
        if list(self.weights.values()) == [1.0]:
            return {}
        return {f"{prefix}/reward_{name}": float(score.mean()) for name, score in scores.items()}

    def _is_async(self, name: str) -> bool:
        scorer = self.scorers[name]
        return isinstance(scorer, RewardFn) and scorer.is_async

    def _texts(self, rollout: Rollout) -> Texts:
        rows = rollout.response_rows
        columns = self._columns(rollout)
        values = (
            rollout.prompts.lengths[rollout.groups].tolist(),
            rollout.responses.lengths.tolist(),
            rollout.finished.tolist(),
        )
        columns |= zip(TOKEN_COLUMNS, values, strict=True)
        return Texts(
            [row.prompt.text for row in rows],
            list(rollout.texts),
            columns,
            [row.source for row in rows],
        )

    def _columns(self, rollout: Rollout) -> dict[str, list[Any]]:
        """Return the rows' fields for each response, None where a row lacks one."""
        if not self._reads_rows:
            return {}
        found = [row.columns for row in rollout.rows]
        names = self._fields
        if names is None:
            names = list(dict.fromkeys(name for one in found for name in one))
        values = [found[group] for group in rollout.groups.tolist()]
        return {name: [one.get(name) for one in values] for name in names}


def load_rewards(
    parts: Sequence[RewardPart],
    config: PPOConfig,
    frozen: LanguageModel | None,
    data: Sequence[PromptData | None] = (),
) -> Rewards:
    """Load the reward models and classifiers.

    Args:
        parts: The rewards.
        config: The stage's configuration.
        frozen: The policy's base, if its weights stay as they are: a reward adapter trained on it
            is put there, each under its own name.
        data: The rows whose fields are the functions' columns.

    Raises:
        InputError: One cannot be loaded.
    """
    scorers: list[Scorer] = []
    for part in parts:
        if part.function is not None:
            scorers.append(part.function)
            continue
        assert part.entry is not None
        assert part.entry.path is not None
        with named_as(part.setting):
            number = sum(isinstance(scorer, RewardModel) for scorer in scorers)
            scorers.append(
                load_reward_model(
                    part.entry.path,
                    device=config.device,
                    dtype=config.dtype,
                    policy_lm=frozen,
                    name=f"reward_{number + 1}" if number else "reward",
                    label=part.entry.label,
                )
            )
    fields: dict[str, None] | None = {}
    for rows in data:
        if rows is not None:
            known = rows.report.fields
            fields = None if fields is None or known is None else fields | dict.fromkeys(known)
    return Rewards(parts, scorers, None if fields is None else list(fields))
