"""The same stages on Vertex AI: a pipeline of custom jobs, and what runs inside them.

Nothing outside this package imports kfp or google-cloud-aiplatform (extra `vertex`), and no stage
knows that it exists.
"""

# The compiled pipeline's name, here and in the folder kfp/.
TEMPLATE = "rlhf_pipeline.yaml"
