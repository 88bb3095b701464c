"""All stages in order: demonstrations, preferences and prompts in, a tuned model out.

This is only about order and folders: each stage reads what the earlier ones left on disk, so an
interrupted run resumes stage by stage.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rlhf.config import PipelineConfig, config_to_yaml
from rlhf.console import say, show
from rlhf.data.overlaps import find_overlap
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import PreferenceData, load_preferences, read_once, split_holdout
from rlhf.errors import InputError
from rlhf.files.lease import lease
from rlhf.files.output import RESULT_FILE, Output, path_in
from rlhf.files.text import to_json, write_text
from rlhf.models.loading import check_limits, load_tokenizer, read_model_config
from rlhf.signals import stop_point
from rlhf.stages import STAGES, RunResult, call
from rlhf.training.inputs import read_data
from rlhf.untrusted import read_json

# What Python callers give a stage beside its configuration: stage to arguments by name.
Given = Mapping[str, Mapping[str, Any]]


def run_pipeline(config: PipelineConfig, *, reward_fn: Any = None) -> RunResult:
    """Run SFT (if there are demonstrations), reward model, PPO, DPO (if asked for) and inference.

    Writes a folder per stage, `config.yaml` and `metrics.json`. Every file of every stage is
    checked before the first model is loaded. Without `eval_dataset` a share of the preference
    rows is held out by prompt: it evaluates the reward model and goes to inference, and neither
    the reward model nor PPO trains on it. Finished stages do not run again.

    Args:
        config: What to run.
        reward_fn: Reward functions of PPO, besides the reward model; see `rlhf.train_ppo`.

    Raises:
        InputError: If anything is wrong with files, configuration or checkpoints.
        StoppedBySignal: After SIGTERM or SIGINT, once everything so far is saved.
    """
    # Without `eval_dataset` the lines of the preference rows are written again, in two parts.
    # Reward functions get the fields of the rows, too.
    rows_again = config.eval_dataset is None or reward_fn is not None
    given = {} if reward_fn is None else {"ppo": {"reward_fn": reward_fn}}
    with read_once(keep_lines=rows_again and not config.dry_run):
        return _run(config, given)


def _run(config: PipelineConfig, given: Given) -> RunResult:
    start = time.monotonic()
    lines = check_inputs(config, given)
    if config.dry_run:
        _dry_run(config, lines, given)
        return RunResult(config.output_dir, {})
    with lease(config.output_dir, "rlhf run"):
        return run_stages(config, start, given)


def run_stages(config: PipelineConfig, start: float, given: Given | None = None) -> RunResult:
    """Run all stages on checked inputs; the caller holds the lease of the output folder.

    Args:
        config: What was checked.
        start: `time.monotonic()` when the work began.
        given: What is not in the configuration: stage to arguments by name.
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
        options = (given or {}).get(stage, {})
        result = call(STAGES[stage].run, config.stage_config(stage), **options)
        metrics[stage] = dict(result.metrics)
        free_memory()
    if finished and earlier is not None:  # nothing was done, so there is nothing to write
        return RunResult(config.output_dir, earlier)
    metrics["seconds"] = time.monotonic() - start
    write_text(output.path / RESULT_FILE, to_json(metrics))
    output.publish()
    say(f"pipeline: finished in {metrics['seconds']:.0f} s; everything is in {config.output_dir}")
    return RunResult(config.output_dir, metrics)


