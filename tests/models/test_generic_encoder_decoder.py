"""Encoder-decoder models without a family of their own.

Random configurations of many types are in `test_families.py`. Here the same T5 checkpoint is
computed by its own family and by the generic one; BART stands for all others.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo import make_trainer
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from support.two_families import assert_read_alike, assert_sampled_alike
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from rlhf.config import LoRAConfig, PPOConfig, SFTConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.families import FAMILIES, family_notes, family_of
from rlhf.models.families.generic_encoder_decoder import GenericEncoderDecoder
from rlhf.models.families.t5 import T5
from rlhf.models.generation import generate
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import check_limits, load_language_model, read_model_config
from rlhf.models.memory import memory_per_role
from rlhf.models.saving import save_merged
from rlhf.sft import train_sft

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [0, 12, 0, 13]]
RESPONSES = [[20, 21, 0, 22, 1], [1], [23, 0], [24, 25, 26], []]
GROUPS = torch.tensor([2, 0, 1, 0, 2])
START, EOS, BOS, LANGUAGE = 5, 1, 2, 30


def both(untied: bool, **options: Any) -> tuple[LanguageModel, LanguageModel]:
    """The same weights in T5's own family and in the generic one."""
    models = [tiny_model("t5", untied=untied) for _ in range(2)]
    for model in models:
        model.generation_config.eos_token_id = list(range(1, 30))  # so that responses end
    own, generic = (
        family(model, make_tokenizer("t5"), base_name="tiny", **options)
        for family, model in zip((T5, GenericEncoderDecoder), models, strict=True)
    )
    if not options:
        for lm in (own, generic):
            lm.add_adapter("policy", LoRAConfig(rank=4, where="decoder", target_modules=list("qv")))
            randomize_lora(lm, "policy")
    return own, generic


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_states_and_gradients_are_those_of_the_own_family(trainable: bool, untied: bool) -> None:
    prompts, responses = map(TokenBatch.from_lists, (PROMPTS, RESPONSES))
    pair = both(untied, trainable=True) if trainable else both(untied)
    assert_read_alike(pair, None if trainable else "policy", prompts, responses, GROUPS)


def test_sampled_rollouts_are_those_of_the_own_family() -> None:
    assert_sampled_alike(both(untied=False), TokenBatch.from_lists(PROMPTS), GROUPS)


def test_a_step_of_ppo_is_that_of_the_own_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for family in (T5, GenericEncoderDecoder):
        monkeypatch.setitem(FAMILIES, "t5", family)
        folder = tmp_path / family.__name__
        folder.mkdir()
        options = {"responses_per_prompt": 2, "kl_coeff": 0.1, "gradient_checkpointing": True}
        trainer = make_trainer("t5", folder, **options)
        lm = trainer.policy.lm
        assert type(lm) is family
        named = [pair for role in lm.adapters.names for pair in lm.named_trainable(role)]
        before = {name: parameter.detach().clone() for name, parameter in named}
        metrics = trainer.step()
        moved = {name: (parameter.detach() - before[name]).flatten() for name, parameter in named}
        found.append((torch.cat([moved[name] for name in sorted(moved)]), metrics))
    (own, metrics), (generic, others) = found
    assert own.norm() > 0.01
    assert (generic - own).norm() < 0.01 * own.norm()
    for name in ("score", "kl", "policy_loss", "value_loss", "entropy", "explained_variance"):
        assert others[f"ppo/{name}"] == pytest.approx(metrics[f"ppo/{name}"], rel=1e-3, abs=1e-5)


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3,
        max_position_embeddings=48, pad_token_id=0, bos_token_id=BOS, eos_token_id=EOS,
        decoder_start_token_id=START, forced_eos_token_id=EOS,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.randn(1, 120))
    model.generation_config.update(forced_bos_token_id=BOS, no_repeat_ngram_size=2)
    return model


def make_bart_tokenizer(template: str = "<s> $A </s>") -> PreTrainedTokenizerFast:
    """Build one that puts its special tokens around a text as BART's does, or mBART's."""
    tokenizer = make_tokenizer("t5")
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("<s>", "<unk>"),
        special_tokens=[("<unk>", BOS), ("</s>", EOS), ("en", LANGUAGE)],
    )
    return tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    bart().save_pretrained(tmp_path / "base")
    make_bart_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(checkpoint: Path, *, trainable: bool = False, **fields: Any) -> LanguageModel:
    config = SFTConfig(
        base_model=str(checkpoint), output_dir="x", dataset="d", device="cpu", **fields
    )
    return load_language_model(config, trainable=trainable)


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("<s> $A </s>", [BOS], [EOS]),  # BART
        ("$A </s>", [], [EOS]),  # Pegasus
        ("$A </s> en", [], [EOS, LANGUAGE]),  # mBART
        ("en $A </s>", [LANGUAGE], [EOS]),  # mBART-50
        ("$A", [], [EOS]),
    ],
)
def test_a_prompt_has_the_tokens_that_its_tokenizer_adds(
    template: str, before: list[int], after: list[int]
) -> None:
    tokenizer = make_bart_tokenizer(template)
    codec = PromptCodec(tokenizer, GenericEncoderDecoder.prompt_layout(tokenizer), 9, 9)
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert codec.prompt_ids(PromptText("the cat", ((0, 7),))) == [*before, *ids, *after]
    assert codec.response_ids("the cat") == [*ids, EOS]


