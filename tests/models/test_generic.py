"""Models without a family of their own, which transformers' forward and cache compute.

Random configurations of many types are in `test_families.py`. Here the same LLaMA checkpoint is
computed by its own family and by the generic one, and what neither can do is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo import make_trainer
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from support.two_families import assert_read_alike, assert_sampled_alike
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from rlhf.config import LoRAConfig, PPOConfig, SFTConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.agreement import check_agreement
from rlhf.models.families import FAMILIES, family_notes, family_of
from rlhf.models.families.generic_causal import GenericCausal
from rlhf.models.families.llama import Llama
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import check_stage, load_language_model, read_model_config
from rlhf.models.memory import memory_per_role
from rlhf.sft import train_sft

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [0, 12, 0, 13]]
RESPONSES = [[20, 21, 0, 22, 2], [2], [23, 0], [24, 25, 26], []]
GROUPS = torch.tensor([2, 0, 1, 0, 2])


def both(**options: Any) -> tuple[LanguageModel, LanguageModel]:
    """The same weights in LLaMA's own family and in the generic one."""
    models = [tiny_model("llama") for _ in range(2)]
    for model in models:
        model.generation_config.eos_token_id = list(range(2, 30))  # so that responses end
    own, generic = (
        family(model, make_tokenizer("llama"), base_name="tiny", **options)
        for family, model in zip((Llama, GenericCausal), models, strict=True)
    )
    if not options:
        for lm in (own, generic):
            lm.add_adapter("policy", LoRAConfig(rank=4))
            randomize_lora(lm, "policy")
    return own, generic


@pytest.mark.parametrize("trainable", [False, True])
def test_states_and_gradients_are_those_of_the_own_family(trainable: bool) -> None:
    prompts, responses = map(TokenBatch.from_lists, (PROMPTS, RESPONSES))
    pair = both(trainable=True) if trainable else both()
    assert_read_alike(pair, None if trainable else "policy", prompts, responses, GROUPS)


def test_sampled_rollouts_are_those_of_the_own_family() -> None:
    assert_sampled_alike(both(), TokenBatch.from_lists(PROMPTS), GROUPS)


def test_a_step_of_ppo_is_that_of_the_own_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for family in (Llama, GenericCausal):
        if family is GenericCausal:
            monkeypatch.delitem(FAMILIES, "llama")
        folder = tmp_path / family.__name__
        folder.mkdir()
        options = {"responses_per_prompt": 2, "kl_coeff": 0.1, "gradient_checkpointing": True}
        trainer = make_trainer("llama", folder, **options)
        lm = trainer.policy.lm
        assert type(lm) is family
        named = [pair for role in lm.adapters.names for pair in lm.named_trainable(role)]
        before = {name: parameter.detach().clone() for name, parameter in named}
        metrics = trainer.step()
        moved = [(parameter.detach() - before[name]).flatten() for name, parameter in named]
        found.append((torch.cat(moved), metrics))
    (own, metrics), (generic, others) = found
    assert own.norm() > 0.01
    assert (generic - own).norm() < 0.01 * own.norm()
    for name in ("score", "kl", "policy_loss", "value_loss", "entropy", "explained_variance"):
        assert others[f"ppo/{name}"] == pytest.approx(metrics[f"ppo/{name}"], rel=1e-3, abs=1e-5)


def test_one_line_says_that_there_is_no_own_family() -> None:
    [line] = family_notes(AutoConfig.for_model("opt"))
    assert "no own family for 'opt'" in line
    assert "slower; prompts of a group are read once per response" in line
    assert family_notes(AutoConfig.for_model("llama")) == []


