"""Files as people have them: read without fuss, or refused with every problem at once."""

import contextlib
import difflib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.duplicates import count_pairs, pair_hash
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts, split_holdout
from rlhf.data.sources.record import MAX_ROW_BYTES
from rlhf.errors import InputError
from rlhf.reports.data_check import check_files

RENDERER = PromptRenderer()
PAIR = {"input_text": "a post", "candidate_0": " one", "candidate_1": " two", "choice": 1}


def write(path: Path, *rows: Any, end: str = "\n") -> str:
    path.write_text("".join(json.dumps(row) + end for row in rows), encoding="utf-8", newline="")
    return str(path)


def problems(path: Any, load: Any = load_preferences, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(path, renderer=RENDERER, **options)
    return caught.value.problems


def test_preference_rows_in_both_layouts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        PAIR,
        {**PAIR, "choice": "0", "margin": 2},
        {"prompt": "a post", "chosen": " two", "rejected": " one"},
        {"messages": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"},
    )
    rows = load_preferences(path, renderer=RENDERER)
    assert [(row.chosen, row.rejected) for row in rows] == [
        (" two", " one"), (" one", " two"), (" two", " one"), ("yes", "no")
    ]  # fmt: skip
    assert [row.margin for row in rows] == [None, 2.0, None, None]
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    assert rows[0].prompt.text == "a post"
    assert rows.report.rows == 4
    assert rows.report.conversations == 1


def test_prompt_rows_with_none_one_and_several_references(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"input_text": "x", "output_text": "one"},
        {"input_text": "y", "output_text": ["one", "two"]},
        {"input_text": "z", "output_text": None},
        PAIR,
    )
    rows = load_prompts(path, renderer=RENDERER)
    assert [row.references for row in rows] == [["one"], ["one", "two"], [], []]
    assert [row.input_text for row in rows] == ["x", "y", "z", "a post"]
    assert [row.row for row in rows] == [0, 1, 2, 3]
    found = problems(path, load_prompts, require_output=True)
    assert [problem.split(": ")[1] for problem in found] == ["output_text", "output_text"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n \n\t\r\n"])
def test_line_ends_byte_order_marks_and_blank_lines(
    tmp_path: Path, start: str, end: str, last: str
) -> None:
    lines = [json.dumps({**PAIR, "input_text": f"post {number}"}) for number in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_bytes((start + end.join(lines) + last).encode())
    rows = load_preferences(str(path), renderer=RENDERER)
    assert [row.prompt.text for row in rows] == ["post 0", "post 1", "post 2"]
    assert rows[2].source.endswith(":3")


def test_line_separators_of_unicode_are_text(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input_text": text}, ensure_ascii=False), encoding="utf-8")
    assert load_prompts(str(path), renderer=RENDERER)[0].input_text == text


def test_blank_candidates_stay_and_identical_ones_go(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {**PAIR, "candidate_0": ""},
        {**PAIR, "candidate_0": " two"},
        {**PAIR, "candidate_0": "", "candidate_1": ""},
        {**PAIR, "label": [1, {"deep": None}]},
        {**PAIR, "label": 3},
    )
    rows = load_preferences(path, renderer=RENDERER)
    assert [row.candidates[0] for row in rows] == ["", " one", " one"]
    assert (rows.report.blank_candidates, rows.report.identical) == (1, 2)
    assert any("identical" in line and line.endswith("2") for line in rows.report.lines())


def test_only_identical_candidates_leave_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**PAIR, "candidate_0": " two"})
    found = problems(path)
    assert "identical" in found[0]
    assert "no valid row is left" in found[-1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choice": 2}, "choice: is the number 2, expected 0 or 1"),
        ({"choice": True}, "choice: is true, expected 0 or 1"),
        ({"choice": 1.0}, "choice: is the number 1.0, expected 0 or 1"),
        ({"choice": "one"}, 'choice: is the text "one", expected 0 or 1'),
        ({"choice": None}, "choice: is null, expected 0 or 1"),
        ({"choice": []}, "choice: is an empty list, expected 0 or 1"),
        ({"margin": float("nan")}, "margin: is NaN, expected a finite number"),
        ({"margin": float("inf")}, "margin: is infinite, expected a finite number"),
        ({"margin": "2"}, 'margin: is the text "2", expected a finite number'),
        ({"margin": True}, "margin: is true, expected a finite number"),
        ({"margin": 10**400}, "margin: is a number of hundreds of digits, expected a finite"),
        ({"candidate_0": 3}, "candidate_0: is the number 3, expected text"),
        ({"candidate_1": ["a"]}, "candidate_1: is a list, expected text"),
        ({"input_text": {"text": "a"}}, "input_text: is an object, expected text"),
        ({"input_text": None}, "input_text: is null, expected text"),
        ({"input_text": " \n"}, "input_text: is blank, expected text"),
        ({"context": 1}, "context: is the number 1, expected text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: stands beside input_text"),
    ],
)
def test_wrong_fields_are_named_with_what_is_expected(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, {**PAIR, **change})
    (found,) = problems(path)
    assert found.startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages: is an empty list, expected a list of turns"),
        ("hi", 'messages: is the text "hi", expected a list of turns'),
        (["hi"], 'messages[0]: is the text "hi", expected an object with author and content'),
        ([{"author": "bot", "content": "a"}], 'messages[0].author: is the text "bot", expected'),
        ([{"content": "a"}], "messages[0].author: is missing, expected user, assistant or system"),
        ([{"author": "user"}], "messages[0].content: is missing, expected text"),
        ([{"author": "user", "content": ""}], "messages[0].content: is blank, expected text"),
        ([{"author": ["user"], "content": "a"}], "messages[0].author: is a list, expected"),
        ([{"role": "system", "content": "a"}], "messages[1].author: is missing, expected a conv"),
    ],
)
def test_wrong_messages(tmp_path: Path, messages: Any, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    assert problems(path, load_prompts)[0].startswith(f"{path}:1: {expected}")


@pytest.mark.parametrize(
    ("authors", "place"),
    [
        ("assistant user", "messages[0].author"),
        ("user assistant assistant", "messages[1].author"),
        ("system assistant user", "messages[1].author"),
        ("user system user", "messages[1].author"),
        ("system system user", "messages[1].author"),
    ],
)
def test_the_user_begins_and_ends(tmp_path: Path, authors: str, place: str) -> None:
    messages = [{"author": author, "content": "a"} for author in authors.split()]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    (found,) = problems(path, load_prompts)
    assert f":1: {place}: " in found


def test_a_missing_field_names_its_neighbor(tmp_path: Path) -> None:
    row = {"imput_text": "a", "candidate0": "b", "candidate_1": "c", "choice": 0}
    found = problems(write(tmp_path / "a.jsonl", row, {}))
    assert any("input_text: is missing" in one and "imput_text" in one for one in found)
    assert any("candidate_0: is missing" in one and "candidate0" in one for one in found)
    assert any(":2: input_text: is missing (the row is empty)" in one for one in found)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 2"},
        {"input": "1 2", "note": "a text"},
        {"candidate_1": "b", "choice": 0, "input_text": "a"},
        {"input_text": "a"},
        {"messages": [{"role": "user", "content": "a"}], "output": "b", "response": "c"},
    ],
)
def test_no_hint_is_to_a_name_by_which_another_field_is_lost(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path / "a.jsonl", row)
    found = problems(path) + problems(path, load_prompts, require_output=True)
    assert found
    assert not any("did you mean" in one for one in found)


