"""`rlhf vertex submit` from the command line to the wire, against a fake of Vertex's API."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.aiplatform_v1.types import (
    CustomJob,
    JobState,
    PipelineJob,
    PipelineState,
    PipelineTaskDetail,
)
from google.protobuf.json_format import MessageToDict, ParseDict
from support.fake_vertex import NOW, FakeVertex
from support.object_store import ObjectStore
from support.vertex_models import SHAPES
from support.vertex_parameters import NOTEBOOK
from transformers import AutoConfig

import rlhf
from rlhf.cli import main
from rlhf.config import PipelineConfig, load_config
from rlhf.errors import InputError
from rlhf.vertex import follow, submit
from rlhf.vertex.conversion import to_config
from rlhf.vertex.failure import TIME_FORMAT
from rlhf.vertex.parameters import PARAMETERS

DEEP = "[" * 100_000


@pytest.fixture
def google_file(tmp_path: Path) -> str:
    path = tmp_path / "google.json"
    path.write_text(json.dumps(NOTEBOOK), encoding="utf-8")
    return str(path)


def test_what_is_sent_is_the_shipped_pipeline_with_the_runs_parameters(vertex, run_file, capsys):
    assert main(["vertex", "submit", "--config", run_file, "--seed", "4"]) == 0
    [(_, _, _), (method, path, body)] = vertex.requests  # the first looks for a living run
    assert method == "POST"
    assert path.startswith("/v1/projects/own-project/locations/us-central1/pipelineJobs?")
    [(name, sent)] = vertex.pipelines.items()  # it was parsed strictly
    assert name.rsplit("/", 1)[-1].startswith("rlhf-first-run-2")
    assert body["displayName"] == "First.run"
    assert sent.service_account == "tuner@p.iam.gserviceaccount.com"
    assert sent.network == "projects/1/global/networks/vpc"
    assert sent.labels["team"] == "nlp"
    assert sent.runtime_config.gcs_output_directory == "gs://bkt/runs/pipeline_root"
    spec = MessageToDict(PipelineJob.pb(sent).pipeline_spec)
    assert spec["pipelineInfo"]["name"] == "rlhf-pipeline"
    assert '"enableCache": true' not in json.dumps(spec)

    values = MessageToDict(PipelineJob.pb(sent).runtime_config)["parameterValues"]
    assert set(values) <= set(PARAMETERS)
    assert values["project"] == "own-project"
    assert values["image"] == (
        f"us-central1-docker.pkg.dev/own-project/rlhf/rlhf:{rlhf.__version__}"
    )
    # What the validation step makes of them are the stages that `rlhf run` has.
    there = to_config(values)
    here = load_config(PipelineConfig, run_file, {"seed": 4})
    for stage in ("reward_model", "ppo", "inference"):
        assert there.stage_config(stage) == here.stage_config(stage)
    said = capsys.readouterr().err
    assert "pairs: 9 rows" in said
    assert f"submitted {name}" in said


def test_a_submission_says_what_it_asks_for(vertex, run_file, capsys, monkeypatch):
    shape = dict(SHAPES["7b"])
    big = AutoConfig.for_model(shape.pop("model_type"), **shape)
    monkeypatch.setattr("rlhf.vertex.machines.read_model_config", lambda *_: big)
    flags = ["--vertex.accelerator_type=GPU", "--vertex.strategy=SPOT", "--vertex.timeout=5400s"]
    flags += ["--vertex.deploy_model", "--eval_dataset=null", "--vertex.project=other-project"]
    assert main(["vertex", "submit", "--config", run_file, *flags]) == 0
    said = capsys.readouterr().err
    for line in (
        "project: other-project, us-central1",
        "jobs: validate (CPU), reward_model, ppo; one after the other",
        "steps: reward_model 7, ppo 2 epochs",
        "a2-ultragpu-1g with 1 x NVIDIA_A100_80GB in europe-west4, SPOT",
        "6.74 B parameters",
        "at most: 1.5 h a job",
        "output: gs://bkt/runs/First.run",
        "no eval_dataset: the pipeline ends after PPO",
        "deploy_model: nothing is deployed",
    ):
        assert line in said, line
    assert vertex.requests[0][1].startswith("/v1/projects/other-project/")


def test_steps_that_nobody_gave_are_the_stages_own(vertex, run_file, capsys):
    flags = ["--reward_model.train_steps=null", "--ppo.num_epochs=null"]
    assert main(["vertex", "submit", "--config", run_file, *flags]) == 0
    assert "steps: reward_model 1 epochs, ppo 200" in capsys.readouterr().err


def test_a_dry_run_prints_the_request_and_sends_nothing(vertex, run_file, capsys):
    assert main(["vertex", "submit", "--config", run_file, "--dry_run"]) == 0
    assert vertex.requests == []
    captured = capsys.readouterr()
    job = PipelineJob()
    ParseDict(json.loads(captured.out), job._pb)
    assert "machine: n1-highmem-8 in europe-west4" in captured.err

    assert main(["vertex", "submit", "--config", run_file]) == 0
    [sent] = vertex.posted()
    shown = json.loads(captured.out)
    assert shown.pop("name", "") == ""
    sent.pop("name", None)
    assert shown == sent  # the exact request


def test_a_dry_run_needs_no_credentials(vertex, run_file, capsys, monkeypatch):
    def none(**_: Any) -> Any:
        raise DefaultCredentialsError("no credentials")

    monkeypatch.setattr("google.auth.default", none)
    command = ["vertex", "submit", "--config", run_file, "--vertex.project=other-project"]
    assert main([*command, "--dry_run"]) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "gcloud auth application-default login" in capsys.readouterr().err
    assert main(["vertex", "submit", "--config", run_file, "--dry_run"]) == 2
    assert vertex.requests == []


def test_credentials_without_a_project(vertex, run_file, capsys, monkeypatch):
    monkeypatch.setattr("google.auth.default", lambda **_: (AnonymousCredentials(), None))
    assert main(["vertex", "submit", "--config", run_file]) == 2
    assert "vertex.project: is not given" in capsys.readouterr().err


def test_googles_parameters_go_with_flags(vertex, google_file, monkeypatch, capsys):
    flags = ["--output_dir", "gs://bkt/runs/google", "--vertex.project", "other-project"]
    flags += ["--ppo.gamma", "0.9", "--vertex.accelerator_type", "CPU"]
    assert main(["vertex", "submit", "--parameters", google_file, *flags]) == 0
    [job] = vertex.pipelines.values()
    values = MessageToDict(PipelineJob.pb(job).runtime_config)["parameterValues"]
    wanted = NOTEBOOK | {"large_model_reference": "meta-llama/Llama-2-7b-hf"}
    assert {name: values.get(name, wanted[name]) for name in wanted} == wanted
    assert (values["output_directory"], values["run_name"]) == ("gs://bkt/runs", "google")
    assert values["ppo_config"] == {"gamma": 0.9}
    assert values["reward_model_config"] == values["inference_config"] == {}
    assert "steps: reward_model 1410, ppo 320" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ("{", [], ["cannot be read"]),
        ("[1]", [], ["expected one JSON object"]),
        (json.dumps(NOTEBOOK | {"kl_coef": 1}), [], ["kl_coef: unknown parameter; did you mean"]),
        (
            json.dumps(NOTEBOOK | {"kl_coeff": "0.1", "instruction": 3}),
            ["--ppo.gama=1"],
            [
                "kl_coeff: expected a number, got '0.1'",
                "instruction: expected text, got 3",
                "--ppo.gama: unknown flag; did you mean `--ppo.gamma`?",
            ],
        ),
        (json.dumps(NOTEBOOK | {"accelerator_type": "TPU"}), [], ["accelerator_type: TPU cannot"]),
        pytest.param(DEEP, [], ["cannot be read: "], id="deep"),
        (json.dumps(NOTEBOOK | {"kl_coeff": 10**400}), [], ["kl_coeff: expected at most 90071"]),
        (
            json.dumps(NOTEBOOK | {"reward_model_train_steps": 1e300}),
            [],
            ["reward_model_train_steps: expected at most 9007199254740992"],
        ),
        (
            json.dumps(NOTEBOOK | {"ppo_config": {"save_every": 10**400}}),
            [],
            ["ppo_config: save_every: expected integer, got one of more than 18 digits"],
        ),
        (
            json.dumps(NOTEBOOK | {"instruction": "\ud800"}),
            [],
            ["instruction: expected text, got a text with half a character"],
        ),
        pytest.param(
            json.dumps(NOTEBOOK | {"eval_dataset": DEEP}),
            [],
            ["eval_dataset: expected an address, or a JSON list"],
            id="deep in text",
        ),
        pytest.param(
            json.dumps(NOTEBOOK),
            ["--vertex.labels", DEEP],
            ["vertex.labels: expected JSON"],
            id="deep in a flag",
        ),
        (json.dumps(NOTEBOOK), ["--ppo.gamma=7"], ["ppo.gamma: expected number less than or"]),
        (json.dumps(NOTEBOOK), ["--config", "run.yaml"], ["config, parameters: give one of them"]),
    ],
)
def test_wrong_parameters_are_refused_by_name_before_anything_is_sent(
    vertex, tmp_path, capsys, content, flags, said
):
    path = tmp_path / "given.json"
    path.write_text(content)
    command = ["vertex", "submit", "--parameters", str(path), "--output_dir=gs://bkt/runs/x"]
    assert main([*command, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    for text in said:
        assert any(text in line for line in lines), (text, lines)
    assert len(lines) == len(said)
    assert vertex.requests == []


def test_parameters_without_a_place_for_the_results(vertex, google_file, tmp_path, capsys):
    assert main(["vertex", "submit", "--parameters", google_file]) == 2
    said = capsys.readouterr().err
    assert "output_directory: is required" in said
    assert "--output_dir gs://BUCKET/FOLDER/RUN" in said
    assert main(["vertex", "submit", "--parameters", str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read: No such file" in capsys.readouterr().err
    assert vertex.requests == []


def test_bases_that_only_the_jobs_can_read(vertex, run_file, capsys, monkeypatch):
    def gated(_: PipelineConfig) -> list[str]:
        raise InputError("base_model: meta-llama/Llama-2-7b-hf: is gated")

    monkeypatch.setattr(submit, "check_inputs", gated)
    monkeypatch.setattr("rlhf.vertex.machines.read_model_config", lambda *_: gated(None))
    command = ["vertex", "submit", "--config", run_file, "--vertex.accelerator_type=GPU"]
    assert main(command) == 2
    assert "is gated" in capsys.readouterr().err
    assert vertex.requests == []
    secret = "--vertex.huggingface_token_secret=hub"
    assert main([*command, secret]) == 0
    assert "the jobs have a token" in capsys.readouterr().err
    # The token helps against nothing else.
    assert main([*command, secret, "--vertex.accelerator_count=3"]) == 2
    assert "accelerator_count: " in capsys.readouterr().err

    def bad_rows(_: PipelineConfig) -> list[str]:
        raise InputError(["base_model: is gated", "gs://bkt/pairs.jsonl:3: choice: wrong"])

    monkeypatch.setattr(submit, "check_inputs", bad_rows)
    assert main([*command, secret]) == 2
    assert len(vertex.posted()) == 1


def test_a_refusal_of_vertex_is_said_without_a_traceback(vertex, run_file, capsys):
    vertex.refuse = (403, "Permission aiplatform.pipelineJobs.create denied")
    assert main(["vertex", "submit", "--config", run_file]) == 2
    said = capsys.readouterr().err
    assert "rlhf: Vertex AI refused the pipeline: " in said
    assert "Permission aiplatform.pipelineJobs.create denied" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", [["submit", "--config", "x.yaml"], ["compile", "x.yaml"]])
def test_a_missing_extra_is_one_clear_error(command, capsys, monkeypatch):
    monkeypatch.setattr("rlhf.cli._installed", lambda name: name != "kfp")
    assert main(["vertex", *command]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("rlhf: kfp not installed; pip install 'rlhf-ppo[vertex]'")


def test_compile_writes_the_shipped_pipeline(tmp_path, capsys):
    path = tmp_path / "pipeline.yaml"
    assert main(["vertex", "compile", str(path)]) == 0
    shipped = Path(submit.__file__).parent / "rlhf_pipeline.yaml"
    assert path.read_bytes() == shipped.read_bytes()
    assert main(["vertex", "compile", "pipeline.json"]) == 2
    assert "expected a name ending in .yaml" in capsys.readouterr().err
    (tmp_path / "folder.yaml").mkdir()
    for place in (tmp_path / "folder.yaml", tmp_path / "none" / "x.yaml"):
        assert main(["vertex", "compile", str(place)]) == 2
        assert f"rlhf: {place}: cannot be written: " in capsys.readouterr().err


PLACES = {
    "validate": "projects/own-project/locations/us-central1",
    "ppo": "projects/own-project/locations/europe-west4",
}


class Story:
    """What becomes of a pipeline, told in steps; `run_name` is the run's."""

    def __init__(self, fake: FakeVertex, run_name: str) -> None:
        self.fake, self.run_name = fake, run_name

    def custom_job(self, stage: str, state: JobState, **fields: Any) -> CustomJob:
        spec = {
            "worker_pool_specs": [
                {
                    "machine_spec": {
                        "machine_type": "a2-highgpu-1g",
                        "accelerator_type": "NVIDIA_TESLA_A100",
                        "accelerator_count": 1,
                    }
                }
            ],
            "scheduling": {"strategy": "SPOT"},
        }
        name = f"{self.run_name}-{stage}"
        given = {"display_name": name, "job_spec": spec, "state": state, **fields}
        return self.fake.add_custom_job(PLACES[stage], **given)

    def tell(self, *steps: Any) -> None:
        self.fake.steps = list(steps)


