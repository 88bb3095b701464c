"""Shapes of the small models that ship with the package."""

from typing import Literal

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

Arch = Literal["t5", "llama"]
_WIDTH = 128


def make_toy_model(
    arch: Arch, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> PreTrainedModel:
    """Return a randomly initialized model: 1.4 M parameters for T5, 0.8 M for LLaMA."""
    torch.manual_seed(seed)
    if arch == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=_WIDTH,
                d_kv=32,
                num_heads=4,
                d_ff=320,
                num_layers=3,
                num_decoder_layers=3,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.pad_token_id,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            # The default 0.02 is meant for widths of thousands; with it, attention to equal words,
            # which copying needs, would take a thousand steps to emerge instead of two hundred.
            initializer_range=_WIDTH**-0.5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