@pytest.mark.parametrize("keys", [300_000, 2])
@pytest.mark.parametrize("length", [5, 300_000])
def test_huge_rows_are_compared_with_few_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: int, length: int
) -> None:
    compared = []

    class Counted(difflib.SequenceMatcher):  # type: ignore[type-arg]
        def set_seq1(self, a: Any) -> None:
            compared.append(len(a))
            super().set_seq1(a)

    monkeypatch.setattr(difflib, "SequenceMatcher", Counted)
    row = {f"key {number}".ljust(length if keys < 3 else 5): 1 for number in range(keys)}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    assert problems(str(path))
    assert len(compared) < 5000
    assert max(compared, default=0) <= 100


def test_unused_fields_are_named_once(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "a", "name": "Al", "weight": 0}
    path = write(
        tmp_path / "a.jsonl",
        {**PAIR, "system": "x", "history": [["a", "b"]]},
        {**PAIR, "system": "y", "prompt": "another", "chosen": "z", "id": None, "tags": []},
        {"messages": [turn], "chosen": "b", "rejected": "c", "choice": 1},
    )
    expected = "fields not used: system, history, prompt, chosen, choice, messages[].name"
    for load in (load_preferences, load_prompts):
        lines = load(path, renderer=RENDERER, name="data").report.lines()
        assert [line for line in lines if "not used" in line] == [f"data: {expected}"]


