"""Vertex AI's custom jobs on loopback: one process per job.

A job runs the container's entrypoint with its own arguments.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.cloud.aiplatform_v1.types import CustomJob, JobState
from google.protobuf.json_format import ParseDict, ParseError
from support.fake_vertex import PARENT, Answer, FakeVertex, message

ROOT = Path(__file__).parents[2]
ENTRYPOINT = ROOT / "containers" / "entrypoint.sh"


@dataclass
class Job:
    """A job, its process and its output."""

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


class CustomJobs(FakeVertex):
    """The API with custom jobs that really run.

    Args:
        folder: For the jobs' output.
        environment: Variables for every job, such as the object store's.

    Attributes:
        jobs: By resource name, in the order of creation.
        restarts: How often a failed job is restarted, as Vertex does after losing a machine.
    """

    ROUTES = (
        *FakeVertex.ROUTES,
        ("POST", PARENT + r"/customJobs", "create_custom_job"),
        ("GET", "/v1/(?P<name>projects/[^:]+/customJobs/[^/:]+)", "get_custom_job"),
        ("POST", "/v1/(?P<name>projects/[^:]+/customJobs/[^/:]+):cancel", "cancel_custom_job"),
    )

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__()
        self.folder = folder
        self.environment = dict(environment)
        self.jobs: dict[str, Job] = {}
        self.restarts = 0

    @property
    def polls(self) -> int:
        """How often a job's state was queried."""
        return sum(method == "GET" for method, _, _ in self.requests)

    def create_custom_job(self, *, parent: str, body: Any, **_: Any) -> Answer:
        resource = CustomJob()
        try:
            ParseDict(body, resource._pb)  # rejects fields that CustomJob does not have
        except ParseError as error:
            return 400, {"error": {"code": 400, "message": str(error)}}
        number = len(self.jobs) + 1
        resource.name = f"{parent}/customJobs/{number}"
        resource.state = JobState.JOB_STATE_PENDING
        job = Job(resource, self.folder / f"job-{number}.log")
        job.log.touch()  # whoever sees the job may read it at once
        self.jobs[resource.name] = job
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return 200, message(resource)

    def get_custom_job(self, *, name: str, **_: Any) -> Answer:
        return 200, message(self.jobs[name].resource)

    def cancel_custom_job(self, *, name: str, **_: Any) -> Answer:
        job = self.jobs[name]
        job.cancelled = True
        if job.process is not None:
            job.process.send_signal(signal.SIGTERM)
        return 200, {}

    def of_stage(self, stage: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.stage == stage]

    def close(self) -> None:
        for job in self.jobs.values():
            if job.process is not None and job.process.poll() is None:
                job.process.kill()
        super().close()

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


def wait_for(condition: Any, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what the test waits for did not happen")
        time.sleep(0.05)
