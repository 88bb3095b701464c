"""Classifiers with several labels: which logit is the score, and what is said of a wrong label."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.classifiers import LABELS, save_classifier

from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.classifiers import SequenceClassifier, classifier_label
from rlhf.models.reward_model import check_reward_model, load_reward_model

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
            "has 3 labels; choose the one whose logit is the score with `label`: 0 (nothate), "
            "1 (hate), 2 (other)",
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
