"""From a configuration to a running pipeline: checks, the request, and following its progress."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import google.auth
from google.api_core.exceptions import GoogleAPIError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.auth.transport.requests import AuthorizedSession
from google.cloud import aiplatform
from pydantic import ValidationError

from rlhf.config import PipelineConfig, TrainingConfig, VertexConfig
from rlhf.config.loading import merged, nested, validation_problems
from rlhf.console import say, show
from rlhf.errors import InputError, together
from rlhf.files.storage import as_url, find_files, open_store
from rlhf.pipeline import check_inputs
from rlhf.vertex import DEPLOY_NOTE, TEMPLATE, default_image
from rlhf.vertex.addresses import PIPELINE_ROOT, not_in_the_cloud
from rlhf.vertex.compat import request_of, send, set_account_and_network
from rlhf.vertex.conversion import to_config, to_parameters
from rlhf.vertex.follow import follow
from rlhf.vertex.image import pinned
from rlhf.vertex.living import refuse_second_writer
from rlhf.vertex.machines import Machine, fit, named_machine, problems_of_run


def read_parameters(
    path: str, flags: Mapping[str, Any], unknown: Sequence[str] = ()
) -> PipelineConfig:
    """Build the configuration described by a file of pipeline parameters and some flags.

    Args:
        path: JSON object of parameter name to value, as for Google's `rlhf_pipeline`.
        flags: Dotted field of `PipelineConfig` to value; these win.
        unknown: Problems with flags, to be reported together with the file's.

    Raises:
        InputError: If the file cannot be read, or `to_config` rejects it.
    """
    problems = list(unknown)
    try:
        with open(path, encoding="utf-8") as file:
            parameters = json.load(file)
        if not isinstance(parameters, dict):
            raise ValueError("expected one JSON object of parameter names to values")
    except (OSError, ValueError, RecursionError) as error:
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
    """Check a run, print the request, and submit it to Vertex AI.

    Args:
        config: The run; `dry_run` prints the request (JSON, stdout) and sends nothing.
        wait: Whether to follow it until it ends.

    Returns:
        Exit code: 0, or 1 for a run that was followed and failed.

    Raises:
        InputError: If anything is wrong that can be known before money is spent.
    """
    config = config.model_copy(update={"output_dir": as_url(config.output_dir).rstrip("/")})
    parameters = _parameters(config)
    project, credentials = _identity(config)
    location = config.vertex.location
    parameters |= {"project": project, "location": location}
    parameters.setdefault("image", default_image(project, location))
    lines = _check_access(config, parameters, credentials)
    for line in [*lines, *_request_lines(config, parameters)]:
        say(line)
    aiplatform.init(project=project, location=location, credentials=credentials)
    job = pipeline_job(config, parameters)
    if config.dry_run:
        show(json.dumps(request_of(job), indent=2, ensure_ascii=False))
        return 0
    _send(job, f"projects/{project}/locations/{location}", config.output_dir)
    say(f"submitted {job.resource_name}")
    return follow(job, config) if wait else 0


def _parameters(config: PipelineConfig) -> dict[str, Any]:
    """Write a run as the pipeline's parameters.

    Raises:
        InputError: If anything is wrong that can be known without reading files.
    """
    problems = [*not_in_the_cloud(config), *_of_section(problems_of_run(config))]
    parameters: dict[str, Any] = {}
    try:
        parameters = to_parameters(config)
        to_config(parameters)  # as the validation step will do
    except InputError as error:
        named = any(problem.startswith("output_dir:") for problem in problems)
        same = ("output_directory:", "run_name:") if named else ()
        problems += [problem for problem in error.problems if not problem.startswith(same)]
    if problems:
        raise InputError(problems)
    return parameters


def _of_section(problems: Sequence[str]) -> list[str]:
    """Name fields of `vertex` as in a configuration and in flags."""
    fields = set(VertexConfig.model_fields)
    return [f"vertex.{text}" if text.split(":")[0] in fields else text for text in problems]


def _send(job: aiplatform.PipelineJob, parent: str, output_dir: str) -> None:
    """Submit the pipeline, unless another one is still writing to its folder."""
    refuse_second_writer(job.api_client, parent, output_dir)
    try:
        send(job, parent)
    except (GoogleAPIError, GoogleAuthError) as error:
        message = getattr(error, "message", error)
        raise InputError(f"Vertex AI refused the pipeline: {message}") from error


def pipeline_job(config: PipelineConfig, parameters: Mapping[str, Any]) -> aiplatform.PipelineJob:
    """Build the request from the pipeline that ships with the package."""
    slug = re.sub(r"[^a-z0-9]+", "-", parameters["run_name"].lower()).strip("-")
    root = config.vertex.pipeline_root or f"{parameters['output_directory']}/{PIPELINE_ROOT}"
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
    # Set here rather than in submit(), so that a dry run shows them.
    set_account_and_network(job, config.vertex.service_account, config.vertex.network)
    return job


def _identity(config: PipelineConfig) -> tuple[str, Any]:
    """Return project and credentials; a dry run on a machine without any gets anonymous ones."""
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


def _check_access(
    config: PipelineConfig, parameters: dict[str, Any], credentials: Any
) -> list[str]:
    """Check bucket, image, files and base models from here, unless that is left to the job.

    Puts the image's digest into the parameters, if the registry reports it.

    Returns:
        Findings, for people.

    Raises:
        InputError: If any of them is wrong; lists all problems.
    """
    if config.vertex.check_inputs == "job":
        return ["rows, base models, bucket and image: looked at by the validation job only"]
    anonymous = isinstance(credentials, AnonymousCredentials)

    def image() -> list[str]:
        if anonymous:
            return []
        parameters["image"], note = pinned(parameters["image"], AuthorizedSession(credentials))
        return [note] if note else []

    def bucket() -> list[str]:
        if not config.dry_run:
            _check_bucket(config, parameters["project"])
        return []

    found = together(bucket, image, lambda: _check_here(config))
    return [line for lines in found for line in lines]


def _check_bucket(config: PipelineConfig, project: str) -> None:
    """Check that the results' bucket exists.

    Raises:
        InputError: If there is no such bucket, or it cannot be read from here.
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
    """Read files and base models as the validation step will, if this machine may."""
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
    """Return whether only base models are unreadable, which the jobs' token may give access to."""
    bases = all(problem.startswith("base_model:") for problem in error.problems)
    return bases and bool(config.vertex.huggingface_token_secret)