def running(job: PipelineJob) -> None:
    job.state = PipelineState.PIPELINE_STATE_RUNNING


def ended(state: str, **tasks: str) -> Any:
    def step(job: PipelineJob) -> None:
        job.state = PipelineState[f"PIPELINE_STATE_{state}"]
        if tasks:
            job.error = {"code": 9, "message": "The DAG failed."}
        job.job_detail = {
            "task_details": [
                {
                    "task_name": name.replace("_", "-"),
                    "state": PipelineTaskDetail.State.FAILED,
                    "error": {"code": 3, "message": text},
                }
                for name, text in tasks.items()
            ]
        }

    return step


def test_wait_follows_changes_and_says_why_a_job_is_queued(vertex, run_file, capsys):
    story = Story(vertex, "First.run")
    yesterday = NOW - datetime.timedelta(days=1)
    story.custom_job("ppo", JobState.JOB_STATE_FAILED, create_time=yesterday)
    queued = {"error": {"code": 8, "message": "no capacity in zone"}}

    def starts(job: PipelineJob) -> None:
        running(job)
        story.custom_job("ppo", JobState.JOB_STATE_QUEUED, **queued)

    def runs(_: PipelineJob) -> None:
        vertex.custom_jobs[-1].state = JobState.JOB_STATE_RUNNING

    story.tell(lambda _: None, running, running, starts, running, runs, ended("SUCCEEDED"))
    assert main(["vertex", "submit", "--config", run_file, "--wait"]) == 0
    said = capsys.readouterr().err
    changes = [line.split(" ", 1)[1] for line in said.splitlines() if line[2:3] == ":"]
    name = f"{PLACES['ppo']}/customJobs/2"
    assert changes == [
        "pipeline: pending",
        "pipeline: running",
        f"ppo: queued ({name}): waits for a2-highgpu-1g with 1 x NVIDIA_TESLA_A100 in "
        "europe-west4, SPOT; Vertex says: no capacity in zone",
        f"ppo: running ({name})",
        "pipeline: succeeded",
    ]
    assert said.rstrip().endswith("everything is in gs://bkt/runs/First.run")


