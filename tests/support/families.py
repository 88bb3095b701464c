"""Random tiny models of each family, drawn from a seed, and what plain transformers says of them.

To add a family, write a function that draws a configuration and put it into `DRAWS`.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from support import encoder_decoders
from support.generic_decoders import generic
from support.tiny import make_tokenizer
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from rlhf.models.families import family_of
from rlhf.models.language_model import LanguageModel

VOCAB = 120  # of `make_tokenizer`
POSITIONS = 48


def decoder(draw: random.Random, *, wide: bool = True) -> dict[str, Any]:
    """Sizes of a decoder: heads that share keys or not, tied or not, heads of another width."""
    heads = draw.choice([2, 4])
    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": draw.choice([16, 32]),
        "intermediate_size": draw.choice([16, 24]),
        "num_hidden_layers": draw.choice([1, 2, 2]),
        "num_attention_heads": heads, "max_position_embeddings": POSITIONS,
        "num_key_value_heads": draw.choice([1, heads // 2, heads]),
        "tie_word_embeddings": draw.random() < 0.5, "attention_dropout": 0.1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rms_norm_eps": draw.choice([1e-6, 1e-2]),
    }  # fmt: skip
    if wide and draw.random() < 0.5:
        fields["head_dim"] = draw.choice([4, 6, 8])
    return fields


def rope(draw: random.Random) -> dict[str, Any]:
    """A kind of rotary positions; the context of `original` tokens is shorter than rows are."""
    original = {"original_max_position_embeddings": 8}
    kind, fields = draw.choice(
        [
            ("default", {}),
            ("default", {}),
            ("linear", {"factor": 2.0}),
            ("dynamic", {"factor": 2.0}),
            ("yarn", {"factor": 4.0, **original}),
            (
                "llama3",
                {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
            ),
        ]
    )
    return {"rope_type": kind, "rope_theta": draw.choice([50.0, 10000.0]), **fields}


def window(draw: random.Random) -> int:
    """One token, a few, and as many as any row has."""
    return draw.choice([1, 2, 3, 5, 8, 64])


def some_windows(draw: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """Windows in some layers."""
    kinds = ["full_attention", "sliding_attention"]
    layers = [draw.choice(kinds) for _ in range(fields["num_hidden_layers"])]
    return {"use_sliding_window": True, "sliding_window": window(draw), "layer_types": layers}


def llama(draw: random.Random) -> PretrainedConfig:
    biases = {name: draw.random() < 0.5 for name in ("attention_bias", "mlp_bias")}
    return LlamaConfig(**decoder(draw), **biases, rope_parameters=rope(draw))


def mistral(draw: random.Random) -> PretrainedConfig:
    size = draw.choice([None, window(draw), window(draw)])
    return MistralConfig(**decoder(draw), sliding_window=size, rope_parameters=rope(draw))


def qwen2(draw: random.Random) -> PretrainedConfig:
    fields = decoder(draw)
    windows = draw.choice([{}, {"use_sliding_window": False}, some_windows(draw, fields)])
    return Qwen2Config(**fields, **windows, rope_parameters=rope(draw))


def qwen3(draw: random.Random) -> PretrainedConfig:
    fields = {"head_dim": 8, **decoder(draw), "attention_bias": draw.random() < 0.5}
    windows = draw.choice([{}, {"use_sliding_window": False}, some_windows(draw, fields)])
    return Qwen3Config(**fields, **windows, rope_parameters=rope(draw))


def smollm3(draw: random.Random) -> PretrainedConfig:
    fields = decoder(draw)
    rotated = [draw.choice([0, 1]) for _ in range(fields["num_hidden_layers"])]
    biases = {name: draw.random() < 0.5 for name in ("attention_bias", "mlp_bias")}
    windows = draw.choice([{}, {}, some_windows(draw, fields)])
    return SmolLM3Config(
        **fields, **biases, **windows, no_rope_layers=rotated, rope_parameters=rope(draw)
    )


def gemma(draw: random.Random) -> dict[str, Any]:
    fields = {"head_dim": 8, **decoder(draw), "attention_bias": draw.random() < 0.5}
    fields["query_pre_attn_scalar"] = draw.choice([4, 16])
    fields["final_logit_softcapping"] = draw.choice([None, 2.0, 30.0])
    windows = some_windows(draw, fields)
    if draw.random() < 0.3:
        del windows["layer_types"]
    del windows["use_sliding_window"]
    return fields | windows


def gemma2(draw: random.Random) -> PretrainedConfig:
    cap = draw.choice([None, 1.0, 50.0])
    return Gemma2Config(**gemma(draw), attn_logit_softcapping=cap, rope_parameters=rope(draw))


def gemma3(draw: random.Random) -> PretrainedConfig:
    tables = {kind: rope(draw) for kind in ("full_attention", "sliding_attention")}
    return Gemma3TextConfig(**gemma(draw), rope_parameters=tables)


def phi3(draw: random.Random) -> PretrainedConfig:
    fields = decoder(draw, wide=False)
    head = fields["hidden_size"] // fields["num_attention_heads"]
    part = draw.choice([0.5, 1.0])
    tables: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
    if draw.random() < 0.5:
        count = int(head * part) // 2
        tables |= {"rope_type": "longrope"} | {
            f"{kind}_factor": [draw.uniform(1, 4) for _ in range(count)]
            for kind in ("short", "long")
        }
        fields |= {"original_max_position_embeddings": POSITIONS // 2}
    tables["partial_rotary_factor"] = part
    size = draw.choice([None, window(draw), window(draw)])
    return Phi3Config(**fields, resid_pdrop=0.1, sliding_window=size, rope_parameters=tables)


def gpt_neox(draw: random.Random) -> PretrainedConfig:
    fields = decoder(draw, wide=False)
    del fields["num_key_value_heads"], fields["rms_norm_eps"]
    kinds = draw.choice(["gelu", "gelu_new", "relu"])
    part = {"partial_rotary_factor": draw.choice([0.25, 0.5, 1.0])}
    return GPTNeoXConfig(
        **fields, hidden_act=kinds, hidden_dropout=0.1, layer_norm_eps=draw.choice([1e-5, 1e-2]),
        use_parallel_residual=draw.random() < 0.5, attention_bias=draw.random() < 0.7,
        rope_parameters=rope(draw) | part,
    )  # fmt: skip


def gpt2(draw: random.Random) -> PretrainedConfig:
    """With the switches of other models of its class, such as Mistral's and Cerebras'."""
    switches = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    return GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=draw.choice([16, 32]),
        n_layer=draw.choice([1, 2, 3]), n_head=draw.choice([1, 2, 4]),
        n_inner=draw.choice([None, 24]), activation_function=draw.choice(["gelu_new", "relu"]),
        layer_norm_epsilon=draw.choice([1e-5, 1e-2]), tie_word_embeddings=draw.random() < 0.5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{switch: draw.random() < 0.5 for switch in switches},
    )  # fmt: skip


# By `model_type`, and all that have no family of their own.
DRAWS: dict[str, Callable[[random.Random], PretrainedConfig]] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "generic": generic,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
    **encoder_decoders.DRAWS,
}


def random_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model, with an LM head of its own if its family's checkpoints have one."""
    family = family_of(config)
    model: Any = family.auto_class.from_config(config, **options)
    if not family.head_is_tied(config):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    if family.is_generic and getattr(config, "decoder_start_token_id", None) == 7:
        model.generation_config.forced_bos_token_id = 2
    return model


