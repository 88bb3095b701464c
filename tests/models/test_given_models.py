"""Models given as objects: whatever the type of their weights, they train and are written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import make_tokenizer, tiny_model
from support.toy_trainer import stop_at
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf import (
    DPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    train_dpo,
    train_ppo,
    train_reward_model,
    train_sft,
)
from rlhf.config import LoRAConfig, StageConfig
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.compat import set_attention_kind
from rlhf.models.loading import load_language_model

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}
SMALL: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 16,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "batch_size": 4, "train_steps": 2, "save_every": 1, "prompt_sequence_length": 16,
    "target_sequence_length": 6, "device": "cpu", "log_with": [],
}  # fmt: skip


def given(arch: str, dtype: str) -> PreTrainedModel:
    return tiny_model(arch, untied=arch == "llama").to(TYPES[dtype])


def train(stage: str, folder: Path, model: PreTrainedModel, arch: str, **options: Any) -> Any:
    rows = folder / "rows.jsonl"
    row = {"input_text": "a", "output_text": "the cat", "candidate_0": "a", "candidate_1": "the"}
    rows.write_text((json.dumps(row | {"choice": 0}) + "\n") * 4)
    callbacks = options.pop("callbacks", ())
    objects = {"model": model, "tokenizer": make_tokenizer(arch), "callbacks": callbacks}
    fields = COMMON | {"output_dir": str(folder / "out")} | options
    if stage == "sft":
        return train_sft(SFTConfig(dataset=str(rows), **fields), **objects)
    if stage == "dpo":
        return train_dpo(DPOConfig(preference_dataset=str(rows), **fields), **objects)
    if stage == "ppo":
        config = PPOConfig(prompt_dataset=str(rows), **fields)
        return train_ppo(config, reward_fn=lambda p, r: [float(len(text)) for text in r], **objects)
    return train_reward_model(RewardModelConfig(preference_dataset=str(rows), **fields), **objects)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "dpo"])
@pytest.mark.parametrize(("held", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("rank", [2, 0])
def test_it_trains_is_written_and_resumes(
    arch: str, stage: str, held: str, dtype: str, rank: int, tmp_path: Path
) -> None:
    options = {"dtype": dtype, "lora": {"rank": rank}}
    with pytest.raises(StoppedBySignal):
        train(stage, tmp_path, given(arch, held), arch, callbacks=[stop_at(1)], **options)
    train(stage, tmp_path, given(arch, held), arch, **options)
    out = tmp_path / "out"
    adapters = list(out.glob("adapter/adapter_model.safetensors"))
    assert len(adapters) == (1 if rank else 0)
    assert all(t.dtype == torch.float32 for file in adapters for t in load_file(file).values())
    if stage == "reward_model" and rank:
        return
    merged = AUTO[arch].from_pretrained(out / "merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {TYPES[dtype]}


def load(arch: str, model: PreTrainedModel, dtype: str, *, trainable: bool = False) -> Any:
    config = StageConfig(output_dir="x", dtype=dtype, device="cpu")
    tokenizer = make_tokenizer(arch)
    return load_language_model(config, trainable=trainable, model=model, tokenizer=tokenizer)


@pytest.mark.parametrize("held", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_have_the_configured_type_and_what_is_shared_stays_shared(
    arch: str, held: str, dtype: str
) -> None:
    frozen = load(arch, tiny_model(arch).to(TYPES[held]), dtype).module
    assert {parameter.dtype for parameter in frozen.parameters()} == {TYPES[dtype]}
    assert frozen.lm_head.weight is frozen.get_input_embeddings().weight
    trained = load(arch, tiny_model(arch).to(TYPES[held]), dtype, trainable=True).module
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_values_are_those_of_the_object_rounded_once(arch: str) -> None:
    expected = {name: p.detach().bfloat16() for name, p in tiny_model(arch).named_parameters()}
    lm = load(arch, tiny_model(arch), "bfloat16")
    assert all(torch.equal(p, expected[name]) for name, p in lm.module.named_parameters())


@pytest.mark.parametrize("held", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_frequencies_of_positions_are_exact(held: str, dtype: str) -> None:
    """As from_pretrained keeps them; in bfloat16 far positions would be turned by wrong angles."""
    model = tiny_model("llama").to(TYPES[held])
    rotary = load("llama", model, dtype).module.model.rotary_emb
    steps = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    expected = 10_000.0**-steps  # Su et al. 2021 (arXiv 2104.09864), section 3.2.2
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq.double(), expected, rtol=1e-6, atol=0)


def test_an_object_with_adapters_is_refused(arch: str) -> None:
    lm = load(arch, tiny_model(arch), "float32")
    lm.add_adapter("policy", LoRAConfig(rank=2))
    with pytest.raises(InputError, match="has an adapter of peft already"):
        load(arch, lm.module, "float32")


def wrong_object(name: str) -> Any:
    lm: Any = tiny_model("llama")
    if name == "no model":
        return torch.nn.Linear(2, 2)
    if name == "body":
        return lm.model
    if name == "classifier":
        return AutoModelForSequenceClassification.from_config(lm.config)
    if name == "window":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, layer_types=["sliding_attention"]))
    set_attention_kind(lm.config, "flash_attention_2")
    return lm


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no model", "model: expected a language model of transformers, got a Linear"),
        ("body", "model: a LlamaModel has no language-model head; .* AutoModelForCausalLM loads"),
        ("classifier", "model: a LlamaForSequenceClassification has no language-model head"),
        ("window", "model: config: layer_types: sliding_attention needs a sliding_window"),
        ("kernel", "model: config: attn_implementation: expected eager or sdpa, got 'flash_att"),
    ],
)
def test_an_object_that_cannot_be_trained_is_refused_before_rows_are_read(
    tmp_path: Path, name: str, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        train("sft", tmp_path, wrong_object(name), "llama")
