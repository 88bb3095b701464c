"""The model card of a stage's folder."""

import re
from pathlib import Path

import pytest
import yaml

from rlhf.config import (
    LoRAConfig,
    RewardModelConfig,
    SFTConfig,
    config_to_yaml,
    result_fields,
)
from rlhf.reports.model_card import write_card


def read(folder: Path) -> tuple[dict[str, object], str]:
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_says_what_was_done_and_how_to_load_it(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text('{"model_type": "t5"}')
    config = SFTConfig(
        base_model="google/flan-t5-small",
        revision="main",
        output_dir="out",
        dataset="rows.jsonl",
        instruction="Sum up: a | b\nin short",
        lora=LoRAConfig(rank=3),
    )
    metrics = {"sft/loss": 1.23456, "stage": "sft", "finished": True, "bad": float("nan")}
    write_card(tmp_path, "sft", config, metrics, ["dataset: 12 rows"])
    front, body = read(tmp_path)
    assert front["base_model"] == "google/flan-t5-small"
    assert front["library_name"] == "peft"
    assert front["tags"] == ["rlhf", "sft", "lora"]
    assert "at revision `main`" in body
    assert 'AutoModelForSeq2SeqLM.from_pretrained("merged")' in body
    assert "| sft/loss | 1.235 |" in body
    assert "rank 3, alpha 6" in body
    assert r"Sum up: a \| b\\nin short" in body
    assert "- dataset: 12 rows" in body
    assert "finished" not in body
    assert "nan" not in body


def test_card_of_a_chat_model_shows_its_template(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    config = SFTConfig(
        base_model="m", output_dir="out", dataset="d", chat_template_options={"thinking": False}
    )
    write_card(tmp_path, "sft", config, {})
    assert "apply_chat_template" not in read(tmp_path)[1]
    (tmp_path / "merged" / "chat_template.jinja").write_text("{{ messages }}")
    write_card(tmp_path, "sft", config, {})
    body = read(tmp_path)[1]
    assert "tokenizer.apply_chat_template(" in body
    assert "with `chat_template_options` of `config.yaml`" in body


def test_card_of_full_weights_and_a_local_base(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    config = SFTConfig(
        base_model=str(tmp_path), output_dir="out", dataset="rows.jsonl", lora=LoRAConfig(rank=0)
    )
    write_card(tmp_path, "ppo", config, {})
    front, body = read(tmp_path)
    assert front == {"library_name": "transformers", "tags": ["rlhf", "ppo"]}
    assert "AutoModelForCausalLM" in body
    assert "adapter/" not in body
    assert "## Results" not in body


@pytest.mark.parametrize("classifier", [True, False])
def test_reward_card_warns_of_the_missing_shift(tmp_path: Path, classifier: bool) -> None:
    if classifier:
        (tmp_path / "sequence_classifier").mkdir()
    config = RewardModelConfig(output_dir="out", preference_dataset="rows.jsonl")
    write_card(tmp_path, "reward_model", config, {"eval/accuracy": 0.75})
    _, body = read(tmp_path)
    assert ("*raw* score" in body) == classifier
    assert "a model given as an object" in body
    assert "| eval/accuracy | 0.75 |" in body


EVIL = "\n# x\n| a |\x1b[31m\u202e<img src=http://x>![y](http://z) `code` <script>*b*"


def test_no_text_of_a_user_or_a_file_becomes_markup(tmp_path: Path) -> None:
    config = SFTConfig(
        base_model=f"https://me:secret@host/m?token=secret{EVIL}",
        revision=f"r`{EVIL}",
        output_dir="out",
        dataset="rows.jsonl",
        instruction=EVIL,
    )
    write_card(tmp_path, "sft", config, {f"a{EVIL}": 1.0}, [f"dataset: {EVIL}"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "secret" not in card
    assert card.replace("\n", "").isprintable()
    shown = card.split("## Training")[1]
    assert "<" not in shown
    assert not re.search(r"(?<!\\)\[y\]", shown)
    assert "\n# x" not in card
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in shown.splitlines()]
    assert set(bars) <= {0, 3}


def test_secrets_of_addresses_are_in_no_file_and_change_no_identity() -> None:
    def config(secret: str) -> SFTConfig:
        return SFTConfig(
            base_model=f"https://me:{secret}@host/m",
            dataset=["https://h/x?token=" + secret, "rows.jsonl"],
            output_dir=f"s3://k:{secret}@bucket/out",
            instruction="see https://a:b@c",
        )

    first, second = config("PASSWORD1"), config("PASSWORD2")
    assert "PASSWORD" not in config_to_yaml(first) + repr(result_fields(first))
    assert result_fields(first) == result_fields(second)
    assert result_fields(first)["instruction"] == "see https://a:b@c"
    assert result_fields(first)["dataset"] == ["https://h/x?token=***", "rows.jsonl"]