MOE = "it is a mixture of experts"
STATE = "keep a state that is no key-value cache"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({}, f"{MOE} .*num_local_experts"),
    "qwen3_moe": ({}, f"{MOE} .*num_experts"),
    "deepseek_v3": ({}, f"{MOE} .*n_routed_experts"),
    "dbrx": ({}, f"{MOE} .*moe_num_experts"),
    "gpt_oss": ({}, MOE),
    "switch_transformers": ({}, MOE),
    "gemma3": ({}, "it reads images or sound .*vision_config"),
    "git": ({}, "it reads images or sound .*vision_config"),
    "gemma3n_text": ({}, "its layers differ in size"),
    "gemma4_text": ({}, "its layers differ in size"),
    "fuyu": ({}, "it is made of several models .*text_config"),
    "mamba": ({}, STATE),
    "falcon_mamba": ({}, STATE),
    "recurrent_gemma": ({}, STATE),
    "rwkv": ({}, STATE),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        f"{STATE} .*conv",
    ),
    "openai-gpt": ({}, "no key-value cache"),
    "xlnet": ({}, "no key-value cache"),
    "bert": ({}, "in both directions .*is_decoder is false"),
    "roberta": ({}, "in both directions"),
    "vit": ({}, "transformers has no text model of this type"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(model_type: str) -> None:
    fields, reason = REFUSED[model_type]
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(
        InputError, match=f"base_model: m: a '{model_type}' model cannot be trained: .*{reason}"
    ):
        family_of(config, "base_model: m")


def test_custom_code_is_refused(tmp_path: Path) -> None:
    classes = {"AutoConfig": "weird.Config", "AutoModelForCausalLM": "weird.Model"}
    values = {"model_type": "weird", "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "weird.py").write_text("raise SystemExit('custom code ran')")
    with pytest.raises(InputError, match="auto_map: custom code is never run"):
        read_model_config(str(tmp_path))


def test_a_bert_that_decodes_is_causal() -> None:
    assert family_of(AutoConfig.for_model("bert", is_decoder=True)) is GenericCausal


def test_gpt_neo_says_null_for_four_times_its_hidden_size(tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    AutoConfig.for_model("gpt_neo", **sizes).save_pretrained(tmp_path)
    assert read_model_config(str(tmp_path)).intermediate_size is None


def test_experts_that_are_switched_off_do_not_count() -> None:
    assert family_of(AutoConfig.for_model("opt", num_experts=0)) is GenericCausal


def falcon(**fields: Any) -> FalconForCausalLM:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, **fields,
    )  # fmt: skip
    return FalconForCausalLM(config)


def load(model: Any, *, trainable: bool = False, **fields: Any) -> LanguageModel:
    config = SFTConfig(output_dir="x", dataset="d", device="cpu", **fields)
    tokenizer = make_tokenizer("llama")
    return load_language_model(config, trainable=trainable, model=model, tokenizer=tokenizer)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_loaded_as_other_families_are(dtype: str, trainable: bool) -> None:
    lm = load(falcon(), trainable=trainable, dtype=dtype)
    assert type(lm) is GenericCausal
    assert lm.module.dtype == (torch.float32 if trainable else getattr(torch, dtype))
    assert all(part.training for part in lm.module.modules())
    assert all(weight.requires_grad is trainable for weight in lm.module.parameters())


def test_dropout_that_cannot_be_switched_off_is_refused() -> None:
    load(falcon())
    with pytest.raises(InputError, match=r"read in training by rlhf.*set all dropout .* to 0"):
        load(falcon(hidden_dropout=0.5))


def test_a_class_that_cannot_be_called_is_refused_with_its_reason() -> None:
    model = falcon()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("sizes\ndo not match")

    model.transformer.h[0].mlp.forward = broken
    with pytest.raises(
        InputError, match=r"'falcon' models cannot be used \(RuntimeError: sizes do"
    ):
        load(model)


class Bidirectional(GenericCausal):
    """Its tokens see what follows, as long as it is there."""

    def _run(self, ids: Any, mask: Any, positions: Any, **options: Any) -> Any:
        states, cache = super()._run(ids, mask, positions, **options)
        return states + states.mean(1, keepdim=True), cache


def test_decoding_that_differs_from_reading_is_refused() -> None:
    lm = Bidirectional(falcon(), make_tokenizer("llama"))
    with pytest.raises(InputError, match="differ from those of transformers"):
        check_agreement(lm)


def test_what_a_stage_cannot_do_with_it_is_said_before_loading() -> None:
    common = {"prompt_dataset": "d", "output_dir": "x", "device": "cpu"}
    config = PPOConfig(
        **common, prompt_sequence_length=5, target_sequence_length=7, compile_decode=True
    )
    opt = AutoConfig.for_model("opt", max_position_embeddings=11)
    assert check_stage(config, opt) == [
        "compile_decode: cannot be used with 'opt' models, which have no family of their own; set "
        "it to false",
        "prompt_sequence_length 5 + target_sequence_length 7 exceed the 11 positions of the model; "
        "lower one of them",
    ]
    config = PPOConfig(**common, gradient_checkpointing=True)
    [problem] = check_stage(config, AutoConfig.for_model("ctrl", n_positions=4096))
    assert "gradient_checkpointing: transformers' class of 'ctrl' models cannot do it" in problem
    assert check_stage(config, AutoConfig.for_model("bloom")) == []  # no limit
    with pytest.raises(InputError, match="compile_decode: cannot be used with 'falcon'"):
        load(falcon()).compile_decoding(4, 8)


SHARED: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"multi_query": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("gpt_bigcode", {"multi_query": True}),
    ("stablelm", {"num_key_value_heads": 2}),
    ("bloom", {}),
]


@pytest.mark.parametrize(("model_type", "fields"), SHARED)
def test_the_cache_of_a_dry_run_is_the_real_one(model_type: str, fields: dict[str, Any]) -> None:
    sizes = {
        "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **sizes, **fields)
    lm = load(AutoModelForCausalLM.from_config(config))
    ppo = PPOConfig(
        prompt_dataset="d", output_dir="x", device="cpu", dtype="float32", batch_size=4,
        prompt_sequence_length=5, target_sequence_length=7, responses_per_prompt=2,
    )  # fmt: skip
    with lm.inference():
        groups = torch.tensor([0, 0, 1, 1])
        state, _ = lm.prefill(TokenBatch.from_lists([[5] * 5] * 2), 7, groups)
        for _ in range(7):
            lm.decode(state, torch.tensor([6] * 4))
    real = sum(tensor.numel() * 4 for layer in state.cache for tensor in layer[:2])
    assert memory_per_role(config, ppo)["cache"] == real


def test_it_is_tuned_and_written_as_transformers_loads_it(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    falcon().save_pretrained(base)
    make_tokenizer("llama").save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"input_text": "a", "output_text": "the cat"}) + "\n") * 4)
    config = SFTConfig(
        base_model=str(base), dataset=str(rows), output_dir=str(out), batch_size=4, train_steps=10,
        learning_rate=0.02, lora=LoRAConfig(rank=4), prompt_sequence_length=16,
        target_sequence_length=8, device="cpu", log_with=[], gradient_checkpointing=True,
    )  # fmt: skip
    train_sft(config)
    lm = load_language_model(config, trainable=False)
    assert type(lm) is GenericCausal
    codec = PromptCodec(lm.tokenizer, lm.layout, 16, 8)
    [prompt] = codec.prompt_rows([PromptText("a", ((0, 1),))])
    [response] = codec.response_rows(["the cat"])
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    loss = {}
    for name, folder in (("before", base), ("after", out / "merged")):
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            loss[name] = float(plain(input_ids=ids, labels=labels).loss)
    assert loss["after"] < 0.5 * loss["before"]


def test_the_docs_name_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [
        line for line in text.splitlines() if line.endswith("| its own family | read once | yes |")
    ]
    assert sorted(re.findall("`(.*?)`", " ".join(rows))) == sorted(FAMILIES)
