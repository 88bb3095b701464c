"""Whatever is wrong with the input: exit code 2, plain lines, no traceback, nothing touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import make_tokenizer, tiny_model

from rlhf.cli import main

PAIR = {"input_text": "the cat", "candidate_0": "a", "candidate_1": "b", "choice": 0}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bad.jsonl"),
    "bad json": (lines(PAIR) + b'{"input_text": \n', "bad.jsonl:2: "),
    "array cut short": (json.dumps([PAIR, PAIR])[:-9].encode(), "bad.jsonl"),
    "missing field": (lines({**PAIR, "candidate_1": None}), "bad.jsonl:1: candidate_1: "),
    "wrong type": (lines({**PAIR, "candidate_0": 7}), "bad.jsonl:1: candidate_0: "),
    "wrong choice": (lines({**PAIR, "choice": 2}), "bad.jsonl:1: choice: "),
    "boolean choice": (lines({**PAIR, "choice": True}), "bad.jsonl:1: choice: "),
    "NaN margin": (lines({**PAIR, "margin": float("nan")}), "bad.jsonl:1: margin: "),
    "not utf-8": (lines(PAIR) + b'{"input_text": "\xff\xfe"}\n', "bad.jsonl:2: "),
    "absurdly deep": (b"[" * 100_000 + b"\n", "bad.jsonl"),
    "absurdly long": (b'{"input_text": "' + b"x" * (20 << 20) + b'"}\n', "bad.jsonl:1: "),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a checkpoint, good rows, and an output that must stay as it is."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer("llama")
    tokenizer.add_bos_token = True  # a prompt of one token has no room but for this
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "good.jsonl").write_bytes(
        lines(*({**PAIR, "input_text": f"{i}"} for i in range(4)))
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    return tmp_path


def refused(place: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> list[str]:
    """Runs the reward model stage with changes; returns what it complains of."""
    flags = {
        "base_model": str(place / "base"), "preference_dataset": str(place / "good.jsonl"),
        "output_dir": str(place / "new"), "prompt_sequence_length": "32",
        "target_sequence_length": "8", "train_steps": "1", "log_with": "none",
    }  # fmt: skip
    flags |= dict(zip(changes[::2], changes[1::2], strict=True))
    capsys.readouterr()
    code = main(["reward-model", *(part for k, v in flags.items() for part in (f"--{k}", v))])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not (place / "new").exists()
    assert [path.name for path in (place / "out").iterdir()] == ["precious.txt"]
    return captured.err.splitlines()


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = BAD_ROWS[kind]
    (place / "bad.jsonl").write_bytes(content)
    said = refused(place, capsys, "preference_dataset", str(place / "bad.jsonl"))
    assert any(expected in line for line in said), said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["preference_dataset", "nothing-*.jsonl"], "nothing-*.jsonl"),
        (["prompt_sequence_length", "1"], "prompt_sequence_length"),
        (["prompt_sequence_length", "200"], "128 positions"),
        (["base_model", "missing/folder/here"], "there is no folder missing/folder/here"),
        (["learnign_rate", "1"], "learning_rate"),
        (["train_steps", "many"], "train_steps"),
        (["lora.target_modules", "nonsense"], "lora.target_modules"),
        (["device", "cuda:7"], "device"),
        (["output_dir", "OUT"], "holds files of no run"),
    ],
)
def test_bad_options(
    changes: list[str], expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda:7" in changes and torch.cuda.device_count() > 7:
        pytest.skip("that device exists here")
    changes = [str(place / "out") if word == "OUT" else word for word in changes]
    said = refused(place, capsys, *changes)
    assert any(expected in line for line in said), said


def no_safetensors(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def nan_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def other_architecture(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "gpt2"}')


def no_checkpoint(base: Path) -> None:
    (base / "config.json").unlink()


@pytest.mark.parametrize("damage", [no_safetensors, nan_weights, other_architecture, no_checkpoint])
def test_bad_checkpoints(
    damage: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place / "base")
    said = refused(place, capsys)
    assert len(said) == 1
    assert said[0].startswith("rlhf: base_model: ")


def test_all_problems_come_at_once_rows_first(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "bad.jsonl").write_bytes(lines({**PAIR, "choice": 5}, {**PAIR, "candidate_0": 1}))
    said = refused(
        place, capsys, "preference_dataset", str(place / "bad.jsonl"),
        "prompt_sequence_length", "200",
    )  # fmt: skip
    assert ["bad.jsonl:1: choice" in said[0], "bad.jsonl:2: candidate_0" in said[1]] == [True, True]
    assert "128 positions" in said[2]


def test_a_finished_run_is_not_touched_by_a_changed_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(place / "out")
    base = [
        "reward-model", "--base_model", str(place / "base"), "--preference_dataset",
        str(place / "good.jsonl"), "--output_dir", str(place / "out"), "--train_steps", "1",
        "--prompt_sequence_length", "32", "--target_sequence_length", "8", "--log_with", "none",
    ]  # fmt: skip
    assert main(base) == 0
    before = {p: p.read_bytes() for p in (place / "out").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([*base, "--seed", "3"]) == 2
    assert "seed: changed from 0 to 3" in capsys.readouterr().err
    assert main(base) == 0  # finished: says so
    assert before == {p: p.read_bytes() for p in (place / "out").rglob("*") if p.is_file()}
