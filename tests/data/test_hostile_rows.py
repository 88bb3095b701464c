"""Rows that nobody wrote in good faith: problems with file and line, never a traceback."""

import contextlib
import json
from pathlib import Path

from support.cases import ROWS
from support.fuzzing import mutations

from rlhf.data.convert import convert
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts
from rlhf.errors import InputError
from rlhf.reports.data_check import check_files

ORIGINALS = [
    "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    json.dumps({"prompt": "a", "chosen": " b", "rejected": " c", "margin": 0.5}).encode() + b"\n",
    json.dumps({"instruction": "a", "input": "b", "output": "c"}).encode() + b"\n",
    json.dumps({"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1})
    .encode() + b"\n",
    json.dumps({"prompt": "a", "response": "b", "helpfulness": 3}).encode() + b"\n"
    + json.dumps({"prompt": "a", "response": "c", "helpfulness": 1}).encode() + b"\n",
    json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    .encode() + b"\n",
    json.dumps({"instruction": "a", "completions": [
        {"response": "b", "overall_score": 1}, {"response": "c", "overall_score": 2}]})
    .encode() + b"\n",
    json.dumps({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 0}).encode()
    + b"\n",
    json.dumps({"input_text": "a", "candidates": ["b", "c", "d"], "ranking": [2, 0, 1]}).encode()
    + b"\n",
]  # fmt: skip
TOKENS = [
    b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b"Infinity", b'"\\ud800"', b"9" * 5000, b'""',
    b"[" * 2000, b'{"a":' * 500, b"true", b"\x00", b'"\\u0000"', b"\xff\xfe", b"\xef\xbb\xbf",
    b"\r", b'"messages": [{"author": "user", "content": "x"}]', b'"messages": [[]]',
    b'"choice": 1e400',
    b'"choice": 10000000000000000000000', b'"margin": 1' + b"0" * 400, b'"output_text": [1]', b",",
    b'"ranking": [0, 0]', b'"ranking": [1.0, true, null]', b'"candidates": [[]]',
    b'"context": "c"', b'"candidate_0": null', b"\xe2\x80\xa8", b"\x1b[2J", b'"input_text": {}',
]  # fmt: skip


def test_no_damage_to_rows_ends_in_a_traceback(tmp_path: Path) -> None:
    renderer = PromptRenderer()
    for number, content in enumerate(mutations(ORIGINALS, TOKENS)):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        skip = "skip" if number % 2 else "error"
        with contextlib.suppress(InputError):
            list(load_prompts(str(path), renderer=renderer, on_bad_rows=skip))
        with contextlib.suppress(InputError):
            list(load_preferences(str(path), renderer=renderer, on_bad_rows=skip))
        with contextlib.suppress(InputError):
            check_files([str(path)], on_bad_rows=skip).lines()
        with contextlib.suppress(InputError):
            convert([str(path)], str(tmp_path / "out.jsonl"), "auto")
