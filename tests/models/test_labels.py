"""Classifiers with several labels: which logit is the score, and what is said of a wrong label."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from support.classifiers import LABELS, save_classifier

from rlhf.config import ScoreConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.classifiers import SequenceClassifier, classifier_label
from rlhf.models.reward_model import check_reward_model, load_reward_model
from rlhf.score import run_score

PROMPTS = [PromptText(text, ()) for text in ("the cat sat", "a dog", "x")]
RESPONSES = [" on the dog", "", " the cat and the dog"]


def logits(folder: Path) -> torch.Tensor:
    """All logits, one text at a time, from plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            rows.append(model(**tokenizer(prompt.text + response, return_tensors="pt")).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("label", "index"), [(0, 0), (1, 1), ("nothate", 0), ("hate", 1), ("1", 1), ("other", 2)]
)
def test_the_score_is_the_raw_logit_of_the_label(
    arch: str, label: Any, index: int, tmp_path: Path
) -> None:
    folder = save_classifier(arch, tmp_path)
    expected = logits(folder)[:, index]
    assert expected.std() > 0.01
    scorer = load_reward_model(str(folder), device="cpu", dtype="float32", label=label)
    for size in (1, 2, 32):
        scores = scorer.score(PROMPTS, RESPONSES, size)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_logits_of_several_labels_are_computed_in_float32(arch: str, tmp_path: Path) -> None:
    """Scores that bfloat16 cannot hold come from its states."""
    folder = save_classifier(arch, tmp_path)
    scorer = SequenceClassifier(str(folder), dtype=torch.bfloat16, label="hate")
    scores = scorer.score(PROMPTS, RESPONSES)
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, logits(folder)[:, 1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("labels", "label", "said"),
    [
        (
            LABELS, None,
            "has 3 labels; choose the one whose logit is the score with `reward_model_label`: "
            "0 (nothate), 1 (hate), 2 (other)",
        ),
        (LABELS, 3, "has no label 3; expected one of 0 (nothate), 1 (hate), 2 (other)"),
        (LABELS, -1, "has no label -1; expected one of 0 (nothate), 1 (hate), 2 (other)"),
        (LABELS, "Hate", "has no label 'Hate'; expected one of 0 (nothate), 1 (hate), 2 (other)"),
        (["score"], "hate", "has no label 'hate'; expected one of 0 (score)"),
        (["same", "same"], "same", "has no label 'same'; expected one of 0 (same), 1 (same)"),
    ],
)  # fmt: skip
def test_a_wrong_label_is_named_without_reading_weights(
    labels: list[str], label: Any, said: str, tmp_path: Path
) -> None:
    folder = save_classifier("llama", tmp_path, labels)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        check_reward_model(str(folder), PromptRenderer(), label=label)
    assert caught.value.problems == [f"reward_model_path: {folder}: {said}"]


def test_a_label_is_checked_in_a_bucket_without_its_weights(tmp_path: Path) -> None:
    folder = save_classifier("llama", tmp_path)
    store, address = MemoryFileSystem(), "memory://bucket/classifier"
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            store.pipe(f"/bucket/classifier/{path.name}", path.read_bytes())
    store.pipe("/bucket/classifier/model.safetensors", b"not weights")
    check_reward_model(address, PromptRenderer(), label="hate")
    with pytest.raises(InputError) as caught:
        check_reward_model(address, PromptRenderer(), label="kind")
    assert caught.value.problems == [
        f"reward_model_path: {address}: has no label 'kind'; expected one of 0 (nothate), "
        "1 (hate), 2 (other)"
    ]


def test_one_label_needs_no_name(tmp_path: Path) -> None:
    folder = str(save_classifier("llama", tmp_path, ["score"]))
    for label in (None, 0, "0", "score"):
        assert classifier_label(folder, label) == 0


def test_names_of_labels_win_over_their_numbers_as_text(tmp_path: Path) -> None:
    folder = str(save_classifier("llama", tmp_path, ["1", "0"]))
    assert [classifier_label(folder, label) for label in ("1", "0", 1, 0)] == [0, 1, 1, 0]


def test_a_reward_model_has_no_labels(cases: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a reward model of rlhf has no labels"):
        check_reward_model(str(cases["llama"].reward), PromptRenderer(), label=0)


def test_a_file_is_scored_by_a_label(arch: str, tmp_path: Path) -> None:
    folder = save_classifier(arch, tmp_path)
    data, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    rows = [{"input_text": prompt.text, "response": text} for prompt, text in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"dataset": str(data), "output": str(output), "device": "cpu", "dtype": "float32"}
    with pytest.raises(InputError, match="has 3 labels; choose"):
        run_score(ScoreConfig(reward_model_path=str(folder), **fields))
    run_score(ScoreConfig(reward_model_path=str(folder), reward_model_label="hate", **fields))
    found = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
    assert found == pytest.approx(logits(folder)[:, 1].tolist(), rel=1e-4, abs=1e-5)


def test_inference_scores_by_a_label(cases: dict[str, Any], arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_classifier(arch, tmp_path)
    fields = {"reward_model_path": str(folder), "dtype": "float32"}
    with pytest.raises(InputError, match="has no label 'kind'"):
        cases[arch].run(tmp_path / "refused", reward_model_label="kind", **fields)
    result = cases[arch].run(tmp_path / "out", reward_model_label="hate", **fields)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checked = 0
    for line in Path(result.predictions).read_text().splitlines():
        row = json.loads(line)
        if row["finish_reason"] == "eos" and row["prediction"] and "[" not in row["input_text"]:
            ids = tokenizer(row["input_text"] + row["prediction"], return_tensors="pt")
            with torch.no_grad():
                assert row["reward"] == pytest.approx(float(model(**ids).logits[0, 1]), abs=1e-4)
            checked += 1
    assert checked
