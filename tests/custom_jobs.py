"""Vertex AI's custom jobs on loopback: the REST API, and a process for every job.

Requests are parsed strictly as `aiplatform_v1` messages, so that a payload Vertex would not
understand fails here too. A job runs the container's entrypoint with its own arguments.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.cloud.aiplatform_v1.types import CustomJob, JobState
from google.protobuf.json_format import MessageToDict, ParseDict

ROOT = Path(__file__).parents[1]
ENTRYPOINT = ROOT / "containers" / "entrypoint.sh"


@dataclass
class Job:
    """A job, its process and what it printed."""

    resource: CustomJob
    log: Path
    process: subprocess.Popen[bytes] | None = None
    cancelled: bool = False
    exit_codes: list[int] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        return list(self.resource.job_spec.worker_pool_specs[0].container_spec.args)

    @property
    def stage(self) -> str:
        return self.arguments[1]

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class CustomJobs:
    """The API's server.

    Args:
        folder: For the jobs' output.
        environment: Variables of every job, such as the object store's.

    Attributes:
        url: Where the API is.
        jobs: By resource name, in the order of creation.
        restarts: How often a job that failed is started again, as Vertex does with a lost machine.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self.jobs: dict[str, Job] = {}
        self.restarts = 0
        self._numbers = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def create(self, parent: str, body: dict[str, Any]) -> dict[str, Any]:
        resource = CustomJob()
        ParseDict(body, resource._pb)  # raises for what CustomJob does not have
        number = next(self._numbers)
        resource.name = f"{parent}/customJobs/{number}"
        resource.state = JobState.JOB_STATE_PENDING
        job = Job(resource, self.folder / f"job-{number}.log")
        self.jobs[resource.name] = job
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return message(resource)

    def cancel(self, name: str) -> None:
        job = self.jobs[name]
        job.cancelled = True
        if job.process is not None:
            job.process.send_signal(signal.SIGTERM)

    def of_stage(self, stage: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.stage == stage]

    def close(self) -> None:
        for job in self.jobs.values():
            if job.process is not None and job.process.poll() is None:
                job.process.kill()
        self._server.shutdown()
        self._server.server_close()

    def _run(self, job: Job) -> None:
        spec = job.resource.job_spec
        logs = spec.base_output_directory.output_uri_prefix
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **self.environment,
            **({"AIP_TENSORBOARD_LOG_DIR": f"{logs}/logs/"} if logs else {}),
        }
        for _ in range(self.restarts + 1):
            with job.log.open("ab") as output:
                job.process = subprocess.Popen(
                    ["sh", str(ENTRYPOINT), *job.arguments],
                    env=environment,
                    stdout=output,
                    stderr=output,
                    cwd=self.folder,
                )
                job.resource.state = JobState.JOB_STATE_RUNNING
                job.exit_codes.append(job.process.wait())
            if job.exit_codes[-1] == 0 or job.cancelled:
                break
        if job.cancelled:
            job.resource.state = JobState.JOB_STATE_CANCELLED
        elif job.exit_codes[-1] == 0:
            job.resource.state = JobState.JOB_STATE_SUCCEEDED
        else:
            job.resource.error.code = 3
            job.resource.error.message = (
                f"The replica workerpool0-0 exited with a non-zero status of {job.exit_codes[-1]}."
            )
            job.resource.state = JobState.JOB_STATE_FAILED


def message(resource: Any) -> dict[str, Any]:
    """A message as the REST API writes it: enums as integers."""
    return MessageToDict(resource._pb, use_integers_for_enums=True)


def _handler(api: CustomJobs) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.split("?")[0].removeprefix("/v1/")
            job = api.jobs.get(name)
            if job is None:
                self._answer(404, {"error": {"code": 404, "message": f"no {name}"}})
            else:
                self._answer(200, message(job.resource))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            path = self.path.split("?")[0].removeprefix("/v1/")
            if path.endswith(":cancel"):
                api.cancel(path.removesuffix(":cancel"))
                self._answer(200, {})
                return
            try:
                created = api.create(path.removesuffix("/customJobs"), json.loads(content))
            except Exception as error:  # whatever is wrong with a request is the client's fault
                self._answer(400, {"error": {"code": 400, "message": repr(error)}})
            else:
                self._answer(200, created)

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing to stderr."""

    return Handler


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what the test waits for did not happen")
        time.sleep(0.05)
