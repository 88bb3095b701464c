"""The compiled pipeline: the same bytes everywhere, no caching, and requests that Vertex takes."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud.aiplatform_v1.types import AcceleratorType, CustomJob
from google.protobuf import json_format
from google_cloud_pipeline_components.container.v1.gcp_launcher.utils import json_util
from kfp import compiler, dsl
from kfp.pipeline_spec import pipeline_spec_pb2
from support.compiled_pipeline import Run

from rlhf.config.vertex import ACCELERATOR_NAMES
from rlhf.errors import InputError
from rlhf.vertex import job
from rlhf.vertex.addresses import RUN_NAME
from rlhf.vertex.executor import Task
from rlhf.vertex.machines import Machine
from rlhf.vertex.parameters import PARAMETERS, REQUIRED
from rlhf.vertex.pipeline import compile_pipeline, rlhf_pipeline

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "kfp" / "rlhf_pipeline.yaml"
SHIPPED = ROOT / "src" / "rlhf" / "vertex" / "rlhf_pipeline.yaml"
KINDS = {
    str: "STRING",
    int: "NUMBER_INTEGER",
    float: "NUMBER_DOUBLE",
    bool: "BOOLEAN",
    dict: "STRUCT",
}
CLOUD = ("kfp", "google.cloud.aiplatform", "google_cloud_pipeline_components")


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))


def test_committed_shipped_and_fresh_are_the_same_bytes(tmp_path):
    fresh = tmp_path / "fresh.yaml"
    compile_pipeline(str(fresh))
    assert COMMITTED.read_bytes() == fresh.read_bytes(), "run python kfp/compile_pipeline.py"
    assert SHIPPED.read_bytes() == COMMITTED.read_bytes()


def test_kfps_own_command_compiles_the_same(tmp_path):
    output = tmp_path / "cli.yaml"
    command = [str(Path(sys.executable).parent / "kfp"), "dsl", "compile", "--py"]
    subprocess.run(
        [*command, str(ROOT / "kfp" / "compile_pipeline.py"), "--output", str(output)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert output.read_bytes() == COMMITTED.read_bytes()


def test_the_script_writes_both_places(tmp_path):
    for folder in ("kfp", "src/rlhf/vertex"):
        (tmp_path / folder).mkdir(parents=True)
    script = shutil.copy(ROOT / "kfp" / "compile_pipeline.py", tmp_path / "kfp")
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    for folder in ("kfp", "src/rlhf/vertex"):
        written = tmp_path / folder / "rlhf_pipeline.yaml"
        assert written.read_bytes() == COMMITTED.read_bytes()


def test_it_is_a_pipeline_spec_in_every_field(spec):
    message = pipeline_spec_pb2.PipelineSpec()
    json_format.ParseDict(spec, message)  # raises for fields that the message does not have
    assert message.pipeline_info.name == "rlhf-pipeline"
    assert message.schema_version == "2.1.0"


def all_tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    dags = [spec["root"], *(c for c in spec["components"].values() if "dag" in c)]
    return {name: task for dag in dags for name, task in dag["dag"]["tasks"].items()}


def test_no_task_is_cached(spec):
    tasks = all_tasks(spec)
    assert set(tasks) == {"validate", "reward-model", "ppo", "condition-1", "inference"}
    for name, task in tasks.items():
        assert not task.get("cachingOptions", {}).get("enableCache"), name
        if name != "condition-1":  # without the key the backend decides for itself
            assert task["cachingOptions"] == {}, name


def test_order_and_condition(spec):
    tasks = spec["root"]["dag"]["tasks"]
    assert "dependentTasks" not in tasks["validate"]
    assert tasks["reward-model"]["dependentTasks"] == ["validate"]
    assert tasks["ppo"]["dependentTasks"] == ["reward-model", "validate"]
    condition = tasks["condition-1"]
    assert condition["dependentTasks"] == ["ppo", "validate"]
    given = condition["inputs"]["parameters"]["pipelinechannel--eval_dataset"]
    assert given == {"componentInputParameter": "eval_dataset"}
    assert condition["triggerPolicy"]["condition"] == (
        "inputs.parameter_values['pipelinechannel--eval_dataset'] != ''"
    )
    assert list(spec["components"]["comp-condition-1"]["dag"]["tasks"]) == ["inference"]


def test_outputs_do_not_depend_on_the_conditional_step(spec):
    outputs = spec["root"]["dag"]["outputs"]["parameters"]
    assert set(outputs) == {
        "output_model_path",
        "output_adapter_path",
        "output_prediction_gcs_path",
        "model_resource_name",
        "endpoint_resource_name",
    }
    producers = {value["valueFromParameter"]["producerSubtask"] for value in outputs.values()}
    assert producers == {"ppo", "validate"}


def test_its_parameters_are_those_of_the_table(spec):
    declared = spec["root"]["inputDefinitions"]["parameters"]
    assert set(declared) == set(PARAMETERS)
    at_run_time = {
        "project": "{{$.pipeline_google_cloud_project_id}}",
        "location": "{{$.pipeline_google_cloud_location}}",
        "output_directory": "{{$.pipeline_root}}",
        "run_name": "{{$.pipeline_job_name}}",
    }
    for name, definition in declared.items():
        parameter = PARAMETERS[name]
        assert definition["parameterType"] == KINDS[parameter.type], name
        assert definition["description"], name
        if parameter.default is REQUIRED:
            assert "defaultValue" not in definition
            assert not definition.get("isOptional"), name
        elif name == "image":
            assert definition["defaultValue"].endswith("/rlhf/rlhf:0.1.0")
        else:
            assert definition["defaultValue"] == at_run_time.get(name, parameter.default), name
    # The validation sees them all, under the same names.
    validated = all_tasks(spec)["validate"]["inputs"]["parameters"]
    assert validated == {name: {"componentInputParameter": name} for name in PARAMETERS}


def test_each_step_gets_and_gives_what_its_component_declares(spec):
    for name, task in all_tasks(spec).items():
        declared = spec["components"][task["componentRef"]["name"]]["inputDefinitions"]
        assert set(task["inputs"]["parameters"]) == set(declared["parameters"]), name


FULL = {
    "service_account": "tuner@p.iam.gserviceaccount.com",
    "network": "projects/1/global/networks/vpc",
    "encryption_spec_key_name": "projects/p/locations/us-central1/keyRings/r/cryptoKeys/k",
    "tensorboard_resource_id": "projects/1/locations/us-central1/tensorboards/2",
    "strategy": "FLEX_START",
    "timeout": "3600s",
    "restart_job_on_worker_restart": True,
    "labels": {"team": "nlp", "cost": "42"},
    "boot_disk_size_gb": 300.0,
    "instruction": 'Say "it",\n\tin \\ C:\\new {"json": [1]} — 要約 \u2028 ${HOME}',
    "ppo_config": {"lora": {"rank": 4.0}},
    "huggingface_token_secret": "token",
}
DECIDED = {
    "resolved_machine_type": "g2-standard-12",
    "resolved_accelerator_type": "NVIDIA_L4",
    "resolved_accelerator_count": 1.0,
    "resolved_tuning_location": "europe-west4",
    "resolved_run_directory": "gs://bkt/runs/first",
    "resolved_run_name": "first",
    "resolved_output_prediction_gcs_path": "",
    **{
        f"resolved_{stage}_config": json.dumps({"instruction": FULL["instruction"]})
        for stage in ("reward_model", "ppo", "inference")
    },
}


def rendered(
    tmp_path: Path, parameters: dict[str, Any], decided: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each task's payload, as the launcher hands it to Vertex, after placeholders have values."""
    least = {
        "prompt_dataset": "gs://bkt/p.jsonl",
        "preference_dataset": "gs://bkt/c.jsonl",
        "large_model_reference": "t5-small",
        "eval_dataset": "gs://bkt/e.jsonl",
    }
    run = Run(COMMITTED, least | parameters, "gs://bkt/root", tmp_path, "http://none", None)
    run.outputs["validate"] = decided
    payloads = {}
    for name, component, inputs in run.tasks(run.spec["root"]["dag"], run.values):
        run.outputs.setdefault(name, {"reward_model_path": "x"})
        label = component["executorLabel"]
        arguments = run.spec["deploymentSpec"]["executors"][label]["container"]["args"]
        text = arguments[arguments.index("--payload") + 1]
        text = run._render(text, inputs, run.executor_input(name, component, inputs))
        payloads[name] = json_util.recursive_remove_empty(json.loads(text, strict=False))
    assert set(payloads) == {"validate", "reward-model", "ppo", "inference"}
    return payloads


