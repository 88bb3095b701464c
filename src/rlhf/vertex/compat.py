"""What Google's libraries have no public interface for.

Checked with google-cloud-aiplatform 1.165.1 and google-cloud-pipeline-components 2.22.0; any other
version of the latter is another program, so pyproject.toml pins it.
"""

from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

if TYPE_CHECKING:
    from google.cloud import aiplatform


def set_account_and_network(job: "aiplatform.PipelineJob", account: str, network: str) -> None:
    """Name a pipeline's service account and network before `submit()`, which also takes them."""
    job._gca_resource.service_account = account
    job._gca_resource.network = network


def send(job: "aiplatform.PipelineJob", parent: str) -> None:
    """Ask Vertex AI for a pipeline.

    `job.submit()` would look into the bucket first, and make one of a misspelled name.
    """
    job._gca_resource = job.api_client.create_pipeline_job(
        parent=parent, pipeline_job=job._gca_resource, pipeline_job_id=job.job_id
    )


def request_of(job: "aiplatform.PipelineJob") -> dict[str, Any]:
    """Return what is sent for a pipeline, as plain data."""
    request: dict[str, Any] = MessageToDict(job._gca_resource._pb)
    return request


def project_and_location() -> tuple[str, str]:
    """Return the placeholders for the project and region that a pipeline runs in."""
    from google_cloud_pipeline_components import _placeholders

    return _placeholders.PROJECT_ID_PLACEHOLDER, _placeholders.LOCATION_PLACEHOLDER
