"""The report of `rlhf data check` on data sets, before any training is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf.config.columns import column_problems
from rlhf.data.overlaps import Overlap, find_overlap, prompt_hashes
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import DataPaths, OnBadRows, Ties, scan_files
from rlhf.data.repeats import repeated_pairs, repeated_rows
from rlhf.data.row_table import Flag, pair_places, take, text_sizes
from rlhf.data.rows import PromptData, ReadReport
from rlhf.data.scanning import Scan
from rlhf.data.selection import Wants, column_values, rows_wanted
from rlhf.errors import InputError
from rlhf.reports.lengths import Lengths

if TYPE_CHECKING:
    from rlhf.data.prompt_codec import PromptCodec

Kind = Literal["auto", "preference", "prompt", "demonstration"]

# What the rows of a data set must be, by its name; of other names what the caller says.
_KINDS: dict[str, Kind] = {"preference_dataset": "preference", "prompt_dataset": "prompt"}
_MOST_EXAMPLES = 3
# Facts of reading of which examples are shown: the column that counts them, or a flag.
_SHOWN: dict[str, str | int] = {
    "identical": "identical_pairs",
    "ties": "tied_pairs",
    "blank_candidates": "blank_candidates",
    "blank_references": "blank_references",
    "left_out": Flag.LEFT_OUT,
    "mended": Flag.MENDED,
}


@dataclass
class CheckReport:
    """Contents of one data set.

    Attributes:
        read: Summary of reading.
        preferences: Rows with candidates.
        candidates: Their candidates.
        pairs: Pairs of different candidates that they make.
        prompts: Rows without.
        references: Texts of `output_text`.
        distinct_prompts: Number of different prompts.
        again: Rows without candidates whose prompt and `output_text` an earlier one has.
        second_chosen: Pairs in which the later of the two in the file was preferred.
        repeating: Preferences whose candidates all begin with the row's whole input.
        longer_chosen: Pairs in which the longer, in characters, was preferred: a bias to know of.
        lengths: Lengths of prompts, candidates and references.
        shortened: Prompts that lose tokens to `prompt_sequence_length`; None without a tokenizer.
        cut: Candidates and references that lose tokens to `target_sequence_length`; likewise.
        limits: The two limits.
        examples: First rows by what they are an example of: attributes of `read`, or `again`.
        warnings: Lines about conversations that the chat template writes differently as a whole.
    """

    read: ReadReport
    preferences: int = 0
    candidates: int = 0
    pairs: int = 0
    prompts: int = 0
    references: int = 0
    distinct_prompts: int = 0
    again: int = 0
    second_chosen: int = 0
    repeating: int = 0
    longer_chosen: int = 0
    lengths: list[Lengths] = field(default_factory=list)
    shortened: int | None = None
    cut: int | None = None
    limits: tuple[int, int] = (0, 0)
    examples: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> list[tuple[str, str, str]]:
        """Return words, figure and examples of what was counted."""
        counted = [
            ("preferences", self.preferences),
            ("prompts without candidates", self.prompts),
            ("texts of output_text", self.references),
            ("different prompts", self.distinct_prompts),
        ]
        facts = [(words, f"{count:,}", "") for words, count in counted if count]
        for name, words, count in self.read.facts():
            facts.append((words, f"{count:,}", _such_as(self.examples.get(name, []), count)))
        if self.again:
            words = "rows that repeat an earlier one"
            facts.append((words, f"{self.again:,}", _such_as(self.examples["again"], self.again)))
        if self.pairs:
            second, longer = self.second_chosen / self.pairs, self.longer_chosen / self.pairs
            rankings = self.candidates > 2 * self.preferences
            words = "the later candidate preferred" if rankings else "candidate_1 preferred"
            facts += [(words, f"{second:.1%}", ""), ("longer one preferred", f"{longer:.1%}", "")]
        if self.repeating:
            facts.append(("all candidates begin with the whole input", f"{self.repeating:,}", ""))
        if self.shortened is not None and self.cut is not None:
            prompt_limit, response_limit = self.limits
            rows = self.preferences + self.prompts
            facts.append(
                (f"prompts over {prompt_limit} tokens, to be shortened", f"{self.shortened:,}",
                 f"of {rows:,}")
            )  # fmt: skip
            answers = self.candidates + self.references
            facts.append(
                (f"answers over {response_limit} tokens, to be cut", f"{self.cut:,}",
                 f"of {answers:,}")
            )  # fmt: skip
        return facts

    def lines(self) -> list[str]:
        """Return the report for people: a table of figures, then the lengths."""
        said = [*self.read.head(), *_table(self.facts()), *self.read.tail()]
        for lengths in self.lengths:
            said += ["", *(f"  {line}" for line in lengths.lines())]
        return said + (["", *self.warnings] if self.warnings else [])


@dataclass
class SetsReport:
    """Contents of several data sets.

    Attributes:
        sets: The report of each, by name.
        overlaps: What prompts any two of them have in common.
    """

    sets: dict[str, CheckReport]
    overlaps: list[Overlap]

    def lines(self) -> list[str]:
        """Return the report for people."""
        said: list[str] = []
        for report in self.sets.values():
            said += [*([""] if said else []), *report.lines()]
        if self.overlaps:
            facts = []
            for one in self.overlaps:
                examples = [one.example(number) for number in range(len(one.examples))]
                shown = f"of {one.rows:,}"
                if examples:
                    shown += f": {_such_as(examples, one.count)}"
                facts.append((f"{one.name}, also in {one.other}", f"{one.count:,}", shown))
            said += ["", "rows whose prompt another data set has", *_table(facts)]
        return said


def _such_as(examples: Sequence[str], count: int) -> str:
    return ", ".join(examples) + (", …" if examples and count > len(examples) else "")


def _table(facts: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return lines of words, figures and remarks in columns."""
    widths = [max((len(row[column]) for row in facts), default=0) for column in (0, 1)]
    return [
        f"  {words:<{widths[0]}}  {figure:>{widths[1]}}  {more}".rstrip()
        for words, figure, more in facts
    ]


