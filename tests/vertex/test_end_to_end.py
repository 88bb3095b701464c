"""The committed pipeline from files in a bucket to a tuned model, with no cloud.

Real are the compiled YAML, Google's launcher, the container's entrypoint, the stages and the
object store's protocol; Vertex's API is a fake that parses requests as Vertex's own messages.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.compiled_pipeline import LauncherFailed, Run, stop
from support.custom_jobs import ROOT, CustomJobs, wait_for
from support.object_store import ObjectStore

from rlhf.config import PipelineConfig, config_to_yaml

pytestmark = pytest.mark.slow

YAML = ROOT / "kfp" / "rlhf_pipeline.yaml"
STEPS = 8
PPO = {"batch_size": 4, "save_every": 2, "save_total_limit": 5, "lora": {"rank": 2}}
INSTRUCTION = "Say \"it\" in <b>one</b> line,\n'not' two: naïve 要約 \\ {{x}} $HOME"


def preference(number: int) -> dict[str, Any]:
    return {
        "input_text": f"{number} the cat sat and the dog ran [summary]: ",
        "candidate_0": " the cat sat",
        "candidate_1": f" a dog ran {number}",
        "choice": number % 2,
    }


DATA = {
    "preferences.jsonl": [preference(number) for number in range(24)],
    "prompts-0.jsonl": [{"input_text": f"{n} the dog ran to a post"} for n in range(5)],
    "prompts-1.jsonl": [{"input_text": f"{n} the cat sat"} for n in range(5)],
    "eval.jsonl": [
        *(preference(number) for number in range(100, 104)),
        *({"input_text": f"a cat {n}", "output_text": "a cat"} for n in range(3)),
    ],
}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass
class Cloud:
    """A bucket with models and data, and the API of custom jobs."""

    store: ObjectStore
    jobs: CustomJobs
    bucket: str
    folder: Path
    number: int = field(default=0)

    def pipeline(self, **parameters: Any) -> Run:
        self.number += 1
        folder = self.folder / f"pipeline-{self.number}"
        folder.mkdir()
        given = {
            "prompt_dataset": f"{self.bucket}/data/prompts-*.jsonl",
            "preference_dataset": f"{self.bucket}/data/preferences.jsonl",
            "eval_dataset": f"{self.bucket}/data/eval.jsonl",
            "output_directory": f"{self.bucket}/runs",
            "prompt_sequence_length": 112,
            "target_sequence_length": 8,
            "reward_model_train_steps": 2,
            "reinforcement_learning_train_steps": STEPS,
            "accelerator_type": "CPU",
            "instruction": INSTRUCTION,
            "reward_model_config": {"batch_size": 4.0, "log_every": 1},
            "ppo_config": PPO,
        }
        return Run(
            YAML,
            given | parameters,
            root=f"{self.bucket}/root/{self.number}",
            folder=folder,
            vertex=self.jobs.url,
            read=self.store.read,
        )

    def json(self, address: str) -> Any:
        return json.loads(self.store.read(address))


@pytest.fixture
def cloud(
    object_store: ObjectStore, tmp_path: Path, checkpoints: dict[str, Path]
) -> Iterator[Cloud]:
    bucket = object_store.bucket("rlhf-test")
    for arch, folder in checkpoints.items():
        for file in folder.iterdir():
            object_store.write(f"{bucket}/models/{arch}/{file.name}", file.read_bytes())
    for name, rows in DATA.items():
        object_store.write(f"{bucket}/data/{name}", lines(rows).encode())
    environment = {**object_store.environment(), "RLHF_CACHE": str(tmp_path / "cache")}
    jobs = CustomJobs(tmp_path, environment)
    yield Cloud(object_store, jobs, bucket, tmp_path)
    jobs.close()


def steps_of(run: Run) -> dict[str, tuple[Any, Any]]:
    """Run the validation alone and return the other tasks, not yet started."""
    tasks = run.tasks(run.spec["root"]["dag"], run.values)
    name, component, inputs = next(tasks)
    assert name == "validate"
    run.run_task(name, component, inputs)
    name, component, inputs = next(tasks)
    return {name: (component, inputs)}


@pytest.mark.parametrize("arch", ["t5", "llama"])
def test_the_life_of_a_run(arch: str, cloud: Cloud, checkpoints: dict[str, Path]) -> None:
    """One test, because each part needs what the parts before it made."""
    base = f"{cloud.bucket}/models/{arch}"
    run = cloud.pipeline(large_model_reference=base, run_name="whole")
    a_run_leaves_what_it_promises(cloud, run, run.run())
    the_same_run_again_returns_at_once_and_changes_nothing(cloud, base)
    one_machine_makes_the_same(cloud, checkpoints[arch])
    if arch == "t5":  # tests/test_killing.py kills both families
        killed_half_way_it_ends_as_if_it_had_not_been(cloud, base)


def a_run_leaves_what_it_promises(cloud: Cloud, run: Run, outputs: dict[str, Any]) -> None:
    out = f"{cloud.bucket}/runs/whole"
    assert outputs == {
        "output_model_path": f"{out}/policy/merged",
        "output_adapter_path": f"{out}/policy/adapter",
        "output_prediction_gcs_path": f"{out}/inference/predictions.jsonl",
        "model_resource_name": "",
        "endpoint_resource_name": "",
    }
    stages = [job.stage for job in cloud.jobs.jobs.values()]
    assert stages == ["validate", "reward_model", "ppo", "inference"]
    predictions = cloud.store.read(outputs["output_prediction_gcs_path"]).decode().splitlines()
    rows = [json.loads(line) for line in predictions]
    assert [row["input_text"] for row in rows] == [r["input_text"] for r in DATA["eval.jsonl"]]
    assert all(isinstance(row["reward"], float) for row in rows)
    for folder, task in (
        ("reward_model", "reward-model"),
        ("policy", "ppo"),
        ("inference", "inference"),
    ):
        metrics = cloud.json(f"{out}/{folder}/metrics.json")
        assert metrics["finished"] is True
        told = run.answers[task]["artifacts"]["metrics"]["artifacts"][0]["metadata"]
        assert told
        assert all(isinstance(value, float) for value in told.values())
        page = cloud.store.read(f"{run.root}/{task}/summary").decode()
        assert "| metric | value |" in page
        assert "before" in page.lower()
    # Free text has survived YAML, JSON, the payload and the executor input.
    for folder in ("reward_model", "policy"):
        written = yaml.safe_load(cloud.store.read(f"{out}/{folder}/config.yaml"))
        assert written["instruction"] == INSTRUCTION
    assert yaml.safe_load(cloud.store.read(f"{out}/policy/config.yaml"))["lora"]["rank"] == 2
    for stage in ("reward_model", "ppo"):
        names = cloud.store.names(f"{out}/vertex/{stage}/logs")
        assert any("events.out.tfevents" in name for name in names), names


def the_same_run_again_returns_at_once_and_changes_nothing(cloud: Cloud, base: str) -> None:
    out = f"{cloud.bucket}/runs/whole"
    names = [name for name in cloud.store.names(out) if not name.startswith("vertex/")]
    before = {name: cloud.store.read(f"{out}/{name}") for name in names}
    run = cloud.pipeline(large_model_reference=base, run_name="whole")
    run.run()
    assert {name: cloud.store.read(f"{out}/{name}") for name in names} == before
    assert "finished" in cloud.jobs.of_stage("ppo")[-1].output()
    assert run.answers["ppo"]["artifacts"]["metrics"]["artifacts"][0]["metadata"]


def one_machine_makes_the_same(cloud: Cloud, checkpoint: Path) -> None:
    folder = cloud.folder / "one-machine"
    folder.mkdir()
    for name, rows in DATA.items():
        (folder / name).write_text(lines(rows))
    config = PipelineConfig.model_validate(
        {
            "base_model": str(checkpoint),
            "output_dir": str(folder / "out"),
            "preference_dataset": str(folder / "preferences.jsonl"),
            "prompt_dataset": str(folder / "prompts-*.jsonl"),
            "eval_dataset": str(folder / "eval.jsonl"),
            "prompt_sequence_length": 112,
            "target_sequence_length": 8,
            "instruction": INSTRUCTION,
            "reward_model": {"train_steps": 2, "batch_size": 4},
            "ppo": PPO | {"train_steps": STEPS},
        }
    )
    (folder / "run.yaml").write_text(config_to_yaml(config))
    command = [sys.executable, "-m", "rlhf", "run", "--config", str(folder / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, env=environment, check=True)
    for name in (
        "reward_model/adapter/adapter_model.safetensors",
        "reward_model/head.safetensors",
        "policy/adapter/adapter_model.safetensors",
        "policy/merged/model.safetensors",
        "inference/predictions.jsonl",
    ):
        local = (folder / "out" / name).read_bytes()
        assert cloud.store.read(f"{cloud.bucket}/runs/whole/{name}") == local, name
    stages = ("reward_model/", "policy/", "inference/")
    here = [str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file()]
    there = cloud.store.names(f"{cloud.bucket}/runs/whole")
    assert comparable(here, stages) == comparable(there, stages)


def comparable(names: list[str], stages: tuple[str, ...]) -> set[str]:
    """Names of a run's files but for event files, which are named after time and process."""
    return {name for name in names if name.startswith(stages) and "tfevents" not in name}