def parsed(payload: dict[str, Any]) -> CustomJob:
    custom_job = CustomJob()
    json_format.ParseDict(payload, custom_job._pb)
    return custom_job


def test_default_payloads_are_custom_jobs(tmp_path):
    cpu = DECIDED | {
        "resolved_machine_type": "n1-highmem-8",
        "resolved_accelerator_type": "",
        "resolved_accelerator_count": 0.0,
    }
    for name, payload in rendered(tmp_path, {}, cpu).items():
        job = parsed(payload)
        pool = payload["job_spec"]["worker_pool_specs"][0]
        # Integers where the message has int32: REST takes 200.0 for an error.
        assert (type(pool["replica_count"]), pool["replica_count"]) == (int, 1)
        assert (type(pool["disk_spec"]["boot_disk_size_gb"])) is int
        assert job.job_spec.worker_pool_specs[0].disk_spec.boot_disk_size_gb == 200
        assert set(pool["machine_spec"]) == {"machine_type"}  # a CPU job names no accelerator
        for left_out in ("service_account", "network", "tensorboard"):
            assert left_out not in payload["job_spec"], name
        assert "encryption_spec" not in payload
        assert "labels" not in payload
        assert payload["job_spec"]["scheduling"]["strategy"] == "STANDARD"
        image = pool["container_spec"]["image_uri"]
        assert image == "us-central1-docker.pkg.dev/test-project/rlhf/rlhf:0.1.0"
        run = "pipeline-job" if name == "validate" else "first"
        assert job.display_name == f"{run}-{name.replace('-', '_')}"


