"""Input of a PPO run: what is read and checked before any weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import PromptData
from rlhf.errors import InputError
from rlhf.files.local_copy import recorded_base
from rlhf.files.run_folder import Run
from rlhf.models.content import weights_fingerprint
from rlhf.models.reward_model import (
    check_reward_model,
    limit_lines,
)
from rlhf.models.reward_record import read_record
from rlhf.models.scorers import RewardFunction
from rlhf.training.inputs import StageInputs
from rlhf.training.trainer import Trainer


@dataclass(frozen=True)
class PPOInputs:
    """Validated data of a run, read before any model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    prompts: PromptData
    eval_prompts: PromptData | None
    lines: Sequence[str]
    run: Run


def read_ppo_inputs(
    config: PPOConfig,
    trainer: type[Trainer],
    *,
    reward_fn: RewardFunction | None = None,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward_model_exists: bool = True,
) -> PPOInputs:
    """Read and check everything that can be checked without weights.

    Args:
        config: The stage's configuration.
        trainer: Class that will train.
        reward_fn: A function of texts instead of `config.reward_model_path`.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        reward_model_exists: Whether to check `config.reward_model_path`.

    Raises:
        InputError: Everything that is wrong, rows first, then limits.
    """
    if (reward_fn is None) == (config.reward_model_path is None):
        raise InputError("reward_model_path: give it or a reward_fn, one of the two")
    check_estimator(config)
    inputs = StageInputs(config, model, tokenizer)
    prompts = inputs.read("prompt_dataset")
    eval_prompts = inputs.read("eval_dataset")
    scorer = weights_fingerprint(config.reward_model_path) if config.reward_model_path else ""
    run = inputs.finish(reward_model_path=scorer, optimizer=trainer.optimizer_settings())
    assert prompts is not None
    if config.reward_model_path and reward_model_exists:
        check_reward_model(
            config.reward_model_path, inputs.renderer, prompts.report.conversations > 0
        )
        inputs.lines += limit_lines(config.reward_model_path, config)
    return PPOInputs(inputs.tokenizer, inputs.renderer, prompts, eval_prompts, inputs.lines, run)


def check_estimator(config: PPOConfig) -> None:
    """Check that the estimators that the configuration names, of advantages and KL, exist.

    Raises:
        InputError: If one does not.
    """
    objectives.find_estimator(config.advantage)
    objectives.find_kl(config.kl_estimator)


def other_base(config: PPOConfig) -> str | None:
    """Return the reward model's base if it is not the policy's; needs no weights."""
    record = read_record(config.reward_model_path) if config.reward_model_path else None
    if record is None or record.base_model == config.base_model:
        return None
    return recorded_base(record.base_model, f"reward_model_path: {config.reward_model_path}")