def test_very_many_unused_fields_are_not_all_named(tmp_path: Path) -> None:
    rows = [{**PAIR, f"{number} \x1b" + "a" * 1000: 1} for number in range(1000)]
    (line,) = load_preferences(
        write(tmp_path / "a.jsonl", *rows), renderer=RENDERER
    ).report.lines()[2:]
    assert len(line) < 1200
    assert "\x1b" not in line
    assert line.endswith("…")


def test_repeated_and_contradicting_pairs_are_counted(tmp_path: Path) -> None:
    mirrored = {**PAIR, "candidate_0": " two", "candidate_1": " one"}
    path = write(
        tmp_path / "a.jsonl",
        PAIR,
        PAIR,  # again
        {**PAIR, "choice": 0},  # contradicts
        mirrored,  # says what the third does
        {**mirrored, "choice": 0},  # says what the first does
        {"prompt": "a post", "chosen": " two", "rejected": " one"},  # the same
        {**PAIR, "input_text": "another post", "choice": 0},
        {**PAIR, "input_text": "another post", "candidate_0": " three"},
        {**PAIR, "candidate_0": " two"},  # identical: left out
    )
    rows = load_preferences(path, renderer=RENDERER)
    assert (rows.report.repeated, rows.report.contradictions) == (4, 1)
    assert len(rows) == 8
    said = "\n".join(rows.report.lines())
    assert "pairs that an earlier row has too, with the same choice: 4" in said
    assert "contradicting pairs (same candidates, either choice): 1" in said
    examples = check_files(path).examples
    assert examples["repeated"] == [f"{path}:2 (as {path}:1)", *(
        f"{path}:{line} (as {path}:{first})" for line, first in ((4, 3), (5, 1))
    )]  # fmt: skip
    assert examples["contradictions"] == [f"{path}:3 (as {path}:1)"]
    assert examples["identical"] == [f"{path}:9"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from("abc")] * 3, st.booleans())))