def test_full_payloads_are_custom_jobs(tmp_path):
    payloads = rendered(tmp_path, FULL, DECIDED)
    for name, payload in payloads.items():
        job = parsed(payload)
        pool = job.job_spec.worker_pool_specs[0]
        assert job.job_spec.service_account == FULL["service_account"]
        assert job.job_spec.network == FULL["network"]
        assert job.encryption_spec.kms_key_name == FULL["encryption_spec_key_name"]
        assert dict(job.labels) == FULL["labels"]
        assert job.job_spec.scheduling.timeout.total_seconds() == 3600
        assert job.job_spec.scheduling.restart_job_on_worker_restart
        assert pool.disk_spec.boot_disk_size_gb == 300
        # Free text survives two layers of JSON.
        stage, flag, *_ = pool.container_spec.args[1:]
        assert stage == name.replace("-", "_")
        given = json.loads(flag.removeprefix("--executor_input="))["inputs"]["parameterValues"]
        text = (
            given["instruction"]
            if stage == "validate"
            else json.loads(given["config"])["instruction"]
        )
        assert text == FULL["instruction"]
        assert given["huggingface_token_secret"] == "token"
        scheduling = payload["job_spec"]["scheduling"]
        if stage == "validate":
            assert scheduling["strategy"] == "STANDARD"  # a CPU need not queue
            assert "max_wait_duration" not in scheduling
            assert not pool.machine_spec.accelerator_count
            continue
        assert scheduling["strategy"] == "FLEX_START"
        assert scheduling["max_wait_duration"] == "86400s"
        machine = payload["job_spec"]["worker_pool_specs"][0]["machine_spec"]
        assert (type(machine["accelerator_count"]), machine["accelerator_count"]) == (int, 1)
        assert pool.machine_spec.accelerator_type == AcceleratorType.NVIDIA_L4
        assert job.job_spec.tensorboard == FULL["tensorboard_resource_id"]
        # Restarts and stages must not write over one another's logs.
        prefix = job.job_spec.base_output_directory.output_uri_prefix
        assert prefix == f"gs://bkt/runs/first/vertex/{stage}"


