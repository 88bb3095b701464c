"""What a stage is, in one record: its command, what it runs and reads, and what its card says.

A stage's fields, and its place in the pipeline, belong to its configuration. Nothing is imported
here before a stage runs, so that the command line stays quick.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import (
    DPOConfig,
    InferenceConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    StageConfig,
)
from rlhf.config.pipeline import add_section, remove_section

# `candidates`: those rows of a file that have candidates, which may be none.
RowKind = Literal["preference", "candidates", "prompt", "demonstration"]
Function = str | Callable[..., Any]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        output_dir: Its folder.
        metrics: Final metrics, as in metrics.json; empty after a dry run.
    """

    output_dir: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Reads:
    """Files that a stage reads.

    Attributes:
        field: The field of its configuration that names them; nothing is read where it is None.
        kind: What their rows must be.
    """

    field: str
    kind: RowKind


@dataclass(frozen=True)
class Card:
    """What the model card of a stage's folder says, beside figures and settings.

    Attributes:
        title: Its heading.
        limits: What the model must not be taken for, in full sentences.
        holds: What is in the folder, which decides how it is loaded.
    """

    title: str
    limits: str
    holds: Literal["language model", "reward model"] = "language model"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        config: Its configuration, which also says its name and its folder in the pipeline.
        command: Its command, `rlhf COMMAND`.
        help: What the command does, for `--help`.
        run: Runs it: takes the configuration, returns a `RunResult`. Either a function or
            "module:function", which is imported at the first call.
        dry_run: Runs it dry in a pipeline, where what earlier stages make may be missing. None:
            the pipeline only says where the stage would write.
        check: Finds what is wrong with a configuration before any file is read; takes it, and
            raises `InputError`.
        check_data: The same for a configuration together with its rows, before any stage runs;
            takes it, the renderer of its prompts, the rows by field, and what the pipeline was
            given for the stage.
        reads: The files that the pipeline checks before any stage runs, in order.
        card: Its model card, if it has one.
    """

    config: type[StageConfig]
    command: str
    help: str
    run: Function
    dry_run: Function | None = None
    check: Function | None = None
    check_data: Function | None = None
    reads: tuple[Reads, ...] = ()
    card: Card | None = None

    @property
    def name(self) -> str:
        """Its name in configurations, files and messages."""
        return self.config.stage


def call(function: Function, *arguments: Any, **options: Any) -> Any:
    """Call a function of a stage record, importing it if it is given by name."""
    if isinstance(function, str):
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments, **options)
    return function(*arguments, **options)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            config=SFTConfig,
            command="sft",
            help="Fine-tune a model on demonstrations.",
            run="rlhf:train_sft",
            dry_run="rlhf:train_sft",
            reads=(Reads("dataset", "demonstration"), Reads("eval_dataset", "demonstration")),
            card=Card(
                "Supervised fine-tuning",
                "It imitates its demonstrations, mistakes and tone included.",
            ),
        ),
        Stage(
            config=RewardModelConfig,
            command="reward-model",
            help="Train a reward model on preference pairs.",
            run="rlhf:train_reward_model",
            dry_run="rlhf:train_reward_model",
            reads=(
                Reads("preference_dataset", "preference"),
                Reads("normalization_dataset", "demonstration"),
                Reads("eval_dataset", "candidates"),
            ),
            card=Card(
                "Reward model",
                "Its scores compare responses to one prompt as the annotators of its training "
                "pairs did. They mean little across prompts, on other kinds of text, or for "
                "responses far from those it was trained on, such as those of a policy optimized "
                "against it for long.",
                holds="reward model",
            ),
        ),
        Stage(
            config=PPOConfig,
            command="ppo",
            help="Tune a policy with PPO against a reward model.",
            run="rlhf:train_ppo",
            dry_run="rlhf.ppo_trainer:dry_run_in_pipeline",
            check="rlhf.ppo.inputs:check_estimator",
            check_data="rlhf.ppo.inputs:check_rewards_in_pipeline",
            reads=(Reads("prompt_dataset", "prompt"), Reads("eval_dataset", "prompt")),
            card=Card(
                "Policy trained by PPO against a reward model",
                "It was rewarded by a model, not by people. A rising reward with a growing KL can "
                "mean that the reward model is exploited: read samples before trusting the "
                "figures.",
            ),
        ),
        Stage(
            config=DPOConfig,
            command="dpo",
            help="Tune a policy on preference pairs, without a reward model.",
            run="rlhf:train_dpo",
            dry_run="rlhf:train_dpo",
            reads=(
                Reads("preference_dataset", "preference"),
                Reads("eval_dataset", "candidates"),
            ),
            card=Card(
                "Policy trained by DPO on preference pairs",
                "It learned to rank given responses and was never judged on its own. Responses far "
                "from those of its training pairs may have become more likely too: read samples "
                "before trusting the figures.",
            ),
        ),
        Stage(
            config=InferenceConfig,
            command="infer",
            help="Generate with the tuned and the untuned model and compare them. Instruction, "
            "limits, temperature and min_response_length default to those of the policy's "
            "training.",
            run="rlhf:run_inference",
            reads=(Reads("eval_dataset", "prompt"), Reads("eval_dataset", "candidates")),
        ),
    )
}


def register(stage: Stage, *, before: str | None = None) -> None:
    """Add a stage: its command `rlhf COMMAND`, its section in `rlhf run`, its turn to run.

    Args:
        stage: Its record.
        before: Name of the stage that runs next in the pipeline; None adds it as the last one.

    Raises:
        ValueError: Its name or command is taken, or there is no stage `before`.
    """
    if stage.command in {other.command for other in STAGES.values()}:
        raise ValueError(f"there is a command {stage.command!r} already")
    add_section(stage.config, before)
    STAGES[stage.name] = stage


def unregister(name: str) -> None:
    """Take back what `register` did."""
    del STAGES[name]
    remove_section(name)