def check_files(paths: DataPaths, **options: Any) -> CheckReport:
    """Validate preference, prompt and demonstration files and describe their contents.

    Args:
        paths: A path, a glob, an fsspec address, or a list of these.
        **options: See `check_sets`.

    Raises:
        InputError: If anything is wrong with the rows or with `base_model`.
    """
    return check_sets({"data": paths}, **options).sets["data"]


def check_sets(
    paths: Mapping[str, DataPaths],
    *,
    kind: Kind = "auto",
    on_bad_rows: OnBadRows = "error",
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    instruction: str | None = None,
    chat_template_options: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    prompt_sequence_length: int = 512,
    target_sequence_length: int = 64,
) -> SetsReport:
    """Validate data sets, describe their contents, and look for prompts that they share.

    Args:
        paths: By name, a path, a glob, an fsspec address, or a list of these. Rows of
            `preference_dataset` and `prompt_dataset` must be what these names say.
        kind: What every row of the others must be; "auto" reads rows with candidates as preferences
            and the others as prompts.
        on_bad_rows: Whether bad rows are an error, or are skipped and counted.
        columns: Columns of the files by our names for them.
        ties: Whether to leave out tied answers, or to keep them.
        instruction: Text put before every input, as in training.
        chat_template_options: Variables for the chat template of `base_model`.
        base_model: If given, lengths are counted in its tokens and compared with the limits, and
            conversations with their rendering as a whole. Only configuration and tokenizer are
            loaded.
        revision: Revision of `base_model`.
        prompt_sequence_length: Limit of prompts in tokens.
        target_sequence_length: Limit of responses in tokens.

    Raises:
        InputError: If anything is wrong with the rows or with `base_model`.
    """
    if wrong := column_problems(columns or {}):
        raise InputError([f"columns.{problem}" for problem in wrong])
    codec, renderer = None, PromptRenderer(instruction)
    if base_model is not None:
        limits = (prompt_sequence_length, target_sequence_length)
        codec = _load_tokenizer(base_model, revision, limits)
        options = chat_template_options
        renderer = PromptRenderer.for_tokenizer(codec.tokenizer, instruction, options)
    elif chat_template_options:
        raise InputError("chat_template_options: are for the template of base_model, give one")
    reports: dict[str, CheckReport] = {}
    sets: list[tuple[PromptData, NDArray[np.uint64]]] = []
    problems: list[str] = []
    for name, files in paths.items():
        wants = replace(_WANTS[_KINDS.get(name, kind)], ties=ties)
        try:
            scanned = scan_files(files, renderer, name, columns=columns)
            taken = rows_wanted(scanned, wants, name, on_bad_rows, fingerprint=False)
            data = _whole(scanned, taken.report).select_rows(taken.index)
            report = reports[name] = CheckReport(taken.report)
            hashes = prompt_hashes(data)
            _describe(data, report, codec, pairs=wants.pair != "ignored")
        except InputError as error:
            problems += error.problems
            continue
        _find_examples(data, _whole(scanned, taken.report), hashes, report)
        if codec is not None:
            from rlhf.data.chat_check import check_conversations  # needs torch, as the codec does

            report.warnings = check_conversations(data, codec, renderer, name)
        sets.append((data, hashes))
    if problems:
        raise InputError(problems)
    return SetsReport(reports, _overlaps(sets))


