"""The container's entry point for a task of the pipeline: a stage in its Vertex environment.

    python -m rlhf.vertex.job STAGE --executor_input=JSON

All inputs come through KFP's executor input and the AIP_* variables; the stage itself gets its
ordinary configuration and knows about neither. Exit codes are those of the command `rlhf`.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from typing import Any

import click
import torch

from rlhf.config import PipelineConfig
from rlhf.console import say
from rlhf.errors import InputError, StoppedBySignal, together
from rlhf.files.output import path_in
from rlhf.files.storage import as_url, open_store
from rlhf.pipeline import check_inputs
from rlhf.process import exit_code, quiet_third_parties
from rlhf.stages import STAGES, call
from rlhf.vertex import DEPLOY_NOTE, failure
from rlhf.vertex.addresses import LONGEST_RUN_NAME
from rlhf.vertex.cloud import export_huggingface_token, register_model
from rlhf.vertex.conversion import problems_in_the_cloud, to_config
from rlhf.vertex.executor import Task, write_file
from rlhf.vertex.machines import Machine, fit
from rlhf.vertex.summary import finite_numbers, markdown


def validate(task: Task) -> None:
    """Check everything that can be checked without a GPU, and decide the jobs' settings.

    Raises:
        InputError: If parameters, rows, base models, output folder or machine are wrong; lists all.
    """
    config = to_config(task.inputs)

    def on_vertex() -> tuple[PipelineConfig, Machine, str]:
        if problems := problems_in_the_cloud(config, _cuda()):
            raise InputError(problems)
        return fit(config)

    lines, _, (config, machine, why) = together(
        lambda: check_inputs(config), lambda: check_writable(config.output_dir), on_vertex
    )
    notes = [*lines, why]
    if config.vertex.deploy_model:
        notes.append(DEPLOY_NOTE)
    for line in notes:
        say(line)
    task.values |= {
        f"resolved_{stage}_config": json.dumps(stage_settings(config, stage), ensure_ascii=False)
        for stage in ("reward_model", "ppo", "inference")
    }
    task.values |= {
        "resolved_machine_type": machine.machine_type,
        "resolved_accelerator_type": machine.accelerator_type,
        "resolved_accelerator_count": machine.accelerator_count,
        "resolved_tuning_location": config.vertex.tuning_location or config.vertex.location,
        "resolved_run_directory": as_url(config.output_dir),
        "resolved_run_name": task.inputs["run_name"],
        "resolved_output_prediction_gcs_path": _predictions(config) if config.eval_dataset else "",
    }
    task.write_artifact("summary", "# validate\n\n" + "\n".join(f"- {note}" for note in notes))


def own_run_name(given: str, pipeline_job: str, pipeline_task: str) -> str:
    """Name an unnamed run so that no other run shares its folder.

    The compiled pipeline's default is the name of the pipeline's job, which is shared by all uses
    of the pipeline in that job, such as those in a ParallelFor. A restarted job has the same step
    and therefore the same name.

    Args:
        given: The parameter run_name.
        pipeline_job: Name of the pipeline's job; "" if not known.
        pipeline_task: Number of the validation step.
    """
    if not pipeline_job or given != pipeline_job:
        return given
    name = f"{pipeline_job}-{pipeline_task}"
    if len(name) <= LONGEST_RUN_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{pipeline_job[: LONGEST_RUN_NAME - 17]}-{digest}"


def _cuda() -> int:
    """Return torch's CUDA build, 126 for 12.6, or 0 for a CPU build."""
    return int((torch.version.cuda or "0").replace(".", ""))