def test_pairs_are_counted_like_sets_count_them(rows: list[tuple[str, str, str, bool]]) -> None:
    hashes = [pair_hash(p, one, two + "2", int(second)) for p, one, two, second in rows]
    said = {(prompt, one, two + "2", second) for prompt, one, two, second in rows}
    pieces = [np.array(piece, np.uint64) for piece in (hashes[:3], hashes[3:])]
    different = {row[:3] for row in said}
    assert count_pairs(pieces) == (len(rows) - len(said), len(said) - len(different))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "{path}: is empty"),
        (b"\n \r\n", "{path}: is empty"),
        (b"\xef\xbb\xbf", "{path}: is empty"),
        (b'{"input_text": "a"}\n{"input_text": }\n', "{path}:2: is not JSON (expecting value at"),
        (b"[\n  {\n", "{path}:1: is not JSON (expecting property name"),
        (b" [ ]", "{path}: is an empty array"),
        (b'{\n  "input_text": "a"\n}\n', "{path}: is one JSON value over several lines"),
        (b'{"input_text": "a"}\n[1]\n', "{path}:2: is a list, expected a JSON object"),
        (b"3\n", "{path}:1: is the number 3, expected a JSON object"),
        (b'{"input_text": "\xff"}\n', "{path}:1: is not UTF-8 (byte 0xff at position 17)"),
        ('{"input_text": "a"}\n'.encode("utf-16"), "{path}: is UTF-16, expected UTF-8"),
        (b'{"a": ' * 100_000, "{path}:1: is nested too deeply"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "{path}:1: is nested too deeply"),
        (b'{"margin": ' + b"9" * 5000 + b"}", "{path}:1: has a number of thousands of digits"),
    ],
)
def test_what_is_no_json_lines(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    (found,) = problems(str(path), load_prompts)
    assert found.startswith(expected.format(path=path))
    if not content.startswith(b'{"input_text": "a"}'):
        assert problems(str(path), load_prompts, on_bad_rows="skip")  # nothing good is left


def test_a_huge_line_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(PAIR).encode() + b'\n{"input_text": "')
        for _ in range(100):
            file.write(b"a" * 2**20)
        file.write(b'"}\n{}\n')
    tracemalloc.start()
    found = problems(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0].startswith(f"{path}:2: is longer than 16 MiB")
    assert found[1].startswith(f"{path}:3: input_text: is missing") or "candidate" in found[1]
    assert peak < 80 * 2**20


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            file.write(json.dumps({"input_text": f"{number} " + "a" * 20_000}) + "\n")
    load_prompts(write(tmp_path / "b.jsonl", PAIR), renderer=RENDERER)  # imports
    tracemalloc.start()
    rows = load_prompts(str(path), renderer=RENDERER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 3000
    assert peak < 40 * 2**20  # the file has 60 MB


def test_first_twenty_problems_then_a_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{**PAIR, "choice": 7}] * 30, PAIR)
    found = problems(path)
    assert len(found) == 21
    assert found[-1] == "… and 10 more problems"
    rows = load_preferences(path, renderer=RENDERER, on_bad_rows="skip")
    assert (len(rows), rows.report.skipped) == (1, 30)
    assert any("bad rows left out: 30" in line for line in rows.report.lines())


def test_a_bad_row_counts_as_nothing_else(tmp_path: Path) -> None:
    bad = {"input_text": "a", "candidate_0": "", "candidate_1": "x", "choice": 3}
    path = write(tmp_path / "a.jsonl", bad, PAIR)
    rows = load_preferences(path, renderer=RENDERER, on_bad_rows="skip")
    assert (rows.report.skipped, rows.report.blank_candidates) == (1, 0)


def test_paths_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b", "a", "[c]"):
        write(tmp_path / f"{name}.jsonl", {"input_text": name})
    (tmp_path / "d.jsonl").mkdir()

    def texts(paths: Any) -> list[str]:
        return [row.input_text for row in load_prompts(paths, renderer=RENDERER)]

    assert texts(f"{tmp_path}/?.jsonl") == ["a", "b"]
    assert texts(f"{tmp_path}/[c].jsonl") == ["[c]"]
    assert texts([f"{tmp_path}/b.jsonl", f"{tmp_path}/a*"]) == ["b", "a"]


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", PAIR)
    (tmp_path / "empty").mkdir()
    found = problems(
        [
            f"{tmp_path}/prompt.jsonl",
            f"{tmp_path}/*.json",
            f"{tmp_path}/empty",
            f"{tmp_path}/x/y.jsonl",
        ],
        load_prompts,
    )
    assert found[0].startswith(f"prompt_dataset: {tmp_path}/prompt.jsonl does not exist")
    assert f"did you mean {tmp_path}/prompts.jsonl?" in found[0]
    assert found[1].endswith("*.json matches no file")
    assert "is a folder without data files" in found[2]
    assert f"there is no folder {tmp_path}/x" in found[3]
    assert problems([], load_prompts)[0].startswith("prompt_dataset: expected a path")


