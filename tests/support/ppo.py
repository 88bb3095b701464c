"""PPO on tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.tiny import make_tokenizer, randomize_lora, tiny_model

from rlhf.config import PPOConfig
from rlhf.ppo_trainer import PPOTrainer

INPUTS = ["the cat sat", "a dog", "post [summary", "x", "the dog ran to the cat and sat to"]


def count_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [
        len(set(response)) - 0.1 * len(prompt)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def make_config(folder: Path, **fields: Any) -> PPOConfig:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_text": text}) + "\n" for text in INPUTS))
    defaults: dict[str, Any] = {
        "base_model": "tiny", "prompt_dataset": str(prompts), "output_dir": str(folder / "ppo"),
        "batch_size": 8, "micro_batch_size": 3, "train_steps": 2, "learning_rate": 3e-3,
        "critic_learning_rate": 3e-3, "prompt_sequence_length": 24, "target_sequence_length": 6,
        "lora": {"rank": 4}, "log_with": [], "dtype": "float32",
    }  # fmt: skip
    return PPOConfig(**(defaults | fields))


def make_trainer(arch: str, folder: Path, **options: Any) -> PPOTrainer:
    reward_fn = options.pop("reward_fn", count_letters)
    model = options.pop("model", None) or tiny_model(arch)
    generator = options.pop("generator", None)
    trainer = PPOTrainer(
        make_config(folder, **options), reward_fn=reward_fn, model=model,
        tokenizer=make_tokenizer(arch), generator=generator,
    )  # fmt: skip
    randomize_roles(trainer)
    return trainer


def randomize_roles(trainer: PPOTrainer) -> None:
    """Randomize the roles: the zeros of a fresh LoRA B or head would hide mix-ups of roles."""
    for seed, name in enumerate(trainer.policy.lm.adapters.names):
        randomize_lora(trainer.policy.lm, name, seed)
    if trainer.critic is None:
        return
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        weight = trainer.critic.head.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