def free_memory() -> None:
    """Free what a finished stage held, for the models of the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_inputs(config: PipelineConfig, given: Given | None = None) -> list[str]:
    """Read every file of every stage and check the limits, without loading weights.

    Args:
        config: The pipeline's configuration.
        given: See `run_stages`.

    Returns:
        What to report about the files that were read.

    Raises:
        InputError: All problems of all stages, rows first, then limits.
    """
    with read_once():
        return _check_inputs(config, given or {})


def _check_inputs(config: PipelineConfig, given: Given) -> list[str]:
    rows: dict[str, None] = {}  # an ordered set: stages share files
    limits: dict[str, None] = {}
    lines: dict[str, None] = {}
    unseen: dict[str, Any] = {}  # training rows that their stage compares with no eval_dataset
    for stage in config.stages():
        stage_config = on_the_given_base(config, stage)
        record = STAGES[stage]
        if record.check is not None:
            call(record.check, stage_config)
        base, revision = stage_config.base_model or "", stage_config.revision
        tokenizer = load_tokenizer(base, revision)
        try:
            renderer = PromptRenderer.for_tokenizer(
                tokenizer, stage_config.instruction, stage_config.chat_template_options
            )
        except InputError as error:
            limits |= dict.fromkeys(error.problems)
            continue
        data: dict[str, Any] = {}
        for reads in record.reads:
            try:
                if (found := read_data(reads, stage_config, renderer)) is not None:
                    lines |= dict.fromkeys(found.report.lines())
                data[reads.field] = found
                if reads is record.reads[0] and found is not None:
                    _note_overlap(config, stage_config, reads.field, found, unseen)
            except InputError as error:
                rows |= dict.fromkeys(error.problems)
        if record.check_data is not None and not rows:
            try:
                call(record.check_data, stage_config, renderer, data, **given.get(stage, {}))
            except InputError as error:
                limits |= dict.fromkeys(error.problems)
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


def _note_overlap(
    config: PipelineConfig, stage_config: Any, field: str, data: Any, unseen: dict[str, Any]
) -> None:
    """Say how many rows for inference have a prompt of training rows that no stage compares.

    Args:
        config: The pipeline's configuration.
        stage_config: Configuration of a stage.
        field: What it reads first: its training rows, or those for inference.
        data: These rows.
        unseen: Training rows of earlier stages that have no `eval_dataset`; may get these.
    """
    if field != "eval_dataset":
        if getattr(stage_config, "eval_dataset", data) is None:
            unseen[f"{field} of stage {stage_config.stage}"] = data
    elif config.eval_dataset is not None:
        for name, trained in unseen.items():
            overlap = find_overlap(data, trained)
            if overlap.count:
                say(replace(overlap, other=name).line())


def on_the_given_base(config: PipelineConfig, stage: str) -> Any:
    """Return a stage's configuration on the base that the user gave, before any stage has run."""
    stage_config = config.stage_config(stage)
    made_later = f"{config.stage_dir('sft')}/merged"
    if stage_config.base_model in (None, made_later):
        stage_config.base_model, stage_config.revision = config.base_model, config.revision
    return stage_config


def hold_out_rows(config: PipelineConfig) -> PipelineConfig:
    """Split the preference rows into OUT/data if there is no `eval_dataset`.

    Inside the `read_once(keep_lines=True)` of a run no file is read again.

    Returns:
        The configuration that reads the two files, or the given one.
    """
    if config.eval_dataset is not None:
        return config
    stage_config = on_the_given_base(config, "reward_model")
    tokenizer = load_tokenizer(stage_config.base_model, stage_config.revision)
    pairs = load_preferences(
        stage_config.preference_dataset,
        renderer=PromptRenderer.for_tokenizer(
            tokenizer, stage_config.instruction, stage_config.chat_template_options
        ),
        on_bad_rows=config.on_bad_rows,
        columns=stage_config.columns,
        ties=stage_config.ties,
    )
    train, held_out = split_holdout(pairs, seed=config.seed)
    if not held_out:
        say("pipeline: a single prompt, so nothing can be held out; inference runs on it")
        return config
    data = config.model_dump(exclude_unset=True)
    data |= _write_rows(path_in(config.output_dir, "data"), train, held_out)
    data.get("reward_model", {}).pop("preference_dataset", None)
    return PipelineConfig.model_validate(data)


def _write_rows(folder: str, train: PreferenceData, held_out: PreferenceData) -> dict[str, Any]:
    """Write the two parts of the preference rows, those to train on with their weights.

    Returns:
        The fields of the configuration that name them.
    """
    output = Output(folder)

    def write(name: str, part: PreferenceData) -> str:
        lines = (f"{line.decode()}\n" for line in part.raw_lines())
        write_text(output.path / f"{name}.jsonl", lines)
        return path_in(folder, f"{name}.jsonl")

    preferences: Any = [
        {"path": write(f"preferences-{index}", part), "weight": entry.weight}
        for index, (entry, part) in enumerate(train.weighted_parts())
    ] or write("preferences", train)
    fields = {"preference_dataset": preferences, "eval_dataset": write("held_out", held_out)}
    output.publish()
    say(f"pipeline: {len(held_out)} preference rows held out by prompt: {fields['eval_dataset']}")
    return fields


def _finished(folder: str) -> bool:
    output = Output(folder)
    output.fetch(RESULT_FILE)
    return bool((read_json(output.path / RESULT_FILE) or {}).get("finished"))


def _dry_run(config: PipelineConfig, lines: list[str], given: Given) -> None:
    """Do each stage's own dry run; for the others, report what they read and where they write."""
    rest: list[str] = []
    for stage in config.stages():
        record = STAGES[stage]
        if record.dry_run is not None:
            call(record.dry_run, on_the_given_base(config, stage), **given.get(stage, {}))
            continue
        fields = tuple(reads.field for reads in record.reads)
        rest += [line for line in lines if line.startswith(fields)]
        rest.append(f"{stage}: into {config.stage_dir(stage)}")
    if rest:
        show("\n".join(rest))
