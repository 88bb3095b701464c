"""Builders of the tiny random models and tokenizers for tests."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf.models.language_model import LanguageModel

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()[]{}<>/\\|@#$%^&*-_=+~`\nABCDEFGHIJ"
WORDS = ["▁the", "▁a", "▁cat", "▁dog", "▁sat", "▁ran", "▁to", "▁and", "▁post", "▁ [", "summary"]


def make_tokenizer(arch: str) -> PreTrainedTokenizerFast:
    """Build one with about 120 tokens. As in real ones, LLaMA's PAD is UNK; T5 decodes from PAD."""
    specials = ["<pad>", "</s>", "<unk>"] if arch == "t5" else ["<unk>", "<s>", "</s>"]
    pieces = [*specials, "▁", *LETTERS, *WORDS]
    vocab = [(piece, -1.0 if piece in WORDS else -5.0) for piece in dict.fromkeys(pieces)]
    unk = specials.index("<unk>")
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk, byte_fallback=False))
    if arch == "t5":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = {
            "pad_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def tiny_model(
    arch: str, seed: int = 0, *, untied: bool = False, vocab: int = 120, layers: int = 2
) -> PreTrainedModel:
    """Build a random model; `untied` gives T5 v1.1's separate LM head and no output scaling."""
    torch.manual_seed(seed)
    if arch == "t5":
        config = T5Config(
            vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
            eos_token_id=1, dropout_rate=0.1, relative_attention_max_distance=32,
            tie_word_embeddings=not untied,
        )  # fmt: skip
        model: PreTrainedModel = T5ForConditionalGeneration(config)
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab, 32) * 0.3)
    else:
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, attention_dropout=0.1,
            tie_word_embeddings=not untied,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # larger than the usual 0.02, so that logits differ clearly
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(5)
    return model


def randomize_lora(lm: LanguageModel, adapter: str, seed: int = 1, std: float = 0.1) -> None:
    """Give the adapter a random B: zeros would hide a mix-up of roles."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_trainable(adapter):
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.to(parameter.device) * std)
