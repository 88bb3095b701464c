"""Rewards for the rows of a file, added to the rows' own fields."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import ScoreConfig
from rlhf.console import say, show
from rlhf.data.layouts.reader import LayoutReader
from rlhf.data.layouts.turns import RowError
from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_checker import RowChecker
from rlhf.data.schema import PromptText, ranked_pairs
from rlhf.data.sources.reading import find_sources, read_records
from rlhf.data.sources.record import MAX_PROBLEMS
from rlhf.data.sources.source import Source, place
from rlhf.errors import InputError
from rlhf.evaluation import bootstrap_interval, evaluate_preferences
from rlhf.files.local_copy import local_folder
from rlhf.files.storage import is_remote, locate, open_store
from rlhf.files.text import whole_file
from rlhf.hardware import pick_device
from rlhf.inference.predictions import json_line
from rlhf.models.bases import find_base
from rlhf.models.reward_model import (
    RewardModel,
    check_reward_model,
    load_reward_model,
)
from rlhf.models.reward_record import read_record
from rlhf.models.scorers import Scorer
from rlhf.training.tracking import ProgressLine

STAGE = "score"
# What is scored in a row without candidates: the first of these that it has.
RESPONSE_FIELDS = ("prediction", "response", "output_text")
LIST_OF_REWARDS = ("rewards",)  # what a row with `candidates` gets
_BATCHES_AT_ONCE = 32  # the scorer sorts by length among this many batches


@dataclass(frozen=True)
class ScoreResult:
    """Result of scoring.

    Attributes:
        output: The file that was written.
        metrics: `rows`, `skipped`, `responses`, mean reward (with interval), `reward_std`,
            `reward_min`, `reward_max`; with choices also the figures of
            `rlhf.evaluation.PreferenceEvaluation`.
    """

    output: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class _Row:
    """A row with its rendered prompt and the texts to score.

    Attributes:
        value: The JSON object as read.
        prompt: What the texts respond to.
        texts: Its candidates, or one response.
        names: The fields for the rewards, one per text; `rewards` alone is one for all of them.
        finished: Whether each text ended by itself.
        pairs: The pairs that the row's own order makes, as indices of the better and the worse.
    """

    value: dict[str, Any]
    prompt: PromptText
    texts: tuple[str, ...]
    names: tuple[str, ...]
    finished: bool
    pairs: Sequence[tuple[int, int]]

    def with_rewards(self, rewards: Sequence[float]) -> dict[str, Any]:
        """Return the row's fields with its rewards."""
        if self.names == LIST_OF_REWARDS:
            return self.value | {"rewards": list(rewards)}
        return self.value | dict(zip(self.names, rewards, strict=True))


def run_score(config: ScoreConfig) -> ScoreResult:
    """Score every row of a file and write the rows, in order, with their rewards.

    A row with two candidates gets `reward_0` and `reward_1` (of `chosen` and `rejected` in that
    layout), and one with a list of `candidates` a list of `rewards`. Any other gets `reward` for
    the first of `prediction`, `response` and `output_text` that it has. `finish_reason` "length"
    says that a limit cut the text off. The output file appears only once everything is scored.

    Raises:
        InputError: If rows are bad, the output is an input, or the reward model cannot be loaded.
    """
    pick_device(config.device)
    sources = find_sources(config.dataset, "dataset")
    _check_output(config.output, [source.name for source in sources])
    renderer = _renderer(config)
    total, skipped = _check_rows(sources, renderer, config)
    path, label = config.reward_model_path, config.reward_model_label
    check_reward_model(path, renderer, label=label)
    scorer = load_reward_model(path, device=config.device, dtype=config.dtype, label=label)
    if isinstance(scorer, RewardModel):
        record = scorer.record
        say(
            f"{STAGE}: prompts up to {record.prompt_sequence_length} and responses up to "
            f"{record.target_sequence_length} tokens, as the reward model was trained"
        )
    figures = _Figures()
    with whole_file(config.output, "output") as file:
        progress = ProgressLine(STAGE, total, 0, ("reward",))
        rows = _rows(sources, renderer, config)
        try:
            while batch := list(islice(rows, config.batch_size * _BATCHES_AT_ONCE)):
                for row, rewards in zip(batch, _scores(scorer, batch, config), strict=True):
                    figures.add(row, rewards)
                    file.write(json_line(row.with_rewards(rewards), allow_nan=True))
                mean = {"reward": float(np.mean(figures.rewards))}
                progress.update(figures.rows, mean, log=True)
        finally:
            progress.close()
    metrics = figures.metrics() | {"skipped": skipped}
    say(f"{STAGE}: wrote {config.output}")
    show(json.dumps(metrics, indent=2))
    return ScoreResult(config.output, metrics)


def _renderer(config: ScoreConfig) -> PromptRenderer:
    """Return a renderer with the template and instruction of the reward model's training."""
    from transformers import AutoTokenizer

    path = config.reward_model_path
    record, given = read_record(path), config.model_fields_set
    instruction, options = config.instruction, config.chat_template_options
    if record is None:
        source = find_base(path, where="reward_model_path").tokenizer
    else:
        source = local_folder(path, weights=False)
        instruction = instruction if "instruction" in given else record.instruction
        options = options if "chat_template_options" in given else record.chat_template_options
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a broken tokenizer.json
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"reward_model_path: {path}: tokenizer: {reason[0]}") from error
    return PromptRenderer.for_tokenizer(tokenizer, instruction, options)


