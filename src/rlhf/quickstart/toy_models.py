"""Shapes of the small models that ship with the package."""

from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.families import family_of

Arch = Literal["t5", "llama"]
_WIDTH = 128
_SHAPES: dict[Arch, dict[str, Any]] = {
    "t5": {
        "d_model": _WIDTH,
        "d_kv": 32,
        "num_heads": 4,
        "d_ff": 320,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,  # <pad>, as in all T5
    },
    "llama": {
        "hidden_size": _WIDTH,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        # The default 0.02 is meant for widths of thousands; with it, attention to equal words,
        # which copying needs, would take a thousand steps to emerge instead of two hundred.
        "initializer_range": _WIDTH**-0.5,
        "tie_word_embeddings": True,
    },
}


def make_toy_model(
    arch: Arch, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> PreTrainedModel:
    """Return a randomly initialized model: 1.4 M parameters for T5, 0.8 M for LLaMA."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_SHAPES[arch],
    )
    model: PreTrainedModel = family_of(config).auto_class.from_config(config)
    return model
