"""The command `rlhf`: reads flags and files, calls one stage function, maps errors to exit codes.

Exit codes: 0 done; 2 bad input or configuration; 75 stopped by a signal after saving; 1 anything
else. torch is imported only after the configuration is known to be good.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click

import rlhf
from rlhf.config import (
    InferenceConfig,
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    Schema,
    ScoreConfig,
    SFTConfig,
)
from rlhf.errors import InputError, StoppedBySignal
from rlhf.flags import CONTEXT, ConfigCommand, config_options, read_config

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command may be given again


@click.group(context_settings=CONTEXT)
@click.version_option(rlhf.__version__, prog_name="rlhf")
def cli() -> None:
    """Reinforcement learning from human feedback for T5 and LLaMA models."""


def _stage(name: str, cls: type[Schema], function: str, text: str) -> None:
    """Register a command that hands its configuration to one function of the library."""

    @config_options(cls)
    @cli.command(name, cls=ConfigCommand, help=text, context_settings=CONTEXT)
    @click.pass_context
    def command(ctx: click.Context, /, **_: Any) -> None:
        config = read_config(ctx, cls)
        getattr(rlhf, function)(config)


_stage("sft", SFTConfig, "train_sft", "Fine-tune a model on demonstrations.")
_stage(
    "reward-model",
    RewardModelConfig,
    "train_reward_model",
    "Train a reward model on preference pairs.",
)


@config_options(PPOConfig)
@cli.command("ppo", cls=ConfigCommand, context_settings=CONTEXT)
@click.option(
    "--reward_fn",
    metavar="MODULE:FUNCTION",
    help="Python function (prompts, responses) -> numbers, instead of reward_model_path.",
)
@click.pass_context
def ppo(ctx: click.Context, /, reward_fn: str | None, **_: Any) -> None:
    """Tune a policy with PPO against a reward model."""
    config = read_config(ctx, PPOConfig, () if reward_fn else ("reward_model_path",))
    if reward_fn and config.reward_model_path:
        raise InputError("reward_fn, reward_model_path: give one of them, not both")
    rlhf.train_ppo(config, reward_fn=_imported(reward_fn) if reward_fn else None)


_stage("infer", InferenceConfig, "run_inference", "Generate with tuned and untuned model.")
_stage("run", PipelineConfig, "run_pipeline", "Run all stages on one's own files.")
_stage("score", ScoreConfig, "run_score", "Write the reward scores of a file's rows.")


def _imported(address: str) -> Callable[..., Any]:
    """Import `module:function`, looking in the current folder too."""
    module_name, _, function_name = address.partition(":")
    if not module_name or not function_name:
        raise InputError(f"reward_fn: expected MODULE:FUNCTION, got {address!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
            raise InputError(f"reward_fn: there is no module {module_name!r}") from None
        raise
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"reward_fn: {module_name!r} has no function {function_name!r}")
    return function


def _quiet_third_parties() -> None:
    """Keep libraries' progress bars and advice out of what the user reads."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("rlhf")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows `rlhf`; None for those of the process.
    """
    _quiet_third_parties()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return cli.main(given or ["--help"], prog_name="rlhf", standalone_mode=False) or 0
    except InputError as error:
        _complain(error.problems)
        return EXIT_BAD_INPUT
    except click.ClickException as error:
        _complain([error.format_message()])
        return EXIT_BAD_INPUT
    except StoppedBySignal as error:
        _complain([str(error)])
        return EXIT_STOPPED
    except click.Abort:
        _complain(["interrupted"])
        return 1


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        click.echo(f"rlhf: {problem}", err=True)