def killed_half_way_it_ends_as_if_it_had_not_been(cloud: Cloud, base: str) -> None:
    cloud.jobs.restarts = 1
    # No inference, but the stages before it with the rows that they had: the reward model would
    # else hold out some of its own.
    rows = {"eval_dataset": f"{cloud.bucket}/data/eval.jsonl"}
    run = cloud.pipeline(
        large_model_reference=base,
        run_name="killed",
        eval_dataset="",
        reward_model_config={"batch_size": 4, "log_every": 1, **rows},
        ppo_config={**PPO, **rows},
    )
    folder = f"{cloud.bucket}/runs/killed/policy"
    cloud.store.first(
        lambda: cloud.jobs.of_stage("ppo")[-1].process.kill(),
        when=r"POST .*killed/policy/checkpoints/step-0+2/manifest",
    )
    outputs = run.run()
    assert cloud.jobs.of_stage("ppo")[-1].exit_codes == [-9, 0]
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        whole = cloud.store.read(f"{cloud.bucket}/runs/whole/policy/{name}")
        assert cloud.store.read(f"{folder}/{name}") == whole, name
    assert without_times(cloud, "killed") == without_times(cloud, "whole")
    # Without rows to evaluate on there is nothing to infer.
    assert outputs["output_prediction_gcs_path"] == ""
    assert outputs["output_model_path"] == f"{folder}/merged"
    assert list(cloud.jobs.jobs.values())[-1].stage == "ppo"