def _check_rows(
    sources: Sequence[Source], renderer: PromptRenderer, config: ScoreConfig
) -> tuple[int, int]:
    """Return the numbers of good and of bad rows.

    Raises:
        InputError: If bad rows are errors or no good one is left; lists the first problems.
    """
    problems: list[str] = []
    good = bad = 0
    for where, found in _read(sources, renderer, config):
        if isinstance(found, _Row):
            good += 1
        else:
            bad += 1
            problems += [f"{where}: {problem}" for problem in found]
    if problems and (config.on_bad_rows == "error" or not good):
        rest = len(problems) - MAX_PROBLEMS
        more = [f"… and {rest} more problems"] if rest > 0 else []
        raise InputError(problems[:MAX_PROBLEMS] + more)
    if bad:
        say(f"{STAGE}: {bad} bad rows left out")
    return good, bad


def _rows(
    sources: Sequence[Source], renderer: PromptRenderer, config: ScoreConfig
) -> Iterator[_Row]:
    return (found for _, found in _read(sources, renderer, config) if isinstance(found, _Row))


def _read(
    sources: Sequence[Source], renderer: PromptRenderer, config: ScoreConfig
) -> Iterator[tuple[str, "_Row | list[str]"]]:
    """Yield every record with its place: a row, or what is wrong with it."""
    layouts = LayoutReader(config.columns)
    for line in read_records(sources):
        where = place(sources, line)
        if line.problem or not isinstance(line.value, dict):
            yield where, [line.problem or "is not an object, expected a JSON object"]
            continue
        yield where, _parse(line.value, layouts, renderer)


def _parse(
    value: dict[str, Any], layouts: LayoutReader, renderer: PromptRenderer
) -> "_Row | list[str]":
    named = layouts.columns.apply(value)
    try:
        row = layouts.single(named)
    except RowError as error:
        return [str(error)]
    checker = RowChecker(row)
    fields = checker.prompt()
    texts: tuple[str, ...] = ()
    names: tuple[str, ...] = ("reward",)
    pairs: Sequence[tuple[int, int]] = ()
    if checker.has_candidates():
        candidates = checker.candidates(needs_order=False)
        texts = candidates.texts
        if not checker.problems:
            pairs = ranked_pairs(texts, candidates.ranking, candidates.levels)
        names = LIST_OF_REWARDS if "candidates" in checker.used() else ("reward_0", "reward_1")
    else:
        fields_of = named | row
        name = next((name for name in RESPONSE_FIELDS if fields_of.get(name) is not None), None)
        if name is None:
            checker.problems.append(
                f"{RESPONSE_FIELDS[0]}: is missing, expected text to score (or candidates)"
            )
        elif not isinstance(fields_of[name], str):
            checker.problems.append(f"{name}: is not text, expected one text to score")
        else:
            texts = (fields_of[name],)
    end = value.get("finish_reason")
    if end is not None and not isinstance(end, str):
        checker.problems.append("finish_reason: is not text, expected eos or length")
    if checker.problems:
        return checker.problems
    finished = end != "length" or names != ("reward",)
    try:
        return _Row(value, renderer.render(fields), texts, names, finished, pairs)
    except ValueError as error:
        return [f"messages: {error}, expected a conversation that it renders"]


def _scores(scorer: Scorer, rows: Sequence[_Row], config: ScoreConfig) -> Iterator[list[float]]:
    prompts = [row.prompt for row in rows for _ in row.texts]
    texts = [text for row in rows for text in row.texts]
    ends = [row.finished for row in rows for _ in row.texts]
    scores = iter(scorer.score(prompts, texts, config.batch_size, finished=ends).tolist())
    for row in rows:
        yield [round(next(scores), 6) for _ in row.texts]


class _Figures:
    """Accumulator of rewards for the summary: a few numbers per candidate and pair."""

    def __init__(self) -> None:
        self.rows = 0
        self.rewards: list[float] = []
        self.pairs: list[tuple[float, float, int, int, int]] = []

    def add(self, row: _Row, rewards: Sequence[float]) -> None:
        self.rows += 1
        self.rewards += rewards
        lengths = [len(text) for text in row.texts]
        self.pairs += [
            (rewards[better], rewards[worse], lengths[better], lengths[worse], self.rows)
            for better, worse in row.pairs
        ]

    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = {"rows": self.rows, "responses": len(self.rewards)}
        metrics |= bootstrap_interval(self.rewards).metrics("reward")
        metrics["reward_std"] = float(np.std(self.rewards))
        metrics |= {"reward_min": min(self.rewards), "reward_max": max(self.rewards)}
        if self.pairs:
            *columns, rows = zip(*self.pairs, strict=True)
            metrics |= evaluate_preferences(*columns, rows=rows).metrics()
        return metrics


def _check_output(output: str, files: Sequence[str]) -> None:
    """Refuse an output that cannot be written, or that would replace an input."""
    if is_remote(output):
        try:
            open_store(output)
        except (ImportError, ValueError) as error:
            raise InputError(f"output: cannot write to {output}: {error}") from error
        same = locate(output) in files
    else:
        path = Path(output)
        if path.is_dir():
            raise InputError(f"output: {output} is a folder, expected a file")
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"output: cannot write to {output}: {existing} is no writable folder")
        same = any(os.path.realpath(file) == os.path.realpath(output) for file in files)
    if same:
        raise InputError(f"output: {output} is the dataset itself; choose another file")
