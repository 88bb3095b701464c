"""Rows in an Arrow file on disk, written batch by batch and read on demand.

A `RowTable` has a row for each line of the input files, good or bad. The file is temporary: it
disappears with the last object that uses it, or with the process.
"""

import mmap
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rlhf.data.duplicates import pair_hashes, text_hash
from rlhf.data.schema import Candidates, PromptText, ranked_pairs
from rlhf.files.owners import temporary_folder

_FILE = "rows.arrow"
_BATCH_ROWS = 4000
_BATCH_CHARACTERS = 8 * 2**20
_PROMPT = PromptText("", ())
_NO_CANDIDATES: tuple[Any, ...] = ((), (), (), None, 0, (), 0, 0)


class Flag:
    """Properties of a table row, as bits."""

    OBJECT = 1  # is a JSON object
    HAS_PAIR = 2  # has candidate fields
    IDENTICAL = 4  # all candidates are the same text
    CONVERSATION = 8
    MENDED = 16
    NO_OUTPUT = 32
    BAD_LINE = 64
    REPEATS = 4096  # all candidates begin with the whole input
    TIED = 8192  # all different candidates are tied
    LEFT_OUT = 16384  # matches its layout, but states no preference between two answers
    WHOLE_FILE = 128  # not a line, but a file that cannot be read
    BAD_PAIR = 256
    BAD_PROMPT = 512
    BAD_RENDER = 1024
    BAD_OUTPUT = 2048


class RowTable:
    """Rows of a finished Arrow file, memory-mapped; the file itself has already been unlinked.

    Attributes:
        batches: Arrow record batches.
        starts: Index of the first row of each batch, followed by the total number of rows.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pa.ipc.open_stream(pa.py_buffer(self._map)) as reader:
            self.batches = list(reader)
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Yield every batch with the index of its first row; release memory after reading."""
        for number, batch in enumerate(self.batches):
            yield int(self.starts[number]), batch
            if number % 8 == 7 and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return some columns of one row."""
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        place = number - int(self.starts[batch])
        return {name: self.batches[batch].column(name)[place].as_py() for name in columns}


class TableWriter:
    """Writer of a table, batch by batch, to a temporary file.

    Attributes:
        rows: Rows added so far.
        ties: Pairs of different candidates in them that are tied.
    """

    def __init__(self) -> None:
        import pyarrow as pa

        self.rows = self.ties = 0
        self._schema = _schema()
        self._folder = str(temporary_folder("data"))
        self._path = os.path.join(self._folder, _FILE)
        self._writer = pa.ipc.new_stream(self._path, self._schema)
        self._pending: list[tuple[Any, ...]] = []
        self._characters = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        prompt: PromptText | None,
        input_text: str,
        pair: Candidates | None,
        references: list[str] | None,
        raw: bytes | None,
        place: tuple[int, int],
        flags: int,
        counts: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Append one row.

        Args:
            prompt: The rendered prompt, if valid.
            input_text: The row's own input.
            pair: Its answers and their order, if valid.
            references: Texts of `output_text`.
            raw: The original line, if lines are kept.
            place: File index and line number.
            flags: Bits of `Flag`.
            counts: Numbers of problems with the pair, the prompt and `output_text`.
        """
        self.rows += 1
        prompt = prompt or _PROMPT
        text, spans, reserve = prompt.text, prompt.spans, prompt.reserve
        candidates = _NO_CANDIDATES
        size = len(text) + len(raw or b"") + sum(map(len, references or ()))
        if pair is not None:
            blank = sum(map(is_blank, pair.texts))
            size += sum(map(len, pair.texts))
            hashes = pair_hashes(text, pair.texts, pair.ranking, pair.levels)
            same = identical_pairs(pair.texts)
            levels, ties = pair.levels, 0
            if levels:
                ties = tied_pairs(pair)
                self.ties += ties
            candidates = (pair.texts, pair.ranking, levels, pair.margin, blank, hashes, same, ties)
        self._pending.append(
            (
                text,
                prompt.template_bos,
                None if input_text == text else input_text,
                spans[0] if len(spans) == 1 else tuple(chain.from_iterable(spans)),
                tuple(chain.from_iterable(reserve)) if reserve else (),
                text_hash(text),
                *candidates,
                references or (),
                sum(map(is_blank, references)) if references else 0,
                raw,
                *place,
                flags,
                *counts,
            )
        )
        self._characters += size
        if len(self._pending) >= _BATCH_ROWS or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> RowTable:
        """Return the table, once all rows are added."""
        self._flush()
        self._writer.close()
        return RowTable(self._path)

    def _flush(self) -> None:
        import pyarrow as pa

        columns = list(zip(*self._pending, strict=True)) or [()] * len(self._schema)
        arrays = [
            _lists(column, kind) if pa.types.is_list(kind) else pa.array(column, type=kind)
            for column, kind in zip(columns, self._schema.types, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._pending, self._characters = [], 0


def _lists(column: Sequence[Sequence[Any]], kind: Any) -> Any:
    """Return an Arrow column of lists, much faster than Arrow's own conversion."""
    import pyarrow as pa

    offsets = np.zeros(len(column) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, column), np.int32, len(column)), out=offsets[1:])
    values = pa.array(list(chain.from_iterable(column)), type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def take(batch: Any, rows: NDArray[np.int64]) -> Any:
    """Return some rows of a record batch; the batch itself if all rows are wanted."""
    import pyarrow as pa

    return batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))


