"""The recipes with real Hub ids run dry on stand-ins: the same families, layouts and names."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.chats import CHATML, DATED, chat_tokenizer
from support.hub import Hub
from support.tiny import make_tokenizer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf.cli import main
from rlhf.config import PipelineConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = "the cat sat on the mat and the dog ran"
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}  # fmt: skip
# As Pythia's checkpoints.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


def tokens(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": max(120, len(tokenizer) + 8), "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def publish(hub: Hub, name: str, model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hub.model(name, folder)


def splits(hub: Hub, name: str, **rows: list[dict[str, Any]]) -> None:
    """Publish a data set of one parquet file for each split."""
    files = {}
    for split, some in rows.items():
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(some), sink)
        files[f"data/{split}-00000-of-00001.parquet"] = sink.getvalue()
    hub.dataset(name, files)


def ultrafeedback(hub: Hub, folder: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, **tokens(tokenizer)))
    publish(hub, "Qwen/Qwen2.5-0.5B-Instruct", model, tokenizer, folder)
    rows = [
        {
            "chosen": turns(f"{i} {WORDS}?", "the cat"),
            "rejected": turns(f"{i} {WORDS}?", f"a dog {i}"),
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        }
        for i in range(40)
    ]
    splits(hub, "trl-lib/ultrafeedback_binarized", train=rows, test=rows[:6])


def hh(hub: Hub, folder: Path) -> None:
    tokenizer = chat_tokenizer(DATED)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **tokens(tokenizer)))
    publish(hub, "meta-llama/Llama-3.2-1B-Instruct", model, tokenizer, folder)

    def dialogue(number: int, answer: str) -> str:
        return (
            f"\n\nHuman: {number} {WORDS}\n\nAssistant: yes\n\nHuman: why?\n\nAssistant: {answer}"
        )

    rows = [{"chosen": dialogue(i, "the cat"), "rejected": dialogue(i, "a dog")} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.dataset(
        "Anthropic/hh-rlhf",
        {"helpful-base/train.jsonl": lines, "harmless-base/test.jsonl": lines},
    )


def tldr(hub: Hub) -> None:
    rows = [
        {"prompt": f"SUBREDDIT: r/cats\n\nPOST: {i} {WORDS}\n\nTL;DR:", "completion": " the cat"}
        for i in range(40)
    ]
    splits(hub, "trl-lib/tldr", train=rows, validation=rows[:6])
    pairs = [
        {"prompt": row["prompt"], "chosen": " the cat", "rejected": " a dog ran"} for row in rows
    ]
    splits(hub, "trl-lib/tldr-preference", train=pairs, validation=pairs[:6])


def pythia(hub: Hub, folder: Path) -> None:
    tldr(hub)
    tokenizer = make_tokenizer("llama")
    config = GPTNeoXConfig(**SMALL, rope_parameters=ROTARY, **tokens(tokenizer), num_labels=1)
    name = "cleanrl/EleutherAI_pythia-1b-deduped"
    publish(hub, f"{name}__sft__tldr", GPTNeoXForCausalLM(config), tokenizer, folder / "sft")
    scorer = GPTNeoXForSequenceClassification(config)
    publish(hub, f"{name}__reward__tldr", scorer, tokenizer, folder / "reward")


def flan(hub: Hub, folder: Path) -> None:
    tldr(hub)
    config = T5Config(
        vocab_size=120, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(120, 32))
    publish(hub, "google/flan-t5-base", model, make_tokenizer("t5"), folder)


RECIPES: dict[str, tuple[Callable[[Hub, Path], None], str]] = {
    "ultrafeedback_qwen2.5_0.5b": (ultrafeedback, "layout ultrafeedback_binarized"),
    "hh_llama3.2_1b": (hh, "layout hh_rlhf"),
    "tldr_pythia_1b": (pythia, "layout prompt_completion"),
    "tldr_flan_t5_base": (flan, "layout prompt_completion"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_dry(
    name: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(CONFIGS / f"{name}.yaml")
    RECIPES[name][0](hub, tmp_path / "model")
    flags = [f"--output_dir={tmp_path / 'out'}", "--device=cpu", "--dry_run=true"]
    code = main(["run", "--config", path, *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert RECIPES[name][1] in said.out
    config = load_config(PipelineConfig, path)
    for stage in config.stages():
        assert stage in said.out
    assert ("reward_model" in config.stages()) == (name != "tldr_pythia_1b")
    assert not (tmp_path / "out").exists()
