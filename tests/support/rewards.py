"""Several rewards for tiny policies: reward models on their base, a classifier, functions."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.classifiers import save_classifier
from support.ppo import INPUTS, make_config
from support.tiny import make_tokenizer, randomize_lora, tiny_model

from rlhf import Reward
from rlhf.config import LoRAConfig, PPOConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.families import FAMILIES
from rlhf.models.heads import ScalarHead
from rlhf.models.reward_model import RewardModel
from rlhf.models.reward_record import RewardRecord

ROWS: list[dict[str, Any]] = [
    {"input_text": text, "target": number, "tags": [f"t{number}"]}
    for number, text in enumerate(INPUTS)
]
del ROWS[1]["target"]
ROWS[2]["target"] = None


def save_base(arch: str, folder: Path) -> Path:
    base = folder / "base"
    if not base.exists():
        tiny_model(arch).save_pretrained(base)
        make_tokenizer(arch).save_pretrained(base)
    return base


def save_reward(arch: str, folder: Path, name: str, seed: int) -> str:
    """A reward model with random weights on the base that the policies here have."""
    base, tokenizer = save_base(arch, folder), make_tokenizer(arch)
    lm = FAMILIES[arch](tiny_model(arch), tokenizer, base_name=str(base))
    lm.add_adapter("reward", LoRAConfig(rank=4))
    randomize_lora(lm, "reward", seed, std=0.3)
    record = RewardRecord(
        base_model=str(base), revision=None, fingerprint=lm.fingerprint, dtype="float32",
        tokenizer=tokenizer_fingerprint(tokenizer), prompt_sequence_length=24,
        target_sequence_length=6, truncation_side="left", instruction="",
        prompting=PromptRenderer.for_tokenizer(tokenizer, "").identity, shift=0.3, scale=2.0,
    )  # fmt: skip
    head = ScalarHead(lm.hidden_size, seed=seed, init_std=1.0)
    RewardModel(lm, "reward", head, record).save(folder / name)
    return str(folder / name)


def near_target(prompts: Sequence[str], responses: Sequence[str], target: Any) -> list[float]:
    """A rule that reads a column, which some rows lack."""
    return [
        -0.1 * abs(len(response) - (goal or 0))
        for response, goal in zip(responses, target, strict=True)
    ]


async def short(
    prompts: Sequence[str], responses: Sequence[str], response_tokens: Any, finished: Any
) -> list[float]:
    await asyncio.sleep(0)
    return [
        float(ended) - 0.5 * count for count, ended in zip(response_tokens, finished, strict=True)
    ]


def config_of(arch: str, folder: Path, **fields: Any) -> PPOConfig:
    config = make_config(folder, base_model=str(save_base(arch, folder)), **fields)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    Path(str(config.prompt_dataset)).write_text(rows)
    return config


def four_rewards(arch: str, folder: Path, **fields: Any) -> tuple[PPOConfig, list[Any]]:
    """Two reward models on the policy's base, a classifier, and two functions."""
    rewards = [
        {"path": save_reward(arch, folder, "second", 5), "weight": -0.5},
        {"path": str(save_classifier(arch, folder)), "label": "hate", "weight": 0.25,
         "name": "toxicity"},
    ]  # fmt: skip
    first = save_reward(arch, folder, "first", 4)
    config = config_of(arch, folder, reward_model_path=first, rewards=rewards, **fields)
    return config, [Reward(near_target, weight=2.0), Reward(short, weight=0.0, name="length")]
