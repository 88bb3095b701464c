"""Scoring a file: every row comes back with its rewards."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from support.cases import Case, read
from support.tiny import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf import score
from rlhf.config import ScoreConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import Message, PromptFields, PromptText
from rlhf.errors import InputError
from rlhf.models.reward_model import load_reward_model
from rlhf.models.reward_record import RECORD_FILE
from rlhf.score import ScoreResult, run_score

ROWS: list[dict[str, Any]] = [
    {"input_text": "the cat", "output_text": " sat", "id": 7, "note": "caf\u00e9", "x": [1, 2.5]},
    {"input_text": "a dog", "candidate_0": " ran", "candidate_1": "", "choice": 0},
    {"input_text": "a dog", "candidate_0": " ran", "candidate_1": " sat"},
    {"input_text": "the", "prediction": " a", "output_text": " cat", "reward": 99},
    {"messages": [{"role": "user", "content": "the dog?"}], "response": " ran"},
    {"prompt": "the cat", "chosen": " sat", "rejected": " [summary"},
    {"input_text": "the cat", "prediction": ""},
]


@pytest.fixture
def reward_model(arch: str, cases: dict[str, Case]) -> Path:
    return cases[arch].reward


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model: Path, data: Path, output: Path | str, **fields: Any) -> ScoreResult:
    values = {"reward_model_path": model, "dataset": data, "output": output}
    texts = {name: str(value) for name, value in values.items()}
    return run_score(ScoreConfig(**texts | {"device": "cpu"} | fields))


def alone(model: Path, prompt: PromptText, text: str) -> float:
    return float(load_reward_model(str(model), device="cpu").score([prompt], [text]))


def test_rows_keep_what_they_say_and_get_their_rewards(reward_model: Path, tmp_path: Path) -> None:
    run(reward_model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "new" / "out.jsonl")
    scored = read(tmp_path / "new" / "out.jsonl")
    names = [["reward"], ["reward_0", "reward_1"], ["reward_0", "reward_1"], ["reward"],
             ["reward"], ["reward_0", "reward_1"], ["reward"]]  # fmt: skip
    for row, before, rewards in zip(scored, ROWS, names, strict=True):
        assert {k: v for k, v in row.items() if k not in rewards} == {
            k: v for k, v in before.items() if k not in rewards
        }
        assert set(rewards) <= set(row)


def test_rewards_equal_scoring_one_text_alone(reward_model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", ROWS)
    renderer = PromptRenderer()
    expected = []
    for row in ROWS:
        turns = tuple(Message("user", turn["content"]) for turn in row.get("messages", ()))
        prompt = renderer.render(
            PromptFields(row.get("input_text") or row.get("prompt"), turns, None)
        )
        if "candidate_0" in row:
            texts = [row["candidate_0"], row["candidate_1"]]
        elif "chosen" in row:
            texts = [row["chosen"], row["rejected"]]
        else:
            names = ("prediction", "response", "output_text")
            texts = [next(row[name] for name in names if name in row)]
        expected.append([alone(reward_model, prompt, text) for text in texts])
    for batch_size in (1, 64):
        output = tmp_path / f"{batch_size}.jsonl"
        run(reward_model, data, output, batch_size=batch_size)
        found = [
            [row["reward_0"], row["reward_1"]] if "reward_0" in row else [row["reward"]]
            for row in read(output)
        ]
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_the_summary_is_on_stdout(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(reward_model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    assert json.loads(capsys.readouterr().out) == result.metrics
    rewards = [
        value
        for row in read(tmp_path / "out.jsonl")
        for name, value in row.items()
        if name.startswith("reward")
    ]
    metrics = result.metrics
    assert (metrics["rows"], metrics["responses"], metrics["skipped"]) == (7, 10, 0)
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["reward_max"] == max(rewards)
    assert metrics["pairs"] == 2  # the pair without a choice says nothing of accuracy
    gaps = [row["reward_0"] - row["reward_1"] for row in read(tmp_path / "out.jsonl")[1::4]]
    assert metrics["accuracy"] == sum(gap > 0 for gap in gaps) / 2
    assert metrics["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 2)


def test_rows_are_written_piece_by_piece_in_order(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "_BATCHES_AT_ONCE", 2)
    rows = [{"input_text": "a" * (i % 7 + 1), "response": " cat", "i": i} for i in range(11)]
    run(cases["t5"].reward, write(tmp_path / "in.jsonl", rows), tmp_path / "o", batch_size=2)
    assert [row["i"] for row in read(tmp_path / "o")] == list(range(11))


def test_the_reward_models_own_instruction_is_the_default(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(cases["t5"].reward, model)
    renderer = PromptRenderer("the post:")
    record = json.loads((model / RECORD_FILE).read_text())
    record |= {"instruction": "the post:", "prompting": renderer.identity}
    (model / RECORD_FILE).write_text(json.dumps(record))
    data = write(tmp_path / "in.jsonl", [{"input_text": "a cat", "response": " sat"}])
    run(model, data, tmp_path / "out.jsonl")
    prompt = renderer.render(PromptFields("a cat", (), None))
    expected = alone(model, prompt, " sat")
    assert read(tmp_path / "out.jsonl")[0]["reward"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="instruction"):
        run(model, data, tmp_path / "other.jsonl", instruction="something else")
    assert not (tmp_path / "other.jsonl").exists()


def test_a_sequence_classifier_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("llama")
    config = LlamaConfig(
        vocab_size=120, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"input_text": "the cat", "response": " sat"}, {"input_text": "a", "response": " dog"}]
    run(tmp_path / "model", write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    for row in read(tmp_path / "out.jsonl"):
        ids = torch.tensor([tokenizer(row["input_text"] + row["response"])["input_ids"]])
        with torch.no_grad():
            expected = float(model.eval()(ids).logits[0, 0])
        assert row["reward"] == pytest.approx(expected, abs=1e-4)


def test_bad_rows_are_errors_or_left_out(cases: dict[str, Case], tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text(
        '{"input_text": "a", "response": " b"}\r\n'
        "not json\n"
        '{"input_text": "a"}\n'
        '{"input_text": "a", "response": 3}\n'
        '{"input_text": "a", "candidate_0": "x", "candidate_1": "y", "choice": 2}\n'
        '{"response": " b"}',
        encoding="utf-8",
    )
    model, output = cases["t5"].reward, tmp_path / "out.jsonl"
    with pytest.raises(InputError) as caught:
        run(model, data, output)
    problems = caught.value.problems
    assert [problem.split(": ")[0] for problem in problems] == [f"{data}:{n}" for n in range(2, 7)]
    assert "prediction: is missing" in problems[1]
    assert "choice" in problems[3]
    assert not output.exists()
    result = run(model, data, output, on_bad_rows="skip")
    assert (result.metrics["rows"], result.metrics["skipped"]) == (1, 5)
    assert len(read(output)) == 1


def test_bad_input_leaves_an_existing_output_alone(cases: dict[str, Case], tmp_path: Path) -> None:
    model = cases["t5"].reward
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    data = write(tmp_path / "in.jsonl", ROWS[:1])
    empty = write(tmp_path / "empty.jsonl", [])
    for reward_model, dataset, target, match in (
        (tmp_path / "missing", data, output, "reward_model_path"),
        (model, tmp_path / "missing.jsonl", output, "does not exist"),
        (model, empty, output, "is empty"),
        (model, data, data, "the dataset itself"),
        (model, data, tmp_path, "is a folder"),
        (model, data, output / "below.jsonl", "no writable folder"),
        (model, data, "nowhere://bucket/out.jsonl", "cannot write"),
    ):
        with pytest.raises(InputError, match=match):
            run(reward_model, dataset, target)
    assert output.read_text() == "precious"
    assert read(data) == ROWS[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty.jsonl", "in.jsonl", "out.jsonl"
    ]  # fmt: skip


def test_a_remote_output(cases: dict[str, Case], tmp_path: Path) -> None:
    target = "memory://bucket/scores.jsonl"
    run(cases["t5"].reward, write(tmp_path / "in.jsonl", ROWS), target)
    content = fsspec.filesystem("memory").cat_file("/bucket/scores.jsonl")
    assert len(content.splitlines()) == len(ROWS)


def test_rows_of_other_layouts_and_columns(reward_model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "the dog?"}]
    rows: list[dict[str, Any]] = [
        {"conversations": [*turns, {"from": "gpt", "value": " ran"}], "id": "x"},
        {"question": "the cat", "chosen": " sat", "rejected": " ran", "system": ""},
        {"q": "the cat", "answer": {"text": " sat"}},
        {"prompt": "the cat", "response": " sat", "helpfulness": 3},
    ]
    data = write(tmp_path / "in.jsonl", rows)
    columns = {"prompt": "q", "response": "answer.text"}
    result = run(reward_model, data, tmp_path / "out.jsonl", columns=columns)
    scored = read(tmp_path / "out.jsonl")
    assert [
        {name: row[name] for name in own} for row, own in zip(scored, rows, strict=True)
    ] == rows
    cat = PromptText("the cat", ((0, 7),))
    sat, ran = (round(alone(reward_model, cat, text), 6) for text in (" sat", " ran"))
    assert scored[1]["reward_0"] == pytest.approx(sat, abs=1e-5)
    assert scored[1]["reward_1"] == pytest.approx(ran, abs=1e-5)
    assert [scored[place]["reward"] for place in (2, 3)] == pytest.approx([sat, sat], abs=1e-5)
    assert set(scored[0]) == {"conversations", "id", "reward"}
    assert result.metrics["rows"] == 4
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(InputError, match="unpaired row"):
        run(reward_model, bad, tmp_path / "no.jsonl")
