"""On the PYTHONPATH of Google's custom-job launcher in tests: its client speaks to loopback.

The launcher has no option for the address of the API. Nothing else of it is changed.
"""

import os

ENDPOINT = os.environ.get("FAKE_VERTEX_ENDPOINT")

if ENDPOINT:
    import google.auth
    from google.api_core.client_options import ClientOptions
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import aiplatform
    from google_cloud_pipeline_components.container.v1.gcp_launcher import job_remote_runner

    class _Credentials(AnonymousCredentials):
        valid = True

        def __init__(self):
            super().__init__()
            self.token = "test"

    _real_client = aiplatform.gapic.JobServiceClient
    _real_post = job_remote_runner.requests.post

    def _client(client_options=None, client_info=None):
        return _real_client(
            client_options=ClientOptions(api_endpoint=ENDPOINT),
            client_info=client_info,
            transport="rest",
            credentials=AnonymousCredentials(),
        )

    def _post(url, **kwargs):
        path = url.split(".googleapis.com", 1)[1]
        return _real_post(ENDPOINT + path, **kwargs)

    aiplatform.gapic.JobServiceClient = _client
    google.auth.default = lambda *_, **__: (_Credentials(), "test-project")
    job_remote_runner.requests.post = _post
    job_remote_runner._POLLING_INTERVAL_IN_SECONDS = 0.3
