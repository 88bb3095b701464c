"""Random small configurations of encoder-decoder models."""

import random
from collections.abc import Callable
from typing import Any

from transformers import LongT5Config, MT5Config, PretrainedConfig, UMT5Config

VOCAB = 60


def t5_like(draw: random.Random) -> dict[str, Any]:
    heads = draw.choice([1, 2, 4])
    return {
        "vocab_size": VOCAB,
        "d_model": draw.choice([16, 24, 32]),
        "d_kv": draw.choice([4, 8]),
        "d_ff": draw.choice([20, 32]),
        "num_layers": draw.choice([1, 2, 3]),
        "num_decoder_layers": draw.choice([1, 2, 3]),
        "num_heads": heads,
        "relative_attention_num_buckets": draw.choice([4, 8]),
        "relative_attention_max_distance": draw.choice([6, 20]),
        "feed_forward_proj": draw.choice(["relu", "gated-gelu", "gated-silu"]),
        "layer_norm_epsilon": draw.choice([1e-6, 1e-3]),
        "dropout_rate": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": draw.choice([0, 7]),
    }


def longt5(draw: random.Random) -> LongT5Config:
    return LongT5Config(
        **t5_like(draw),
        local_radius=draw.choice([1, 2, 3, 5]),
        global_block_size=draw.choice([2, 3, 4]),
        encoder_attention_type=draw.choice(["local", "transient-global"]),
        tie_word_embeddings=draw.choice([True, False]),
    )


DRAWS: dict[str, Callable[[random.Random], PretrainedConfig]] = {
    "mt5": lambda draw: MT5Config(**t5_like(draw)),
    "umt5": lambda draw: UMT5Config(**t5_like(draw)),
    "longt5": longt5,
}
