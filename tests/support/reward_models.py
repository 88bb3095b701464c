"""Reward models for tests, and a slow reference implementation of their scores."""

from pathlib import Path
from typing import Any

import torch
from support.tiny import randomize_lora, tiny_model

from rlhf.config import LoRAConfig, StageConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model
from rlhf.models.reward_model import (
    RewardModel,
)
from rlhf.models.reward_record import RewardRecord

RANK, ALPHA, LIMIT = 4, 8, 7


def make_reward(lm: LanguageModel, adapter: str | None = "reward", **record: Any) -> RewardModel:
    if adapter is not None:
        lm.add_adapter(adapter, LoRAConfig(rank=RANK, alpha=ALPHA), seed=3)
        randomize_lora(lm, adapter, seed=5)
    facts = {
        "base_model": lm.base_name,
        "revision": None,
        "fingerprint": lm.fingerprint,
        "tokenizer": tokenizer_fingerprint(lm.tokenizer),
        "dtype": "float32",
        "prompt_sequence_length": 32,
        "target_sequence_length": LIMIT,
        "truncation_side": "left",
        "instruction": "",
        "prompting": PromptRenderer().identity,
        "shift": 0.3,
        "scale": 1.7,
    }
    return RewardModel(
        lm, adapter, ScalarHead(lm.hidden_size, seed=9), RewardRecord(**facts | record)
    )


def load(folder: Path, trainable: bool = False) -> LanguageModel:
    config = StageConfig(base_model=str(folder), output_dir="unused", device="cpu")
    return load_language_model(config, trainable=trainable)


def slow_raw_scores(reward: RewardModel, arch: str, rows: zip) -> list[float]:
    """Score one row at a time in a plain model, with the adapter multiplied out by hand."""
    model = tiny_model(arch).eval()
    weights = dict(model.named_parameters())
    matrices = dict(reward.lm.named_trainable("reward"))
    for name, a in matrices.items():
        if "lora_A" in name:
            b = matrices[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
            weights[target].data += ALPHA / RANK * (b @ a).detach()
    head = reward.head.weight.detach()[0].double()
    scores = []
    for prompt, response in rows:
        if arch == "t5":
            states = model(
                input_ids=torch.tensor([prompt]),
                decoder_input_ids=torch.tensor([[0, *response]]),
                output_hidden_states=True,
            ).decoder_hidden_states[-1]
        else:
            ids = torch.tensor([prompt + response])
            states = model(ids, output_hidden_states=True).hidden_states[-1]
        scores.append(float(states[0, -1].detach().double() @ head))
    return scores
