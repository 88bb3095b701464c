"""Progress of a submitted pipeline, reported as it changes, and why it failed if it did."""

import time
from dataclasses import dataclass, field
from typing import Any

from google.api_core.exceptions import GoogleAPIError
from google.api_core.retry import Retry
from google.auth.exceptions import GoogleAuthError
from google.cloud import aiplatform
from google.cloud.aiplatform_v1.types import JobState, PipelineState, PipelineTaskDetail

from rlhf.config import PipelineConfig
from rlhf.console import say
from rlhf.files.output import path_in
from rlhf.vertex.failure import TIME_FORMAT, read_failure

POLL_SECONDS = 30.0
_UNREACHABLE = (GoogleAPIError, GoogleAuthError, OSError)
_DONE = {
    PipelineState.PIPELINE_STATE_SUCCEEDED,
    PipelineState.PIPELINE_STATE_FAILED,
    PipelineState.PIPELINE_STATE_CANCELLED,
}
_WAITING = {JobState.JOB_STATE_QUEUED, JobState.JOB_STATE_PENDING}
_STEPS = ("validate", "reward_model", "ppo", "inference")


@dataclass
class _Seen:
    """What was already reported, so that only changes are."""

    lines: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, line: str) -> None:
        if self.lines.get(name) != line:
            self.lines[name] = line
            say(f"{time.strftime('%H:%M:%S')} {name}: {line}")


def follow(job: aiplatform.PipelineJob, config: PipelineConfig) -> int:
    """Report a pipeline's progress until it ends.

    Returns:
        0 if it succeeded, else 1.
    """
    seen = _Seen()
    while True:
        try:
            # The client library's own policy for idempotent calls.
            resource = job.api_client.get_pipeline_job(
                name=job.resource_name, retry=Retry(timeout=600.0)
            )
        except _UNREACHABLE as error:
            say(f"cannot be followed any longer: {error}")
            say(f"the run itself goes on: {job.resource_name}")
            return 1
        state = resource.state
        seen.say("pipeline", state.name.removeprefix("PIPELINE_STATE_").lower())
        for stage in _STEPS:
            custom_job = _custom_job(stage, config, resource)
            if custom_job is not None:
                seen.say(stage, _words(custom_job, config))
        if state in _DONE:
            break
        time.sleep(POLL_SECONDS)
    if state == PipelineState.PIPELINE_STATE_SUCCEEDED:
        say(f"everything is in {config.output_dir}")
        return 0
    for line in why(resource, config):
        say(line)
    return 1


def _custom_job(stage: str, config: PipelineConfig, pipeline: Any) -> aiplatform.CustomJob | None:
    """Return a stage's newest job from this submission, found by its name."""
    run_name = config.output_dir.rstrip("/").rsplit("/", 1)[-1]
    vertex = config.vertex
    location = vertex.location if stage == "validate" else vertex.tuning_location or vertex.location
    try:
        jobs = aiplatform.CustomJob.list(
            filter=f'display_name="{run_name}-{stage}"',
            order_by="create_time desc",
            location=location,
        )
    except _UNREACHABLE:  # one failed look; the next one follows soon
        return None
    # An earlier submission of the same run had jobs with the same names.
    recent = [job for job in jobs if job.create_time >= pipeline.create_time]
    return recent[0] if recent else None


def _words(job: aiplatform.CustomJob, config: PipelineConfig) -> str:
    """Describe the state of a job, and what it waits for."""
    state = job.gca_resource.state
    words = f"{state.name.removeprefix('JOB_STATE_').lower()} ({job.resource_name})"
    if state not in _WAITING:
        return words
    spec = job.gca_resource.job_spec
    machine = spec.worker_pool_specs[0].machine_spec
    wanted = machine.machine_type
    if machine.accelerator_count:
        kind = machine.accelerator_type.name
        wanted += f" with {machine.accelerator_count} x {kind}"
    strategy = spec.scheduling.strategy
    asked = strategy.name if strategy else config.vertex.strategy
    place = job.resource_name.split("/")[3]
    reason = job.gca_resource.error.message
    return f"{words}: waits for {wanted} in {place}, {asked}" + (
        f"; Vertex says: {reason}" if reason else ""
    )


def why(resource: Any, config: PipelineConfig) -> list[str]:
    """Return what is known about a pipeline that did not succeed, and where to read more."""
    lines = []
    if resource.error.message:
        lines.append(f"pipeline: {resource.error.message}")
    failed = [
        task
        for task in resource.job_detail.task_details
        if task.state == PipelineTaskDetail.State.FAILED
    ]
    lines += [f"failed: {task.task_name}: {task.error.message or 'no message'}" for task in failed]
    names = {task.task_name.replace("-", "_") for task in failed}
    project = aiplatform.initializer.global_config.project
    for stage in _STEPS:
        if stage not in names:
            continue
        validation = stage == "validate"
        folder = path_in(config.output_dir, stage) if validation else config.stage_dir(stage)
        custom_job = _custom_job(stage, config, resource)
        found = read_failure(folder)
        # A failure of an earlier submission says nothing about this one.
        if found is not None and found.time >= resource.create_time.strftime(TIME_FORMAT):
            lines += [f"cause: {found.cause}", f"fix: {found.fix}"]
        if custom_job is not None:
            number = custom_job.resource_name.rsplit("/", 1)[-1]
            query = f'resource.type="ml_job" AND resource.labels.job_id="{number}"'
            lines.append(f"logs: gcloud logging read '{query}' --project={project} --limit=200")
    return lines
