"""All stages, one after the other: demonstrations, preferences and prompts in, a tuned model out.

Nothing but order and folders: each stage reads what the earlier ones left on disk, so a run that
was stopped goes on where it was, stage by stage.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config import PipelineConfig, config_to_yaml
from rlhf.console import say, show
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts, read_once, split_holdout
from rlhf.errors import InputError
from rlhf.files.lease import lease
from rlhf.files.output import RESULT_FILE, Output, path_in
from rlhf.files.text import to_json, write_text
from rlhf.inference import run_inference
from rlhf.models.loading import check_limits, load_tokenizer, read_model_config
from rlhf.objectives import find_estimator
from rlhf.ppo_trainer import train_ppo
from rlhf.reward_model import train_reward_model
from rlhf.sft import train_sft
from rlhf.signals import stop_point
from rlhf.untrusted import read_json

STAGES: dict[str, Callable[[Any], Any]] = {
    "sft": train_sft,
    "reward_model": train_reward_model,
    "ppo": train_ppo,
    "inference": run_inference,
}


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline left behind.

    Attributes:
        output_dir: Its folder, with a folder per stage.
        metrics: Final metrics by stage, and `seconds` of the whole; empty after a dry run.
    """

    output_dir: str
    metrics: Mapping[str, Any]


def run_pipeline(config: PipelineConfig) -> PipelineResult:
    """Runs SFT (if there are demonstrations), reward model, PPO and inference.

    Writes a folder per stage, `config.yaml` and `metrics.json`. Every file of every stage is
    checked before the first model is loaded. Without `eval_dataset` a share of the preference
    rows is held out by prompt: it evaluates the reward model and goes to inference, and neither
    reward model nor PPO train on it. Finished stages are not run again.

    Raises:
        InputError: Anything wrong with files, configuration or checkpoints.
        StoppedBySignal: After SIGTERM or SIGINT, with everything so far saved.
    """
    # Without `eval_dataset` the lines of the preference rows are written again, in two parts.
    with read_once(keep_lines=config.eval_dataset is None and not config.dry_run):
        return _run(config)


def _run(config: PipelineConfig) -> PipelineResult:
    start = time.monotonic()
    lines = check_inputs(config)
    if config.dry_run:
        _dry_run(config, lines)
        return PipelineResult(config.output_dir, {})
    with lease(config.output_dir, "rlhf run"):
        return run_stages(config, start)


def run_stages(config: PipelineConfig, start: float) -> PipelineResult:
    """Runs all stages on checked inputs, for a caller that holds the lease of the output folder.

    Args:
        config: What was checked.
        start: `time.monotonic()` when the work began.
    """
    output = Output(config.output_dir)
    output.fetch(RESULT_FILE)
    earlier = read_json(output.path / RESULT_FILE)
    finished = all(_finished(config.stage_dir(stage)) for stage in config.stages())
    write_text(output.path / "config.yaml", config_to_yaml(config))
    config = hold_out_rows(config)
    metrics: dict[str, Any] = {}
    for number, stage in enumerate(config.stages(), start=1):
        stop_point()
        say(f"pipeline: stage {number} of {len(config.stages())}: {stage}")
        metrics[stage] = dict(STAGES[stage](config.stage_config(stage)).metrics)
        free_memory()
    if finished and earlier is not None:  # nothing was done, so nothing is to be written
        return PipelineResult(config.output_dir, earlier)
    metrics["seconds"] = time.monotonic() - start
    write_text(output.path / RESULT_FILE, to_json(metrics))
    output.publish()
    say(f"pipeline: finished in {metrics['seconds']:.0f} s; everything is in {config.output_dir}")
    return PipelineResult(config.output_dir, metrics)


