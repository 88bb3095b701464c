"""The same stages on Vertex AI: a pipeline of custom jobs, and what runs inside them.

Nothing outside this package imports kfp or google-cloud-aiplatform (extra `vertex`), and no stage
knows that it exists.
"""

from rlhf import __version__

# The compiled pipeline's name, here and in the folder kfp/.
TEMPLATE = "rlhf_pipeline.yaml"


def default_image(project: str, location: str) -> str:
    """Address of the container image that containers/cloudbuild.yaml pushes.

    Args:
        project: Project, or what stands for it.
        location: Region, or what stands for it.
    """
    # The registry writes example.com:project with a slash.
    project = project.replace(":", "/")
    return f"{location}-docker.pkg.dev/{project}/rlhf/rlhf:{__version__}"
