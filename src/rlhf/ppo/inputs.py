"""Input of a PPO run: what is read and checked before any weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf import objectives
from rlhf.config import PPOConfig, RewardModelConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import PromptData
from rlhf.errors import together
from rlhf.files.local_copy import recorded_base
from rlhf.files.output import path_in
from rlhf.files.run_folder import Run
from rlhf.files.storage import exists
from rlhf.models.reward_record import RECORD_FILE, read_record
from rlhf.ppo.reward_parts import (
    RewardFunctions,
    RewardPart,
    check_columns,
    check_models,
    read_rewards,
    rewards_identity,
    uses_of_rows,
)
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
    rewards: Sequence[RewardPart]


def read_ppo_inputs(
    config: PPOConfig,
    trainer: type[Trainer],
    *,
    reward_fn: RewardFunctions | None = None,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    to_be_written: str | None = None,
) -> PPOInputs:
    """Read and check everything that can be checked without weights.

    Args:
        config: The stage's configuration.
        trainer: Class that will train.
        reward_fn: Functions of texts, besides the rewards of the configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        to_be_written: Reward model's folder that need not be there yet.

    Raises:
        InputError: Everything that is wrong, rows first, then limits.
    """
    rewards = read_rewards(config, reward_fn)
    check_estimator(config)
    inputs = StageInputs(config, model, tokenizer)
    uses = uses_of_rows(rewards)
    data = {
        "prompt_dataset": inputs.read("prompt_dataset", uses=uses),
        "eval_dataset": inputs.read("eval_dataset", uses=uses),
    }
    run = inputs.finish(**rewards_identity(rewards), optimizer=trainer.optimizer_settings())
    inputs.lines += _check_rewards(rewards, config, inputs.renderer, data, to_be_written)
    return PPOInputs(
        inputs.tokenizer,
        inputs.renderer,
        data["prompt_dataset"],
        data["eval_dataset"],
        inputs.lines,
        run,
        rewards,
    )


def check_rewards_in_pipeline(
    config: PPOConfig,
    renderer: PromptRenderer,
    data: Mapping[str, PromptData],
    *,
    reward_fn: RewardFunctions | None = None,
) -> None:
    """Check all rewards but the reward model that the pipeline makes, before any stage runs.

    Args:
        config: The stage's configuration.
        renderer: Renders the policy's prompts.
        data: Field of the configuration to the rows that were read.
        reward_fn: Functions of texts, besides the rewards of the configuration.

    Raises:
        InputError: All that is wrong with them.
    """
    rewards = read_rewards(config, reward_fn)
    _check_rewards(rewards, config, renderer, data, made_later(config))


def made_later(config: PPOConfig) -> str | None:
    """Return the reward model's folder if the pipeline has yet to write it, else None.

    The pipeline writes it beside PPO's own folder.
    """
    path = config.reward_model_path
    own = f"{config.output_dir.rpartition('/')[0]}/{RewardModelConfig.folder}"
    return path if path == own and not exists(path_in(path, RECORD_FILE)) else None


def _check_rewards(
    rewards: Sequence[RewardPart],
    config: PPOConfig,
    renderer: PromptRenderer,
    data: Mapping[str, PromptData | None],
    to_be_written: str | None,
) -> list[str]:
    """Check columns and reward models; return what the user should know of them."""
    prompts = data["prompt_dataset"]
    conversations = prompts is not None and prompts.report.conversations > 0
    _, lines = together(
        lambda: check_columns(rewards, data),
        lambda: check_models(rewards, config, renderer, conversations, to_be_written),
    )
    found: list[str] = lines
    return found


def check_estimator(config: PPOConfig) -> None:
    """Check that the estimators that the configuration names, of advantages and KL, exist.

    Raises:
        InputError: If one does not.
    """
    objectives.find_estimator(config.advantage)
    objectives.find_kl(config.kl_estimator)


def other_bases(config: PPOConfig) -> list[str]:
    """Return the reward models' bases that are not the policy's, each once; needs no weights."""
    found: dict[str, None] = {}
    for entry in config.reward_models:
        path = entry.path or ""
        record = read_record(path) if exists(path) else None
        if record is not None and record.base_model != config.base_model:
            found[recorded_base(record.base_model, f"reward_model_path: {path}")[0]] = None
    return list(found)
