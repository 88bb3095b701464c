"""The two Google Cloud services that a job calls itself: Secret Manager and the Model Registry."""

import hashlib
import os
import re

from rlhf.errors import InputError


def export_huggingface_token(secret: str, project: str) -> None:
    """Read a Hugging Face token as the job's service account and set HF_TOKEN for transformers.

    Args:
        secret: NAME, projects/P/secrets/NAME or …/versions/V.
        project: Where a bare NAME lives.

    Raises:
        InputError: If there is no such secret, or this service account may not read it.
    """
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import secretmanager

    name = secret if "/" in secret else f"projects/{project}/secrets/{secret}"
    if "/versions/" not in name:
        name += "/versions/latest"
    try:
        client = secretmanager.SecretManagerServiceClient()
        payload = client.access_secret_version(name=name).payload.data
    except (GoogleAPIError, GoogleAuthError) as error:
        raise InputError(
            f"huggingface_token_secret: {name} cannot be read: "
            f"{getattr(error, 'message', error)}; the job's service account needs "
            "roles/secretmanager.secretAccessor on it"
        ) from error
    os.environ["HF_TOKEN"] = payload.decode().strip()


def register_model(
    *,
    project: str,
    location: str,
    display_name: str,
    run_directory: str,
    model_path: str,
    serving_image: str,
    encryption_key: str,
) -> str:
    """Upload a model to the Model Registry, or find it there from an earlier attempt.

    Args:
        project: Project of the registry.
        location: Its region.
        display_name: Name shown in the console.
        run_directory: gs:// folder of the run; identifies the entry.
        model_path: gs:// folder of merged/.
        serving_image: Container image that serves it.
        encryption_key: Customer-managed key, or "".

    Returns:
        Resource name of the model.
    """
    from google.api_core.exceptions import NotFound
    from google.cloud import aiplatform

    aiplatform.init(project=project, location=location)
    # A job may be restarted after the upload; the same run must not create a second entry.
    # The run's folder is its identity; long ones may share their ending, hence the hash.
    words = re.sub(r"[^a-z0-9]+", "-", run_directory.removeprefix("gs://").lower())[-40:]
    digest = hashlib.sha256(run_directory.rstrip("/").encode()).hexdigest()[:12]
    identity = f"rlhf-{words.strip('-')}-{digest}"
    try:
        return str(aiplatform.Model(identity).resource_name)
    except NotFound:
        pass
    model = aiplatform.Model.upload(
        model_id=identity,
        display_name=display_name,
        artifact_uri=model_path,
        serving_container_image_uri=serving_image,
        encryption_spec_key_name=encryption_key or None,
        labels={"made-by": "rlhf"},
    )
    return str(model.resource_name)
