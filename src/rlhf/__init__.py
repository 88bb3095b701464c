"""Reinforcement learning from human feedback for T5, LLaMA and their relatives.

`import rlhf` is cheap: every name is imported on first use, so that command-line help and
configuration work without loading torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config import (
        DPOConfig,
        InferenceConfig,
        LoRAConfig,
        PipelineConfig,
        PPOConfig,
        RewardModelConfig,
        ScoreConfig,
        SFTConfig,
        load_config,
    )
    from rlhf.dpo import DPOTrainer, train_dpo
    from rlhf.errors import InputError, StoppedBySignal
    from rlhf.inference import run_inference
    from rlhf.pipeline import run_pipeline
    from rlhf.ppo.reward_parts import Reward
    from rlhf.ppo_trainer import PPOTrainer, train_ppo
    from rlhf.reward_model import RewardModelTrainer, train_reward_model
    from rlhf.score import run_score
    from rlhf.sft import SFTTrainer, train_sft

_HOMES = {
    "DPOConfig": "rlhf.config",
    "DPOTrainer": "rlhf.dpo",
    "InferenceConfig": "rlhf.config",
    "InputError": "rlhf.errors",
    "LoRAConfig": "rlhf.config",
    "PPOConfig": "rlhf.config",
    "PPOTrainer": "rlhf.ppo_trainer",
    "PipelineConfig": "rlhf.config",
    "Reward": "rlhf.ppo.reward_parts",
    "RewardModelConfig": "rlhf.config",
    "RewardModelTrainer": "rlhf.reward_model",
    "SFTConfig": "rlhf.config",
    "SFTTrainer": "rlhf.sft",
    "ScoreConfig": "rlhf.config",
    "StoppedBySignal": "rlhf.errors",
    "load_config": "rlhf.config",
    "run_inference": "rlhf.inference",
    "run_pipeline": "rlhf.pipeline",
    "run_score": "rlhf.score",
    "train_dpo": "rlhf.dpo",
    "train_ppo": "rlhf.ppo_trainer",
    "train_reward_model": "rlhf.reward_model",
    "train_sft": "rlhf.sft",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "InferenceConfig",
    "InputError",
    "LoRAConfig",
    "PPOConfig",
    "PPOTrainer",
    "PipelineConfig",
    "Reward",
    "RewardModelConfig",
    "RewardModelTrainer",
    "SFTConfig",
    "SFTTrainer",
    "ScoreConfig",
    "StoppedBySignal",
    "load_config",
    "run_inference",
    "run_pipeline",
    "run_score",
    "train_dpo",
    "train_ppo",
    "train_reward_model",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rlhf-ppo")
    except PackageNotFoundError:  # running from a source tree that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