def free_memory() -> None:
    """Gives back what a finished stage held, for the next one's models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_inputs(config: PipelineConfig) -> list[str]:
    """Reads every file of every stage and checks the limits; loads no weights.

    Returns:
        What reading came upon, for people.

    Raises:
        InputError: All problems of all stages, rows first, then limits.
    """
    with read_once():
        return _check_inputs(config)


def _check_inputs(config: PipelineConfig) -> list[str]:
    rows: dict[str, None] = {}  # an ordered set: stages share files
    limits: dict[str, None] = {}
    lines: dict[str, None] = {}
    for stage in config.stages():
        stage_config = on_the_given_base(config, stage)
        if stage == "ppo":
            find_estimator(stage_config.advantage)
        base, revision = stage_config.base_model or "", stage_config.revision
        tokenizer = load_tokenizer(base, revision)
        renderer = PromptRenderer.for_tokenizer(tokenizer, stage_config.instruction)
        for read in _readers(stage, stage_config, renderer):
            try:
                lines |= dict.fromkeys(read().report.lines())
            except InputError as error:
                rows |= dict.fromkeys(error.problems)
        limits |= dict.fromkeys(
            check_limits(
                read_model_config(base, revision),
                stage_config.prompt_sequence_length,
                stage_config.target_sequence_length,
            )
        )
    if rows or limits:
        raise InputError([*rows, *limits])
    return list(lines)


def on_the_given_base(config: PipelineConfig, stage: str) -> Any:
    """A stage's configuration before any stage has run: on the base that the user gave."""
    stage_config = config.stage_config(stage)
    made_later = f"{config.stage_dir('sft')}/merged"
    if stage_config.base_model in (None, made_later):
        stage_config.base_model, stage_config.revision = config.base_model, config.revision
    return stage_config


def _readers(stage: str, config: Any, renderer: PromptRenderer) -> Iterator[Callable[[], Any]]:
    """Calls that read the files of a stage as the stage itself will."""

    def reader(load: Callable[..., Any], name: str, **options: Any) -> Callable[[], Any]:
        paths = getattr(config, name)
        return lambda: load(
            paths, renderer=renderer, on_bad_rows=config.on_bad_rows, name=name, **options
        )

    if stage == "sft":
        yield reader(load_prompts, "dataset", require_output=True)
        if config.eval_dataset is not None:
            yield reader(load_prompts, "eval_dataset", require_output=True)
        return
    if stage == "reward_model":
        yield reader(load_preferences, "preference_dataset")
        if config.normalization_dataset is not None:
            yield reader(load_prompts, "normalization_dataset", require_output=True)
    if stage == "ppo":
        yield reader(load_prompts, "prompt_dataset")
    if config.eval_dataset is not None:
        if stage != "reward_model":
            yield reader(load_prompts, "eval_dataset")
        if stage != "ppo":
            yield reader(load_preferences, "eval_dataset", candidates_optional=True)


def hold_out_rows(config: PipelineConfig) -> PipelineConfig:
    """Splits the preference rows into OUT/data if there is no `eval_dataset`.

    Reads nothing inside the `read_once(keep_lines=True)` of a run.

    Returns:
        The configuration that reads the two files, or the given one.
    """
    if config.eval_dataset is not None:
        return config
    stage_config = on_the_given_base(config, "reward_model")
    tokenizer = load_tokenizer(stage_config.base_model, stage_config.revision)
    pairs = load_preferences(
        stage_config.preference_dataset,
        renderer=PromptRenderer.for_tokenizer(tokenizer, stage_config.instruction),
        on_bad_rows=config.on_bad_rows,
    )
    train, held_out = split_holdout(pairs, seed=config.seed)
    if not held_out:
        say("pipeline: a single prompt, so nothing can be held out; inference runs on it")
        return config
    folder = path_in(config.output_dir, "data")
    files = {}
    output = Output(folder)
    for name, part in (("preferences", train), ("held_out", held_out)):
        files[name] = path_in(folder, f"{name}.jsonl")
        write_text(
            output.path / f"{name}.jsonl", (f"{line.decode()}\n" for line in part.raw_lines())
        )
    output.publish()
    say(f"pipeline: {len(held_out)} preference rows held out by prompt: {files['held_out']}")
    data = config.model_dump(exclude_unset=True)
    data |= {"preference_dataset": files["preferences"], "eval_dataset": files["held_out"]}
    data.get("reward_model", {}).pop("preference_dataset", None)
    return PipelineConfig.model_validate(data)


def _finished(folder: str) -> bool:
    output = Output(folder)
    output.fetch(RESULT_FILE)
    return bool((read_json(output.path / RESULT_FILE) or {}).get("finished"))


def _dry_run(config: PipelineConfig, lines: list[str]) -> None:
    """Every training stage's own dry run; inference needs a policy that is not there yet."""
    for stage in config.stages():
        if stage != "inference":
            STAGES[stage](on_the_given_base(config, stage))
    rows = [line for line in lines if line.startswith("eval_dataset")]
    show("\n".join([*rows, f"inference: into {config.stage_dir('inference')}"]))
