"""From a configuration to a running pipeline: checks, the request, and following it."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import google.auth
from google.api_core.exceptions import GoogleAPIError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud import aiplatform
from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from rlhf.config import PipelineConfig, TrainingConfig
from rlhf.config.loading import merged, nested, validation_problems
from rlhf.errors import InputError
from rlhf.pipeline import check_inputs
from rlhf.storage import as_url, find_files, open_store
from rlhf.tracking import say
from rlhf.vertex import TEMPLATE, default_image
from rlhf.vertex.follow import follow
from rlhf.vertex.job import DEPLOY_NOTE
from rlhf.vertex.machines import fit
from rlhf.vertex.parameters import RUN_NAME, to_config, to_parameters

# Fields that hold files or folders which the jobs read.
_PATHS = (
    "preference_dataset",
    "prompt_dataset",
    "eval_dataset",
    "normalization_dataset",
    "reward_model_path",
    "tensorboard_dir",
)


def read_parameters(
    path: str, flags: Mapping[str, Any], unknown: Sequence[str] = ()
) -> PipelineConfig:
    """Build the configuration that a file of pipeline parameters and some flags mean.

    Args:
        path: JSON object of parameter name to value, as Google's `rlhf_pipeline` takes it.
        flags: Dotted field of `PipelineConfig` to value; they win.
        unknown: Problems with flags, to be said together with the file's.

    Raises:
        InputError: The file cannot be read, or what `to_config` says.
    """
    problems = list(unknown)
    try:
        with open(path, encoding="utf-8") as file:
            parameters = json.load(file)
        if not isinstance(parameters, dict):
            raise ValueError("expected one JSON object of parameter names to values")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError([*problems, f"{path}: cannot be read: {reason}"]) from None
    flags = dict(flags)
    if output_dir := flags.pop("output_dir", None):
        folder, _, name = str(output_dir).rstrip("/").rpartition("/")
        parameters |= {"output_directory": folder, "run_name": name}
    try:
        config = to_config(parameters)
        data = merged(config.model_dump(exclude_unset=True), nested(flags))
        config = PipelineConfig.model_validate(data)
    except InputError as error:
        hint = " (or give --output_dir gs://BUCKET/FOLDER/RUN)"
        found = [
            problem + hint if problem.startswith("output_directory:") else problem
            for problem in error.problems
        ]
        raise InputError(problems + found) from None
    except ValidationError as error:
        raise InputError(problems + validation_problems(PipelineConfig, error)) from None
    if problems:
        raise InputError(problems)
    return config


def submit(config: PipelineConfig, *, wait: bool = False) -> int:
    """Check a run, say what will be asked for, and ask Vertex AI for it.

    Args:
        config: The run; `dry_run` prints the request (JSON, stdout) and sends nothing.
        wait: Follow it until it ends.

    Returns:
        Exit code: 0, or 1 for a run that was followed and failed.

    Raises:
        InputError: Anything that can be known to be wrong before money is spent.
    """
    config = config.model_copy(update={"output_dir": as_url(config.output_dir)})
    problems = not_in_the_cloud(config)
    try:
        parameters = to_parameters(config)
    except InputError as error:
        raise InputError(problems + error.problems) from None
    if problems:
        raise InputError(problems)
    to_config(parameters)  # what the validation step will do
    project, credentials = _identity(config)
    location = config.vertex.location
    parameters |= {"project": project, "location": location}
    parameters.setdefault("image", default_image(project, location))
    if not config.dry_run:
        _check_bucket(config, project)
    for line in _check_here(config):
        say(line)
    _say_request(config, parameters)
    aiplatform.init(project=project, location=location, credentials=credentials)
    job = pipeline_job(config, parameters)
    if config.dry_run:
        print(json.dumps(_request(job), indent=2, ensure_ascii=False))
        return 0
    try:
        job.submit()
    except (GoogleAPIError, GoogleAuthError) as error:
        message = getattr(error, "message", error)
        raise InputError(f"Vertex AI refused the pipeline: {message}") from error
    say(f"submitted {job.resource_name}")
    return follow(job, config) if wait else 0


def not_in_the_cloud(config: PipelineConfig) -> list[str]:
    """Name the fields with paths that a job on another machine cannot see."""
    problems = []
    folder, _, run_name = config.output_dir.rstrip("/").rpartition("/")
    if not folder.startswith("gs://") or folder == "gs://":
        problems.append(f"output_dir: expected gs://BUCKET/FOLDER/RUN, got {config.output_dir}")
    elif not RUN_NAME.fullmatch(run_name):
        problems.append(
            "output_dir: its last part is the name of the run; expected letters, digits, ., - and "
            f"_, at most 100, got {run_name!r}"
        )
    for stage in ("reward_model", "ppo", "inference"):
        stage_config, own = config.stage_config(stage), getattr(config, stage)
        for field in _PATHS:
            # What a stage gets in the place of a field that was not given was named already.
            if field not in own and getattr(config, field, None) is None:
                continue
            given = getattr(stage_config, field, None) or []
            name = f"{stage}.{field}" if field in own else field
            problems += [
                _copy_it(name, path)
                for path in ([given] if isinstance(given, str) else given)
                if not path.startswith(("gs://", "/gcs/"))
            ]
        base = stage_config.base_model
        here = base and (base.startswith((".", "/", "~")) or os.path.isdir(base))
        if here and not base.startswith("/gcs/"):
            name = f"{stage}.base_model" if own.get("base_model") == base else "base_model"
            problems.append(
                f"{name}: {base} is on this machine, the jobs are not; give a Hub id or a gs:// "
                "folder"
            )
    return list(dict.fromkeys(problems))


def _copy_it(name: str, path: str) -> str:
    if "://" in path:
        return f"{name}: {path}: the jobs read gs:// addresses; copy it to the bucket"
    return (
        f"{name}: {path} is on this machine, the jobs are not; copy it to the bucket (gcloud "
        "storage cp) and give its gs:// address"
    )


def pipeline_job(config: PipelineConfig, parameters: Mapping[str, Any]) -> aiplatform.PipelineJob:
    """The request, made from the pipeline that ships with the package."""
    slug = re.sub(r"[^a-z0-9]+", "-", parameters["run_name"].lower()).strip("-")
    root = config.vertex.pipeline_root or f"{parameters['output_directory']}/pipeline_root"
    job = aiplatform.PipelineJob(
        display_name=parameters["run_name"],
        template_path=str(files("rlhf.vertex") / TEMPLATE),
        job_id=f"rlhf-{slug[:80]}-{time.strftime('%Y%m%d%H%M%S')}",
        pipeline_root=root,
        parameter_values=dict(parameters),
        enable_caching=False,
        encryption_spec_key_name=config.vertex.encryption_spec_key_name or None,
        labels=config.vertex.labels or None,
    )
    # Here rather than in submit(), so that a dry run shows them.
    job._gca_resource.service_account = config.vertex.service_account
    job._gca_resource.network = config.vertex.network
    return job


def _request(job: aiplatform.PipelineJob) -> dict[str, Any]:
    request: dict[str, Any] = MessageToDict(job._gca_resource._pb)
    return request


def _identity(config: PipelineConfig) -> tuple[str, Any]:
    """Project and credentials; nobody's for a dry run on a machine that has none."""
    given = config.vertex.project
    try:
        credentials, own = google.auth.default(
            scopes=["https://www.googleapis.com/auth/cloud-platform"]
        )
    except DefaultCredentialsError as error:
        if not (config.dry_run and given):
            raise InputError(
                "there are no Google Cloud credentials here; run "
                "`gcloud auth application-default login` (for a dry run vertex.project is enough)"
            ) from error
        credentials, own = AnonymousCredentials(), None
    if not (given or own):
        raise InputError("vertex.project: is not given, and the credentials name none")
    return given or own, credentials


