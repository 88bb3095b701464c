"""The entries of `rewards`: what scores the responses, and how much each of it counts."""

import re
from typing import Any

from pydantic import field_validator, model_validator

from rlhf.config.common import LARGEST_WEIGHT, NonEmpty, Schema, option

NAME = r"[A-Za-z0-9_-]{1,40}"
_LONGEST_NAME = 40


class RewardEntry(Schema):
    """One reward: a reward model, a classifier, or a function that the command line allows."""

    path: NonEmpty | None = option(
        None,
        "Folder written by `rlhf reward-model`, or any Hugging Face sequence classifier.",
    )
    function: NonEmpty | None = option(
        None,
        "MODULE:FUNCTION of a Python function; runs only if the flag `--reward_fn` names it too.",
    )
    label: int | str | None = option(
        None,
        "Label of a classifier with several (index or name) whose logit is the score.",
    )
    weight: float = option(
        1.0,
        "Factor of its score in the sum; 0 only logs it.",
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
    )
    name: str | None = option(
        None,
        "Its name in metrics, ppo/reward_NAME: letters, digits, - and _. "
        "Default: the last part of path or function.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _fit_for_metrics(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(NAME, value):
            raise ValueError(f"expected letters, digits, - and _, at most 40, got {value!r:.100}")
        return value

    @property
    def effective_name(self) -> str:
        """`name`, or its default."""
        return self.name or metric_name(re.split(r"[/:.]", (self.path or self.function or ""))[-1])

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields that are each valid, one line each."""
        problems = super().cross_problems()
        if (self.path is None) == (self.function is None):
            problems.append("path, function: give one of the two")
        elif self.label is not None and self.path is None:
            problems.append("label: is for a classifier, given by path")
        return problems


def metric_name(text: str) -> str:
    """Return a text as the name of a reward in metrics: letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_")[:_LONGEST_NAME] or "reward"


def name_problems(names: list[str]) -> list[str]:
    """Say which names of rewards are given more than once."""
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f"rewards: several are called {name}; give each a `name`" for name in twice]
