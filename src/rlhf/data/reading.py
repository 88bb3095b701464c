"""From data sources to checked, rendered rows on disk.

Nothing here needs a model. Memory stays bounded for any input: one pass writes every row to a
temporary Arrow file, and each stage selects the rows it needs. Inside `read_once` no file is read
twice.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf.data.prompts import PromptRenderer
from rlhf.data.rows import PreferenceData, PromptData, ReadReport
from rlhf.data.scanning import Scan, scan
from rlhf.data.selection import OnBadRows, Ties, Wants, column_values, group_rows, rows_wanted
from rlhf.data.sources.reading import find_sources
from rlhf.data.sources.source import Source

__all__ = [
    "OnBadRows",
    "PreferenceData",
    "PromptData",
    "ReadReport",
    "Ties",
    "load_preferences",
    "load_prompts",
    "read_once",
    "scan_files",
    "split_holdout",
]

DataPaths = Any  # what `rlhf.config.Sources` holds, or what becomes that: a path, …
_HELD_OUT = 0.05  # share of the rows

_MOST_SCANS = 8  # each of them is a file on disk


def load_prompts(
    paths: DataPaths,
    *,
    renderer: PromptRenderer,
    on_bad_rows: OnBadRows = "error",
    require_output: bool = False,
    uses: Callable[[str], bool] | None = None,
    columns: Mapping[str, str] | None = None,
    name: str = "prompt_dataset",
) -> PromptData:
    """Read prompt rows; preference rows are prompt rows too.

    Args:
        paths: A path, glob, folder, address, Hub id, entry with weight and limit, rows, or a list
            of these.
        renderer: Renders the prompts.
        on_bad_rows: Whether bad rows are an error, or are skipped and counted.
        require_output: Whether each row must have `output_text` (demonstrations).
        uses: Whether the caller uses a field of this name that no stage reads. If given, rows keep
            all their fields, as `PromptRow.columns`.
        columns: Columns of the files by our names for them.
        name: Configuration field to name in messages.

    Raises:
        InputError: If files are missing, rows are bad (lists them all), or no row is left.
    """
    scanned = scan_files(paths, renderer, name, keep_lines=uses is not None, columns=columns)
    wants = Wants(output="required" if require_output else "if present", lines=uses is not None)
    data = PromptData(*_data(scanned, wants, name, on_bad_rows))
    data.check_shares()
    if uses is not None:
        unused = [field for field in data.report.unused if not uses(field)]
        data.report = replace(data.report, unused=unused)
    return data


def load_preferences(
    paths: DataPaths,
    *,
    renderer: PromptRenderer,
    on_bad_rows: OnBadRows = "error",
    candidates_optional: bool = False,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "drop",
    name: str = "preference_dataset",
) -> PreferenceData:
    """Read preference rows; rows whose candidates are all the same text are left out.

    Args:
        paths: A path, glob, folder, address, Hub id, entry with weight and limit, rows, or a list
            of these.
        renderer: Renders the prompts.
        on_bad_rows: Whether bad rows are an error, or are skipped and counted.
        candidates_optional: Whether to pass over rows without candidate fields, which an
            `eval_dataset` may have; the result may then be empty.
        columns: Columns of the files by our names for them.
        ties: Whether to leave out tied answers, or to keep them as half a choice either way.
        name: Configuration field to name in messages.

    Raises:
        InputError: If files are missing, rows are bad (lists them all), or no row is left.
    """
    scanned = scan_files(paths, renderer, name, columns=columns)
    wants = Wants(pair="required", pass_over=candidates_optional, output="ignored", ties=ties)
    data = PreferenceData(*_data(scanned, wants, name, on_bad_rows))
    data.check_shares()
    return data


def _data(scanned: Scan, wants: Wants, name: str, on_bad_rows: OnBadRows) -> tuple[Any, ...]:
    """Return the parts of a data set: the rows of a scan that a stage wants."""
    taken = rows_wanted(scanned, wants, name, on_bad_rows)
    return (
        scanned.table,
        scanned.files,
        taken.report,
        taken.fingerprint,
        taken.index,
        scanned.token_counts,
        scanned.entries,
    )


def split_holdout(
    preferences: PreferenceData, limit: int = 1000, *, seed: int = 0
) -> tuple[PreferenceData, PreferenceData]:
    """Hold out rows for evaluation; all rows of one prompt stay on the same side.

    Args:
        preferences: All rows.
        limit: Maximum number of rows to hold out; at most a twentieth is held out anyway.
        seed: Determines which prompts are chosen.

    Returns:
        (training rows, held-out rows), both in their original order. With a single prompt
        nothing can be held out; otherwise at least one prompt is.
    """
    from rlhf.data.batching import permutation  # needs torch, which checking files does not

    batches = preferences.batches(("prompt_hash",))
    group_of = group_rows([column_values(batch, "prompt_hash") for batch in batches])
    sizes = np.bincount(group_of)
    wanted = min(limit, max(1, round(_HELD_OUT * len(preferences))))
    held: list[int] = []
    count = 0
    for group in permutation(len(sizes), "holdout", seed)[: len(sizes) - 1]:
        # A prompt with too many rows is only taken if nothing else was.
        if count + sizes[group] <= wanted:
            held.append(group)
            count += sizes[group]
        if count == wanted:
            break
    if not held and len(sizes) > 1 and limit > 0:
        held.append(int(sizes.argmin()))
    held_out = np.isin(group_of, held)
    return (
        preferences.select_rows(np.flatnonzero(~held_out)),
        preferences.select_rows(np.flatnonzero(held_out)),
    )


class _Scans:
    """The latest scans of a run, keyed by sources, rendering and columns."""

    def __init__(self, keep_lines: bool) -> None:
        self.keep_lines = keep_lines
        self._scans: OrderedDict[tuple[object, ...], Scan] = OrderedDict()

    def get(
        self,
        sources: Sequence[Source],
        renderer: PromptRenderer,
        keep_lines: bool,
        columns: Mapping[str, str] | None,
    ) -> Scan:
        """Return the scan of some sources; scan them again if they changed."""
        keep_lines = keep_lines or self.keep_lines
        key = (
            renderer.identity,
            keep_lines,
            tuple((columns or {}).items()),
            *((source.entry, *source.stamp()) for source in sources),
        )
        if key not in self._scans:
            self._scans[key] = scan(sources, renderer, keep_lines, columns)
            if len(self._scans) > _MOST_SCANS:
                self._scans.popitem(last=False)
        self._scans.move_to_end(key)
        return self._scans[key]


_scans: _Scans | None = None


@contextlib.contextmanager
def read_once(keep_lines: bool = False) -> Iterator[None]:
    """Read unchanged files only once inside this context, however many stages ask for them.

    Args:
        keep_lines: Whether to keep the original lines, for `RowData.raw_lines`.
    """
    global _scans
    if _scans is not None:  # nested: the outermost context applies
        yield
        return
    _scans = _Scans(keep_lines)
    try:
        yield
    finally:
        _scans = None


def scan_files(
    paths: DataPaths,
    renderer: PromptRenderer,
    name: str,
    keep_lines: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Scan:
    """Scan all rows of some files, good and bad.

    Args:
        paths: A path, glob, folder, address, Hub id, entry with weight and limit, rows, or a list
            of these.
        renderer: Renders the prompts.
        name: Configuration field to name in messages.
        keep_lines: Whether to keep every original line, too.
        columns: Columns of the files by our names for them.

    Raises:
        InputError: If files are missing.
    """
    sources = find_sources(paths, name)
    if _scans is None:
        return scan(sources, renderer, keep_lines, columns)
    return _scans.get(sources, renderer, keep_lines, columns)