def text_sizes(texts: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (N,) characters and (N,) bytes of an Arrow column of texts; 0 for null."""
    import pyarrow.compute as pc

    characters, size = (
        pc.fill_null(length(texts), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        for length in (pc.utf8_length, pc.binary_length)
    )
    return characters, size


def identical_pairs(texts: Sequence[str]) -> int:
    """Return the number of pairs that are the same text."""
    if len(set(texts)) == len(texts):
        return 0
    return sum(count * (count - 1) // 2 for count in Counter(texts).values())


def tied_pairs(pair: Candidates) -> int:
    """Return the number of pairs of different texts that are tied."""
    strict = ranked_pairs(pair.texts, pair.ranking, pair.levels)
    return len(ranked_pairs(pair.texts, pair.ranking)) - len(strict)


def pair_places(rankings: Any, levels: Any = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs of each row's candidates, as places in a flat list of all candidates.

    Args:
        rankings: (N,) Arrow column `ranking`, of which rows without candidates have none.
        levels: (N,) Arrow column `levels`, by which tied candidates make no pair.

    Returns:
        (pairs,) places of the better and (pairs,) of the worse candidates.
    """
    import pyarrow.compute as pc

    counts = pc.list_value_length(rankings).to_numpy(zero_copy_only=False)
    starts = np.cumsum(counts) - counts
    flat = rankings.flatten().to_numpy(zero_copy_only=False)
    level = np.arange(len(flat)) - np.repeat(starts, counts)
    if levels is not None:
        given = pc.list_value_length(levels).to_numpy(zero_copy_only=False) > 0
        level[np.repeat(given, counts)] = levels.flatten().to_numpy(zero_copy_only=False)
    pairs = [np.zeros((2, 0), np.int64)]
    for count in np.unique(counts).tolist():
        first = starts[counts == count]
        places = first[:, None] + np.arange(count)
        order = first[:, None] + flat[places]
        better, worse = np.triu_indices(count, 1)
        strict = level[places][:, better] != level[places][:, worse]
        pairs.append(np.stack([order[:, better][strict], order[:, worse][strict]]))
    both = np.concatenate(pairs, axis=1)
    return both[0], both[1]


def is_blank(text: str) -> bool:
    """Return whether a text is empty or all white space."""
    return not text or text.isspace()


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "text": pa.string(),
            "template_bos": pa.string(),
            "input_text": pa.string(),  # null where it equals the prompt's text
            "spans": pa.list_(pa.int64()),
            "reserve": pa.list_(pa.int64()),
            "prompt_hash": pa.uint64(),
            "candidates": pa.list_(pa.string()),
            "ranking": pa.list_(pa.int8()),
            "levels": pa.list_(pa.int8()),  # per place of the ranking; [] if nothing is tied
            "margin": pa.float64(),
            "blank_candidates": pa.int8(),
            "pair_hashes": pa.list_(pa.uint64()),  # of the pairs of different candidates
            "identical_pairs": pa.int32(),
            "tied_pairs": pa.int32(),  # of different candidates
            "references": pa.list_(pa.string()),
            "blank_references": pa.int32(),
            "raw": pa.binary(),
            "file": pa.int32(),
            "line": pa.int64(),
            "flags": pa.int32(),
            "pair_problems": pa.int32(),
            "prompt_problems": pa.int32(),
            "output_problems": pa.int32(),
        }
    )
