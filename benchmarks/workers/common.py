"""What sides of ours share."""

import json
from pathlib import Path
from typing import Any

import flops
from rlhf.config import LoRAConfig


def read_batches(folder: Path) -> list[dict[str, Any]]:
    """Per step the ids of the prompts and the lengths of the responses."""
    batches: list[dict[str, Any]] = json.loads((folder / "batches.json").read_text())
    return batches


def flops_lora(config: LoRAConfig) -> flops.Lora:
    """An adapter as flops.py describes it."""
    targets = None if config.target_modules is None else tuple(config.target_modules)
    return flops.Lora(config.rank, targets, encoder=config.where != "decoder")


def training_fields(spec: dict[str, Any]) -> dict[str, Any]:
    """What the configurations of both trainers take from a comparison."""
    return {
        "base_model": str(Path(spec["folder"]) / "model"),
        "device": spec["device"],
        "batch_size": spec["batch"],
        "prompt_sequence_length": spec["lengths"]["prompt"],
        "target_sequence_length": spec["lengths"]["response"],
        "train_steps": 1000,
        **spec["options"]["config"],
    }
