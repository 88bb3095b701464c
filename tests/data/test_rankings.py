"""Rows with several ranked candidates: as read, as reported, as pairs."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny import make_tokenizer, tiny_model

from rlhf.data.convert import convert
from rlhf.data.pairs import Pairs
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts, split_holdout
from rlhf.data.row_table import pair_places
from rlhf.data.schema import PreferenceRow, PromptText
from rlhf.errors import InputError
from rlhf.models.loading import prompt_layout
from rlhf.reports.data_check import check_files

RENDERER = PromptRenderer()
RANKED = {"input_text": "a post", "candidates": [" one", " two", " three"], "ranking": [2, 0, 1]}
PAIR = {"input_text": "a post", "candidate_0": " one", "candidate_1": " two", "choice": 1}
TEXTS = st.sampled_from([" a", " b", "", " the cat", " dog", " 9 9 9"])
ROWS = st.lists(
    st.lists(TEXTS, min_size=2, max_size=5).flatmap(
        lambda texts: st.tuples(st.just(texts), st.permutations(range(len(texts))))
    ),
    min_size=1,
    max_size=6,
)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def problems(path: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_preferences(path, renderer=RENDERER)
    return caught.value.problems


def preference(number: int, texts: list[str], ranking: list[int]) -> PreferenceRow:
    prompt = PromptText(f"the {'cat ' * (number % 4)}", ((0, 4),))
    margin = number / 2 if len(texts) == 2 else None
    return PreferenceRow(prompt, tuple(texts), tuple(ranking), margin, "file:1", number)


# Reading


def test_a_ranking_is_read_best_to_worst(tmp_path: Path) -> None:
    rows = load_preferences(write(tmp_path / "a.jsonl", RANKED, PAIR), renderer=RENDERER)
    ranked, pair = rows
    assert ranked.candidates == (" one", " two", " three")
    assert ranked.ranking == (2, 0, 1)
    assert (ranked.chosen, ranked.rejected, ranked.margin) == (" three", " two", None)
    assert ranked.pairs == [(2, 0), (2, 1), (0, 1)]
    assert (pair.candidates, pair.ranking) == ((" one", " two"), (1, 0))
    assert pair.pairs == [(1, 0)]
    said = "\n".join(rows.report.lines())
    assert "of them with more than two candidates: 1" in said
    assert "pairs that their candidates make: 4" in said


def test_prompts_come_from_rankings_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RANKED, {**RANKED, "ranking": [7]}, PAIR)
    rows = load_prompts(path, renderer=RENDERER)
    assert [row.prompt.text for row in rows] == ["a post"] * 3
    assert rows.report.unused == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ranking": None}, "ranking: is null, expected the indices 0 to 2, each once, best to"),
        ({"ranking": "2 0 1"}, 'ranking: is the text "2 0 1", expected the indices 0 to 2'),
        ({"ranking": [2, 0]}, "ranking: has 2 in it for 3 candidates, expected the indices 0"),
        ({"ranking": []}, "ranking: has 0 in it for 3 candidates, expected"),
        ({"ranking": [1, 2, 3]}, "ranking[2]: is the number 3, expected the indices 0 to 2"),
        ({"ranking": [0, -1, 2]}, "ranking[1]: is the number -1, expected"),
        ({"ranking": [0, 1, 1]}, "ranking[2]: repeats 1, expected the indices 0 to 2, each once"),
        ({"ranking": [0, 1.0, 2]}, "ranking[1]: is the number 1.0, expected"),
        ({"ranking": [True, 0, 2]}, "ranking[0]: is true, expected"),
        ({"ranking": ["0", 1, 2]}, 'ranking[0]: is the text "0", expected'),
        ({"ranking": [[0], 1, 2]}, "ranking[0]: is a list, expected"),
        ({"ranking": [10**400, 1, 2]}, "ranking[0]: is a number of hundreds of digits, expected"),
        ({"candidates": None}, "candidates: is null, expected a list of 2 to 64 texts"),
        ({"candidates": {"a": 1}}, "candidates: is an object, expected a list of 2 to 64 texts"),
        ({"candidates": [" one"]}, "candidates: has 1 in it, expected a list of 2 to 64 texts"),
        ({"candidates": [" a"] * 65}, "candidates: has 65 in it, expected a list of 2 to 64"),
        ({"candidates": ["a", None, "b"]}, "candidates[1]: is null, expected text"),
        ({"candidates": ["a", "b", {"text": "c"}]}, "candidates[2]: is an object, expected text"),
        ({"margin": 1}, "margin: stands beside ranking, expected a row of candidate_0, candidate"),
        ({"margin": "x"}, 'margin: is the text "x", expected a finite number'),
    ],
)
def test_wrong_rankings_are_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "a.jsonl", RANKED, {**RANKED, **change})
    (found,) = problems(path)
    assert found.startswith(f"{path}:2: {expected}")
    with pytest.raises(InputError) as caught:
        check_files(path)
    assert caught.value.problems == [found]


def test_missing_fields_of_a_ranking(tmp_path: Path) -> None:
    row = {"input_text": "a", "candidates": ["b", "c"], "rankings": [0, 1]}
    (found,) = problems(write(tmp_path / "a.jsonl", row))
    assert "ranking: is missing (did you mean ranking where it says rankings?), expected" in found
    (found,) = problems(write(tmp_path / "b.jsonl", {"input_text": "a", "ranking": [0, 1]}))
    assert "candidates: is missing (the row has input_text, ranking), expected a list" in found


def test_several_problems_of_a_row_are_all_named(tmp_path: Path) -> None:
    row = {"candidates": ["a", 3, 4], "ranking": 7, "margin": 2, "input_text": ""}
    fields = [text.split(": ")[1] for text in problems(write(tmp_path / "a.jsonl", row))]
    assert fields == ["margin", "candidates[1]", "candidates[2]", "ranking", "input_text"]


@pytest.mark.parametrize(
    ("row", "chosen", "unused"),
    [
        ({**RANKED, **PAIR}, " two", ["candidates", "ranking"]),
        ({**RANKED, "chosen": " c", "rejected": " r"}, " c", ["candidates", "ranking"]),
        ({**RANKED, "choice": 1}, " three", ["choice"]),
        ({**RANKED, "candidate_0": None, "id": 3}, " three", ["id"]),
    ],
)
def test_of_several_layouts_one_is_read_and_the_rest_is_named(
    tmp_path: Path, row: dict[str, Any], chosen: str, unused: list[str]
) -> None:
    rows = load_preferences(write(tmp_path / "a.jsonl", row), renderer=RENDERER)
    assert rows[0].chosen == chosen
    assert sorted(rows.report.unused) == unused


def test_identical_candidates_make_no_pair(tmp_path: Path) -> None:
    same = {**RANKED, "candidates": [" one", " two", " one"]}
    path = write(tmp_path / "a.jsonl", same, {**RANKED, "candidates": [" x"] * 3}, RANKED)
    rows = load_preferences(path, renderer=RENDERER)
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:3"]
    assert rows[0].pairs == [(2, 1), (0, 1)]
    assert (rows.report.identical, rows.report.pairs) == (1 + 3, 2 + 3)
    assert "no valid row is left" in problems(
        write(tmp_path / "b.jsonl", {**RANKED, "candidates": [""] * 3})
    )[-1]  # fmt: skip


def test_pairs_of_rankings_repeat_and_contradict_those_of_other_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        RANKED,  # three > one > two
        PAIR,  # two > one contradicts
        {**PAIR, "choice": 0},  # again
        {**RANKED, "candidates": [" two", " three", " four"], "ranking": [2, 0, 1]},  # two > three
    )
    report = load_preferences(path, renderer=RENDERER).report
    assert (report.repeated, report.contradictions) == (1, 2)


def test_rankings_are_held_out_by_prompt(tmp_path: Path) -> None:
    lines = [{**RANKED, "input_text": f"post {number // 2}"} for number in range(80)]
    rows = load_preferences(write(tmp_path / "a.jsonl", *lines), renderer=RENDERER)
    train, held = split_holdout(rows, seed=1)
    assert (len(train), len(held)) == (76, 4)
    assert not {row.prompt.text for row in train} & {row.prompt.text for row in held}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ROWS)
def test_any_ranking_survives_the_files(
    tmp_path: Path, rows: list[tuple[list[str], list[int]]]
) -> None:
    lines = [
        {"input_text": "x", "candidates": texts, "ranking": list(order)} for texts, order in rows
    ]
    path = write(tmp_path / "a.jsonl", *lines)
    kept = [(tuple(texts), tuple(order)) for texts, order in rows if len(set(texts)) > 1]
    if not kept:
        return
    read = load_preferences(path, renderer=RENDERER)
    assert [(row.candidates, row.ranking) for row in read] == kept
    blank = sum(not text for texts, _ in kept for text in texts)
    assert read.report.blank_candidates == blank
    for row, (texts, order) in zip(read, kept, strict=True):
        places = {index: place for place, index in enumerate(order)}
        expected = [
            (i, j)
            for i, j in itertools.permutations(range(len(texts)), 2)
            if places[i] < places[j] and texts[i] != texts[j]
        ]
        assert sorted(row.pairs) == sorted(expected)


# Checking and converting


def test_the_check_counts_pairs(tmp_path: Path) -> None:
    same = {**RANKED, "candidates": [" one", " one", " x"]}  # x > one, twice
    path = write(tmp_path / "a.jsonl", RANKED, same, PAIR, {"input_text": "the dog"})
    report = check_files(path)
    assert (report.preferences, report.candidates, report.pairs, report.prompts) == (3, 8, 6, 1)
    # three > one, three > two and x > one twice come later; two > one too; one > two not.
    assert report.second_chosen == 5
    assert report.longer_chosen == 2  # than " three", both
    assert report.lengths[1].count == 8
    found = {words: (figure, more) for words, figure, more in report.facts()}
    assert found["the later candidate preferred"] == ("83.3%", "")
    assert found["longer one preferred"] == ("33.3%", "")
    identical = found["pairs with identical candidates left out (they carry no signal)"]
    assert identical == ("1", f"{path}:2")


def test_the_check_tells_rankings_that_repeat_the_input(tmp_path: Path) -> None:
    texts = [f"a post {text}" for text in "xyz"]
    path = write(tmp_path / "a.jsonl", {**RANKED, "candidates": texts}, RANKED)
    assert ("all candidates begin with the whole input", "1", "") in check_files(path).facts()


@given(ROWS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_places_of_pairs_against_loops(
    rows: list[tuple[list[str], list[int]]], without: int
) -> None:
    orders = [*[list(order) for _, order in rows], *[[]] * without]
    better, worse = pair_places(pa.array(orders, pa.list_(pa.int8())))
    expected, start = [], 0
    for order in orders:
        expected += [(start + a, start + b) for a, b in itertools.combinations(order, 2)]
        start += len(order)
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == sorted(expected)


def test_conversion_keeps_rankings_as_they_are(tmp_path: Path) -> None:
    prompt = {"prompt": "x", "candidates": ["x a", "x b"], "ranking": [1, 0], "id": 1}
    for number, rows in enumerate(([RANKED, prompt], [prompt, RANKED])):
        path = write(tmp_path / f"{number}.jsonl", *rows)
        report = convert(path, str(tmp_path / "out.jsonl"))
        assert (report.layouts, report.rows, report.unused) == ({"rows": 2}, 2, ["id"])
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows
    with pytest.raises(InputError, match=r"ranking\[1\]: repeats 0"):
        convert(
            write(tmp_path / "bad.jsonl", {**RANKED, "ranking": [0, 0, 1]}),
            str(tmp_path / "out.jsonl"),
        )


# Pairs


@pytest.fixture(scope="module")
def codec() -> PromptCodec:
    tokenizer = make_tokenizer("t5")
    return PromptCodec(tokenizer, prompt_layout(tiny_model("t5").config, tokenizer), 12, 6)


def texts_of(pairs: Pairs, rows: list[PreferenceRow], codec: PromptCodec) -> Counter[Any]:
    """What each pair says, by its ids and numbers, whatever the order of anything."""
    prompts, responses = pairs.prompts.tolists(), pairs.responses.tolists()
    groups = pairs.groups.tolist()
    said = []
    for winner, loser, margin, weight in zip(
        pairs.winners.tolist(), pairs.losers.tolist(), pairs.margin.tolist(),
        pairs.weight.tolist(), strict=True,
    ):  # fmt: skip
        assert groups[winner] == groups[loser]
        prompt = tuple(prompts[groups[winner]])
        said.append((prompt, tuple(responses[winner]), tuple(responses[loser]), margin, weight))
    return Counter(said)


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_pairs_against_loops_in_any_order(
    codec: PromptCodec, rows: list[tuple[list[str], list[int]]], rng: Any
) -> None:
    made = [preference(number, *row) for number, row in enumerate(rows)]
    expected: Counter[Any] = Counter()
    for row in made:
        ids = [tuple(codec.response_ids(text)) for text in row.candidates]
        found = [
            (a, b) for place, a in enumerate(row.ranking) for b in row.ranking[place + 1 :]
            if row.candidates[a] != row.candidates[b]
        ]  # fmt: skip
        for a, b in found:
            weight = float(np.float32(1 / len(found)))
            prompt = tuple(codec.prompt_ids(row.prompt))
            expected[prompt, ids[a], ids[b], row.margin or 0.0, weight] += 1
    pairs = Pairs.from_rows(made, codec)
    assert texts_of(pairs, made, codec) == expected
    assert pairs.tokens.tolist() == [
        len(codec.prompt_ids(row.prompt))
        + sum(len(codec.response_ids(text)) for text in row.candidates)
        for row in made
    ]
    shuffled = []
    for row in rng.sample(made, len(made)):  # other places of rows and candidates, same meaning
        order = rng.sample(range(len(row.candidates)), len(row.candidates))
        shuffled.append(
            PreferenceRow(
                row.prompt,
                tuple(row.candidates[i] for i in order),
                tuple(order.index(i) for i in row.ranking),
                row.margin,
                row.source,
            )
        )
    assert texts_of(Pairs.from_rows(shuffled, codec), shuffled, codec) == expected


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_selected_rows_are_those_made_alone(
    codec: PromptCodec, rows: list[tuple[list[str], list[int]]], rng: Any
) -> None:
    made = [preference(number, *row) for number, row in enumerate(rows)]
    wanted = rng.sample(range(len(made)), rng.randint(1, len(made)))
    part = Pairs.from_rows(made, codec).select_rows(wanted)
    alone = Pairs.from_rows([made[number] for number in wanted], codec)
    assert len(part) == len(wanted)
    assert part.prompts.tolists() == alone.prompts.tolists()
    assert part.responses.tolists() == alone.responses.tolists()
    for name in ("groups", "winners", "losers", "margin", "weight", "rows", "tokens"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
