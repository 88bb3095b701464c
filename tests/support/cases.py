"""Tiny policies and reward models on disk, with rows to run them on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.tiny import make_tokenizer, randomize_lora, tiny_model

from rlhf.config import InferenceConfig, LoRAConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.inference import InferenceResult, run_inference
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.families import FAMILIES
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.reward_model import RewardModel
from rlhf.models.reward_record import RewardRecord
from rlhf.models.saving import save_adapter, save_merged

PROMPT_LIMIT, RESPONSE_LIMIT = 24, 8
ROWS: list[dict[str, Any]] = [
    {"input_text": "the cat sat [summary]: ", "output_text": "a cat"},
    {"input_text": "post: the dog ran to the cat and sat", "output_text": ["the dog", "a dog ran"]},
    {"input_text": "a"},
    {
        "input_text": "the dog",
        "candidate_0": " a dog ran",
        "candidate_1": " the",
        "choice": 1,
        "output_text": "the dog",
    },
    {"input_text": "the cat", "candidate_0": " and the cat", "candidate_1": "", "choice": 0},
    {"messages": [{"author": "user", "content": "sat the cat?"}]},
    {"input_text": "0123456789 " * 6},
]


@dataclass
class Case:
    """A policy, a reward model and rows on disk."""

    arch: str
    base: Path
    policy: Path
    reward: Path
    data: Path

    def config(self, output: Path | str, **fields: Any) -> InferenceConfig:
        values = {
            "policy_path": str(self.policy),
            "eval_dataset": str(self.data),
            "reward_model_path": str(self.reward),
            "output_dir": str(output),
            "device": "cpu",
            "batch_size": 3,
            "sampling_strategy": "temperature_sampling",
        }
        return InferenceConfig(**values | fields)

    def run(self, output: Path, **fields: Any) -> InferenceResult:
        return run_inference(self.config(output, **fields))


def load_base(arch: str, folder: Path) -> LanguageModel:
    return FAMILIES[arch](tiny_model(arch), make_tokenizer(arch), base_name=str(folder))


def save_policy(arch: str, base: Path, folder: Path) -> None:
    lm = load_base(arch, base)
    lm.add_adapter("policy", LoRAConfig(rank=4))
    randomize_lora(lm, "policy", std=0.3)
    save_adapter(lm, "policy", folder / "adapter")
    save_merged(lm, "policy", folder / "merged")
    settings = {"prompt_sequence_length": PROMPT_LIMIT, "target_sequence_length": RESPONSE_LIMIT}
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML


def save_reward_model(arch: str, base: Path, folder: Path) -> None:
    lm = load_base(arch, base)
    lm.add_adapter("reward", LoRAConfig(rank=4))
    randomize_lora(lm, "reward", seed=5, std=0.5)
    record = RewardRecord(
        base_model=lm.base_name,
        revision=None,
        fingerprint=lm.fingerprint,
        tokenizer=tokenizer_fingerprint(lm.tokenizer),
        dtype="float32",
        prompt_sequence_length=PROMPT_LIMIT,
        target_sequence_length=RESPONSE_LIMIT,
        truncation_side="left",
        instruction="",
        prompting=PromptRenderer.for_tokenizer(lm.tokenizer).identity,
        shift=0.5,
        scale=2.0,
    )
    RewardModel(lm, "reward", ScalarHead(lm.hidden_size, init_std=1.0), record).save(folder)


def make_case(arch: str, base: Path, folder: Path) -> Case:
    """Write everything below `folder`."""
    case = Case(arch, base, folder / "policy", folder / "reward", folder / "rows.jsonl")
    save_policy(arch, base, case.policy)
    save_reward_model(arch, base, case.reward)
    case.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return case


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