def without_times(cloud: Cloud, run: str) -> list[dict[str, Any]]:
    text = cloud.store.read(f"{cloud.bucket}/runs/{run}/policy/metrics.jsonl").decode()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "time"))} for row in rows]


def test_what_is_wrong_never_reaches_a_gpu(cloud: Cloud) -> None:
    cloud.store.write(f"{cloud.bucket}/data/bad.jsonl", b'{"input_text": "a", "choice": 7}\n')
    run = cloud.pipeline(
        large_model_reference=f"{cloud.bucket}/models/t5",
        run_name="bad",
        preference_dataset=f"{cloud.bucket}/data/bad.jsonl",
    )
    with pytest.raises(LauncherFailed, match="Job failed with value error"):
        run.run()
    [job] = cloud.jobs.jobs.values()
    assert job.stage == "validate"
    assert job.exit_codes == [2]
    assert "bad.jsonl:1: candidate_0" in job.output()
    assert "Traceback" not in job.output()
    failure = cloud.json(f"{cloud.bucket}/runs/bad/validate/failure.json")
    assert "bad.jsonl:1: candidate_0" in failure["cause"]
    assert failure["permanent"] is True


def test_a_permanent_failure_is_not_tried_again_by_restarts(cloud: Cloud) -> None:
    cloud.jobs.restarts = 2
    folder = f"{cloud.bucket}/runs/taken/reward_model"
    cloud.store.write(f"{folder}/thesis.docx", b"not of a run")
    given = {"large_model_reference": f"{cloud.bucket}/models/t5", "run_name": "taken"}
    with pytest.raises(LauncherFailed):
        cloud.pipeline(**given).run()
    [job] = cloud.jobs.of_stage("reward_model")
    assert job.exit_codes == [2, 2, 2]
    assert job.output().count("is not tried again") == 2
    failure = cloud.json(f"{folder}/failure.json")
    assert "thesis.docx" in failure["cause"]
    # Somebody mends it: the next submission is another attempt and goes through.
    cloud.store.delete(f"{folder}/thesis.docx")
    [(name, (component, inputs))] = steps_of(again := cloud.pipeline(**given)).items()
    again.run_task(name, component, inputs)
    assert "failure.json" not in cloud.store.names(folder)


def test_cancelling_reaches_the_process_which_saves(cloud: Cloud) -> None:
    run = cloud.pipeline(
        large_model_reference=f"{cloud.bucket}/models/t5",
        run_name="long",
        reward_model_train_steps=100_000,
    )
    [(name, (component, inputs))] = steps_of(run).items()
    launcher = run.start_task(name, component, inputs)
    wait_for(lambda: cloud.jobs.of_stage("reward_model"))
    [job] = cloud.jobs.of_stage("reward_model")
    wait_for(lambda: "reward_model" in job.output() and "eta" in job.output())
    # A launcher that is started again goes on watching the same job.
    launcher.kill()
    launcher.communicate()
    launcher = run.start_task(name, component, inputs)
    seen = cloud.jobs.polls
    wait_for(lambda: cloud.jobs.polls > seen + 1)
    stop(launcher)
    wait_for(lambda: job.exit_codes)
    assert job.exit_codes == [75]
    assert len(cloud.jobs.of_stage("reward_model")) == 1
    names = cloud.store.names(f"{cloud.bucket}/runs/long/reward_model")
    assert any(name.endswith("manifest.json") for name in names)
    assert "failure.json" not in names