def draw_model(model_type: str, seed: int) -> PreTrainedModel:
    """Build a random model of a family, in which every weight counts, biases and norms too."""
    return model_of(DRAWS[model_type](random.Random(f"{model_type} {seed}")), seed)


def model_of(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Build a random model of a configuration."""
    torch.manual_seed(seed)
    # A cap needs the eager kernel; GPT-2's that casts to float32 can do nothing else.
    needed = getattr(config, "attn_logit_softcapping", None) is not None
    eager = needed or (seed % 3 == 0 and not getattr(config, "reorder_and_upcast_attn", False))
    model = random_model(config, attn_implementation="eager" if eager else None)
    with torch.no_grad():
        biases = [tensor for name, tensor in model.named_buffers() if "logits_bias" in name]
        for tensor in [*model.parameters(), *biases]:
            tensor.add_(torch.randn(tensor.shape) * 0.2)
    return model.eval()


def language_model(model: PreTrainedModel, **options: Any) -> LanguageModel:
    """Wrap a model in its family's class; without a check, which would cost more than the test."""
    tokenizer = make_tokenizer("t5" if model.config.is_encoder_decoder else "llama")
    return family_of(model.config)(model, tokenizer, base_name="drawn", **options)


def plain_logits(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Return (R+1, V): transformers' logits before and after each token, from one unpadded row."""
    if model.config.is_encoder_decoder:
        forced = getattr(model.generation_config, "forced_bos_token_id", None)
        start = [model.config.decoder_start_token_id, *([] if forced is None else [forced])]
        decoder = torch.tensor([[*start, *response]])
        told = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": decoder}
        return model(**told, use_cache=False).logits[0, len(start) - 1 :]
    row = torch.tensor([[*prompt, *response]])
    return model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :]


def plain_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Return (R,): log-probabilities of the response's tokens."""
    logprobs = plain_logits(model, prompt, response)[: len(response)].log_softmax(-1)
    return logprobs[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]
