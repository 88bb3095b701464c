"""An adapter sits on linear layers with weights of their own, and nowhere else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.language_models import make_lm, plain_logits, ragged
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

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
from rlhf.config import LoRAConfig
from rlhf.errors import InputError
from rlhf.models.families import FAMILIES
from rlhf.models.generation import generate
from rlhf.models.loading import load_language_model
from rlhf.models.memory import count_parameters
from rlhf.models.saving import save_adapter, save_merged
from rlhf.models.targets import adapted_layers
from rlhf.ppo_trainer import PPOTrainer

QUERY = {"t5": "q", "llama": "q_proj"}
AUTO = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}


def problem(arch: str, *names: str, untied: bool = False, **lora: Any) -> str:
    lm = make_lm(arch, untied=untied)
    with pytest.raises(InputError) as error:
        lm.add_adapter("policy", LoRAConfig(rank=2, target_modules=list(names), **lora))
    assert not lm.adapters.names
    assert not any("lora" in name for name, _ in lm.module.named_parameters())
    return str(error.value)


def test_a_tied_head_is_refused(arch: str) -> None:
    text = problem(arch, "lm_head")
    assert "lora.target_modules: lm_head cannot be adapted: the weight is shared with" in text
    assert QUERY[arch] in text
    assert "lm_head" not in text.partition("expected")[2]


def test_a_layer_that_another_module_holds_too_is_refused(arch: str) -> None:
    module = tiny_model(arch)
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    first, second = next(
        (a, b)
        for i, a in enumerate(layers)
        for b in layers[i + 1 :]
        if a.weight.shape == b.weight.shape
    )
    second.weight = first.weight
    lm = FAMILIES[arch](module, make_tokenizer(arch))
    with pytest.raises(InputError, match="the weight is shared"):
        lm.add_adapter("policy", LoRAConfig(rank=2))
    second.weight = nn.Parameter(torch.zeros(()))
    second.weight.data = first.weight.data  # one memory, two parameters
    with pytest.raises(InputError, match="the weight is shared"):
        lm.add_adapter("policy", LoRAConfig(rank=2))


def test_everything_that_is_wrong_is_named_at_once(arch: str) -> None:
    embedding = {"t5": "shared", "llama": "embed_tokens"}[arch]
    norm = {"t5": "final_layer_norm", "llama": "norm"}[arch]
    text = problem(arch, QUERY[arch], "nonexistent", embedding, norm, "lm_head")
    assert text.count("\n") == 0
    for name in (
        "'nonexistent' names no layer",
        f"{embedding} cannot be adapted: not a linear layer (Embedding)",
    ):
        assert name in text
    assert f"{norm} cannot be adapted: not a linear layer" in text
    assert "lm_head cannot be adapted: the weight is shared" in text
    assert f"'{QUERY[arch]}'" not in text


@pytest.mark.parametrize(
    "name", ["all-linear", ".*", "model.layers.9.self_attn.q_proj", "EncDecAttention", "rotary_emb"]
)
def test_patterns_containers_and_what_is_not_there_are_refused(arch: str, name: str) -> None:
    assert "expected linear layers: " in problem(arch, QUERY[arch], name)


def test_names_that_only_the_other_stack_has() -> None:
    text = problem("t5", "q", "EncDecAttention.k", where="encoder")
    assert "'EncDecAttention.k' names layers outside of lora.where only" in text
    assert "lora.where" in problem("t5", "lm_head", where="decoder", untied=True)
    with pytest.raises(InputError, match=r"lora\.where: a LLaMA has no encoder"):
        make_lm("llama").add_adapter("policy", LoRAConfig(rank=2, where="encoder"))


FULL = {
    "t5": "decoder.block.1.layer.0.SelfAttention.v",
    "llama": "model.layers.1.self_attn.v_proj",
}


@pytest.mark.parametrize("where", ["all", "decoder"])
def test_what_is_adapted_is_what_peft_adapts(arch: str, where: str) -> None:
    names = [QUERY[arch], FULL[arch]]
    lora = LoRAConfig(rank=2, target_modules=names, where=where)
    lm = make_lm(arch)
    lm.add_adapter("policy", lora)
    ours = {n.partition(".lora_A")[0] for n, _ in lm.named_trainable("policy") if ".lora_A" in n}
    plain = get_peft_model(tiny_model(arch), LoraConfig(r=2, target_modules=names))
    theirs = {n for n, part in plain.base_model.model.named_modules() if hasattr(part, "lora_A")}
    if arch == "t5" and where == "decoder":
        theirs = {name for name in theirs if name.startswith("decoder.")}
    assert ours == theirs
    assert FULL[arch] in ours
    assert (
        set(adapted_layers(lm.module, lm.peft_config(lora, lm.module))) == ours
    )  # adapters are looked through
    counted = count_parameters(lm.config, lora).adapter
    assert counted == sum(p.numel() for _, p in lm.named_trainable("policy"))


# --- before any weights --------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    for auto in AUTO.values():
        monkeypatch.setattr(auto, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "dpo"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_stages_refuse_before_they_load(
    arch: str, stage: str, dry_run: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"input_text": "a", "output_text": "the cat", "candidate_0": "a", "candidate_1": "the"}
    rows.write_text((json.dumps(row | {"choice": 0}) + "\n") * 4)
    common: dict[str, Any] = {
        "base_model": str(tiny_checkpoint), "output_dir": str(tmp_path / "out"), "dry_run": dry_run,
        "lora": {"rank": 2, "target_modules": [QUERY[arch], "lm_head", "nonexistent"]},
    }  # fmt: skip
    runs: dict[str, Callable[[], Any]] = {
        "sft": lambda: train_sft(SFTConfig(dataset=str(rows), **common)),
        "reward_model": lambda: train_reward_model(
            RewardModelConfig(preference_dataset=str(rows), **common)
        ),
        "dpo": lambda: train_dpo(DPOConfig(preference_dataset=str(rows), **common)),
        "ppo": lambda: train_ppo(
            PPOConfig(prompt_dataset=str(rows), **common),
            reward_fn=lambda prompts, responses: [0.0],
        ),
    }
    with pytest.raises(
        InputError, match=r"lora\.target_modules: 'nonexistent' .*; lm_head cannot be adapted"
    ):
        runs[stage]()
    assert not (tmp_path / "out").exists()


def test_a_reward_model_has_no_use_for_an_untied_head(arch: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"input_text": "a", "candidate_0": "a", "candidate_1": "the", "choice": 0}
    rows.write_text((json.dumps(row) + "\n") * 4)
    config = RewardModelConfig(
        base_model="x", preference_dataset=str(rows), output_dir=str(tmp_path / "out"),
        lora={"rank": 2, "target_modules": ["lm_head"]},
    )  # fmt: skip
    model = tiny_model(arch, untied=True)
    with pytest.raises(InputError, match="lm_head is not used in this stage"):
        train_reward_model(config, model=model, tokenizer=make_tokenizer(arch))


# --- an untied head ------------------------------------------------------------------------------


def save_untied(arch: str, folder: Path) -> Path:
    tiny_model(arch, untied=True).save_pretrained(folder)
    make_tokenizer(arch).save_pretrained(folder)
    if arch == "t5":  # transformers 5 forgets it when it saves; hub files have it
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def test_an_untied_head_is_right_in_update_decoding_merged_and_peft(
    arch: str, tmp_path: Path
) -> None:
    base = save_untied(arch, tmp_path / "base")
    config = PPOConfig(base_model=str(base), prompt_dataset="x", output_dir="x", dtype="float32")
    lm = load_language_model(config, trainable=False)
    lm.add_adapter("policy", LoRAConfig(rank=3, target_modules=["lm_head", QUERY[arch]]))
    randomize_lora(lm, "policy", std=0.5)
    save_adapter(lm, "policy", tmp_path / "adapter")
    save_merged(lm, "policy", tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AUTO[arch].from_pretrained(base), tmp_path / "adapter")
    merged = AUTO[arch].from_pretrained(tmp_path / "merged")
    untouched = AUTO[arch].from_pretrained(base)
    prompts, responses = ragged(arch)
    with torch.no_grad(), lm.using("policy"):
        states = lm.response_states(prompts, responses)
        made = generate(lm, prompts, max_new_tokens=8, temperature=0.0).responses
    with torch.no_grad(), lm.using(None):
        before = lm.logits(lm.response_states(prompts, responses))
    for row, prompt in enumerate(prompts.tolists()):
        response = responses.tolists()[row]
        with torch.no_grad(), lm.using("policy"):
            ours = lm.logits(states[row, : len(response) + 1])
        reference = plain_logits(arch, untouched.eval(), prompt, response)
        torch.testing.assert_close(
            before[row, : len(response) + 1], reference, atol=1e-4, rtol=1e-4
        )
        assert (ours - reference).abs().max() > 0.1
        for plain in (adapted, merged):
            expected = plain_logits(arch, plain.eval(), prompt, response)
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
            answer = made.tolists()[row]
            greedy = plain_logits(arch, plain, prompt, answer)[:-1].argmax(-1)
            assert greedy.tolist() == answer


def test_ppo_trains_an_untied_head(arch: str, tmp_path: Path) -> None:
    from support.ppo import count_letters, make_config

    config = make_config(
        tmp_path, lora={"rank": 3, "target_modules": ["lm_head", QUERY[arch]]}, critic="adapter"
    )
    trainer = PPOTrainer(
        config, reward_fn=count_letters, model=tiny_model(arch, untied=True),
        tokenizer=make_tokenizer(arch),
    )  # fmt: skip
    lm = trainer.policy.lm
    head = lm.module.get_output_embeddings()
    for name in lm.adapters.names:
        randomize_lora(lm, name)
    before = head.lora_B["policy"].weight.detach().clone(), head.base_layer.weight.clone()
    metrics = trainer.step()
    assert metrics["ppo/ratio_first"] < 1e-4
    assert metrics["ppo/decode_deviation"] < 1e-4
    assert not torch.equal(head.lora_B["policy"].weight, before[0])
    assert torch.equal(head.base_layer.weight, before[1])