def left_behind(cause: str, when: datetime.datetime) -> bytes:
    found = {
        "cause": cause,
        "fix": "Correct what the cause names and submit again.",
        "kind": "InputError",
        "permanent": True,
        "attempt": "x",
        "checkpoint": "",
        "time": when.strftime(TIME_FORMAT),
    }
    return json.dumps(found).encode()


def test_wait_says_why_a_run_failed(vertex, run_file, capsys, object_store: ObjectStore):
    bucket = object_store.bucket("rlhf-test")
    run = f"{bucket}/runs/First.run"
    later = NOW + datetime.timedelta(minutes=9)
    earlier = NOW - datetime.timedelta(minutes=9)
    object_store.write(f"{run}/policy/failure.json", left_behind("ppo: no memory", later))
    object_store.write(f"{run}/validate/failure.json", left_behind("of an old run", earlier))
    story = Story(vertex, "First.run")
    story.custom_job("validate", JobState.JOB_STATE_SUCCEEDED)
    story.custom_job("ppo", JobState.JOB_STATE_FAILED)
    story.tell(running, ended("FAILED", ppo="The replica exited with 2.", validate="odd"))
    assert main(["vertex", "submit", "--config", run_file, f"--output_dir={run}", "--wait"]) == 1
    lines = capsys.readouterr().err.splitlines()
    for line in (
        "pipeline: The DAG failed.",
        "failed: ppo: The replica exited with 2.",
        "cause: ppo: no memory",
        "fix: Correct what the cause names and submit again.",
        'logs: gcloud logging read \'resource.type="ml_job" AND resource.labels.job_id="2"\' '
        "--project=own-project --limit=200",
    ):
        assert line in lines, (line, lines)
    assert not any("of an old run" in line for line in lines)