def stage_settings(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """Return a stage's own configuration as plain data, with folders as gs:// addresses."""
    data: dict[str, Any] = config.stage_config(stage).model_dump(mode="json", exclude_unset=True)
    for name in ("output_dir", "policy_path", "reward_model_path", "base_model"):
        if data.get(name):
            data[name] = as_url(data[name])
    return data


def check_writable(folder: str) -> None:
    """Check a folder by writing and removing a small file.

    Raises:
        InputError: If the job's identity may not write there.
    """
    probe = path_in(folder, ".rlhf-write-test")
    try:
        write_file(probe, "")
        filesystem, path = open_store(as_url(probe))
        filesystem.rm_file(path)
    except Exception as error:  # every store raises its own kind
        raise InputError(
            f"output_directory: {folder} cannot be written: {error}; the job's service account "
            "needs roles/storage.objectUser on the bucket"
        ) from error


def run_stage(stage: str, task: Task) -> None:
    """Run one stage of the library and report its outputs to KFP.

    Raises:
        InputError: As the stage does.
        StoppedBySignal: As the stage does.
    """
    config: Any = STAGES[stage].config.model_validate_json(task.inputs["config"])
    logs = os.environ.get("AIP_TENSORBOARD_LOG_DIR", "")
    if logs and "tensorboard_dir" in type(config).model_fields:
        config = config.model_copy(update={"tensorboard_dir": as_url(logs)})
    metrics = dict(call(STAGES[stage].run, config).metrics)
    folder = config.output_dir
    notes = [f"everything is in {folder}"]
    if stage == "reward_model":
        task.values["reward_model_path"] = folder
    if stage == "ppo":
        task.values |= _ppo_outputs(config, task)
        if task.inputs.get("deploy_model"):
            notes.append(DEPLOY_NOTE)
    if stage == "inference":
        task.values["output_prediction_gcs_path"] = path_in(folder, "predictions.jsonl")
    task.metadata["metrics"] = finite_numbers(metrics)
    task.write_artifact("summary", markdown(stage, folder, metrics, notes))
    failure.clear_failure(folder)


def _ppo_outputs(config: Any, task: Task) -> dict[str, str]:
    """Return the tuned model's address, and its Model Registry entry if one was requested."""
    model_path = path_in(config.output_dir, "merged")
    resource = ""
    if task.inputs.get("serving_container_image"):
        resource = register_model(
            project=task.inputs["project"],
            location=task.inputs["location"],
            display_name=task.inputs.get("model_display_name") or task.inputs["run_name"],
            run_directory=config.output_dir,
            model_path=model_path,
            serving_image=task.inputs["serving_container_image"],
            encryption_key=task.inputs.get("encryption_spec_key_name", ""),
        )
    return {
        "output_model_path": model_path,
        "output_adapter_path": path_in(config.output_dir, "adapter") if config.lora.rank else "",
        "model_resource_name": resource,
        "endpoint_resource_name": "",
    }


def _predictions(config: PipelineConfig) -> str:
    return as_url(path_in(config.stage_dir("inference"), "predictions.jsonl"))


def _folder(stage: str, task: Task) -> str:
    """Return the folder for a failure of this task, or "" if it is unknown."""
    try:
        if stage == "validate":
            directory, name = task.inputs["output_directory"], task.inputs["run_name"]
            return path_in(as_url(directory), name, "validate") if directory and name else ""
        return str(json.loads(task.inputs["config"])["output_dir"])
    except (KeyError, ValueError):
        return ""


def _attempt(stage: str, task: Task) -> None:
    """Run the task unless it is known to fail again; write `failure.json` if it fails."""
    folder, attempt = _folder(stage, task), failure.arguments_hash(sys.argv)
    if folder and stage != "validate" and (earlier := failure.repeated_failure(folder, attempt)):
        raise InputError(
            [
                *earlier.cause.splitlines(),
                f"this job failed the same way at {earlier.time} and has made no progress since; "
                f"it is not tried again. {earlier.fix}",
            ]
        )
    try:
        if secret := task.inputs.get("huggingface_token_secret"):
            export_huggingface_token(secret, task.inputs.get("project", ""))
        if stage == "validate":
            validate(task)
        else:
            run_stage(stage, task)
    except (StoppedBySignal, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        if folder:
            _leave(folder, failure.describe_failure(error, folder, attempt))
        raise
    task.answer()


def _leave(folder: str, found: failure.Failure) -> None:
    try:
        failure.write_failure(folder, found)
    except Exception as error:  # the cause matters more than failing to record it
        say(f"failure.json cannot be written to {folder}: {error}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stage", type=click.Choice(["validate", "reward_model", "ppo", "inference"]))
@click.option("--executor_input", required=True, help="KFP's executor input, JSON.")
@click.option("--pipeline_job", default="", help="Name of the pipeline's job.")
@click.option("--pipeline_task", default="", help="Number of this step in it.")
def command(stage: str, executor_input: str, pipeline_job: str, pipeline_task: str) -> None:
    """Run one task of the pipeline `rlhf-pipeline`."""
    task = Task.from_executor_input(executor_input)
    if stage == "validate":
        name = own_run_name(str(task.inputs.get("run_name", "")), pipeline_job, pipeline_task)
        task = replace(task, inputs={**task.inputs, "run_name": name})
    _attempt(stage, task)


def main() -> int:
    """Run the task and return the process's exit code."""
    quiet_third_parties()
    return exit_code(lambda: command.main(standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