LEAST = {
    "prompt_dataset": "gs://bkt/p.jsonl",
    "preference_dataset": "gs://bkt/c.jsonl",
    "large_model_reference": "t5-small",
}


def test_a_pipeline_may_be_used_several_times_in_another(tmp_path):
    """Each use has a validation step, which is told the number that is its own."""

    @dsl.pipeline(name="several")
    def several() -> None:
        rlhf_pipeline(**LEAST)
        rlhf_pipeline(**LEAST)
        with dsl.ParallelFor([1, 2]) as _:
            rlhf_pipeline(**LEAST)

    path = str(tmp_path / "several.yaml")
    compiler.Compiler().compile(several, path)
    spec = yaml.safe_load(Path(path).read_text())
    steps = {
        name: executor["container"]["args"]
        for name, executor in spec["deploymentSpec"]["executors"].items()
    }
    checks = [arguments for name, arguments in steps.items() if "validate" in name]
    assert len(checks) == 3  # the third runs twice
    for arguments in checks:
        text = arguments[arguments.index("--payload") + 1]
        assert '"--pipeline_job={{$.pipeline_job_name}}"' in text
        assert '"--pipeline_task={{$.pipeline_task_uuid}}"' in text
    # The steps after it have folder and name from it, not from the pipeline's parameters.
    for name, definition in spec["components"].items():
        for task in definition.get("dag", {}).get("tasks", {}).values():
            stage = task["componentRef"]["name"]
            if stage.startswith(("comp-reward-model", "comp-ppo")):
                given = task["inputs"]["parameters"]
                for field in ("run_name", "run_directory", "config"):
                    assert given[field]["taskOutputParameter"]["producerTask"] == "validate", name


def decided(monkeypatch, tmp_path: Path, run_name: str, task: str) -> dict[str, Any]:
    """What the validation step of a pipeline job `job-1` answers."""
    monkeypatch.setattr(job, "check_inputs", lambda config: [])
    monkeypatch.setattr(job, "check_writable", lambda folder: None)
    monkeypatch.setattr(job, "fit", lambda config: (config, Machine("n1-highmem-8"), "as told"))
    monkeypatch.setattr(job.failure, "read_failure", lambda folder: None)
    values = {
        **LEAST,
        "output_directory": "gs://bkt/root",
        "run_name": run_name,
        "accelerator_type": "CPU",
    }
    answer = tmp_path / f"{task}.json"
    given = {"inputs": {"parameterValues": values}, "outputs": {"outputFile": str(answer)}}
    job.command.main(
        [
            "validate",
            f"--executor_input={json.dumps(given)}",
            "--pipeline_job=job-1",
            f"--pipeline_task={task}",
        ],
        standalone_mode=False,
    )
    return json.loads(answer.read_text())["parameterValues"]


def test_runs_without_a_name_share_no_folder(monkeypatch, tmp_path):
    tasks = ["7081", "-3312", "908", "-908"]
    folders = {}
    for task in tasks:
        values = decided(monkeypatch, tmp_path, "job-1", task)
        folder = values["resolved_run_directory"]
        assert folder == f"gs://bkt/root/{values['resolved_run_name']}"
        assert json.loads(values["resolved_ppo_config"])["output_dir"] == f"{folder}/policy"
        folders[task] = folder
    assert len(set(folders.values())) == len(tasks)
    # A job that is started again is the same step, and finds what it left.
    again = decided(monkeypatch, tmp_path, "job-1", tasks[1])
    assert again["resolved_run_directory"] == folders[tasks[1]]
    # A name that somebody chose stays.
    named = decided(monkeypatch, tmp_path, "mine", tasks[0])
    assert named["resolved_run_directory"] == "gs://bkt/root/mine"


