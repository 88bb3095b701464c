"""Tiny sequence classifiers of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from support.tiny import make_tokenizer, tiny_model
from transformers import LlamaForSequenceClassification, T5ForSequenceClassification

from rlhf.data.special_tokens import save_tokenizer
from rlhf.models.families import FAMILIES

LABELS = ["nothate", "hate", "other"]


def save_classifier(arch: str, folder: Path, labels: Sequence[str] = LABELS) -> Path:
    """Write a classifier with random weights on the tiny model's configuration."""
    config = tiny_model(arch).config
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    kinds = {"t5": T5ForSequenceClassification, "llama": LlamaForSequenceClassification}
    torch.manual_seed(11)
    model = kinds[arch](config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "score" in name or "classification_head" in name:
                weight.normal_(std=0.5)
    path = folder / f"classifier-{arch}"
    model.save_pretrained(path)
    tokenizer = make_tokenizer(arch)
    layout = FAMILIES[arch].prompt_layout(tokenizer)
    save_tokenizer(tokenizer, layout.prefix_ids, layout.suffix_ids, path)
    return path
