"""What the rewards of a PPO run are, and what is checked about them before any weights."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import PPOConfig, RewardEntry
from rlhf.config.rewards import NAME, metric_name, name_problems
from rlhf.data.prompts import PromptRenderer
from rlhf.data.rows import PromptData
from rlhf.errors import InputError, together
from rlhf.models.content import weights_fingerprint
from rlhf.models.reward_functions import RewardFn, RewardFunction, function_name
from rlhf.models.reward_model import check_reward_model, limit_lines


@dataclass(frozen=True)
class Reward:
    """A reward function with its weight and its name.

    Attributes:
        function: Called with prompts and responses, and as columns with what its other parameters
            name; returns one number per response. May be async.
        weight: Factor of its score in the sum; 0 only logs it.
        name: Its name in metrics; by default the function's.
    """

    function: RewardFunction
    weight: float = 1.0
    name: str | None = None


# What `reward_fn` takes: a function, several with or without weights and names, or functions by
# the address that the configuration's `rewards` give.
RewardFunctions = (
    RewardFunction | Reward | Sequence[RewardFunction | Reward] | Mapping[str, RewardFunction]
)


@dataclass(frozen=True)
class RewardPart:
    """One of the rewards whose weighted sum is the score.

    Attributes:
        name: Its name in metrics.
        weight: Factor in the sum.
        entry: The reward model or classifier; None for a function.
        function: The function; None for a model.
        setting: Where it comes from, for messages.
    """

    name: str
    weight: float
    entry: RewardEntry | None
    function: RewardFn | None
    setting: str

    def line(self) -> str:
        """Describe it for people."""
        what = "a function"
        if self.entry is not None:
            label = "" if self.entry.label is None else f", label {self.entry.label}"
            what = f"{self.entry.path}{label}"
        return f"reward {self.name}: weight {self.weight:g}, {what}"


def read_rewards(config: PPOConfig, reward_fn: RewardFunctions | None = None) -> list[RewardPart]:
    """Return all rewards of a run: of the configuration, then the further functions.

    Args:
        config: The stage's configuration.
        reward_fn: Functions. Those that an entry of `config.rewards` names get its weight and name.

    Raises:
        InputError: There are none, names repeat, or the configuration names code that was not given
            as a function.
    """
    given = _listed(reward_fn)
    parts, problems = [], []
    if config.reward_model_path is not None:
        parts.append(
            RewardPart("reward_model", 1.0, config.reward_models[0], None, "reward_model_path")
        )
    for number, entry in enumerate(config.rewards):
        setting = f"rewards.{number}.path"
        if entry.path is not None:
            parts.append(RewardPart(entry.effective_name, entry.weight, entry, None, setting))
            continue
        found = next((one for one in given if one[0] == entry.function), None)
        if found is None:
            problems.append(
                f"rewards.{number}.function: a configuration alone runs no code; allow it with the "
                f"flag --reward_fn {entry.function}, or in Python pass the function as reward_fn"
            )
            continue
        given.remove(found)
        own = replace(found[1], weight=entry.weight, name=entry.effective_name)
        parts.append(_of_function(own, config))
    parts += [_of_function(reward, config) for _, reward in given]
    problems += name_problems([part.name for part in parts])
    if problems:
        raise InputError(problems)
    if not parts:
        raise InputError("reward_model_path: give it, or rewards, or a reward_fn")
    return parts


def _listed(reward_fn: RewardFunctions | None) -> list[tuple[str, Reward]]:
    """Return the functions with their addresses, by which `rewards` name them."""
    if reward_fn is None:
        return []
    if isinstance(reward_fn, Mapping):
        return [(address, Reward(function)) for address, function in reward_fn.items()]
    several = list(reward_fn) if isinstance(reward_fn, list | tuple) else [reward_fn]
    rewards: list[Reward] = []
    for one in several:
        if not isinstance(one, Reward) and not callable(one):
            raise InputError(f"reward_fn: expected a callable, got {type(one).__name__}")
        rewards.append(one if isinstance(one, Reward) else Reward(one))
    return [(_address(reward.function), reward) for reward in rewards]


def _address(function: RewardFunction) -> str:
    return f"{getattr(function, '__module__', None)}:{function_name(function)}"


def _of_function(reward: Reward, config: PPOConfig) -> RewardPart:
    scorer = RewardFn(reward.function, reward.name, config.reward_timeout)
    name = reward.name or metric_name(scorer.name)
    if not re.fullmatch(NAME, name):
        raise InputError(
            f"reward_fn {name}: a name has letters, digits, - and _, at most 40; give another"
        )
    weight: Any = reward.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"reward_fn {name}: expected a finite number as weight, got {weight!r}")
    return RewardPart(name, float(weight), None, scorer, "reward_fn")


def uses_of_rows(parts: Sequence[RewardPart]) -> Callable[[str], bool] | None:
    """Return which fields of the rows the functions get; None if they get none at all."""
    functions = [part.function for part in parts if part.function is not None]
    if not any(function.reads_rows for function in functions):
        return None
    return lambda field: any(function.takes(field) for function in functions)


def check_columns(parts: Sequence[RewardPart], data: Mapping[str, PromptData | None]) -> None:
    """Check that the rows have the columns that the functions need.

    Args:
        parts: The rewards.
        data: Field of the configuration to the rows that were read.

    Raises:
        InputError: All columns that no row has.
    """
    together(
        *(
            lambda fn=part.function, fields=rows.report.fields, name=name: fn.check_columns(
                fields, name
            )
            for part in parts
            if part.function is not None
            for name, rows in data.items()
            if rows is not None and rows.report.fields is not None
        )
    )


def check_models(
    parts: Sequence[RewardPart],
    config: PPOConfig,
    renderer: PromptRenderer,
    conversations: bool,
    to_be_written: str | None = None,
) -> list[str]:
    """Check the reward models and classifiers without reading weights.

    Args:
        parts: The rewards.
        config: The stage's configuration.
        renderer: Renders the policy's prompts.
        conversations: Whether the policy's rows have `messages`.
        to_be_written: Path of a reward model that an earlier stage makes; it is not looked at.

    Returns:
        What the user should know of them.

    Raises:
        InputError: All that are missing or unfit.
    """
    models = [
        (part, part.entry.path, part.entry.label)
        for part in parts
        if part.entry is not None and part.entry.path is not None
    ]
    present = [one for one in models if one[1] != to_be_written]

    def check(part: RewardPart, path: str, label: int | str | None) -> list[str]:
        with named_as(part.setting):
            check_reward_model(path, renderer, conversations, label)
            lines = limit_lines(path, config)
            return [line.replace("reward_model_path", part.setting, 1) for line in lines]

    found = together(*(lambda one=one: check(*one) for one in present))
    shown = [part.line() for part in parts] if len(parts) > 1 else []
    return [*shown, *(line for lines in found for line in lines)]


@contextmanager
def named_as(setting: str) -> Iterator[None]:
    """Name the setting a reward model comes from in what is raised about it."""
    label = "`label` in an entry of `rewards`" if setting == "reward_model_path" else "`label`"
    try:
        yield
    except InputError as error:
        renamed = [problem.replace("`reward_model_label`", label) for problem in error.problems]
        problems = [re.sub(r"^reward_model_path\b", setting, problem) for problem in renamed]
        raise InputError(problems) from error


def rewards_identity(parts: Sequence[RewardPart]) -> dict[str, str]:
    """Return what determines the scores, for the identity of a run: weights, names and contents."""
    identity = {}
    described = []
    for part in parts:
        content = "function"
        if part.entry is not None and part.entry.path is not None:
            content = weights_fingerprint(part.entry.path)
            if part.setting == "reward_model_path":
                identity["reward_model_path"] = content
                continue
            if part.entry.label is not None:
                content += f" label {part.entry.label}"
        described.append(f"{part.weight:g} {part.name} ({content})")
    if described:
        identity["rewards"] = " + ".join(described)
    return {"reward_model_path": "", **identity}
