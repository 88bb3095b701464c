"""Prompts that data sets share, and rows that repeat earlier ones, against slow references."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.overlaps import find_overlap, prompt_hashes
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_prompts
from rlhf.data.repeats import repeated_pairs, repeated_rows

WORDS = st.sampled_from(["a", "b", " a", "a ", "a b", "a  b", "a\nb", "b\u00a0a", "b a"])
ROWS = st.lists(st.tuples(WORDS, st.lists(st.sampled_from("xy"), max_size=2)), min_size=1)


def load(folder: str, name: str, rows: Sequence[tuple[str, list[str]]]) -> Any:
    path = Path(folder) / f"{name}.jsonl"
    lines = [{"input_text": text, "output_text": answers or None} for text, answers in rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    return load_prompts(str(path), renderer=PromptRenderer("Help."), name=name)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS)
def test_overlaps_against_loops(ours: Any, theirs: Any) -> None:
    with TemporaryDirectory() as folder:
        data, other = load(folder, "eval", ours), load(folder, "train", theirs)
        found = find_overlap(data, other)
        plain = [" ".join(text.split()) for text, _ in theirs]
        expected = [
            (f"{folder}/eval.jsonl:{line}", f"{folder}/train.jsonl:{plain.index(key) + 1}")
            for line, (text, _) in enumerate(ours, start=1)
            if (key := " ".join(text.split())) in plain
        ]
        assert (found.name, found.other, found.rows) == ("eval", "train", len(ours))
        assert found.count == len(expected)
        assert list(found.examples) == expected[:3]
        if expected:
            start = f"eval: {len(expected)} of {len(ours)} rows have a prompt that train has, too"
            assert found.line().startswith(f"{start}, such as {expected[0][0]} (as ")


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_repeated_rows_against_loops(rows: Any) -> None:
    with TemporaryDirectory() as folder:
        data = load(folder, "rows", rows)
        found = repeated_rows(data, prompt_hashes(data))
    keys = [(" ".join(text.split()), *answers) for text, answers in rows]
    again = [(n, keys.index(key)) for n, key in enumerate(keys) if key in keys[:n]]
    assert (found.count, found.first) == (len(again), again[:3])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12))
def test_repeated_pairs_against_loops(given_: list[tuple[int, int]]) -> None:
    """Hashes of pairs are numbers of which the last bit is the choice; rows may have several."""
    given_.sort(key=lambda pair: pair[1])
    hashes = np.array([value for value, _ in given_], np.uint64)
    rows = np.array([row for _, row in given_], np.int64)
    repeated, contradicting = repeated_pairs(hashes, rows)
    again, either = [], {}
    for place, (value, row) in enumerate(given_):
        before = [pair for pair in given_[:place] if pair[0] == value]
        if before:
            again.append((row, before[0][1]))
        opposite = [pair for pair in given_[:place] if pair[0] == value ^ 1]
        if opposite and value // 2 not in either:
            either[value // 2] = (row, opposite[0][1])
    assert repeated.count == len(again)
    assert repeated.first == sorted(pair for pair in again if pair[0] != pair[1])[:3]
    assert contradicting.count == len(either)
    assert contradicting.first == sorted(p for p in either.values() if p[0] != p[1])[:3]
