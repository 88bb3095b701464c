"""What `rlhf data check` tells about a file before any training is started."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf.data.duplicates import PairCounter
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import OnBadRows, Paths, prompt_columns, read_rows
from rlhf.data.rows import PromptData, ReadReport, prompt_schema
from rlhf.data.schema import RowChecker
from rlhf.data.tokenising import Tokeniser

Kind = Literal["auto", "preference", "prompt", "demonstration"]

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Lengths:
    """Lengths of a set of texts.

    Attributes:
        what: Which texts.
        unit: "tokens" or "characters".
        count: Number of texts.
        quantiles: Shortest, median, 90 %, 99 %, longest.
    """

    what: str
    unit: str
    count: int
    quantiles: tuple[int, ...]

    @classmethod
    def of(cls, what: str, unit: str, lengths: Sequence[int]) -> "Lengths":
        """Sums up at least one length."""
        ordered = sorted(lengths)
        quantiles = tuple(ordered[round(q * (len(ordered) - 1))] for q in _QUANTILES)
        return cls(what, unit, len(ordered), quantiles)

    def line(self) -> str:
        """The same in words."""
        shortest, median, most, nearly_all, longest = self.quantiles
        return (
            f"{self.what}, {self.unit}: shortest {shortest}, median {median}, 90 % {most}, "
            f"99 % {nearly_all}, longest {longest}"
        )


@dataclass
class CheckReport:
    """What is in the files.

    Attributes:
        read: What reading came upon.
        preferences: Rows with two candidates.
        prompts: Rows without.
        references: Texts of `output_text`.
        distinct_prompts: Number of different prompts.
        second_chosen: Preferences for `candidate_1`.
        repeating: Preferences of which both candidates begin with the row's whole input.
        longer_chosen: Preferences for the longer candidate (in characters); a bias to know of.
        lengths: Of prompts, candidates and references.
        shortened: Prompts that lose tokens to `prompt_sequence_length`; None without a tokenizer.
        cut: Candidates and references that lose tokens to `target_sequence_length`; likewise.
        limits: The two limits.
    """

    read: ReadReport
    preferences: int = 0
    prompts: int = 0
    references: int = 0
    distinct_prompts: int = 0
    second_chosen: int = 0
    repeating: int = 0
    longer_chosen: int = 0
    lengths: list[Lengths] = field(default_factory=list)
    shortened: int | None = None
    cut: int | None = None
    limits: tuple[int, int] = (0, 0)

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        said = self.read.lines()
        said.append(
            f"{self.preferences} preferences, {self.prompts} prompts without candidates, "
            f"{self.references} references, {self.distinct_prompts} different prompts"
        )
        if self.preferences:
            second = self.second_chosen / self.preferences
            longer = self.longer_chosen / self.preferences
            said.append(f"preferred: candidate_1 in {second:.1%}, the longer one in {longer:.1%}")
        if self.repeating:
            said.append(f"both candidates begin with the whole input: {self.repeating}")
        said += [lengths.line() for lengths in self.lengths]
        if self.shortened is not None and self.cut is not None:
            prompt_limit, response_limit = self.limits
            rows = self.preferences + self.prompts
            answers = 2 * self.preferences + self.references
            said += [
                f"prompts over {prompt_limit} tokens, to be shortened: {self.shortened} of {rows}",
                f"answers over {response_limit} tokens, to be cut: {self.cut} of {answers}",
            ]
        return said


def check_files(
    paths: Paths,
    *,
    kind: Kind = "auto",
    on_bad_rows: OnBadRows = "error",
    instruction: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    prompt_sequence_length: int = 512,
    target_sequence_length: int = 64,
) -> CheckReport:
    """Validates preference, prompt and demonstration files and describes what is in them.

    Args:
        paths: Path, glob, fsspec address, or a list of these.
        kind: What every row must be; "auto" takes rows with candidates for preferences and the
            others for prompts.
        on_bad_rows: Whether bad rows are errors or are left out and counted.
        instruction: Text before every input, as in training.
        base_model: If given, lengths are counted in its tokens and compared with the limits. Only
            configuration and tokenizer are loaded.
        revision: Revision of `base_model`.
        prompt_sequence_length: Limit of prompts in tokens.
        target_sequence_length: Limit of responses in tokens.

    Raises:
        InputError: For everything that is wrong with the rows, or with `base_model`.
    """
    tokeniser, renderer = None, PromptRenderer(instruction)
    if base_model is not None:
        limits = (prompt_sequence_length, target_sequence_length)
        tokeniser = _load_tokeniser(base_model, revision, limits)
        renderer = PromptRenderer.for_tokenizer(tokeniser.tokenizer, instruction)
    tally = _Tally(kind, renderer)
    data = PromptData(*read_rows(paths, "data", on_bad_rows, tally.normalise, prompt_schema()))
    report = tally.report(data.report)
    _measure(data, report, tokeniser)
    return report


class _Tally:
    """Counts what rows are, while they are read."""

    def __init__(self, kind: Kind, renderer: PromptRenderer) -> None:
        self.kind = kind
        self.renderer = renderer
        self.found = CheckReport(ReadReport("data"))
        self.prompts: set[bytes] = set()
        self.pairs = PairCounter()

    def normalise(self, checker: RowChecker, read: ReadReport) -> dict[str, Any] | None:
        """The columns of a row; the answers of either kind stand in `references`."""
        answers: list[str] = []
        pair = None
        if self.kind == "preference" or (self.kind == "auto" and checker.has_candidates()):
            pair = checker.candidates()
            answers = [pair.candidate_0, pair.candidate_1]
        columns = prompt_columns(checker, self.renderer, read)
        references = checker.references(self.kind == "demonstration")
        if checker.problems:
            return None
        read.blank_references += sum(not text.strip() for text in references)
        if pair is not None:
            read.blank_candidates += sum(not text.strip() for text in answers)
            if answers[0] == answers[1]:
                read.identical += 1
                return None
            self.found.preferences += 1
            prompt = columns["input_text"]
            self.found.repeating += all(answer.startswith(prompt) for answer in answers)
            self.pairs.add(columns["text"], answers[0], answers[1], pair.choice)
            self.found.second_chosen += pair.choice
            other = answers[1 - pair.choice]
            self.found.longer_chosen += len(answers[pair.choice]) > len(other)
        self.found.references += len(references)
        self.prompts.add(hashlib.sha256(columns["text"].encode()).digest()[:16])
        return columns | {"references": [*answers, *references]}

    def report(self, read: ReadReport) -> CheckReport:
        """The counts as the beginning of a report."""
        read.repeated, read.contradictions = self.pairs.counts()
        prompts = read.rows - self.found.preferences
        return replace(self.found, read=read, prompts=prompts, distinct_prompts=len(self.prompts))


def _load_tokeniser(base_model: str, revision: str | None, limits: tuple[int, int]) -> Tokeniser:
    from rlhf.models.loading import load_tokenizer, prompt_layout, read_model_config

    config = read_model_config(base_model, revision)
    tokenizer = load_tokenizer(base_model, revision)
    return Tokeniser(tokenizer, prompt_layout(config, tokenizer), *limits)


def _measure(data: PromptData, report: CheckReport, tokeniser: Tokeniser | None) -> None:
    """Fills in the lengths.

    Raises:
        InputError: If a prompt does not fit even when shortened.
    """
    prompts: list[int] = []
    answers: list[int] = []
    for texts, replies in _batches(data):
        if tokeniser is None:
            prompts += [len(prompt.text) for prompt in texts]
            answers += [len(reply) for reply in replies]
        else:
            prompts += tokeniser.prompt_lengths(texts)
            answers += tokeniser.response_lengths(replies)
    unit = "characters" if tokeniser is None else "tokens"
    report.lengths = [Lengths.of("prompts", unit, prompts)]
    if answers:
        report.lengths.append(Lengths.of("answers", unit, answers))
    if tokeniser is None:
        return
    report.limits = (tokeniser.prompt_limit, tokeniser.response_limit)
    report.shortened = tokeniser.check_prompts(data).shortened
    report.cut = sum(length > tokeniser.response_limit for length in answers)


def _batches(data: PromptData) -> Iterator[tuple[list[Any], list[str]]]:
    for start in range(0, len(data), 256):
        rows = data[start : start + 256]
        yield [row.prompt for row in rows], [text for row in rows for text in row.references]
