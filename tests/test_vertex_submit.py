"""`rlhf vertex submit` from the command line to the wire, against a fake of Vertex's API."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vertex import NOW, FakeVertex
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.aiplatform import initializer
from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS
from google.cloud.aiplatform_v1.types import (
    CustomJob,
    JobState,
    PipelineJob,
    PipelineState,
    PipelineTaskDetail,
)
from google.protobuf.json_format import MessageToDict, ParseDict
from object_store import ObjectStore
from test_vertex_machines import SHAPES
from test_vertex_parameters import NOTEBOOK
from transformers import AutoConfig

import rlhf
from rlhf.cli import main
from rlhf.config import PipelineConfig, VertexConfig, load_config
from rlhf.config.cloud_names import REGIONS
from rlhf.errors import InputError
from rlhf.vertex import follow, submit
from rlhf.vertex.conversion import to_config
from rlhf.vertex.failure import TIME_FORMAT
from rlhf.vertex.image import pinned
from rlhf.vertex.parameters import PARAMETERS

YAML = """
base_model: google/flan-t5-base
preference_dataset: gs://bkt/pairs.jsonl
prompt_dataset: [gs://bkt/1.jsonl, gs://bkt/2.jsonl]
eval_dataset: gs://bkt/eval.jsonl
output_dir: gs://bkt/runs/First.run
seed: 3
lora: {rank: 4}
instruction: "Say \\"it\\",\\nbriefly: 要約"
reward_model: {train_steps: 7}
ppo: {num_epochs: 2, temperature: 0.7}
vertex:
  accelerator_type: CPU
  tuning_location: europe-west4
  service_account: tuner@p.iam.gserviceaccount.com
  network: projects/1/global/networks/vpc
  labels: {team: nlp}
"""


@pytest.fixture
def vertex(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVertex]:
    """The API, credentials of nobody, and files that nobody looks into."""
    fake = FakeVertex()
    settings = initializer.global_config
    for name in ("_project", "_location", "_credentials"):  # whatever a test makes of them
        monkeypatch.setattr(settings, name, getattr(settings, name))
    monkeypatch.setattr(settings, "_api_endpoint", fake.url)
    monkeypatch.setattr(settings, "_api_transport", "rest")
    credentials = (AnonymousCredentials(), "own-project")
    monkeypatch.setattr("google.auth.default", lambda **_: credentials)
    monkeypatch.setattr(submit, "check_inputs", lambda config: ["pairs: 9 rows"])
    monkeypatch.setattr(submit, "find_files", lambda *_: {})  # the bucket is there
    shape = dict(SHAPES["tiny"])
    tiny = AutoConfig.for_model(shape.pop("model_type"), **shape)
    monkeypatch.setattr("rlhf.vertex.machines.read_model_config", lambda *_: tiny)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0)
    yield fake
    fake.close()


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


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


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--preference_dataset=pairs.jsonl"], ["preference_dataset: pairs.jsonl is on this"]),
        (
            ["--prompt_dataset=gs://bkt/1.jsonl", "--prompt_dataset=/data/2.jsonl"],
            ["prompt_dataset: /data/2.jsonl is on this machine"],
        ),
        # What takes the place of a field that was not given is not named for it too.
        (
            ["--preference_dataset=p.jsonl", "--prompt_dataset=null", "--eval_dataset=null"],
            ["preference_dataset: p.jsonl is on this machine"],
        ),
        (["--eval_dataset=s3://b/x.jsonl"], ["eval_dataset: s3://b/x.jsonl: the jobs read gs://"]),
        (["--base_model=./model"], ["base_model: ./model is on this machine"]),
        (["--base_model=models/t5"], ["base_model: models/t5 is on this machine"]),
        (
            ["--reward_model.base_model=~/judge", "--ppo.eval_dataset=e.jsonl"],
            ["reward_model.base_model: ~/judge is on", "ppo.eval_dataset: e.jsonl is on this"],
        ),
        (
            ["--reward_model.normalization_dataset=n.jsonl"],
            ["reward_model.normalization_dataset: n.jsonl is on this machine"],
        ),
        (["--inference.reward_model_path=rm"], ["inference.reward_model_path: rm is on this"]),
        (["--tensorboard_dir=logs"], ["tensorboard_dir: logs/reward_model is on this", "/policy"]),
        (["--output_dir=runs/x"], ["output_dir: expected gs://BUCKET/FOLDER/RUN, got runs/x"]),
        (["--output_dir=gs://bkt"], ["output_dir: expected gs://BUCKET/FOLDER/RUN"]),
        (
            ["--output_dir=file:///tmp/x"],
            ["output_dir: expected gs://BUCKET/FOLDER/RUN, got file:"],
        ),
        (["--output_dir=/data/x"], ["output_dir: expected gs://BUCKET/FOLDER/RUN, got /data/x"]),
        (["--output_dir=s3://b/x"], ["output_dir: expected gs://BUCKET/FOLDER/RUN, got s3://b/x"]),
        (
            ["--output_dir=gs://YOUR-BUCKET/runs/x", "--preference_dataset=gs://<bucket>/p.jsonl"],
            ["output_dir: gs://YOUR-BUCKET/runs still has the placeholder YOUR-BUCKET", "<bucket>"],
        ),
        (["--output_dir=gs://My_Bucket/runs/x"], ["output_dir: gs://My_Bucket/runs: 'My_Bucket'"]),
        (["--base_model=gs://x/model"], ["base_model: gs://x/model: 'x' cannot be a bucket"]),
        (["--output_dir=gs://bkt/"], ["output_dir: expected gs://BUCKET/FOLDER/RUN"]),
        (["--output_dir=gs://bkt/a run"], ["output_dir: its last part is the name of the run"]),
        (
            ["--sft_dataset=gs://bkt/d", "--output_dir=x"],
            ["sft_dataset: the Vertex", "output_dir:"],
        ),
        (["--ppo.dry_run"], ["ppo_config: dry_run: a job of the pipeline has to run"]),
        (["--vertex.machine_type=n1-standard-8", "--vertex.accelerator_type=GPU"], ["not known"]),
        # All of them at once, and none after the files were read.
        (
            [
                "--output_dir=/data/x",
                "--vertex.accelerator_type=NVIDIA_TESLA_T4",
                "--vertex.machine_type=e2-standard-8",
                "--vertex.accelerator_count=3",
                "--ppo.dry_run",
            ],
            ["output_dir: ", "machine_type: e2", "accelerator_count: a stage", "ppo_config: dry"],
        ),
    ],
)
def test_what_only_this_machine_has_is_refused_by_the_fields_name(
    vertex, run_file, capsys, tmp_path, monkeypatch, flags, named
):
    (tmp_path / "models" / "t5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["vertex", "submit", "--config", run_file, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    problems = [line for line in lines if line.startswith("rlhf: ")]
    for text in named:
        assert any(text in line for line in problems), (text, lines)
    assert len(problems) == len(named), lines
    assert vertex.requests == []


def test_mounted_addresses_are_addresses(vertex, run_file):
    flags = ["--output_dir=/gcs/bkt/runs/x", "--preference_dataset=/gcs/bkt/pairs.jsonl"]
    assert main(["vertex", "submit", "--config", run_file, *flags]) == 0
    [job] = vertex.pipelines.values()
    values = MessageToDict(PipelineJob.pb(job).runtime_config)["parameterValues"]
    assert values["output_directory"] == "gs://bkt/runs"
    assert main(["vertex", "submit", "--config", run_file, "--output_dir=gs://bkt/y"]) == 0
    [_, job] = vertex.pipelines.values()
    values = MessageToDict(PipelineJob.pb(job).runtime_config)["parameterValues"]
    assert (values["output_directory"], values["run_name"]) == ("gs://bkt", "y")


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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["location=us-centrall1"], ["is no region of Vertex AI; did you mean `us-central1`?"]),
        (["tuning_location=us-central1-a"], ["us-central1-a is a zone; expected its region, us-c"]),
        (["location=global"], ["location: 'global' is no region"]),
        (["project=YOUR_PROJECT"], ["project: YOUR_PROJECT still has the placeholder"]),
        (["project=${PROJECT}"], ["project: ${PROJECT} still has the placeholder"]),
        (["project=My Project"], ["project: expected a project ID"]),
        (["timeout=0s"], ["timeout: expected at least 1s"]),
        (["timeout=99999999999999s"], ["timeout: expected at least 1s"]),
        (["network=default"], ["network: expected projects/NUMBER/global/networks/NAME"]),
        (
            ["network=projects/my-project/global/networks/default"],
            ["network: expected projects/NUMBER/global/networks/NAME"],
        ),
        (["service_account=someone"], ["service_account: expected an address such as NAME@"]),
        (["service_account=me@example.com"], ["service_account: expected an address such as NAME"]),
        (["image=<image>"], ["image: <image> still has the placeholder"]),
        (["image=https://gcr.io/p/x"], ["image: expected HOST/PROJECT/REPOSITORY/NAME:TAG"]),
        (["image=gcr.io/p/x@sha256:12"], ["image: expected HOST/PROJECT"]),
        (["strategy=FLEX_START", "timeout=2592000s"], ["timeout: FLEX_START gives machines for"]),
        (
            ["strategy=FLEX_START", "accelerator_type=NVIDIA_TESLA_T4"],
            ["strategy: FLEX_START does not give NVIDIA_TESLA_T4"],
        ),
        (["pipeline_root=/data"], ["pipeline_root: expected gs://"]),
        (["pipeline_root=gs://YOUR-BUCKET/x"], ["pipeline_root: gs://YOUR-BUCKET/x still has"]),
        (['labels={"1a": "b"}'], ["labels: 1a=b: expected lower case"]),
        (['labels={"goog-a": "b"}'], ["labels: goog-a: names in goog- are Google's"]),
        (
            [f"labels={json.dumps({f'l{n}': 'x' for n in range(65)})}"],
            ["labels: there are 65; at most 64"],
        ),
        ([f"model_display_name={'x' * 129}"], ["model_display_name: expected at most 128"]),
        # A key or a TensorBoard of another region.
        (
            ["encryption_spec_key_name=projects/p/locations/us/keyRings/r/cryptoKeys/k"],
            ["the key is in us, but jobs run in us-central1 and europe-west4"],
        ),
        (
            [
                "location=europe-west4",
                "tensorboard_resource_id=projects/1/locations/us-central1/tensorboards/2",
            ],
            ["tensorboard_resource_id: the TensorBoard is in us-central1, the GPU jobs in eur"],
        ),
        (
            ["location=us-centrall1", "timeout=0s", "network=default", "service_account=someone"],
            ["location: ", "timeout: ", "network: ", "service_account: "],
        ),
    ],
)
def test_what_vertex_would_refuse_late_is_refused_first_by_the_fields_name(
    vertex, run_file, capsys, flags, said
):
    command = ["vertex", "submit", "--config", run_file]
    assert main([*command, *(f"--vertex.{flag}" for flag in flags)]) == 2
    lines = capsys.readouterr().err.splitlines()
    for text in said:
        assert any(text in line for line in lines), (text, lines)
    assert len(lines) == len(said)
    assert vertex.requests == []


def test_regions_are_those_that_the_client_library_takes():
    assert set(REGIONS) == SUPPORTED_REGIONS - {"global"}
    for region in REGIONS:
        assert not VertexConfig(location=region).cross_problems()


LIVING = ["QUEUED", "PENDING", "RUNNING", "CANCELLING", "PAUSED"]


@pytest.mark.parametrize("state", LIVING)
def test_a_run_that_lives_is_not_submitted_again(vertex, run_file, capsys, state):
    command = ["vertex", "submit", "--config", run_file]
    for number in range(4):  # more than a page of others
        assert main([*command, f"--output_dir=gs://bkt/runs/other-{number}"]) == 0
    assert main(command) == 0
    name, job = list(vertex.pipelines.items())[-1]
    job.state = PipelineState[f"PIPELINE_STATE_{state}"]
    capsys.readouterr()
    assert main(command) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if "writes into" in text]
    assert line == (
        f"rlhf: output_dir: {name} ({state.lower()}, submitted 2026-01-02 03:04:05 UTC) writes "
        "into gs://bkt/runs/First.run; wait until it has ended, cancel it, or give another run name"
    )
    assert len(vertex.posted()) == 5
    # The same folder by its mounted address.
    assert main([*command, "--output_dir=/gcs/bkt/runs/First.run/"]) == 2
    # A dry run sends nothing and asks nothing.
    asked = len(vertex.requests)
    assert main([*command, "--dry_run"]) == 0
    assert len(vertex.requests) == asked


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELLED"])
def test_a_run_that_has_ended_is_continued(vertex, run_file, state):
    command = ["vertex", "submit", "--config", run_file]
    assert main(command) == 0
    [job] = vertex.pipelines.values()
    job.state = PipelineState[f"PIPELINE_STATE_{state}"]
    assert main(command) == 0
    assert len(vertex.posted()) == 2


def test_a_project_that_does_not_list_its_pipelines(vertex, run_file, capsys):
    vertex.refuse_list = (403, "aiplatform.pipelineJobs.list denied")
    assert main(["vertex", "submit", "--config", run_file]) == 2
    said = capsys.readouterr().err
    assert "Vertex AI does not list the pipelines of projects/own-project/locations/us-ce" in said
    assert vertex.posted() == []


def test_access_can_be_left_to_the_job(vertex, run_file, capsys, monkeypatch):
    def no_access(*_: Any) -> Any:
        raise InputError("gs://bkt: 403")

    monkeypatch.setattr(submit, "check_inputs", no_access)
    monkeypatch.setattr(submit, "find_files", no_access)
    monkeypatch.setattr("rlhf.vertex.machines.read_model_config", no_access)
    command = ["vertex", "submit", "--config", run_file]
    assert main(command) == 2
    assert vertex.requests == []
    command.append("--vertex.check_inputs=job")
    assert main(command) == 0
    [sent] = vertex.pipelines.values()
    values = MessageToDict(PipelineJob.pb(sent).runtime_config)["parameterValues"]
    assert "check_inputs" not in values  # the job looks in any case
    said = capsys.readouterr().err
    assert "looked at by the validation job only" in said
    assert "machine: n1-highmem-8 in europe-west4" in said
    vertex.pipelines.clear()
    assert main([*command, "--vertex.accelerator_type=GPU"]) == 0
    assert "machine: chosen by the validation step in europe-west4" in capsys.readouterr().err
    # What needs no access is looked at all the same.
    assert main([*command, "--vertex.machine_type=a2-highgpu-8g"]) == 2


class Registry:
    """An image registry as `requests` would meet it."""

    def __init__(self, status: int, digest: str | None = None) -> None:
        self.status, self.digest, self.asked = status, digest, []

    def head(self, url: str, **options: Any) -> Any:
        self.asked.append(url)
        if self.status == 0:
            raise ConnectionError("no route")
        headers = {} if self.digest is None else {"Docker-Content-Digest": self.digest}
        return SimpleNamespace(status_code=self.status, headers=headers)


DIGEST = f"sha256:{'0a' * 32}"
IMAGE = "europe-west4-docker.pkg.dev/own-project/rlhf/rlhf"


def test_a_run_is_sent_with_the_digest_that_its_tag_has_now(vertex, run_file, monkeypatch, capsys):
    registry = Registry(200, DIGEST)
    monkeypatch.setattr(submit, "AuthorizedSession", lambda credentials: registry)
    monkeypatch.setattr("google.auth.default", lambda **_: (object(), "own-project"))
    command = ["vertex", "submit", "--config", run_file, "--vertex.location=europe-west4"]
    assert main([*command, "--dry_run"]) == 0
    shown = capsys.readouterr()
    sent = json.loads(shown.out)["runtimeConfig"]["parameterValues"]
    assert sent["image"] == f"{IMAGE}@{DIGEST}"
    tag = rlhf.__version__
    host, path = IMAGE.split("/", 1)
    assert registry.asked == [f"https://{host}/v2/{path}/manifests/{tag}"]
    assert f"image: {tag} is {DIGEST} now" in shown.err
    registry.status = 404
    assert main([*command, "--dry_run"]) == 2
    assert f"image: there is no {IMAGE}:{tag}; build and push it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "registry", "said"),
    [
        (f"{IMAGE}@{DIGEST}", Registry(500), ""),
        (f"{IMAGE}:1", Registry(403), "cannot be looked up (403)"),
        (f"{IMAGE}:1", Registry(200), "cannot be looked up (200)"),
        (f"{IMAGE}:1", Registry(200, "sha256:12"), "cannot be looked up (200)"),
        (f"{IMAGE}:1", Registry(0), "cannot be looked up: no route"),
        # Credentials go to Google's registries only.
        ("evil.example/rlhf/rlhf:1", Registry(200, DIGEST), "evil.example is not asked"),
        ("gcr.io.evil.example/rlhf:1", Registry(200, DIGEST), "is not asked"),
    ],
)
def test_an_image_whose_digest_is_not_told_keeps_its_tag(image, registry, said):
    kept, note = pinned(image, registry)
    assert kept == image
    assert said in note if said else note == ""
    assert bool(registry.asked) == (IMAGE in image and "@" not in image)


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


def test_a_bucket_that_is_not_there_is_refused_and_not_made(vertex, run_file, monkeypatch, capsys):
    def missing(*_):
        raise FileNotFoundError("bucket")

    monkeypatch.setattr(submit, "find_files", missing)
    assert main(["vertex", "submit", "--config", run_file]) == 2
    said = capsys.readouterr().err
    assert "output_dir: there is no bucket gs://" in said
    assert "gcloud storage buckets create" in said
    assert vertex.requests == []
