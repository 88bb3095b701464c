"""What `rlhf data check` finds in files before any training."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chats import THINKING, chat_tokenizer
from transformers import LlamaConfig

from rlhf.errors import InputError
from rlhf.reports.data_check import check_files, check_sets
from rlhf.reports.lengths import Lengths

PAIR = {"input_text": "the cat", "candidate_0": "a", "candidate_1": "a dog ran", "choice": 1}


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def table(report: Any) -> dict[str, tuple[str, str]]:
    return {words: (figure, more) for words, figure, more in report.facts()}


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
    assert table(report) == {
        "preferences": ("3", ""),
        "prompts without candidates": ("1", ""),
        "texts of output_text": ("2", ""),
        "different prompts": ("2", ""),
        "pairs with identical candidates left out (they carry no signal)": ("1", f"{path}:3"),
        "blank candidates kept": ("1", f"{path}:4"),
        "contradicting pairs (same candidates, either choice)": ("1", f"{path}:2 (as {path}:1)"),
        "candidate_1 preferred": ("66.7%", ""),
        "longer one preferred": ("66.7%", ""),
    }
    lines = report.lines()
    assert lines[0] == "data: 4 rows from 1 file"
    assert (
        len(
            {
                line.index(figure) + len(figure)
                for line, (figure, _) in zip(lines[1:], table(report).values(), strict=False)
            }
        )
        == 1
    )  # in a column


def test_a_tokenizer_tells_what_the_limits_do(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = write(tmp_path, PAIR, {"input_text": "the cat sat and the dog ran " * 4})
    report = check_files(
        path, base_model=str(tiny_checkpoint), prompt_sequence_length=20, target_sequence_length=3
    )
    assert [lengths.unit for lengths in report.lengths] == ["tokens", "tokens"]
    assert report.shortened == 1
    assert report.cut == 1
    assert table(report)["prompts over 20 tokens, to be shortened"] == ("1", "of 2")
    assert table(report)["answers over 3 tokens, to be cut"] == ("1", "of 2")
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


@given(st.lists(st.integers(0, 3000), min_size=1))
def test_bars_hold_every_length_once(lengths: list[int]) -> None:
    bars = Lengths.of("x", "tokens", lengths).bars
    assert [count for *_, count in bars] == [
        sum(low <= length <= high for length in lengths) for low, high, _ in bars
    ]
    assert sum(count for *_, count in bars) == len(lengths)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bars))
    widths = {high - low + 1 for low, high, _ in bars[:-1]}
    assert len(widths) <= 1  # all but the last, which has the longest
    assert all(str(width).strip("0") in ("1", "2", "5") for width in widths)
    assert 1 <= len(bars) <= 10


def test_a_histogram() -> None:
    lengths = [3] * 80 + [12] * 20 + [19] + [700]
    assert Lengths.of("answers", "tokens", lengths).lines() == [
        "answers, tokens: shortest 3, median 3, 90 % 12, 99 % 19, longest 700",
        "     2-3   80  " + "█" * 40,
        "     4-5    0",
        "     6-7    0",
        "     8-9    0",
        "   10-11    0",
        "   12-13   20  " + "█" * 10,
        "  14-700    2  █",
    ]


def test_data_sets_with_names_are_compared(tmp_path: Path) -> None:
    pairs, prompts, held_out = (tmp_path / name for name in ("pairs", "prompts", "eval"))
    for path, rows in (
        (pairs, [PAIR, {**PAIR, "input_text": "a post"}]),
        (prompts, [{"input_text": text} for text in ("x", "a  post ", "y", "x")]),
        (held_out, [{"input_text": text, "output_text": "a"} for text in ("the\ncat", "z", "y")]),
    ):
        path.write_text("\n".join(map(json.dumps, rows)))
    report = check_sets(
        {
            "preference_dataset": str(pairs),
            "prompt_dataset": str(prompts),
            "eval_dataset": [str(held_out)],
        }
    )
    assert [one.read.rows for one in report.sets.values()] == [2, 4, 3]
    assert table(report.sets["prompt_dataset"])["rows that repeat an earlier one"] == (
        "1", f"{prompts}:4 (as {prompts}:1)",
    )  # fmt: skip
    assert report.lines()[-4:] == [
        "rows whose prompt another data set has",
        f"  prompt_dataset, also in preference_dataset  1  of 4: {prompts}:2 (as {pairs}:2)",
        f"  eval_dataset, also in preference_dataset    1  of 3: {held_out}:1 (as {pairs}:1)",
        f"  eval_dataset, also in prompt_dataset        1  of 3: {held_out}:3 (as {prompts}:3)",
    ]
    with pytest.raises(InputError) as caught:
        check_sets({"preference_dataset": str(prompts), "prompt_dataset": str(tmp_path / "none")})
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        *[f"{prompts}:{line}" for line in (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)], "prompt_dataset",
    ]  # fmt: skip


def test_columns_ties_and_template_options(tmp_path: Path) -> None:
    path = write(tmp_path, {**PAIR, "input_text": None, "query": "the cat"})
    assert check_files(path, columns={"input_text": "query"}).preferences == 1
    with pytest.raises(InputError, match=r"chat_template_options: .* base_model, give one"):
        check_files(path, chat_template_options={"enable_thinking": False})
    lists = {"prompt": "a cat", "responses": ["x", "y", "z"]}
    path = write(tmp_path, {**lists, "scores": [1, 1, 2]}, {**lists, "scores": [3, 3, 3]})
    for ties, words, rows in (
        ("drop", "tied pairs left out (ties: keep)", 1),
        ("keep", "tied pairs kept, as half a choice either way", 2),
    ):
        report = check_files(path, ties=ties)
        assert table(report)[words] == ("4", f"{path}:1, {path}:2, …")
        assert report.preferences == rows


def test_conversations_are_compared_with_their_template(tmp_path: Path) -> None:
    base = tmp_path / "base"
    chat_tokenizer(THINKING).save_pretrained(base)
    LlamaConfig(vocab_size=400).save_pretrained(base)
    chat = {"messages": [{"author": "user", "content": "is it a cat?"}]}
    path = write(tmp_path, {**chat, "chosen": "Yes.", "rejected": "No."}, chat)
    report = check_files(path, base_model=str(base))
    assert report.warnings[0].startswith("data: warning: in 2 of the first 2 conversations")
    assert "'Y' 'es' '.'" in report.warnings[1]
    assert report.lines()[-4:] == report.warnings
    options = {"enable_thinking": False}
    assert not check_files(path, base_model=str(base), chat_template_options=options).warnings
    with pytest.raises(InputError, match="it reads enable_thinking"):
        check_files(path, base_model=str(base), chat_template_options={"thinking": False})


def test_real_rows(shared: Path) -> None:
    folder = shared / "data" / "tldr_vertex"
    report = check_files(
        str(folder / "preference_train.jsonl"), base_model=str(shared / "models" / "stories260k")
    )
    assert report.preferences == 780
    assert report.shortened is not None
    assert 0 < report.shortened < 780
