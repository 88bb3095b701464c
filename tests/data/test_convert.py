"""Published layouts become the library's rows, whole files or none."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlhf.data.convert import ConvertReport, convert
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts
from rlhf.errors import InputError

PAIR = {"input_text": "a post", "candidate_0": " one", "candidate_1": " two", "choice": 1}
TLDR = {
    "info": {"id": "t3_1", "post": "My cat ran.", "title": None, "subreddit": None},
    "summaries": [{"text": " Cat ran.", "policy": "sup1"}, {"text": " Dog.", "policy": "ref"}],
    "choice": 0,
    "worker": "x",
    "extra": {"confidence": 7},
}
HH = {
    "chosen": "\n\nHuman: Hi\nthere\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because.",
    "rejected": "\n\nHuman: Hi\nthere\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Go\n\nto.",
}


def run(folder: Path, *rows: Any, layout: str = "auto", array: bool = False) -> ConvertReport:
    source = folder / "source.jsonl"
    text = json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows))
    source.write_text(text, encoding="utf-8")
    return convert(str(source), str(folder / "out.jsonl"), layout)


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def problems(folder: Path, *rows: Any, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        run(folder, *rows, **options)
    assert not (folder / "out.jsonl").exists()
    assert [path.name for path in folder.iterdir()] == ["source.jsonl"]
    return caught.value.problems


def test_chosen_and_rejected(tmp_path: Path) -> None:
    report = run(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "id": 3})
    assert (report.layouts, report.rows, report.left_out) == ({"rows": 1}, 1, 0)
    report = run(tmp_path, {"question": "a", "chosen": "b", "rejected": "c", "margin": 0.5})
    assert (report.layouts, report.rows, report.left_out) == ({"orca_pairs": 1}, 1, 0)
    (row,) = written(tmp_path)
    assert row == {
        "input_text": "a", "candidate_0": "b", "candidate_1": "c", "choice": 0, "margin": 0.5
    }  # fmt: skip


def test_chosen_and_rejected_conversations(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi"}
    good, bad = ({"role": "assistant", "content": text} for text in ("Hello.", "Go."))
    report = run(
        tmp_path,
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": "Hi", "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "Hi", "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [{**user, "content": "Ho"}, bad]},
    )
    assert (report.rows, report.left_out) == (4, 1)
    assert (
        written(tmp_path)
        == [{"messages": [user], "candidate_0": "Hello.", "candidate_1": "Go.", "choice": 0}] * 4
    )


SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello. What is it?"}
AGAIN = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "Go."}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"text": "y?"}]}


@pytest.mark.parametrize(
    ("prompt", "shared", "expected"),
    [
        ([ASKED], [ASKED], [ASKED]),
        ([SYSTEM, ASKED], [SYSTEM, ASKED], [SYSTEM, ASKED]),
        ([SYSTEM, ASKED], [ASKED], [SYSTEM, ASKED]),
        ([ASKED], [SYSTEM, ASKED], [SYSTEM, ASKED]),
        ([SYSTEM], [ASKED], [SYSTEM, ASKED]),
        ([SYSTEM], [SYSTEM, ASKED], [SYSTEM, ASKED]),
        ([ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED, SAID, AGAIN], [AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED, SAID, AGAIN], [SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED, SAID], [AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED, SAID], [SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED], [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED, SAID], [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([AGAIN], [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([ASKED, SAID, AGAIN, GOOD], [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ([{**AGAIN, "content": "Why? "}], [AGAIN], [AGAIN]),
        ([IN_PARTS], [AGAIN], [AGAIN]),
        ("Why?", [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
        ("Hi", [ASKED], [ASKED]),
        ("", [ASKED], [ASKED]),
        ([], [ASKED], [ASKED]),
        ([ASKED], [], [ASKED]),
        (None, [ASKED, SAID, AGAIN], [ASKED, SAID, AGAIN]),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_a_prompt_that_the_conversations_hold_already_is_written_once(
    tmp_path: Path, name: str, prompt: Any, shared: list[Any], expected: list[Any]
) -> None:
    if name == "messages" and not isinstance(prompt, list):
        return
    run(tmp_path, {name: prompt, "chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    learned = {"output_text": "Because."} if name == "messages" and GOOD in prompt else {}
    assert written(tmp_path) == [
        {"messages": expected, "candidate_0": "Because.", "candidate_1": "Go.", "choice": 0}
        | learned
    ]


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        ([ASKED], [AGAIN]),
        ("Hi", [AGAIN]),
        ([SYSTEM, ASKED], [{**SYSTEM, "content": "Be rude."}, ASKED]),
        ([ASKED, SAID, AGAIN], [ASKED]),
    ],
)
def test_a_prompt_that_contradicts_the_conversations_is_an_error(
    tmp_path: Path, prompt: Any, shared: list[Any]
) -> None:
    row = {"prompt": prompt, "chosen": [*shared, GOOD], "rejected": [*shared, BAD]}
    (found,) = problems(tmp_path, row)
    assert ":1: prompt: is not how chosen and rejected begin, expected" in found


@pytest.mark.parametrize("arch", ["t5", "llama"])
def test_a_prompt_written_once_has_the_tokens_of_one_prompt(
    tmp_path: Path, checkpoints: dict[str, Path], arch: str
) -> None:
    from transformers import AutoTokenizer

    shared = [SYSTEM, ASKED]
    run(tmp_path, {"prompt": shared, "chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[arch])
    renderer = PromptRenderer.for_tokenizer(tokenizer)
    (row,) = load_preferences(str(tmp_path / "out.jsonl"), renderer=renderer)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(shared, tokenize=False, add_generation_prompt=True)
        text = text.removeprefix(tokenizer.bos_token or "")
    else:
        text = "Be kind.\n\nUser: Hi\n\nAssistant:"
    assert tokenizer(row.prompt.text).input_ids == tokenizer(text).input_ids


def test_two_answers_by_the_user_are_left_out(tmp_path: Path) -> None:
    good = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
    other = {**good, "rejected": [{**BAD, "role": "user"}]}
    assert run(tmp_path, good, other).left_out == 1


def test_answers_as_texts_or_single_turns_after_a_conversation(tmp_path: Path) -> None:
    turns = [ASKED, SAID, AGAIN]
    run(
        tmp_path,
        {"prompt": turns, "chosen": "Because.", "rejected": "Go."},
        {"prompt": turns, "chosen": GOOD, "rejected": BAD},
    )
    row = {"messages": turns, "candidate_0": "Because.", "candidate_1": "Go.", "choice": 0}
    assert written(tmp_path) == [row, row]


def test_system_and_history_are_part_of_the_prompt(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "Because.", "rejected": "Go."}
    history = [["Hi", "Hello. What is it?"]]
    turned = {"chosen": [AGAIN, GOOD], "rejected": [AGAIN, BAD]}
    report = run(
        tmp_path,
        {**pair, "system": "Be kind."},
        {**pair, "system": "Be kind.", "context": "It rains."},
        {**pair, "system": "Be kind.", "history": history},
        {**pair, "history": [ASKED, SAID]},
        {**turned, "system": "Be kind.", "history": history},
        {"chosen": [SYSTEM, AGAIN, GOOD], "rejected": [SYSTEM, AGAIN, BAD], "system": "Be kind."},
    )
    answers = {"candidate_0": "Because.", "candidate_1": "Go.", "choice": 0}
    assert written(tmp_path) == [
        {"input_text": "Why?", "context": "Be kind.", **answers},
        {"input_text": "Why?", "context": "Be kind.\n\nIt rains.", **answers},
        {"messages": [SYSTEM, ASKED, SAID, AGAIN], **answers},
        {"messages": [ASKED, SAID, AGAIN], **answers},
        {"messages": [SYSTEM, ASKED, SAID, AGAIN], **answers},
        {"messages": [SYSTEM, AGAIN], **answers},
    ]
    assert report.unused == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"system": ["x"]}, "system: is a list, expected text"),
        ({"history": [["one"]]}, "history[0]: is a list, expected two texts"),
        ({"history": ["one"]}, 'history[0]: is the text "one", expected two texts'),
        ({"prompt": [SYSTEM, ASKED], "system": "x"}, "system: is not the first turn's text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt[0]: is an object"),
    ],
)
def test_what_cannot_be_part_of_the_prompt_is_an_error(
    tmp_path: Path, change: Any, expected: str
) -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "Go."} | change
    (found,) = problems(tmp_path, row)
    assert found.startswith(f"{tmp_path}/source.jsonl:1: {expected}")


def test_alpaca_rows(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    report = run(
        tmp_path,
        row,
        {**row, "input": ""},
        {**row, "system": "Be kind.", "history": [["Hi", "Ho"]], "id": 7},
    )
    assert set(report.layouts) == {"alpaca"}
    assert written(tmp_path) == [
        {"input_text": "Add.\n\n1 2", "output_text": "3"},
        {"input_text": "Add.", "output_text": "3"},
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "Add.\n\n1 2"},
            ],
            "output_text": "3",
        },
    ]
    assert report.lines()[-1] == "fields not used: id"


def test_preferences_with_an_alpaca_prompt(tmp_path: Path) -> None:
    report = run(tmp_path, {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"})
    assert set(report.layouts) == {"chosen_rejected"}
    assert written(tmp_path) == [
        {"input_text": "Add.\n\n1 2", "candidate_0": "3", "candidate_1": "4", "choice": 0}
    ]


@pytest.mark.parametrize("row", [
    {"prompt": "a", "chosen": "b", "rejected": "c"}, TLDR, HH, {**PAIR, "prompt": "a post"},
    {"instruction": "a", "output": "b"},
])  # fmt: skip
def test_fields_that_no_row_of_the_library_has_are_named_once(tmp_path: Path, row: Any) -> None:
    more = {"source": "web", "meta": {"a": 1}, "score": 0, "none": None, "blank": "", "no": []}
    report = run(tmp_path, row | more, row | more)
    known = {"worker", "extra", "info.id", "summaries[].policy"} if row is TLDR else set()
    assert set(report.unused) == {"source", "meta", "score"} | known
    assert sum("fields not used: " in line for line in report.lines()) == 1


def test_texts_that_begin_with_the_prompt(tmp_path: Path) -> None:
    report = run(
        tmp_path,
        {"prompt": "I am", "chosen": "I am so", "rejected": "I am."},
        {"prompt": "I am", "chosen": "I am so", "rejected": "You are."},
    )
    assert report.repeating == 1
    assert "all answers begin with the whole prompt: 1" in report.lines()[1]
    run(tmp_path, {"prompt": "\n\nHuman: Hi\n\nAssistant:", **{
        name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")
    }})  # fmt: skip
    assert written(tmp_path) == [{
        "messages": [{"author": "user", "content": "Hi"}],
        "candidate_0": "chosen", "candidate_1": "rejected", "choice": 0,
    }]  # fmt: skip


def test_half_characters_in_arrays_are_mended(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"input_text": "cut \\ud83d"}]')
    convert(str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl"))
    assert written(tmp_path) == [{"input_text": "cut \ufffd"}]


def test_tldr_comparisons(tmp_path: Path) -> None:
    titled = {**TLDR, "info": {"post": "It ran.", "title": "Cat", "subreddit": "cats"}, "choice": 1}
    news = {**TLDR, "info": {"article": "News."}}
    report = run(tmp_path, TLDR, titled, news)
    assert set(report.layouts) == {"tldr_comparisons"}
    rows = written(tmp_path)
    assert rows[0] == {
        "input_text": "My cat ran.", "candidate_0": " Cat ran.", "candidate_1": " Dog.", "choice": 0
    }  # fmt: skip
    assert rows[1]["input_text"] == "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: It ran.\n\nTL;DR:"
    assert rows[1]["choice"] == 1
    assert rows[2]["input_text"] == "News."


def test_hh_dialogues(tmp_path: Path) -> None:
    one = {"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant:"}
    twice = {name: f"\n\nHuman: A{text}" for name, text in one.items()}
    report = run(tmp_path, HH, one, twice)
    assert report.layouts == {"hh_rlhf": 3}
    rows = written(tmp_path)
    assert rows[0] == {
        "messages": [
            {"author": "user", "content": "Hi\nthere"},
            {"author": "assistant", "content": "Hello."},
            {"author": "user", "content": "Why?"},
        ],
        "candidate_0": "Because.",
        "candidate_1": "Go\n\nto.",
        "choice": 0,
    }
    assert (rows[1]["candidate_0"], rows[1]["candidate_1"]) == ("b", "")
    assert rows[2]["messages"] == [{"author": "user", "content": "A\n\nA"}]


def test_dialogues_that_are_no_preference_are_left_out_and_counted(tmp_path: Path) -> None:
    other = {**HH, "rejected": HH["rejected"].replace("Hi", "Ho")}
    longer = {**HH, "rejected": HH["rejected"] + "\n\nHuman: More?\n\nAssistant: No."}
    silent = {name: text.replace("Why?", "") for name, text in HH.items()}
    report = run(tmp_path, HH, other, longer, silent)
    assert (report.rows, report.left_out) == (1, 3)
    assert report.lines()[-1].endswith(": 3")


def test_nothing_but_left_out_rows_is_an_error(tmp_path: Path) -> None:
    other = {**HH, "rejected": HH["rejected"].replace("Hi", "Ho")}
    found = problems(tmp_path, other)
    assert found[0].endswith(": 1")
    assert "no row can be converted" in found[1]


@pytest.mark.parametrize("array", [False, True])
def test_every_layout_can_be_read_back(tmp_path: Path, array: bool) -> None:
    for number, row in enumerate(
        [PAIR, {"prompt": "a", "chosen": "b", "rejected": "c"}, TLDR, HH, {"input_text": "x"}]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(folder, row, row, array=array)
        assert len(load_prompts(str(folder / "out.jsonl"), renderer=PromptRenderer())) == 2
        if number < 4:
            assert load_preferences(str(folder / "out.jsonl"), renderer=PromptRenderer())


def test_what_is_wrong_is_said_all_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        {**TLDR, "info": {"title": "x"}},
        {**TLDR, "summaries": TLDR["summaries"][:1]},
        {**TLDR, "summaries": [{"text": "a"}, {"text": None}]},
        {**TLDR, "choice": 2},
        {"info": {"post": "a"}, "summaries": TLDR["summaries"]},
        {"input_text": "a"},
        [3],
        TLDR,
    )
    path = tmp_path / "source.jsonl"
    assert [one.removeprefix(f"{path}:").split(",")[0] for one in found] == [
        "1: info.post: is null",
        "2: summaries: is a list",
        "3: summaries[1].text: is null",
        "4: choice: is the number 2",
        "5: choice: is missing (the row has input_text",
        "7: is a list",
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "has the fields text, expected those of one of the layouts"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected: is the number 3"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "prompt: is the number 1"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt: is blank"),
        ({"chosen": "hello", "rejected": "c"}, "chosen: does not begin as rejected does"),
        ({"chosen": [{"role": "user"}], "rejected": [3]}, "chosen[-1]: is an object"),
        ({**PAIR, "margin": float("nan")}, "margin: is NaN"),
    ],
)
def test_rows_of_no_layout(tmp_path: Path, row: Any, expected: str) -> None:
    (found,) = problems(tmp_path, row)
    assert found.startswith(f"{tmp_path}/source.jsonl:1: {expected}")


def test_arrays_name_their_items(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, PAIR, {**PAIR, "choice": 3}, array=True)
    assert found.startswith(f"{tmp_path}/source.jsonl:2: choice:")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"[]", "is an empty array"),
        (b"[1", "is not one JSON array"),
        (b'["\xff"]', "is not UTF-8"),
        (b"[" * 200_000, "is nested too deeply"),
        (b"{", "is one JSON value over several lines"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, expected: str) -> None:
    source = tmp_path / "source.json"
    source.write_bytes(content)
    with pytest.raises(InputError, match=expected):
        convert(str(source), str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_an_existing_file_survives_a_failed_conversion(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("precious")
    with pytest.raises(InputError):
        run(tmp_path, PAIR, {"input_text": 3})
    assert target.read_text() == "precious"
    run(tmp_path, PAIR)
    assert written(tmp_path) == [PAIR]


def test_a_file_may_be_converted_in_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIR] * 3))
    convert(str(path), str(path))
    assert path.read_text().count("\n") == 3


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of auto, rows, tldr_comparisons"):
        run(tmp_path, PAIR, layout="tldr")
    with pytest.raises(InputError, match="is a folder"):
        convert(str(tmp_path / "source.jsonl"), str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        convert(str(tmp_path / "source.jsonl"), str(tmp_path / "file" / "out.jsonl"))
    with pytest.raises(InputError, match="info: is null"):
        run(tmp_path, PAIR, layout="tldr_comparisons")


def test_remote_output(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(PAIR))
    convert(str(source), "memory://rlhf-convert/out.jsonl")
    written_text = fsspec.filesystem("memory").cat("/rlhf-convert/out.jsonl")
    assert json.loads(written_text) == PAIR
