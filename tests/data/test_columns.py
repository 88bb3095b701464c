"""The fields of rows beyond those that the library reads, for reward functions."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import PromptData, load_prompts, read_once

ROWS: list[dict[str, Any]] = [
    {"input_text": "a", "answer": "x", "tags": [1, {"k": None}], "output_text": ["one", "two"]},
    {"messages": [{"role": "user", "content": "b", "id": 3}], "level": 0.5},
    {"prompt": "c", "chosen": "d", "rejected": "e", "answer": None},
    {"input_text": "half \ud83d", "note": "\ude00 the other"},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **options: Any) -> PromptData:
    return load_prompts(path, renderer=PromptRenderer(), **options)


def test_a_row_has_all_its_fields_as_in_the_file(tmp_path: Path) -> None:
    data = read(write(tmp_path, ROWS), uses=lambda field: True)
    mended = {"input_text": "half \ufffd", "note": "\ufffd the other"}
    assert [row.columns for row in data] == [*ROWS[:3], mended]
    assert [data[number].columns for number in range(4)] == [*ROWS[:3], mended]
    assert data.select_rows([2, 0])[0].columns == ROWS[2]
    names = {name for row in ROWS for name in row}
    assert set(data.report.fields or ()) == names


def test_fields_are_kept_only_if_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    assert [row.columns for row in read(path)] == [{}] * 4
    with read_once():
        assert read(path)[0].columns == {}
        assert read(path, uses=lambda field: True)[0].columns == ROWS[0]
        assert read(path)[0].columns == {}
    with read_once(keep_lines=True):
        assert read(path, uses=lambda field: True)[0].columns == ROWS[0]


def test_used_fields_are_not_reported_as_unused(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    with read_once():
        assert "answer" in read(path).report.unused
        report = read(path, uses=lambda field: field == "answer").report
        assert "answer" not in report.unused
        assert "tags" in report.unused
        assert "answer" in read(path).report.unused


def test_kept_fields_are_part_of_the_data_s_identity(tmp_path: Path) -> None:
    first = write(tmp_path, ROWS)
    plain, whole = read(first).fingerprint, read(first, uses=lambda field: True).fingerprint
    write(tmp_path, [ROWS[0] | {"answer": "y"}, *ROWS[1:]])
    assert read(first).fingerprint == plain
    assert read(first, uses=lambda field: True).fingerprint != whole


def test_bad_rows_left_out_do_not_move_the_fields(tmp_path: Path) -> None:
    path = write(tmp_path, [ROWS[0], {"input_text": 3, "answer": "bad"}, ROWS[2]])
    data = read(path, uses=lambda field: True, on_bad_rows="skip")
    assert [row.columns for row in data] == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize(("count", "known"), [(900, True), (1200, False)])
def test_names_of_fields_are_listed_up_to_a_limit(count: int, known: bool, tmp_path: Path) -> None:
    rows = [{"input_text": "a", f"field {number}": number} for number in range(count)]
    data = read(write(tmp_path, rows), uses=lambda field: True)
    assert (data.report.fields is not None) == known
    assert data[7].columns == rows[7]
