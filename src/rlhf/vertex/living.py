"""Check whether another pipeline is still writing to a run's folder."""

from typing import Any

from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import GoogleAuthError
from google.cloud.aiplatform_v1.types import ListPipelineJobsRequest, PipelineState

from rlhf.errors import InputError
from rlhf.files.storage import as_url

_LIVING = (
    PipelineState.PIPELINE_STATE_QUEUED,
    PipelineState.PIPELINE_STATE_PENDING,
    PipelineState.PIPELINE_STATE_RUNNING,
    PipelineState.PIPELINE_STATE_CANCELLING,
    PipelineState.PIPELINE_STATE_PAUSED,
)


def refuse_second_writer(client: Any, parent: str, output_dir: str) -> None:
    """Raise InputError if an unfinished pipeline has the same output folder and run name.

    Args:
        client: Client of the pipeline service.
        parent: projects/P/locations/L; pipelines in other regions are not seen.
        output_dir: gs:// folder of the run.
    """
    request = ListPipelineJobsRequest(
        parent=parent,
        filter=" OR ".join(f'state="{state.name}"' for state in _LIVING),
        read_mask={"paths": ["name", "state", "create_time", "runtime_config"]},
    )
    try:
        jobs = list(client.list_pipeline_jobs(request=request))
    except (GoogleAPIError, GoogleAuthError) as error:
        message = getattr(error, "message", error)
        raise InputError(f"Vertex AI does not list the pipelines of {parent}: {message}") from error
    for job in jobs:
        if job.state in _LIVING and _folder(job.runtime_config.parameter_values) == output_dir:
            state = job.state.name.removeprefix("PIPELINE_STATE_").lower()
            raise InputError(
                f"output_dir: {job.name} ({state}, submitted "
                f"{job.create_time.strftime('%Y-%m-%d %H:%M:%S UTC')}) writes into {output_dir}; "
                "wait until it has ended, cancel it, or give another run name"
            )


def _folder(values: Any) -> str:
    """Return the folder that a pipeline's parameters name; "" if left to the pipeline."""
    directory, name = values.get("output_directory", ""), values.get("run_name", "")
    if not (isinstance(directory, str) and isinstance(name, str) and directory and name):
        return ""
    return as_url(f"{directory.rstrip('/')}/{name}")
