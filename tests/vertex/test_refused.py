"""What `rlhf vertex submit` refuses before anything is sent, and by which name."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS
from google.cloud.aiplatform_v1.types import (
    PipelineJob,
    PipelineState,
)
from google.protobuf.json_format import MessageToDict

import rlhf
from rlhf.cli import main
from rlhf.config import PipelineConfig, VertexConfig
from rlhf.config.cloud_names import REGIONS
from rlhf.errors import InputError
from rlhf.vertex import submit
from rlhf.vertex.conversion import to_parameters
from rlhf.vertex.image import pinned


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
            ["--reward_model.base_model=~/scorer", "--ppo.eval_dataset=e.jsonl"],
            ["reward_model.base_model: ~/scorer is on", "ppo.eval_dataset: e.jsonl is on this"],
        ),
        (
            ["--reward_model.normalization_dataset=n.jsonl"],
            ["reward_model.normalization_dataset: n.jsonl is on this machine"],
        ),
        (["--inference.reward_model_path=rm"], ["inference.reward_model_path: rm is on this"]),
        (
            ["--ppo.rewards=./judge", "--ppo.rewards=gs://bkt/one", "--ppo.rewards=org/two"],
            ["ppo.rewards.0.path: ./judge is on this machine"],
        ),
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
        (["--output_dir=gs://bkt/../x/run"], ["expected no . or .. between slashes"]),
        (["--output_dir=gs://bkt/a*/run"], ["output_dir: gs://bkt/a*: expected no empty part"]),
        (["--output_dir=gs://bkt//a/run"], ["output_dir: gs://bkt//a: expected no empty part"]),
        (
            ["--output_dir=gs://bkt/pipeline_root"],
            ["output_dir: pipeline_root is where Vertex keeps"],
        ),
        (["--preference_dataset=gs://bkt/x/../../y"], ["preference_dataset: 'gs://bkt/x/../../y'"]),
        (["--output_dir=gs://192.168.1.1/a/run"], ["'192.168.1.1' cannot be a bucket"]),
        (["--vertex.pipeline_root=gs://bkt/runs/First.run/x"], ["vertex.pipeline_root: gs://bkt"]),
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
            [
                "output_dir: ",
                "vertex.machine_type: e2",
                "vertex.accelerator_count: ",
                "ppo_config: dry",
            ],
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["location=us-centrall1"], ["is no region of Vertex AI; did you mean `us-central1`?"]),
        (["tuning_location=us-central1-a"], ["us-central1-a is a zone; expected its region, us-c"]),
        (["location=global"], ["location: 'global' is no region"]),
        (["project=YOUR_PROJECT"], ["project: YOUR_PROJECT still has the placeholder"]),
        (["project=${PROJECT}"], ["project: ${PROJECT} still has the placeholder"]),
        (["project=123456789"], ["project: expected a project ID"]),
        (["project=My Project"], ["project: expected a project ID"]),
        (["timeout=0s"], ["timeout: expected at least 1s"]),
        (["timeout=1h"], ["timeout: expected whole seconds and an s, such as 3600s, got '1h'"]),
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
            # The file has another one.
            [f"labels={json.dumps({f'l{n}': 'x' for n in range(64)})}"],
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
    assert f"vertex.image: there is no {IMAGE}:{tag}; build and push it" in capsys.readouterr().err


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


def test_a_bucket_that_is_not_there_is_refused_and_not_made(vertex, run_file, monkeypatch, capsys):
    def missing(*_):
        raise FileNotFoundError("bucket")

    monkeypatch.setattr(submit, "find_files", missing)
    assert main(["vertex", "submit", "--config", run_file]) == 2
    said = capsys.readouterr().err
    assert "output_dir: there is no bucket gs://" in said
    assert "gcloud storage buckets create" in said
    assert vertex.requests == []


def test_a_pipeline_that_trains_no_reward_model_is_refused():
    config = PipelineConfig(
        base_model="b", output_dir="gs://bkt/runs/one", preference_dataset="gs://bkt/p.jsonl",
        reward_model_path="team/scorer",
    )  # fmt: skip
    with pytest.raises(InputError, match="reward_model_path: the Vertex pipeline always trains"):
        to_parameters(config)
