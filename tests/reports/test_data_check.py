"""What `rlhf data check` finds in files before any training."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import InputError
from rlhf.reports.data_check import Lengths, check_files

PAIR = {"input_text": "the cat", "candidate_0": "a", "candidate_1": "a dog ran", "choice": 1}


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_mixed_files_are_described(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        PAIR,
        {**PAIR, "choice": 0},
        {**PAIR, "candidate_0": "a dog ran"},
        {**PAIR, "candidate_0": ""},
        {"input_text": "the dog", "output_text": ["a", "the"]},
    )
    report = check_files(path)
    assert (report.preferences, report.prompts, report.references) == (3, 1, 2)
    assert (report.distinct_prompts, report.second_chosen, report.longer_chosen) == (2, 2, 2)
    assert (report.read.identical, report.read.blank_candidates) == (1, 1)
    prompts, answers = report.lengths
    assert (prompts.unit, prompts.count, prompts.quantiles[0]) == ("characters", 4, 7)
    assert (answers.count, answers.quantiles[0], answers.quantiles[-1]) == (8, 0, 9)
    assert report.shortened is None
    text = "\n".join(report.lines())
    assert "3 preferences, 1 prompts without candidates, 2 references, 2 different prompts" in text
    assert "candidate_1 in 66.7%, the longer one in 66.7%" in text


def test_a_tokenizer_tells_what_the_limits_do(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = write(tmp_path, PAIR, {"input_text": "the cat sat and the dog ran " * 4})
    report = check_files(
        path, base_model=str(tiny_checkpoint), prompt_sequence_length=20, target_sequence_length=3
    )
    assert [lengths.unit for lengths in report.lengths] == ["tokens", "tokens"]
    assert report.shortened == 1
    assert report.cut == 1
    assert "prompts over 20 tokens, to be shortened: 1 of 2" in report.lines()
    assert "answers over 3 tokens, to be cut: 1 of 2" in report.lines()
    with pytest.raises(InputError, match="prompt_sequence_length"):
        check_files(
            path,
            base_model=str(tiny_checkpoint),
            prompt_sequence_length=4,
            instruction="the cat sat",
        )


def test_a_kind_can_be_demanded(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR, {"input_text": "x"})
    assert check_files(path, kind="prompt").preferences == 0
    with pytest.raises(InputError, match=r"rows\.jsonl:2: candidate_0: is missing"):
        check_files(path, kind="preference")
    with pytest.raises(InputError) as caught:
        check_files(path, kind="demonstration")
    assert len(caught.value.problems) == 2


def test_everything_wrong_is_reported_or_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, {**PAIR, "choice": 3, "margin": "x"}, {"input_text": 3}, PAIR, [])
    with pytest.raises(InputError) as caught:
        check_files(path)
    assert len(caught.value.problems) == 4
    report = check_files(path, on_bad_rows="skip")
    assert (report.preferences, report.read.skipped, report.second_chosen) == (1, 3, 1)
    with pytest.raises(InputError, match="data: "):
        check_files(str(tmp_path / "none.jsonl"))


def test_a_wrong_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base_model"):
        check_files(write(tmp_path, PAIR), base_model=str(tmp_path / "none"))


def test_quantiles() -> None:
    assert Lengths.of("x", "tokens", list(range(101))).quantiles == (0, 50, 90, 99, 100)
    assert Lengths.of("x", "tokens", [3]).quantiles == (3, 3, 3, 3, 3)


def test_real_rows(shared: Path) -> None:
    folder = shared / "data" / "tldr_vertex"
    report = check_files(
        str(folder / "preference_train.jsonl"), base_model=str(shared / "models" / "stories260k")
    )
    assert report.preferences == 780
    assert report.shortened is not None
    assert 0 < report.shortened < 780