def test_long_names_of_jobs_stay_apart():
    name = "x" * 120
    short = [job.own_run_name(name, name, task) for task in ("1", "2")]
    assert len(set(short)) == 2
    assert all(RUN_NAME.fullmatch(text) for text in short)
    assert job.own_run_name("mine", "", "") == "mine"


def test_the_validation_says_all_that_is_wrong_at_once(monkeypatch, tmp_path):
    """Parameters of the console, which nobody has looked at: machine, rows and folder."""

    def fails(problem: str) -> Any:
        def check(_: Any) -> None:
            raise InputError(problem)

        return check

    monkeypatch.setattr(job, "check_inputs", fails("gs://bkt/p.jsonl:3: choice: wrong"))
    monkeypatch.setattr(job, "check_writable", fails("output_directory: cannot be written"))
    monkeypatch.setattr(job.torch.version, "cuda", "12.6")
    inputs = {
        **LEAST,
        "output_directory": "gs://bkt/root",
        "run_name": "one",
        "machine_type": "a4-highgpu-8g",
        "eval_dataset": "/data/e.jsonl",
        "ppo_config": {"dtype": "bfloat16"},
    }
    with pytest.raises(InputError) as caught:
        job.validate(Task(inputs))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "gs://bkt/p.jsonl:3",
        "output_directory",
        "eval_dataset",
        "machine_type",
        "boot_disk_type",
        "image",
    ]
    turing = inputs | {"machine_type": "", "accelerator_type": "NVIDIA_TESLA_T4"}
    with pytest.raises(InputError, match="ppo_config: dtype: NVIDIA_TESLA_T4 has no bfloat16"):
        job.validate(Task(turing))


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ("13.0", "image: torch for CUDA 13.0 has no code for NVIDIA_TESLA_V100 any more"),
        (None, "image: has torch's CPU build"),
    ],
)
def test_the_validation_looks_at_the_torch_that_is_there(monkeypatch, cuda, said):
    monkeypatch.setattr(job, "check_inputs", lambda config: [])
    monkeypatch.setattr(job, "check_writable", lambda folder: None)
    monkeypatch.setattr(job.torch.version, "cuda", cuda)
    inputs = {
        **LEAST,
        "output_directory": "gs://bkt/root",
        "run_name": "one",
        "accelerator_type": "NVIDIA_TESLA_V100",
        "image": "gcr.io/p/mine:1",  # which says nothing
    }
    with pytest.raises(InputError, match=said):
        job.validate(Task(inputs))


def test_accelerators_are_those_that_vertex_knows():
    known = {kind.name for kind in AcceleratorType if kind.name.startswith("NVIDIA")}
    assert set(ACCELERATOR_NAMES) == known


def test_the_folder_kfp_does_not_hide_the_package():
    assert not (ROOT / "kfp" / "__init__.py").exists()
    code = "import kfp, kfp.compiler; print(kfp.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "site-packages" in found.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import rlhf, rlhf.cli",
        "from rlhf.cli import main; assert main(['run', '--help']) == 0",
        "import rlhf.vertex.job",  # and with it all stages; the container asks for it when needed
    ],
)
def test_nothing_loads_the_cloud_before_it_is_asked_for(code):
    code += f"\nimport sys\nprint([name for name in {CLOUD} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_only_the_vertex_package_knows_of_it():
    package = ROOT / "src" / "rlhf"
    inside = [path for path in package.rglob("*.py") if "vertex" in path.parts]
    outside = [path for path in package.rglob("*.py") if "vertex" not in path.parts]
    assert any("kfp" in imported(path) for path in inside)  # the scan finds what there is
    for path in outside:
        cloud = {name for name in imported(path) if name.startswith(CLOUD)}
        assert not cloud, path
        ours = {name for name in imported(path) if name.startswith("rlhf.vertex")}
        assert not ours or path.name == "cli.py", path
