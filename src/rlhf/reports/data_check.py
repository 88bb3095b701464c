"""The report of `rlhf data check` on a file, before any training is started."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import DataPaths, OnBadRows, scan_files
from rlhf.data.row_table import Flag, pair_places, take, text_sizes
from rlhf.data.rows import PromptData, ReadReport
from rlhf.data.selection import Wants, column_values, rows_wanted

if TYPE_CHECKING:
    from rlhf.data.prompt_codec import PromptCodec

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
    def of(cls, what: str, unit: str, lengths: Sequence[int] | NDArray[np.int64]) -> "Lengths":
        """Summarize at least one length."""
        ordered = np.sort(np.asarray(lengths))
        quantiles = tuple(int(ordered[round(q * (len(ordered) - 1))]) for q in _QUANTILES)
        return cls(what, unit, len(ordered), quantiles)

    def line(self) -> str:
        """Return the same in words."""
        shortest, median, most, nearly_all, longest = self.quantiles
        return (
            f"{self.what}, {self.unit}: shortest {shortest}, median {median}, 90 % {most}, "
            f"99 % {nearly_all}, longest {longest}"
        )


@dataclass
class CheckReport:
    """Contents of the checked files.

    Attributes:
        read: Summary of reading.
        preferences: Rows with candidates.
        candidates: Their candidates.
        pairs: Pairs of different candidates that they make.
        prompts: Rows without.
        references: Texts of `output_text`.
        distinct_prompts: Number of different prompts.
        second_chosen: Pairs in which the later of the two in the file was preferred.
        repeating: Preferences whose candidates all begin with the row's whole input.
        longer_chosen: Pairs in which the longer, in characters, was preferred: a bias to know of.
        lengths: Lengths of prompts, candidates and references.
        shortened: Prompts that lose tokens to `prompt_sequence_length`; None without a tokenizer.
        cut: Candidates and references that lose tokens to `target_sequence_length`; likewise.
        limits: The two limits.
    """

    read: ReadReport
    preferences: int = 0
    candidates: int = 0
    pairs: int = 0
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
        """Return the report for people, one fact per line."""
        said = self.read.lines()
        said.append(
            f"{self.preferences} preferences, {self.prompts} prompts without candidates, "
            f"{self.references} references, {self.distinct_prompts} different prompts"
        )
        if self.pairs:
            second, longer = self.second_chosen / self.pairs, self.longer_chosen / self.pairs
            what = "preferred: candidate_1"
            if self.candidates > 2 * self.preferences:
                what = f"preferred in {self.pairs} pairs: the later candidate"
            said.append(f"{what} in {second:.1%}, the longer one in {longer:.1%}")
        if self.repeating:
            said.append(f"all candidates begin with the whole input: {self.repeating}")
        said += [lengths.line() for lengths in self.lengths]
        if self.shortened is not None and self.cut is not None:
            prompt_limit, response_limit = self.limits
            rows = self.preferences + self.prompts
            answers = self.candidates + self.references
            said += [
                f"prompts over {prompt_limit} tokens, to be shortened: {self.shortened} of {rows}",
                f"answers over {response_limit} tokens, to be cut: {self.cut} of {answers}",
            ]
        return said


def check_files(
    paths: DataPaths,
    *,
    kind: Kind = "auto",
    on_bad_rows: OnBadRows = "error",
    instruction: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    prompt_sequence_length: int = 512,
    target_sequence_length: int = 64,
) -> CheckReport:
    """Validate preference, prompt and demonstration files and describe their contents.

    Args:
        paths: A path, a glob, an fsspec address, or a list of these.
        kind: What every row must be; "auto" reads rows with candidates as preferences and the
            others as prompts.
        on_bad_rows: Whether bad rows are an error, or are skipped and counted.
        instruction: Text put before every input, as in training.
        base_model: If given, lengths are counted in its tokens and compared with the limits. Only
            configuration and tokenizer are loaded.
        revision: Revision of `base_model`.
        prompt_sequence_length: Limit of prompts in tokens.
        target_sequence_length: Limit of responses in tokens.

    Raises:
        InputError: If anything is wrong with the rows or with `base_model`.
    """
    codec, renderer = None, PromptRenderer(instruction)
    if base_model is not None:
        limits = (prompt_sequence_length, target_sequence_length)
        codec = _load_tokenizer(base_model, revision, limits)
        renderer = PromptRenderer.for_tokenizer(codec.tokenizer, instruction)
    scanned = scan_files(paths, renderer, "data")
    taken = rows_wanted(scanned, _WANTS[kind], "data", on_bad_rows, fingerprint=False)
    report = CheckReport(taken.report)
    data = PromptData(
        scanned.table, scanned.files, taken.report, "", taken.index, scanned.token_counts
    )
    _describe(data, report, codec, pairs=_WANTS[kind].pair != "ignored")
    return report


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