def test_remote_files_and_globs() -> None:
    memory = fsspec.filesystem("memory")
    for name in "ab":
        memory.pipe(f"/rlhf-test/{name}.jsonl", json.dumps({"input_text": name}).encode())
    rows = load_prompts("memory://rlhf-test/*.jsonl", renderer=RENDERER)
    assert [row.input_text for row in rows] == ["a", "b"]
    assert rows[0].source == "memory:///rlhf-test/a.jsonl:1"
    assert "no file" in problems("memory://rlhf-test/c.jsonl", load_prompts)[0]
    assert "cannot be read" in problems("nosuch://bucket/c.jsonl", load_prompts)[0]


def test_a_public_bucket_is_read_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b'{"input_text": "public"}')
    asked = []

    def url_to_fs(path: str, **options: Any) -> Any:
        asked.append(options)
        if options.get("token") != "anon":
            raise PermissionError("no credentials")
        return memory, "/bucket/a.jsonl"

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    rows = load_prompts("gs://bucket/a.jsonl", renderer=RENDERER)
    assert rows[0].input_text == "public"
    assert rows[0].source == "gs://bucket/a.jsonl:1"
    assert "token" not in asked[0]


def test_half_characters_are_mended_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"input_text": "cut \\ud83d", "x": "\\ude00"}\n{"input_text": "\\ud83d\\ude00"}'
    )
    rows = load_prompts(str(path), renderer=RENDERER)
    assert [row.input_text for row in rows] == ["cut \ufffd", "\U0001f600"]
    assert rows.report.mended == 1


def test_eval_sets_may_mix_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"input_text": "x"}, PAIR)
    pairs = load_preferences(path, renderer=RENDERER, candidates_optional=True)
    assert (len(pairs), pairs.report.without_candidates) == (1, 1)
    assert len(load_prompts(path, renderer=RENDERER)) == 2
    lonely = write(tmp_path / "b.jsonl", {"input_text": "x"})
    none = load_preferences(lonely, renderer=RENDERER, candidates_optional=True)
    assert list(none) == []
    assert "candidate_0" in problems(lonely)[0]


def test_fingerprint_follows_content_and_order_alone(tmp_path: Path) -> None:
    other = {**PAIR, "input_text": "another post"}

    def fingerprint(*rows: Any, end: str = "\n", name: str = "a") -> str:
        path = write(tmp_path / f"{name}.jsonl", *rows, end=end)
        return load_preferences(path, renderer=RENDERER).fingerprint

    first = fingerprint(PAIR, other)
    assert first == fingerprint({**PAIR, "note": 1}, other, end="\r\n", name="b")
    assert len({first, fingerprint(other, PAIR), fingerprint(PAIR)}) == 3
    assert first != fingerprint({**PAIR, "choice": 0}, other)


def test_rows_can_be_sliced_selected_and_counted_from_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"input_text": str(number)} for number in range(10)])
    rows = load_prompts(path, renderer=RENDERER)
    assert [row.input_text for row in rows[2:4]] == ["2", "3"]
    assert rows[-1].input_text == "9"
    with pytest.raises(IndexError):
        rows[10]
    chosen = rows.select_rows([7, 1]).select_rows([1])
    assert [(row.input_text, row.row) for row in chosen] == [("1", 0)]
    assert chosen.fingerprint != rows.fingerprint


def test_temporary_files_go_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write(tmp_path / "a.jsonl", PAIR)
    rows = load_preferences(path, renderer=RENDERER)
    part = rows.select_rows([0])
    del rows
    assert part[0].ranking == (1, 0)
    del part
    problems(write(tmp_path / "b.jsonl", {}))
    assert list((tmp_path / "temporary").iterdir()) == []


