"""A model that its family does not compute as transformers does is refused when it is loaded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import make_tokenizer, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from rlhf.config import StageConfig
from rlhf.errors import InputError
from rlhf.models import decoding, encoder_decoder
from rlhf.models.decoding import Cached, cached_attention
from rlhf.models.families import FAMILIES
from rlhf.models.families.llama import Llama
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model


def load(model: PreTrainedModel, dtype: str = "float32", **options: Any) -> LanguageModel:
    arch = "t5" if model.config.is_encoder_decoder else "llama"
    fields = {"trainable": False, **options}
    config = StageConfig(output_dir="x", dtype=dtype, device="cpu")
    return load_language_model(config, model=model, tokenizer=make_tokenizer(arch), **fields)


DECODER_ONLY: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}


def rope(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **fields}}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with shared keys": ("llama", {}),
    "llama with one key": ("llama", {"num_key_value_heads": 1}),
    "llama with a key per head": ("llama", {"num_key_value_heads": 4}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 16, "rms_norm_eps": 0.1}),
    "llama of one layer": ("llama", {"num_hidden_layers": 1}),
    "rope linear": ("llama", rope("linear")),
    "rope dynamic": ("llama", rope("dynamic")),
    "rope llama3": ("llama", rope("llama3", **LLAMA3)),
    "rope yarn": ("llama", rope("yarn", original_max_position_embeddings=8)),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 with scores in float32": ("gpt2", {"reorder_and_upcast_attn": True, "n_inner": 48}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "t5 1.0": ("t5", {"feed_forward_proj": "relu"}),
    "t5 1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 with fewer decoder layers": ("t5", {"num_decoder_layers": 1}),
}


def build(model_type: str, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
    """A random model whose every weight counts, biases and norms too."""
    torch.manual_seed(0)
    auto, sizes = AutoModelForCausalLM, DECODER_ONLY
    if model_type == "t5":
        auto, sizes = AutoModelForSeq2SeqLM, T5
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    model: PreTrainedModel = auto.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", [False, True])
def test_every_model_of_our_families_passes(
    kind: str, attention: str, dtype: str, trainable: bool
) -> None:
    model_type, fields = KINDS[kind]
    lm = load(build(model_type, attention, **fields), dtype, trainable=trainable)
    assert type(lm) is FAMILIES[model_type]


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("qwen3", {"head_dim": 8}),  # norms of queries and keys
        ("granite", {"logits_scaling": 4.0}),  # factors in four places
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_family_in_the_place_of_ours_is_refused(
    model_type: str, more: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, model_type, Llama)
    model = build(model_type, **more)
    model.name_or_path = "some/model"
    with pytest.raises(InputError, match=f"some/model: read by rlhf.*'{model_type}'.*LLaMA"):
        load(model, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [1, 4, 5000])
def test_a_window_that_a_family_forgets_is_found(
    window: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is longer than any text of the check."""
    model = build("mistral", sliding_window=window)
    assert load(model, dtype).config.sliding_window == window
    monkeypatch.setitem(FAMILIES, "mistral", Llama)
    with pytest.raises(InputError, match=r"'mistral' model differ .* LLaMA does not compute"):
        load(model, dtype)
    assert model.config.sliding_window == window


LAYERS: dict[str, Callable[[Any], Any]] = {
    "llama": lambda model: model.model.layers[0],
    "t5": lambda model: model.decoder.block[0],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_code_of_transformers_that_has_changed_is_refused(arch: str, dtype: str) -> None:
    model = tiny_model(arch)

    def more(_: Any, __: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(output, Tensor) else (output[0] * 1.5, *output[1:])

    LAYERS[arch](model).register_forward_hook(more)
    with pytest.raises(InputError, match=r"read by rlhf, .* differ from those of transformers"):
        load(model, dtype)


def without_the_first_head(module: Any, queries: Tensor, *parts: Cached) -> Tensor:
    heads = cached_attention(module, queries, *parts)
    return torch.cat([torch.zeros_like(heads[..., :8]), heads[..., 8:]], -1)


def test_decoding_that_differs_from_reading_is_refused(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decoding, encoder_decoder):
        monkeypatch.setattr(module, "cached_attention", without_the_first_head)
    with pytest.raises(InputError, match=r"decoded by rlhf, .* differ from those of transformers"):
        load(tiny_model(arch))


def test_a_broken_checkpoint_is_not_called_another_family(arch: str) -> None:
    model = tiny_model(arch)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    load(model)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_check_leaves_no_trace(arch: str, trainable: bool) -> None:
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in tiny_model(arch).state_dict().items()}
    torch.set_rng_state(before)
    model = tiny_model(arch)
    before = torch.get_rng_state()
    lm = load(model, trainable=trainable)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in lm.module.modules())
    assert all(p.grad is None and p.requires_grad is trainable for p in lm.module.parameters())
    state = lm.module.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
