"""Public layouts, read directly: small files in each, with the rows that they have to give."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.layout_cases import CASES, GOOD, WHY, Case, Rows, assistant, gpt, human, user
from support.tiny import make_tokenizer, tiny_model

from rlhf.config.columns import COLUMN_TARGETS
from rlhf.data.convert import convert
from rlhf.data.layouts.table import BY_NAME, LAYOUTS
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts, read_once
from rlhf.data.row_checker import FIELDS
from rlhf.errors import InputError
from rlhf.reports.data_check import check_files

RENDERER = PromptRenderer()

assert len(CASES) >= 25
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def problems(load: Any, path: str, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(path, renderer=RENDERER, **options)
    return caught.value.problems


def as_pairs(path: str, **options: Any) -> list[tuple[Any, ...]]:
    data = load_preferences(path, renderer=RENDERER, **options)
    return [
        (row.prompt.text, *(row.candidates[index] for index in row.ranking))
        + (() if row.margin is None else (row.margin,))
        for row in data
    ]


@EVERY
def test_each_layout_gives_the_rows_written_here(tmp_path: Path, case: Case) -> None:
    path = write(tmp_path / "a.jsonl", case.rows)
    prompts = load_prompts(path, renderer=RENDERER)
    assert list(prompts.report.layouts) == [case.layout]
    assert sorted(prompts.report.unused) == sorted(case.unused)
    assert prompts.report.left_out == case.left_out
    said = f"prompt_dataset: layout {case.layout} ("
    assert any(line.startswith(said) for line in prompts.report.lines()) == (case.layout != "rows")
    if case.learned:
        rows = load_prompts(path, renderer=RENDERER, require_output=True)
        assert [(row.prompt.text, *row.references) for row in rows] == case.learned
    else:
        assert all(not row.references for row in prompts)
        assert problems(load_prompts, path, require_output=True)
    if case.pairs:
        assert as_pairs(path) == case.pairs
        report = load_preferences(path, renderer=RENDERER).report
        assert (report.ties, report.left_out) == (case.ties, case.left_out)
    else:
        assert problems(load_preferences, path)


@EVERY
def test_conversion_and_reading_agree(tmp_path: Path, case: Case) -> None:
    path = write(tmp_path / "a.jsonl", case.rows)
    report = convert(path, str(tmp_path / "out.jsonl"))
    assert list(report.layouts) == [case.layout]
    assert sorted(report.unused) == sorted(case.unused)
    assert report.left_out == case.left_out
    assert outcome(path) == outcome(str(tmp_path / "out.jsonl"))
    assert convert(path, str(tmp_path / "named.jsonl"), case.layout).rows == report.rows
    assert (tmp_path / "named.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()


def outcome(path: str) -> list[Any]:
    """All that training could see of a file, places apart."""
    with read_once():
        data = load_prompts(path, renderer=RENDERER)
        found: list[Any] = [(row.prompt, row.input_text, row.references) for row in data]
        try:
            pairs = load_preferences(path, renderer=RENDERER, ties="keep")
        except InputError:
            return found
        return [
            *found,
            *((row.prompt, row.candidates, row.ranking, row.margin, row.levels) for row in pairs),
        ]


def texts_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, with the path by which reports name it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_of(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item, f"{path}[]")


@EVERY
def test_no_text_is_lost(tmp_path: Path, case: Case) -> None:
    """Each text is in what is read, or its path (or what it is in) is named as not used."""
    path = write(tmp_path / "a.jsonl", case.rows)
    if case.left_out:
        return  # rows that are counted as left out
    seen = json.dumps([*map(str, outcome(path))], ensure_ascii=False)
    report = load_prompts(path, renderer=RENDERER).report
    for row in case.rows:
        for place, text in texts_of(row):
            if place.endswith((".role", ".from", ".type", "Rating", "_score")) or place == "choice":
                continue
            named = any(place == name or place.startswith((f"{name}.", f"{name}[")) for name in
                        report.unused)  # fmt: skip
            pieces = [piece.strip() for piece in text.replace("Human:", "\n\n").replace(
                "Assistant:", "\n\n").split("\n\n")]  # fmt: skip
            assert named or all(str([piece])[2:-2] in seen for piece in pieces), place


TEXT = st.text("ab c\n", min_size=1, max_size=6).filter(str.strip)
NUMBER = st.sampled_from([0, 1, 2, 0.5, -1])
TURNS = st.lists(st.builds(lambda make, text: make(text), st.sampled_from([user, assistant, human]),
                           TEXT), min_size=1, max_size=3)  # fmt: skip
VALUE = st.one_of(TEXT, NUMBER, TURNS, st.lists(TEXT, max_size=3), st.lists(NUMBER, max_size=3))
KEYS = sorted({key for case in CASES.values() for row in case.rows for key in row})
MUTATED = st.one_of(
    st.builds(
        lambda row, change, dropped: {k: v for k, v in (row | change).items() if k != dropped},
        st.sampled_from([row for case in CASES.values() for row in case.rows]),
        st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=1),
        st.one_of(st.none(), st.sampled_from(KEYS)),
    ),
    st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(MUTATED, min_size=1, max_size=3))
def test_any_rows_are_converted_as_they_are_read(tmp_path: Path, rows: Rows) -> None:
    """What `convert` accepts reads back as the file itself reads; nothing ends in a traceback."""
    path, out = write(tmp_path / "a.jsonl", rows), str(tmp_path / "out.jsonl")
    try:
        convert(path, out)
    except InputError:
        return
    assert outcome(path) == outcome(out)


def test_layouts_may_be_mixed_and_are_counted(tmp_path: Path) -> None:
    cases = ["vertex preferences", "hh-rlhf with its prompt", "helpsteer2", "orca pairs"]
    rows = [row for name in cases for row in CASES[name].rows]
    path = write(tmp_path / "a.jsonl", rows)
    assert as_pairs(path) == [pair for name in cases for pair in CASES[name].pairs]
    report = load_preferences(path, renderer=RENDERER).report
    assert report.layouts == {"rows": 1, "chosen_rejected": 1, "helpsteer2": 3, "orca_pairs": 2}
    said = "preference_dataset: layouts 3 helpsteer2, 2 orca_pairs, 1 chosen_rejected, 1 rows"
    assert said in report.lines()


def test_rows_keep_their_lines(tmp_path: Path) -> None:
    case = CASES["helpsteer2"]
    path = write(tmp_path / "a.jsonl", [*case.rows, {"input_text": "Say x", "answer": "x"}])
    rows = load_prompts(path, renderer=RENDERER, uses=lambda name: name == "answer")
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 3, 6, 9)]
    assert [row.columns for row in rows] == [
        *(case.rows[place] for place in (0, 2, 5)), {"input_text": "Say x", "answer": "x"}
    ]  # fmt: skip
    assert set(rows.report.fields or ()) == {*case.rows[0], "input_text", "answer"}
    with read_once(keep_lines=True):
        pairs = load_preferences(path, renderer=RENDERER, candidates_optional=True, ties="keep")
        lines = b"\n".join(pairs.raw_lines())
    assert [json.loads(line) for line in lines.split(b"\n")] == [
        case.rows[place] for place in (0, 1, 2, 3, 5, 6)
    ]


def test_a_row_that_waits_for_its_second_belongs_to_its_file(tmp_path: Path) -> None:
    rows = CASES["helpsteer2"].rows[:2]
    paths = [write(tmp_path / f"{number}.jsonl", [row]) for number, row in enumerate(rows)]
    assert problems(load_preferences, paths)[-1].endswith("no valid row is left")  # type: ignore[arg-type]
    bad = {**rows[1], "helpfulness": "much"}
    found = problems(load_preferences, write(tmp_path / "a.jsonl", [rows[0], bad, rows[1]]))
    assert found == [
        f'{tmp_path}/a.jsonl:2: helpfulness: is the text "much", expected a finite number'
    ]


# Ties


def test_ties_are_left_out_or_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CASES["scores"].rows)
    _, dropped = load_preferences(path, renderer=RENDERER)
    assert dropped.pairs == [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]
    assert dropped.pair_weights == [1 / 5] * 5
    first, some, all_tied = load_preferences(path, renderer=RENDERER, ties="keep")
    assert first.pairs == [(1, 0), (1, 2), (0, 2)]
    assert some.pairs == [(1, 0), (1, 2), (1, 3), (0, 2), (2, 0), (0, 3), (2, 3)]
    assert some.pair_weights == pytest.approx([1 / 6] * 3 + [1 / 12] * 2 + [1 / 6] * 2)
    assert all_tied.pairs == [(0, 1), (1, 0)]
    assert all_tied.pair_weights == [0.5, 0.5]


def test_ties_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CASES["scores"].rows)
    said = load_preferences(path, renderer=RENDERER).report.lines()
    assert "preference_dataset: tied pairs left out (ties: keep): 2" in said
    assert "preference_dataset: pairs that their candidates make: 8" in said
    said = load_preferences(path, renderer=RENDERER, ties="keep").report.lines()
    assert "preference_dataset: tied pairs kept, as half a choice either way: 2" in said
    assert "preference_dataset: pairs that their candidates make: 10" in said
    report = check_files(path)
    # Better and worse by place: later first in b > x, c > x (twice), b > a and so on.
    assert (report.read.ties, report.pairs, report.second_chosen) == (2, 8, 2)


def test_kept_ties_are_part_of_the_data_s_identity(tmp_path: Path) -> None:
    rows = CASES["scores"].rows
    prints = set()
    for number, change in enumerate(([1, 2, 1, 0], [1, 2, 0.5, 0])):
        path = write(tmp_path / f"{number}.jsonl", [rows[0], {**rows[1], "scores": change}])
        prints.add(load_preferences(path, renderer=RENDERER).fingerprint)
    assert len(prints) == 2


def test_the_loss_of_a_kept_tie_is_cross_entropy_with_the_label_one_half(tmp_path: Path) -> None:
    import torch

    from rlhf.data.pairs import Pairs
    from rlhf.data.prompt_codec import PromptCodec
    from rlhf.models.loading import prompt_layout
    from rlhf.objectives import pairwise_loss

    path = write(
        tmp_path / "a.jsonl", [*CASES["scores"].rows[2:], *CASES["vertex preferences"].rows]
    )
    tokenizer = make_tokenizer("t5")
    codec = PromptCodec(tokenizer, prompt_layout(tiny_model("t5").config, tokenizer), 12, 6)
    pairs = Pairs.from_rows(list(load_preferences(path, renderer=RENDERER, ties="keep")), codec)
    assert pairs.rows.tolist() == [0, 0, 1]
    for one in (pairs, pairs.select_rows([0])):
        scores = torch.tensor([1.5, -0.5, 0.0, 0.0], dtype=torch.float64)
        loss = pairwise_loss(scores[one.winners], scores[one.losers]) * one.weight
        share = torch.sigmoid(scores[0] - scores[1])
        expected = -(share.log() + (1 - share).log()) / 2
        assert loss[one.rows == 0].sum().item() == pytest.approx(expected.item(), abs=1e-7)


# Columns


def test_columns_are_mapped_before_layouts_are_recognized(tmp_path: Path) -> None:
    rows = [
        {"q": "Why?", "answers": {"good": "So.", "bad": "No.", "note": "n"}, "a.b": "Be brief."},
        {"q": "How?", "answers": {"good": "Thus.", "bad": "No."}, "a": {"b": "Be kind."}},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "q", "chosen": "answers.good", "rejected": "answers.bad", "system": "a.b"}
    assert as_pairs(path, columns=columns) == [
        ("Be brief.\n\nWhy?", "So.", "No."), ("Be kind.\n\nHow?", "Thus.", "No.")
    ]  # fmt: skip
    data = load_prompts(path, renderer=RENDERER, columns=columns, uses=lambda name: name == "q")
    assert data.report.unused == ["answers"]
    assert [row.columns for row in data] == rows
    assert set(data.report.fields or ()) == {"q", "answers", "a.b", "a"}
    convert(path, str(tmp_path / "out.jsonl"), columns=columns)
    assert as_pairs(str(tmp_path / "out.jsonl")) == as_pairs(path, columns=columns)


def test_rows_without_a_prompt_ask_for_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"article": "a", "highlights": "b"}])
    (found,) = problems(load_prompts, path)
    assert found.endswith("expected input_text or messages, or columns for other names")
    columns = {"prompt": "article", "output_text": "highlights"}
    (row,) = load_prompts(path, renderer=RENDERER, require_output=True, columns=columns)
    assert (row.prompt.text, row.references) == ("a", ["b"])


def test_columns_that_replace_or_miss_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "old", "q": "new"}])
    data = load_prompts(path, renderer=RENDERER, columns={"prompt": "q", "context": "extra.text"})
    assert [row.prompt.text for row in data] == ["new"]
    assert data.report.unused == ["prompt"]
    assert "prompt_dataset: no row has the columns: extra.text" in data.report.lines()


def test_rows_are_read_again_with_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "old", "q": "new"}])
    with read_once():
        plain = load_prompts(path, renderer=RENDERER)
        mapped = load_prompts(path, renderer=RENDERER, columns={"prompt": "q"})
    assert (plain[0].prompt.text, mapped[0].prompt.text) == ("old", "new")


def test_every_field_that_is_read_can_be_mapped() -> None:
    assert set(COLUMN_TARGETS) >= FIELDS


# Near misses


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"history": "a", "human_ref_A": "b", "labels": 1},
         "is nearly of layout shp (history, human_ref_A, human_ref_B, labels (or score_A, "
         "score_B)): human_ref_B is missing"),
        ({"human_ref_A": "b", "human_ref_B": "c", "labels": 1},
         "is nearly of layout shp (history, human_ref_A, human_ref_B, labels (or score_A, "
         "score_B)): history is missing"),
        ({"question": "a", "chosen": "b"},
         "is nearly of layout orca_pairs (system, question, chosen, rejected): rejected is "
         "missing"),
        ({"instruction": "a", "input": "b"},
         "is nearly of layout alpaca (instruction, input, output): output is missing"),
        ({"question": "a", "completion": "b"},
         "is nearly of layout prompt_completion (prompt (or messages), completion): prompt is "
         "missing"),
        ({"instruction": "a", "completions": ["b", "c"]},
         "is nearly of layout ultrafeedback, expected instruction (or prompt), completions of "
         "objects with response and overall_score"),
        ({"response_1": "a", "response_2": "b", "preference_strength": 1},
         "is nearly of layout helpsteer_preference (prompt (or context), response_1, response_2, "
         "preference_strength): prompt is missing"),
        ({"response": "a", "helpfulness": 3},
         "is nearly of layout helpsteer2 (prompt, response, helpfulness: two rows of a prompt "
         "make a pair): prompt is missing"),
        ({"question": "a", "responses": ["b", "c"]}, "is nearly of layout scored_responses"),
    ],
)  # fmt: skip
def test_near_misses_name_the_layout_and_what_is_missing(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    for load in (load_preferences, load_prompts):
        (found,) = problems(load, path)
        assert found.startswith(f"{path}:1: {expected}")
        assert "did you mean" not in found
    with pytest.raises(InputError) as caught:
        convert(path, str(tmp_path / "out.jsonl"))
    assert caught.value.problems[0].startswith(f"{path}:1: {expected}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "response_1": "b", "preference_strength": 1},
         "is nearly of layout helpsteer_preference"),
        ({"prompt": "a", "responses": ["b", "c"]}, "is nearly of layout scored_responses"),
        ({"prompt": "a", "completion": "b"},
         "is of layout prompt_completion (prompt (or messages), completion), expected two answers "
         "to a prompt"),
        ({"messages": [WHY, GOOD]}, "is of layout conversation"),
    ],
)  # fmt: skip
def test_rows_with_a_prompt_are_near_misses_only_as_preferences(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", [row] * 30)
    found = problems(load_preferences, path)
    assert found[0].startswith(f"{path}:1: {expected}")
    assert found[-1] == "… and 10 more problems"
    assert len(load_prompts(path, renderer=RENDERER)) == 30


@pytest.mark.parametrize("load", [load_preferences, load_prompts])
@pytest.mark.parametrize("prompt", ["a", [WHY]])
def test_unpaired_rows_are_refused_by_name(tmp_path: Path, load: Any, prompt: Any) -> None:
    row = {"prompt": prompt, "completion": "b", "label": True}
    (found,) = problems(load, write(tmp_path / "a.jsonl", [row]))
    assert ":1: label: makes it an unpaired row (KTO: prompt, completion, label)" in found


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("shp", {"labels": 2}, "labels: is the number 2, expected 1 for A or 0 for B"),
        ("shp", {"human_ref_A": ["a"]}, "human_ref_A: is a list, expected text"),
        ("ultrafeedback", {"completions": [{"response": "a"}]},
         "completions: has 1 in it, expected at least two"),
        ("ultrafeedback", {"completions": [{"response": "a"}, {"response": "b"}]},
         "completions[0].overall_score: is missing, expected a number, or a Rating"),
        ("ultrafeedback", {"completions": [{"response": 3}]},
         "completions[0].response: is the number 3, expected text"),
        ("helpsteer2 preferences", {"preference_strength": "strong"},
         'preference_strength: is the text "strong", expected a finite number'),
        ("responses with scores", {"scores": [1, 2]}, "scores: has 2 in it for 3 responses"),
        ("responses with scores", {"scores": [1, 2, None]}, "scores[2]: is null, expected a fin"),
        ("responses with scores", {"responses": [1, 2, 3]}, "responses[0]: is the number 1, exp"),
        ("candidates with scores", {"candidate_1_score": []}, "candidate_1_score: is an empty"),
        ("scores", {"scores": [1, 2]}, "scores: has 2 in it for 3 candidates, expected a finite"),
        ("scores", {"scores": 4}, "scores: is the number 4, expected a finite number for each"),
        ("scores", {"scores": [1, True, 2]}, "scores[1]: is true, expected a finite number"),
        ("scores", {"margin": 1}, "margin: stands beside scores, expected a row of candidate_0"),
        ("tl;dr posts", {"completion": [WHY]}, "completion: is a list, expected text or one turn"),
        ("tl;dr posts", {"completion": 3}, "completion: is the number 3, expected text or one"),
        ("sharegpt", {"conversations": "a"}, 'conversations: is the text "a", expected a list of'),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0]: is an object, exp"),
        ("messages", {"messages": [GOOD]}, "messages: is an empty list, expected a list of turns"),
        ("messages", {"messages": [human("a"), {"from": "tool", "value": "b"}, gpt("c")]},
         'messages[1].author: is the text "tool", expected user, assistant or system'),
        ("ultrafeedback binarized", {"score_chosen": "high"},
         'score_chosen: is the text "high", expected a finite number'),
        ("orca pairs", {"question": ["a"]}, "question: is a list, expected text"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_layout_is_named_with_its_place(
    tmp_path: Path, name: str, change: dict[str, Any], expected: str
) -> None:
    good = CASES[name].rows[0]
    path = write(tmp_path / "a.jsonl", [good, {**good, **change}])
    load = load_preferences if CASES[name].pairs else load_prompts
    (found,) = problems(load, path)
    assert found.startswith(f"{path}:2: {expected}")


def test_each_layout_is_tested_here_and_documented() -> None:
    tested = {case.layout for case in CASES.values()} | {"unpaired"}
    assert tested == set(BY_NAME)
    pages = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in BY_NAME if f"| `{name}` |" not in pages] == []
    assert all(len(layout.needs) > 0 for layout in LAYOUTS)


def test_null_counts_as_missing_as_in_tables(tmp_path: Path) -> None:
    """Parquet and Arrow give every row all columns."""
    nulls = dict.fromkeys(KEYS)
    for case in CASES.values():
        path = write(tmp_path / "a.jsonl", [nulls | row for row in case.rows])
        data = load_prompts(path, renderer=RENDERER)
        assert list(data.report.layouts) == [case.layout]
        assert sorted(data.report.unused) == sorted(case.unused)
        if case.pairs:
            assert as_pairs(path) == case.pairs
        if case.learned:
            rows = load_prompts(path, renderer=RENDERER, require_output=True)
            assert [(row.prompt.text, *row.references) for row in rows] == case.learned