def _overlaps(sets: Sequence[tuple[PromptData, NDArray[np.uint64]]]) -> list[Overlap]:
    """Compare each data set with those before it."""
    return [
        find_overlap(data, other, (ours, theirs))
        for (other, theirs), (data, ours) in combinations(sets, 2)
    ]


def _whole(scanned: Scan, report: ReadReport) -> PromptData:
    """Return all rows of a scan, good and bad."""
    every = np.arange(len(scanned.table))
    return PromptData(scanned.table, scanned.files, report, "", every, scanned.token_counts)


def _find_examples(
    data: PromptData, whole: PromptData, hashes: NDArray[np.uint64], report: CheckReport
) -> None:
    """Note the first rows of each kind that one may want to look at."""
    read, examples = report.read, report.examples
    for name, column in _SHOWN.items():
        if getattr(read, name):
            examples[name] = [whole[place].source for place in _first_rows(whole, column)]
    if read.repeated or read.contradictions:
        found = repeated_pairs(*_pair_hashes(data))
        for name, repeats in zip(("repeated", "contradictions"), found, strict=True):
            examples[name] = _as_sources(data, repeats.first)
    again = repeated_rows(data, hashes)
    report.again, examples["again"] = again.count, _as_sources(data, again.first)


def _as_sources(data: PromptData, pairs: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{data[later].source} (as {data[earlier].source})" for later, earlier in pairs]


def _first_rows(whole: PromptData, column: str | int) -> list[int]:
    """Return the first rows with a count in a column, or with a flag, that are otherwise good."""
    bad = Flag.BAD_LINE | Flag.BAD_PROMPT | Flag.BAD_RENDER | Flag.BAD_PAIR | Flag.WHOLE_FILE
    found: list[int] = []
    start = 0
    names = ("flags",) if isinstance(column, int) else ("flags", column)
    for batch in whole.batches(names):
        flags = column_values(batch, "flags")
        has = flags & column if isinstance(column, int) else column_values(batch, column)
        found += (np.flatnonzero((has > 0) & (flags & bad == 0)) + start).tolist()
        start += batch.num_rows
        if len(found) >= _MOST_EXAMPLES:
            break
    return found[:_MOST_EXAMPLES]


def _pair_hashes(data: PromptData) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of all pairs, and the row that each is from."""
    hashes: list[NDArray[np.uint64]] = []
    counts: list[NDArray[np.int64]] = []
    for batch in data.batches(("pair_hashes",)):
        column = batch.column("pair_hashes")
        hashes.append(column.flatten().to_numpy(zero_copy_only=False))
        counts.append(column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(hashes), np.repeat(np.arange(len(data)), np.concatenate(counts))


_WANTS: dict[Kind, Wants] = {
    "auto": Wants(pair="if present"),
    "preference": Wants(pair="required", output="if present"),
    "prompt": Wants(),
    "demonstration": Wants(output="required"),
}


def _load_tokenizer(
    base_model: str, revision: str | None, limits: tuple[int, int]
) -> "PromptCodec":
    from rlhf.data.prompt_codec import PromptCodec
    from rlhf.models.loading import load_tokenizer, prompt_layout, read_model_config

    config = read_model_config(base_model, revision)
    tokenizer = load_tokenizer(base_model, revision)
    return PromptCodec(tokenizer, prompt_layout(config, tokenizer), *limits)


def _describe(
    data: PromptData, report: CheckReport, codec: "PromptCodec | None", pairs: bool
) -> None:
    """Count kinds of rows, and lengths of their texts.

    Raises:
        InputError: If a prompt does not fit even when shortened.
    """
    prompts: list[NDArray[np.int64]] = []
    answers: list[NDArray[np.int64]] = []
    seen: list[NDArray[np.uint64]] = []
    for batch in data.batches(_COLUMNS):
        flags = column_values(batch, "flags")
        has_pair = flags & Flag.HAS_PAIR != 0 if pairs else np.zeros(len(flags), bool)
        candidates = _count_pairs(take(batch, np.flatnonzero(has_pair)), report)
        references = batch.column("references").flatten()
        report.preferences += int(has_pair.sum())
        report.prompts += int((~has_pair).sum())
        report.references += len(references)
        report.repeating += int((has_pair & (flags & Flag.REPEATS != 0)).sum())
        seen.append(np.unique(column_values(batch, "prompt_hash")))
        if codec is None:
            prompts.append(text_sizes(batch.column("text"))[0])
            answers += [text_sizes(texts)[0] for texts in (candidates, references)]
        else:
            texts = (candidates, references)
            answers += [codec.count_responses(column.to_pylist()) for column in texts]
    report.distinct_prompts = len(np.unique(np.concatenate(seen)))
    unit = "characters" if codec is None else "tokens"
    lengths = np.concatenate(prompts) if codec is None else codec.count_prompts(data)
    report.lengths = [Lengths.of("prompts", unit, lengths)]
    if any(map(len, answers)):
        report.lengths.append(Lengths.of("answers", unit, np.concatenate(answers)))
    if codec is not None:
        report.limits = (codec.prompt_limit, codec.response_limit)
        report.shortened = codec.check_prompts(data).shortened
        report.cut = sum(int((size > codec.response_limit).sum()) for size in answers)


def _count_pairs(batch: Any, report: CheckReport) -> Any:
    """Count what won in rows with candidates; return the Arrow column of all candidates."""
    import pyarrow.compute as pc

    texts = batch.column("candidates").flatten()
    better, worse = pair_places(batch.column("ranking"), batch.column("levels"))
    different = pc.not_equal(texts.take(better), texts.take(worse)).to_numpy(zero_copy_only=False)
    better, worse = better[different], worse[different]
    sizes, _ = text_sizes(texts)
    report.candidates += len(texts)
    report.pairs += len(better)
    report.second_chosen += int((better > worse).sum())
    report.longer_chosen += int((sizes[better] > sizes[worse]).sum())
    return texts


_COLUMNS = (
    "text",
    "flags",
    "candidates",
    "ranking",
    "levels",
    "references",
    "prompt_hash",
)