def make_pairs(folder: Path, counts: list[int]) -> str:
    rows = [
        {**PAIR, "input_text": f"post {prompt}", "candidate_0": f"{pair}"}
        for prompt, count in enumerate(counts)
        for pair in range(count)
    ]
    return write(folder / "pairs.jsonl", *rows)


def test_holdout_keeps_prompts_together(tmp_path: Path) -> None:
    pairs = load_preferences(make_pairs(tmp_path, [3] * 100), renderer=RENDERER)
    train, held = split_holdout(pairs, seed=3)
    sides = [{row.prompt.text for row in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held) == 300
    assert len(held) == 15
    assert [row.source for row in held] == [row.source for row in split_holdout(pairs, seed=3)[1]]
    assert sides[1] != {row.prompt.text for row in split_holdout(pairs, seed=4)[1]}
    assert len(split_holdout(pairs, limit=6)[1]) == 6


@pytest.mark.parametrize(
    ("counts", "held_out"), [([5], 0), ([1, 1], 1), ([9, 8], 8), ([100, 1, 1], 2)]
)
def test_small_and_lopsided_sets_still_hold_something_out(
    tmp_path: Path, counts: list[int], held_out: int
) -> None:
    pairs = load_preferences(make_pairs(tmp_path, counts), renderer=RENDERER)
    train, held = split_holdout(pairs)
    assert len(held) in {held_out, min(1, held_out)}
    assert len(train) > 0


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ANY = st.text(st.characters(exclude_categories=["Cs"]))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.tuples(TEXT, ANY, ANY, st.booleans()), min_size=1, max_size=5),
    escaped=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_any_text_survives(
    tmp_path: Path, rows: list[tuple[str, str, str, bool]], escaped: bool, end: str
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps(
            {"input_text": prompt, "candidate_0": one, "candidate_1": "~" + two,
             "choice": int(second)},
            ensure_ascii=escaped,
        )
        for prompt, one, two, second in rows
    ]  # fmt: skip
    path.write_bytes(end.join(lines).encode())
    expected = [row for row in rows if row[1] != "~" + row[2]]
    if not expected:
        return
    read = load_preferences(str(path), renderer=RENDERER)
    assert [
        (row.prompt.text, row.candidates[0], row.candidates[1][1:], row.ranking == (1, 0))
        for row in read
    ] == expected
    prompts = load_prompts(str(path), renderer=RENDERER)
    assert [row.input_text for row in prompts] == [row[0] for row in rows]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(
            ["input_text", "messages", "choice", "candidate_0", "candidates", "ranking", "x"]
        ), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_whatever_the_file_holds_only_input_errors_come_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for load in (load_prompts, load_preferences):
        with contextlib.suppress(InputError):
            load(str(path), renderer=RENDERER)


def test_real_tldr_preferences_load_completely(shared: Path) -> None:
    folder = shared / "data" / "tldr_vertex"
    pairs = load_preferences(str(folder / "preference_train.jsonl"), renderer=RENDERER)
    assert (len(pairs), pairs.report.blank_candidates, pairs.report.identical) == (780, 1, 0)
    assert pairs[0].prompt.text.endswith(" [summary]: ")
    texts = [row.candidates[0] for row in pairs]
    assert all(text.startswith(" ") for text in texts if text.strip())
    names = ("prompt_train", "course_sample_prompt", "course_sample_preference")
    paths = [str(folder / f"{name}.jsonl") for name in names]
    assert len(load_prompts(paths, renderer=RENDERER)) == 741 + 6 + 5
    train, held = split_holdout(pairs)
    assert (len(train), len(held)) == (741, 39)


def test_the_line_limit_is_sixteen_mebibytes() -> None:
    assert MAX_ROW_BYTES == 2**24