def _machine(config: PipelineConfig) -> tuple[Machine | None, str]:
    """Return the machine and why; None if only the validation step can choose it."""
    if config.vertex.check_inputs == "job":
        told = named_machine(config)
        return told, "as told" if told else "by the memory that the run needs"
    try:
        _, machine, why = fit(config)
    except InputError as error:
        if not _gated(error, config):
            raise InputError(_of_section(error.problems)) from error
        return named_machine(config), error.problems[0]
    return machine, why


def _request_lines(config: PipelineConfig, parameters: Mapping[str, Any]) -> list[str]:
    machine, why = _machine(config)
    shown = "chosen by the validation step" if machine is None else machine.machine_type
    if machine is not None and machine.accelerator_type:
        shown += f" with {machine.accelerator_count} x {machine.accelerator_type}"
    vertex = config.vertex
    stages = ["reward_model", "ppo", *(["inference"] if config.eval_dataset else [])]
    steps = [f"{stage} {_steps(config.stage_config(stage))}" for stage in stages[:2]]
    place = vertex.tuning_location or vertex.location
    lines = {
        "project": f"{parameters['project']}, {parameters['location']}",
        "image": parameters["image"],
        "jobs": f"validate (CPU), {', '.join(stages)}; one after the other",
        "steps": ", ".join(steps),
        "machine": f"{shown} in {place}, {vertex.strategy} (whether {place} has it is not checked)",
        "because": why,
        "at most": f"{int(vertex.timeout[:-1]) / 3600:.3g} h a job",
        "output": config.output_dir,
    }
    said = [f"{name:>8}: {value}" for name, value in lines.items()]
    if not config.eval_dataset:
        said.append("no eval_dataset: the pipeline ends after PPO")
    if vertex.deploy_model:
        said.append(DEPLOY_NOTE)
    return said


def _steps(config: TrainingConfig) -> str:
    count = config.train_steps
    if count is None and config.num_epochs is None:
        count = config.default_train_steps
    return str(count) if count else f"{config.num_epochs or 1:g} epochs"
