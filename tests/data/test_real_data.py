"""Real TL;DR preferences with a real LLaMA checkpoint (whose PAD equals UNK) through all stages."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_tokenizer, tiny_model

from rlhf.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


@pytest.fixture(scope="module")
def places(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The real LLaMA, a small T5, and the real rows."""
    folder = tmp_path_factory.mktemp("t5")
    tiny_model("t5").save_pretrained(folder)
    make_tokenizer("t5").save_pretrained(folder)
    data = shared / "data" / "tldr_vertex"
    return {
        "llama": str(shared / "models" / "stories260k"),
        "t5": str(folder),
        "preferences": str(data / "preference_train.jsonl"),
        "prompts": str(data / "prompt_train.jsonl"),
        "eval": str(data / "course_sample_preference.jsonl"),
    }


def run(places: dict[str, str], output: Path, policy: str, scorer: str) -> dict[str, Any]:
    code = main(
        [
            "run", "--base_model", places[policy], "--reward_model.base_model", places[scorer],
            "--preference_dataset", places["preferences"], "--prompt_dataset", places["prompts"],
            "--eval_dataset", places["eval"], "--instruction", "Summarize in less than 50 words.",
            "--prompt_sequence_length", "400", "--target_sequence_length", "32",
            "--batch_size", "8", "--reward_model.train_steps", "4", "--ppo.train_steps", "2",
            "--output_dir", str(output),
        ]
    )  # fmt: skip
    assert code == 0
    return json.loads((output / "metrics.json").read_text())


# Of one family with itself the quickstart's tests are as good.
@pytest.mark.parametrize(("policy", "scorer"), [("llama", "t5"), ("t5", "llama")])
def test_all_stages(places: dict[str, str], policy: str, scorer: str, tmp_path: Path) -> None:
    metrics = run(places, tmp_path / "out", policy, scorer)
    assert metrics["ppo"]["ppo/ratio_first"] < 1e-4
    assert metrics["inference"]["finished"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "inference" / "predictions.jsonl").read_text().splitlines()
    ]
    inputs = [
        json.loads(line)["input_text"]
        for line in Path(places["eval"]).read_text().splitlines()
        if line.strip()
    ]
    assert [row["input_text"] for row in rows] == inputs
    for row in rows:
        assert {"prediction", "baseline", "reward", "baseline_reward"} <= set(row)
    record = json.loads((tmp_path / "out" / "reward_model" / "reward_model.json").read_text())
    assert record["base_model"] == places[scorer]
