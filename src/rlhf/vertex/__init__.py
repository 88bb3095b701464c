"""The same stages on Vertex AI: a pipeline of custom jobs, and the code that runs inside them.

Nothing outside this package imports kfp or google-cloud-aiplatform (extra `vertex`), and no stage
knows about this package.
"""

from rlhf import __version__

# File name of the compiled pipeline, here and in the folder kfp/.
TEMPLATE = "rlhf_pipeline.yaml"
DEPLOY_NOTE = (
    "deploy_model: nothing is deployed, because an endpoint costs money until it is deleted; "
    "docs/vertex.md has the command"
)


def default_image(project: str, location: str) -> str:
    """Return the address of the container image that containers/cloudbuild.yaml pushes.

    Args:
        project: Project, or a placeholder for it.
        location: Region, or a placeholder for it.
    """
    # The registry writes example.com:project with a slash.
    project = project.replace(":", "/")
    return f"{location}-docker.pkg.dev/{project}/rlhf/rlhf:{__version__}"
