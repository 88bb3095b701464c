"""Random tiny configurations of encoder-decoder models, drawn as in `support.families`."""

import random
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCAB = 120  # of `make_tokenizer`


def t5_like(model_type: str, draw: random.Random, **fields: Any) -> PretrainedConfig:
    return AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        d_model=draw.choice([16, 24, 32]),
        d_kv=draw.choice([4, 8]),
        d_ff=draw.choice([20, 32]),
        num_layers=draw.choice([1, 1, 2]),
        num_decoder_layers=draw.choice([1, 2, 2]),
        num_heads=draw.choice([1, 2, 4]),
        relative_attention_num_buckets=draw.choice([4, 8]),
        relative_attention_max_distance=draw.choice([6, 20]),
        feed_forward_proj=draw.choice(["relu", "gated-gelu", "gated-silu"]),
        layer_norm_epsilon=draw.choice([1e-6, 1e-3]),
        initializer_factor=0.4,  # scores have no scale: sharp attention would magnify rounding
        dropout_rate=0.3,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=draw.choice([0, 7]),
        **fields,
    )


def longt5(draw: random.Random) -> PretrainedConfig:
    return t5_like(
        "longt5",
        draw,
        local_radius=draw.choice([1, 2, 3, 5]),
        global_block_size=draw.choice([2, 3, 4]),
        encoder_attention_type=draw.choice(["local", "transient-global"]),
        tie_word_embeddings=draw.choice([True, False]),
    )


def bart_like(model_type: str, draw: random.Random, **fields: Any) -> PretrainedConfig:
    """Sizes and all kinds of dropout, which must not act."""
    heads, drop = draw.choice([1, 2, 4]), {"dropout": 0.3, "activation_dropout": 0.3}
    drop |= {"attention_dropout": 0.3, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
    return AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        d_model=draw.choice([16, 24, 32]),
        encoder_layers=draw.choice([1, 1, 2]),
        decoder_layers=draw.choice([1, 2, 2]),
        encoder_attention_heads=draw.choice([1, 2, 4]),
        decoder_attention_heads=heads,
        encoder_ffn_dim=draw.choice([20, 32]),
        decoder_ffn_dim=draw.choice([20, 32]),
        max_position_embeddings=48,
        activation_function=draw.choice(["relu", "gelu", "swish"]),
        scale_embedding=draw.choice([True, False]),
        pad_token_id=draw.choice([0, 3]),
        bos_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=draw.choice([0, 1, 7]),
        forced_eos_token_id=1,
        tie_word_embeddings=draw.choice([True, False]),
        **drop,
        **fields,
    )


# Types without a family of their own.
BART_LIKE: dict[str, dict[str, Any]] = {
    "bart": {}, "blenderbot": {}, "blenderbot-small": {}, "marian": {}, "mbart": {}, "mvp": {},
    "pegasus": {}, "pegasus_x": {"block_size": 4, "num_global_tokens": 3}, "plbart": {},
}  # fmt: skip


def generic(draw: random.Random) -> PretrainedConfig:
    model_type = draw.choice(list(BART_LIKE))
    return bart_like(model_type, draw, **BART_LIKE[model_type])


# By `model_type`, or by what several of them have in common.
DRAWS: dict[str, Callable[[random.Random], PretrainedConfig]] = {
    "longt5": longt5,
    "mt5": lambda draw: t5_like("mt5", draw),
    "umt5": lambda draw: t5_like("umt5", draw),
    "other encoder-decoders": generic,
}
