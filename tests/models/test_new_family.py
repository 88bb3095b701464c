"""A family is one class: one that the package does not know is trained, decoded and written.

Phi 1 and 2 differ from LLaMA in all that a family says: biased layer norms, positions in a part of
each head, attention and feed forward side by side, an LM head with a bias.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.numerics import assert_same_gradients
from support.tiny import make_tokenizer, randomize_lora
from torch import Tensor
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from rlhf.config import LoRAConfig, PPOConfig, SFTConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.attention import rotate, split_heads
from rlhf.models.decoder_only import DecoderOnlyModel, Places
from rlhf.models.families import FAMILIES
from rlhf.models.generation import generate
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model, read_model_config
from rlhf.models.memory import memory_per_role
from rlhf.sft import train_sft


class Phi(DecoderOnlyModel):
    """All that there is to say of it (Li et al. 2023)."""

    name = "Phi"
    adapter_modules = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    has_sequence_classifier = False

    @property
    def layers(self) -> Sequence[Any]:
        return self.module.model.layers

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        x = self.module.model.embed_tokens(ids)
        return x, self.module.model.rotary_emb(x, positions)

    def attention(self, layer: Any) -> Any:
        return layer.self_attn

    def attention_input(self, layer: Any, x: Tensor) -> Tensor:
        return layer.input_layernorm(x)

    def queries(self, layer: Any, h: Tensor, places: Places) -> Tensor:
        return turned(split_heads(layer.self_attn.q_proj(h), layer.self_attn.head_dim), places)

    def keys_values(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        keys, values = (
            split_heads(part(h), layer.self_attn.head_dim)
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        return turned(keys, places), values

    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        return x + layer.self_attn.dense(heads) + layer.mlp(layer.input_layernorm(x))

    def final_norm(self, x: Tensor) -> Tensor:
        return self.module.model.final_layernorm(x)


def turned(states: Tensor, places: Places) -> Tensor:
    width = places[0].shape[-1]
    return torch.cat([rotate(states[..., :width], *places), states[..., width:]], dim=-1)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "phi", Phi)


def write_checkpoint(folder: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, **fields, rope_parameters={
            "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5,
        },
    )  # fmt: skip
    model = PhiForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base")


def load(checkpoint: Path, *, trainable: bool = False, **fields: Any) -> LanguageModel:
    fields = {"base_model": str(checkpoint), "output_dir": "x", "dataset": "d", **fields}
    config = SFTConfig(device="cpu", **fields)
    return load_language_model(config, trainable=trainable)


PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [0, 12, 0, 13]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25, 26], [27]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_gradients_are_those_of_plain_transformers(
    checkpoint: Path, checkpointing: bool
) -> None:
    lm = load(checkpoint, trainable=True, gradient_checkpointing=checkpointing)
    assert type(lm) is Phi
    prompts, responses = map(TokenBatch.from_lists, (PROMPTS, RESPONSES))
    lm.token_logprobs(lm.response_states(prompts, responses), responses).logprobs.sum().backward()
    ours = {name: parameter.grad for name, parameter in lm.module.named_parameters()}

    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = plain(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1)[range(len(response)), response].sum().backward()
    assert_same_gradients(ours, {name: p.grad for name, p in plain.named_parameters()})


def test_its_greedy_responses_are_those_of_plain_transformers(checkpoint: Path) -> None:
    made = generate(load(checkpoint), TokenBatch.from_lists(PROMPTS), max_new_tokens=12,
                    temperature=0.0).responses.tolists()  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for prompt, response in zip(PROMPTS, made, strict=True):
        ids = torch.tensor([prompt])
        told = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **told)
        assert response == expected[0, len(prompt) :].tolist()
    assert len({tuple(response) for response in made}) == len(made)


def test_a_pair_in_one_row_is_two_responses(checkpoint: Path) -> None:
    lm = load(checkpoint)
    lm.add_adapter("reward", LoRAConfig(rank=2))
    randomize_lora(lm, "reward")
    prompts, first = map(TokenBatch.from_lists, (PROMPTS, RESPONSES))
    second = first.select_rows([2, 0, 1])
    with lm.using("reward"), torch.no_grad():
        pair = lm.final_states(
            prompts, TokenBatch.concat([first, second]), torch.arange(len(first)).repeat(2)
        ).chunk(2)
        for states, responses in zip(pair, (first, second), strict=True):
            torch.testing.assert_close(
                states, lm.final_states(prompts, responses), atol=1e-5, rtol=1e-5
            )


def test_it_is_tuned_and_written_as_transformers_loads_it(checkpoint: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"input_text": "a", "output_text": "the cat"}) + "\n") * 4)
    config = SFTConfig(
        base_model=str(checkpoint), dataset=str(rows), output_dir=str(tmp_path / "out"),
        batch_size=4, train_steps=10, learning_rate=0.02, lora=LoRAConfig(rank=4),
        prompt_sequence_length=16, target_sequence_length=8, device="cpu", log_with=[],
    )  # fmt: skip
    train_sft(config)
    tokenizer = make_tokenizer("llama")
    codec = PromptCodec(tokenizer, Phi.prompt_layout(tokenizer), 16, 8)
    (prompt,), (response,) = (
        codec.prompt_rows([PromptText("a", ((0, 1),))]),
        codec.response_rows(["the cat"]),
    )
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    loss = {}
    for name, folder in (("before", checkpoint), ("after", tmp_path / "out" / "merged")):
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            loss[name] = float(plain(input_ids=ids, labels=labels).loss)
    assert loss["after"] < 0.5 * loss["before"]


def test_what_a_dry_run_says_of_it(checkpoint: Path) -> None:
    config = PPOConfig(
        prompt_dataset="d", output_dir="x", device="cpu", dtype="float32", batch_size=2,
        prompt_sequence_length=5, target_sequence_length=7,
    )  # fmt: skip
    state, _ = load(checkpoint).prefill(TokenBatch.from_lists([[5] * 5] * 2), 7)
    layers = (*state.keys, *state.values, *state.prompt_keys, *state.prompt_values)
    real = sum(layer.numel() * 4 for layer in layers)
    assert memory_per_role(read_model_config(str(checkpoint)), config)["cache"] == real


def test_a_field_that_it_does_not_compute_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "normed", qk_layernorm=True)
    with pytest.raises(InputError, match=r"'phi' model differ .* Phi does not compute"):
        load(folder)