def test_wait_without_a_failure_file_or_a_job(vertex, run_file, capsys, monkeypatch):
    monkeypatch.setattr(follow, "read_failure", lambda folder: None)
    story = Story(vertex, "First.run")
    story.tell(ended("FAILED", validate="Quota exceeded."))
    assert main(["vertex", "submit", "--config", run_file, "--wait"]) == 1
    said = capsys.readouterr().err
    assert "failed: validate: Quota exceeded." in said
    assert "\ncause: " not in said
    assert "logs: " not in said


def test_a_cancelled_run_is_no_success(vertex, run_file, capsys):
    Story(vertex, "First.run").tell(running, ended("CANCELLED"))
    assert main(["vertex", "submit", "--config", run_file, "--wait"]) == 1
    assert "pipeline: cancelled" in capsys.readouterr().err


def test_a_run_that_cannot_be_followed_goes_on(vertex, run_file, capsys):
    def gone(_: PipelineJob) -> None:
        vertex.pipelines.clear()

    Story(vertex, "First.run").tell(gone, running)
    assert main(["vertex", "submit", "--config", run_file, "--wait"]) == 1
    said = capsys.readouterr().err
    assert "cannot be followed any longer: 404" in said
    assert "the run itself goes on: projects/own-project/locations/us-central1/pipe" in said
    assert "Traceback" not in said