def test_what_generation_forces_is_read_before_a_response(checkpoint: Path, tmp_path: Path) -> None:
    lm = load(checkpoint)
    assert lm.start_ids == (START, BOS)
    lm.add_adapter("policy", LoRAConfig(rank=2))
    randomize_lora(lm, "policy")
    with lm.using("policy"):
        made = generate(lm, TokenBatch.from_lists(PROMPTS), max_new_tokens=9, temperature=0.0)
    save_merged(lm, "policy", tmp_path / "merged")
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    for prompt, response in zip(PROMPTS, made.responses.tolists(), strict=True):
        ids = torch.tensor([prompt])
        told = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)
        assert told.tolist() == [[START, BOS, *response]]
    assert len({tuple(row) for row in made.responses.tolists()}) > 1


def test_it_is_tuned_and_written_as_transformers_loads_it(checkpoint: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"input_text": "a", "output_text": "the cat"}) + "\n") * 4)
    config = SFTConfig(
        base_model=str(checkpoint), dataset=str(rows), output_dir=str(tmp_path / "out"),
        batch_size=4, train_steps=10, learning_rate=0.02, lora=LoRAConfig(rank=4),
        prompt_sequence_length=16, target_sequence_length=8, device="cpu", log_with=[],
    )  # fmt: skip
    train_sft(config)
    tokenizer = make_bart_tokenizer()
    loss = {}
    for name, folder in (("before", checkpoint), ("after", tmp_path / "out" / "merged")):
        plain = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        prompt, labels = (
            tokenizer(text, return_tensors="pt")["input_ids"] for text in ("a", "the cat")
        )
        with torch.no_grad():  # the labels begin with BOS, as BART's do
            logits = plain(input_ids=prompt, labels=labels).logits[0, 1:]
        loss[name] = float(torch.nn.functional.cross_entropy(logits, labels[0, 1:]))
    assert loss["after"] < 0.5 * loss["before"]


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_an_adapter_sits_on_one_part(where: str) -> None:
    lm = GenericEncoderDecoder(bart(), make_bart_tokenizer())
    lm.add_adapter("policy", LoRAConfig(rank=2, where=where))
    names = {name.rpartition(".lora_")[0] for name, _ in lm.named_trainable("policy")}
    layers = 2 * 6 if where == "encoder" else 3 * 10
    assert len(names) == layers
    assert all(name.startswith(f"model.{where}.layers.") for name in names)
    prompts = TokenBatch.from_lists(PROMPTS)
    with lm.using("policy"):
        assert (lm.with_states(prompts, 2) is prompts) == (where == "encoder")


def test_what_a_dry_run_says_of_it(checkpoint: Path) -> None:
    config = PPOConfig(
        prompt_dataset="d", output_dir="x", device="cpu", dtype="float32", batch_size=2,
        responses_per_prompt=2, prompt_sequence_length=5, target_sequence_length=7,
    )  # fmt: skip
    lm, prompts = load(checkpoint), TokenBatch.from_lists([[5] * 5])
    lm.module.generation_config.forced_bos_token_id = None  # which would be one token more
    with lm.inference():
        state, _ = lm.prefill(prompts, 7, torch.tensor([0, 0]))
        for _ in range(6):
            lm.decode(state, torch.tensor([6, 7]))
    caches = (state.cache.self_attention_cache, state.cache.cross_attention_cache)
    real = sum(4 * (p.keys.numel() + p.values.numel()) for c in caches for p in c.layers)
    assert memory_per_role(read_model_config(str(checkpoint)), config)["cache"] == real


def test_the_encoder_and_the_decoder_have_limits_of_their_own(checkpoint: Path) -> None:
    config = read_model_config(str(checkpoint))
    assert check_limits(config, 48, 46) == []
    [prompt, response] = check_limits(config, 49, 47)
    assert "prompt_sequence_length 49 exceeds the 48 positions of the model's encoder" in prompt
    assert "target_sequence_length 47 exceeds the 48 positions of the model's decoder" in response


def test_a_model_that_does_not_say_what_its_decoder_reads_first(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    values["decoder_start_token_id"] = None
    (checkpoint / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config.json: decoder_start_token_id is missing; set it"):
        read_model_config(str(checkpoint))


def test_a_configuration_without_that_field(tmp_path: Path) -> None:
    AutoConfig.for_model("plbart").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"config.json: decoder_start_token_id is missing; set it"):
        read_model_config(str(tmp_path))


def test_a_forced_token_that_the_model_does_not_have(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "generation_config.json").read_text())
    values["forced_bos_token_id"] = 120
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=r"generation_config.json: forced_bos_token_id is 120, exp"
    ):
        read_model_config(str(checkpoint))


def test_one_line_says_that_there_is_no_own_family() -> None:
    [line] = family_notes(AutoConfig.for_model("pegasus"))
    assert "no own family for 'pegasus'" in line
    assert "slower; each response of a group caches its prompt" in line
    assert family_notes(AutoConfig.for_model("umt5")) == []


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bigbird_pegasus", "the states of a prompt depend on its padding"),
        ("encoder-decoder", "it is made of several models .*decoder, encoder"),
        ("fsmt", "its decoder is not called as others are"),
        ("led", "which tokens have global attention"),
        ("m2m_100", "its decoder gives PAD no position"),
        ("nllb-moe", "it is a mixture of experts"),
        ("prophetnet", "its decoder predicts several tokens at once"),
        ("seamless_m4t", "its decoder gives PAD no position"),
        ("switch_transformers", "it is a mixture of experts"),
        ("t5gemma", "it is made of several models"),
        ("whisper", "transformers has no text model of this type"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(model_type: str, reason: str) -> None:
    fields = {"langs": ["en", "de"]} if model_type == "fsmt" else {}
    parts = {name: AutoConfig.for_model("bert").to_dict() for name in ("encoder", "decoder")}
    fields = parts if model_type == "encoder-decoder" else fields
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(InputError, match=f"'{model_type}' model cannot be trained: .*{reason}"):
        family_of(config)
