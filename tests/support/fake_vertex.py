"""Vertex AI's pipelines on loopback: the REST API used by the real `aiplatform.PipelineJob`.

Requests are parsed strictly as `aiplatform_v1` messages. Nothing runs: the test dictates a
pipeline's states one by one. A route is a row of `ROUTES` and a method; a subclass may add more.
"""

import datetime
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from google.cloud.aiplatform_v1.types import (
    CustomJob,
    ListCustomJobsResponse,
    ListPipelineJobsResponse,
    PipelineJob,
    PipelineState,
)
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict, ParseDict

PARENT = r"/v1/(?P<parent>projects/[^/]+/locations/[^/]+)"
Answer = tuple[int, dict[str, Any]]
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


class FakeVertex:
    """The API's server.

    Attributes:
        url: Address of the API.
        requests: (method, path, body) of every request, in order.
        pipelines: By resource name.
        custom_jobs: All, in order of creation.
        steps: Changes to a pipeline, one per query of its state; the last one persists.
        refuse: Status and message to answer a new pipeline with; None to accept it.
        refuse_list: The same for a list of pipelines.
    """

    ROUTES: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("POST", PARENT + r"/pipelineJobs", "create_pipeline"),
        ("GET", PARENT + r"/pipelineJobs", "list_pipelines"),
        ("GET", PARENT + r"/pipelineJobs/(?P<number>[^/:]+)", "get_pipeline"),
        ("GET", PARENT + r"/customJobs", "list_custom_jobs"),
    )

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.pipelines: dict[str, PipelineJob] = {}
        self.custom_jobs: list[CustomJob] = []
        self.steps: list[Callable[[PipelineJob], None]] = []
        self.refuse: tuple[int, str] | None = None
        self.refuse_list: tuple[int, str] | None = None
        self._numbers = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        # Checks every hundredth of a second whether to end.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def posted(self) -> list[Any]:
        """Return the bodies of the POST requests."""
        return [body for method, _, body in self.requests if method == "POST"]

    def answer(self, method: str, target: str, body: Any) -> Answer:
        """Find the route of a request and follow it."""
        self.requests.append((method, target, body))
        parts = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        for wanted, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if wanted == method and match:
                status, answer = getattr(self, name)(query=query, body=body, **match.groupdict())
                return status, answer
        return _error(404, f"no route for {method} {parts.path}")

    def create_pipeline(self, parent: str, query: Mapping[str, str], body: Any) -> Answer:
        if self.refuse is not None:
            return _error(*self.refuse)
        job = PipelineJob()
        ParseDict(body, job._pb)  # rejects fields that PipelineJob does not have
        job.name = f"{parent}/pipelineJobs/{query['pipelineJobId']}"
        job.state = PipelineState.PIPELINE_STATE_PENDING
        job.create_time = NOW
        self.pipelines[job.name] = job
        return 200, message(job)

    def get_pipeline(self, parent: str, number: str, **_: Any) -> Answer:
        job = self.pipelines.get(f"{parent}/pipelineJobs/{number}")
        if job is None:
            return _error(404, f"no pipeline {number}")
        if self.steps:
            step = self.steps[0] if len(self.steps) == 1 else self.steps.pop(0)
            step(job)
        return 200, message(job)

    def list_pipelines(self, parent: str, query: Mapping[str, str], **_: Any) -> Answer:
        """Filter by state, two per page, with the fields of the read mask only."""
        if self.refuse_list is not None:
            return _error(*self.refuse_list)
        terms = query.get("filter", "").split(" OR ")
        wanted = [re.fullmatch(r'state="(PIPELINE_STATE_\w+)"', term) for term in terms]
        assert all(wanted), f"a filter that this fake does not know: {query}"
        states = {PipelineState[match[1]] for match in wanted if match}
        jobs = self.pipelines.items()
        found = [job for name, job in jobs if name.startswith(f"{parent}/") and job.state in states]
        start = int(query.get("pageToken") or 0)
        shown = [_masked(job, query.get("readMask", "")) for job in found[start : start + 2]]
        more = str(start + 2) if start + 2 < len(found) else ""
        return 200, message(ListPipelineJobsResponse(pipeline_jobs=shown, next_page_token=more))

    def list_custom_jobs(self, parent: str, query: Mapping[str, str], **_: Any) -> Answer:
        wanted = re.fullmatch(r'display_name="(.*)"', query.get("filter", ""))
        assert wanted, f"a filter that this fake does not know: {query}"
        found = [
            job
            for job in self.custom_jobs
            if job.display_name == wanted[1] and job.name.startswith(f"{parent}/")
        ]
        return 200, message(ListCustomJobsResponse(custom_jobs=found))

    def add_custom_job(self, parent: str, **fields: Any) -> CustomJob:
        """Create a job as a pipeline's launcher would."""
        name = f"{parent}/customJobs/{next(self._numbers)}"
        job = CustomJob({"create_time": NOW, **fields, "name": name})
        self.custom_jobs.append(job)
        return job


def _masked(job: PipelineJob, mask: str) -> PipelineJob:
    fields = FieldMask()
    fields.FromJsonString(mask)  # raises if it is not a mask
    copy = PipelineJob()
    fields.MergeMessage(PipelineJob.pb(job), PipelineJob.pb(copy))
    return copy


def message(resource: Any) -> dict[str, Any]:
    """Return a message as the REST API writes it: enums as integers."""
    return MessageToDict(type(resource).pb(resource), use_integers_for_enums=True)


def _error(status: int, text: str) -> Answer:
    return status, {"error": {"code": status, "message": text, "status": "X"}}


def _handler(api: FakeVertex) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._respond(json.loads(content) if content else None)

        def _respond(self, body: Any) -> None:
            try:
                status, answer = api.answer(self.command, self.path, body)
            except Exception as error:  # anything wrong with a request is the client's fault
                status, answer = _error(400, repr(error))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Write nothing to stderr."""

    return Handler
