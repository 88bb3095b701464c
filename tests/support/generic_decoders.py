"""Random small configurations of causal models that have no family of their own."""

import random
from collections.abc import Callable
from typing import Any

from transformers import (
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GraniteConfig,
    MptConfig,
    Olmo3Config,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    StableLmConfig,
)

IDS: dict[str, Any] = {
    "vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
POSITIONS = 48


def sizes(draw: random.Random) -> dict[str, Any]:
    """Fields that most configurations have."""
    return IDS | {
        "hidden_size": draw.choice([16, 32]),
        "num_hidden_layers": draw.choice([1, 2, 2, 3]),
        "num_attention_heads": draw.choice([2, 4]),
        "tie_word_embeddings": draw.random() < 0.5,
    }


def gated(draw: random.Random) -> dict[str, Any]:
    """The fields of LLaMA's relatives, with as many keys as heads or fewer."""
    fields = sizes(draw) | {"intermediate_size": 24, "max_position_embeddings": POSITIONS}
    return fields | {"num_key_value_heads": draw.choice([1, 2]), "attention_dropout": 0.1}


def opt(draw: random.Random) -> PretrainedConfig:
    """With norms before or after, and with embeddings of another width, as in the 350M model."""
    fields = sizes(draw) | {"ffn_dim": 24, "max_position_embeddings": POSITIONS}
    width = draw.choice([fields["hidden_size"], 12])
    return OPTConfig(
        **fields, do_layer_norm_before=draw.random() < 0.7, word_embed_proj_dim=width,
        dropout=0.1, attention_dropout=0.1, layerdrop=0.5,
    )  # fmt: skip


def bloom(draw: random.Random) -> PretrainedConfig:
    """With ALiBi (Press et al. 2022)."""
    after = draw.random() < 0.5
    return BloomConfig(
        **sizes(draw), apply_residual_connection_post_layernorm=after, hidden_dropout=0.1,
        attention_dropout=0.1,
    )  # fmt: skip


def falcon(draw: random.Random) -> PretrainedConfig:
    """Rotated or with ALiBi, parallel or not, with one key for all heads or one for each."""
    flags = ("alibi", "parallel_attn", "multi_query", "new_decoder_architecture", "bias")
    return FalconConfig(**sizes(draw), **{flag: draw.random() < 0.5 for flag in flags})


def stablelm(draw: random.Random) -> PretrainedConfig:
    flags = ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")
    return StableLmConfig(**gated(draw), **{flag: draw.random() < 0.5 for flag in flags})


def granite(draw: random.Random) -> PretrainedConfig:
    """With factors in four places, one of them between the LM head and the logits."""
    names = (
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    )
    return GraniteConfig(**gated(draw), **{name: draw.uniform(0.3, 3.0) for name in names})


def cohere(draw: random.Random) -> PretrainedConfig:
    """Parallel, with scaled logits."""
    scale = draw.uniform(0.1, 2.0)
    return CohereConfig(**gated(draw), logit_scale=scale, use_qk_norm=draw.random() < 0.5)


def olmo3(draw: random.Random) -> PretrainedConfig:
    """With norms after each part, and windows in some layers.

    Not of one token: transformers' cache would then keep all.
    """
    fields = gated(draw)
    kinds = [
        draw.choice(["full_attention", "sliding_attention"])
        for _ in range(fields["num_hidden_layers"])
    ]
    return Olmo3Config(**fields, layer_types=kinds, sliding_window=draw.choice([2, 3, 5, 8]))


def mpt(draw: random.Random) -> PretrainedConfig:
    """With ALiBi that counts columns, not tokens."""
    return MptConfig(
        **IDS, d_model=draw.choice([16, 32]), n_heads=draw.choice([2, 4]), n_layers=2,
        expansion_ratio=2, max_seq_len=POSITIONS, emb_pdrop=0.1, resid_pdrop=0.1,
        tie_word_embeddings=draw.random() < 0.5,
    )  # fmt: skip


def gpt_neo(draw: random.Random) -> PretrainedConfig:
    """With a window in every other layer."""
    kinds = [[["global", "local"], 1]]
    return GPTNeoConfig(
        **IDS, hidden_size=16, num_heads=2, num_layers=2, attention_types=kinds,
        window_size=draw.choice([1, 2, 3, 8]), max_position_embeddings=POSITIONS,
        resid_dropout=0.1, embed_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip


def gptj(draw: random.Random) -> PretrainedConfig:
    fields = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
    return GPTJConfig(**IDS, **fields, rotary_dim=draw.choice([2, 4]), tie_word_embeddings=False)


def gpt_bigcode(draw: random.Random) -> PretrainedConfig:
    fields = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPTBigCodeConfig(**IDS, **fields, multi_query=draw.random() < 0.5)


def phi(draw: random.Random) -> PretrainedConfig:
    """Parallel, with a bias in the LM head."""
    fields = gated(draw) | {"tie_word_embeddings": False}
    return PhiConfig(**fields, qk_layernorm=draw.random() < 0.5, resid_pdrop=0.1)


KINDS: tuple[Callable[[random.Random], PretrainedConfig], ...] = (
    opt, bloom, falcon, stablelm, granite, cohere, olmo3, mpt, gpt_neo, gptj, gpt_bigcode, phi,
)  # fmt: skip


def generic(draw: random.Random) -> PretrainedConfig:
    """One of them."""
    return draw.choice(KINDS)(draw)