def _check_bucket(config: PipelineConfig, project: str) -> None:
    """Look for the bucket of the results: the client library would make one of a misspelt name.

    Raises:
        InputError: There is no such bucket, or one cannot look into it from here.
    """
    filesystem, root = open_store(config.output_dir)
    bucket = root.split("/")[0]
    try:
        find_files(filesystem, root)
    except FileNotFoundError:
        raise InputError(
            f"output_dir: there is no bucket gs://{bucket}; correct the name, or make it: "
            f"gcloud storage buckets create gs://{bucket} --project={project} "
            f"--location={config.vertex.location}"
        ) from None
    except Exception as error:  # the store's own kinds
        raise InputError(f"output_dir: gs://{bucket} cannot be read: {error}") from error


def _check_here(config: PipelineConfig) -> list[str]:
    """Read files and base models as the validation step will, where this machine may."""
    try:
        return check_inputs(config)
    except InputError as error:
        if not _gated(error, config):
            raise
        return [
            f"{problem} (from here; the jobs have a token and will look again)"
            for problem in error.problems
        ]


def _gated(error: InputError, config: PipelineConfig) -> bool:
    """Whether only bases cannot be read, which the jobs, who have a token, may be able to."""
    bases = all(problem.startswith("base_model:") for problem in error.problems)
    return bases and bool(config.vertex.huggingface_token_secret)


def _say_request(config: PipelineConfig, parameters: Mapping[str, Any]) -> None:
    try:
        _, machine, why = fit(config)
        accelerators = f"{machine.accelerator_count} x {machine.accelerator_type}"
        shown = f"{machine.machine_type}" + (
            f" with {accelerators}" if machine.accelerator_count else ""
        )
        if machine.accelerator_count > 1:
            say(f"accelerator_count: {machine.accelerator_count}, of which a stage uses one")
    except InputError as error:
        if not _gated(error, config):
            raise
        shown, why = "chosen by the validation step", error.problems[0]
    vertex = config.vertex
    stages = ["reward_model", "ppo", *(["inference"] if config.eval_dataset else [])]
    steps = [f"{stage} {_steps(config.stage_config(stage))}" for stage in stages[:2]]
    lines = {
        "project": f"{parameters['project']}, {parameters['location']}",
        "image": parameters["image"],
        "jobs": f"validate (CPU), {', '.join(stages)}; one after the other",
        "steps": ", ".join(steps),
        "machine": f"{shown} in {vertex.tuning_location or vertex.location}, {vertex.strategy}",
        "because": why,
        "at most": f"{int(vertex.timeout[:-1]) / 3600:.3g} h a job",
        "output": config.output_dir,
    }
    for name, value in lines.items():
        say(f"{name:>8}: {value}")
    if not config.eval_dataset:
        say("no eval_dataset: the pipeline ends after PPO")
    if vertex.deploy_model:
        say(DEPLOY_NOTE)


def _steps(config: TrainingConfig) -> str:
    count = config.train_steps
    if count is None and config.num_epochs is None:
        count = config.default_train_steps
    return str(count) if count else f"{config.num_epochs or 1:g} epochs"
