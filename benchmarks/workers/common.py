"""Helpers shared by our sides."""

import json
from pathlib import Path
from typing import Any

import flops
from rlhf.config import LoRAConfig


def read_batches(folder: Path) -> list[dict[str, Any]]:
    """Return per step the ids of the prompts and the lengths of the responses."""
    batches: list[dict[str, Any]] = json.loads((folder / "batches.json").read_text())
    return batches


def flops_lora(config: LoRAConfig) -> flops.Lora:
    """Return an adapter in the form that flops.py expects."""
    targets = None if config.target_modules is None else tuple(config.target_modules)
    return flops.Lora(config.rank, targets, encoder=config.where != "decoder")


def training_fields(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that both trainers' configurations take from a comparison."""
    return {
        "base_model": str(Path(spec["folder"]) / "model"),
        "device": spec["device"],
        "batch_size": spec["batch"],
        "prompt_sequence_length": spec["lengths"]["prompt"],
        "target_sequence_length": spec["lengths"]["response"],
        "train_steps": 1000,
        **spec["options"]["config"],
    }
