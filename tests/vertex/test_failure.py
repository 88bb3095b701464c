"""What a failed stage leaves behind, what a restart makes of it, and what the console is shown."""

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from google.api_core.exceptions import NotFound, PermissionDenied, ServiceUnavailable
from google.auth.exceptions import DefaultCredentialsError

from rlhf.errors import InputError, StorageError
from rlhf.files.output import Output, path_in
from rlhf.files.storage import as_url
from rlhf.vertex import failure
from rlhf.vertex.cloud import export_huggingface_token, register_model
from rlhf.vertex.executor import Task, write_file
from rlhf.vertex.failure import (
    Failure,
    describe_failure,
    read_failure,
    repeated_failure,
    write_failure,
)
from rlhf.vertex.summary import finite_numbers, markdown


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "run" / "policy")
        return
    name = f"memory://bucket-{uuid.uuid4().hex}/run/policy"
    yield name
    filesystem, root = fsspec.core.url_to_fs(name)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def save_checkpoint(folder: str, step: int, *, whole: bool = True) -> None:
    write_file(path_in(folder, "checkpoints", f"step-{step}", "model.safetensors"), "weights")
    if whole:
        write_file(path_in(folder, "checkpoints", f"step-{step}", "manifest.json"), "{}")


def fail(folder: str, error: BaseException, attempt: str = "a") -> Failure:
    """One attempt: what a job does when a stage raises."""
    found = describe_failure(error, folder, attempt)
    write_failure(folder, found)
    return found


def test_a_failure_reads_back_as_written_and_is_cleared(folder):
    assert read_failure(folder) is None
    failure.clear_failure(folder)  # nothing there is nothing to do
    problems = ['rows.jsonl:3: choice: "x", 要約', "second"]
    found = fail(folder, InputError(problems))
    assert read_failure(folder) == found
    assert (found.cause, found.kind) == ("\n".join(problems), "InputError")
    assert found.permanent
    assert found.fix
    assert not found.details
    failure.clear_failure(folder)
    assert read_failure(folder) is None


def test_half_a_surrogate_pair_does_not_hide_the_cause(folder):
    row = json.loads('"\\ud83d half"')  # legal in JSON, not in UTF-8
    fail(folder, InputError(f"rows.jsonl:1: {row}"))
    assert "\\ud83d half" in read_failure(folder).cause.encode("unicode_escape").decode()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cause": "x"}', "\xff"])
def test_what_is_no_failure_file_is_no_failure(folder, text):
    write_file(path_in(folder, "failure.json"), text)
    assert read_failure(folder) is None
    assert repeated_failure(folder, "a") is None


def caused(error: Exception, cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as reason:
            raise error from reason
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (InputError("rows.jsonl:3: choice: wrong"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (StorageError("gs://bkt/x could not be written"), False),
        (ConnectionResetError("peer"), False),
        # Another Hub, another day: such an input error may not come again.
        (caused(InputError("base_model: x: cannot be reached"), ConnectionError("refused")), False),
        (caused(InputError("token: cannot be read"), ServiceUnavailable("later")), False),
        (caused(InputError("base_model: x: no such model"), FileNotFoundError("x")), True),
        (caused(InputError("token: cannot be read"), PermissionDenied("never")), True),
    ],
)
def test_whether_trying_again_makes_sense(folder, error, permanent):
    found = fail(folder, error)
    assert found.permanent is permanent
    assert found.cause
    assert (repeated_failure(folder, "a") is not None) is permanent
    unforeseen = not isinstance(error, InputError | torch.OutOfMemoryError | MemoryError)
    if unforeseen:
        assert type(error).__name__ in found.details  # the traceback, for a report


def test_lack_of_memory_names_what_to_lower(folder):
    found = describe_failure(torch.OutOfMemoryError("CUDA out of memory. Tried"), folder, "a")
    for field in ("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "machine_t"):
        assert field in found.fix


def test_the_same_failure_again_is_permanent_unless_it_got_further(folder):
    error = RuntimeError("illegal memory access")
    assert not fail(folder, error).permanent
    assert repeated_failure(folder, "a") is None  # one more try
    assert fail(folder, error).permanent
    assert repeated_failure(folder, "a") is not None

    save_checkpoint(folder, 2)
    assert not fail(folder, error).permanent  # it had got further
    assert not fail(folder, RuntimeError("another")).permanent
    assert not fail(folder, ValueError("another")).permanent  # another kind
    assert not fail(folder, ValueError("another"), attempt="b").permanent
    assert fail(folder, ValueError("another"), attempt="b").permanent


def test_a_permanent_failure_is_tried_again_by_another_job_or_after_progress(folder):
    save_checkpoint(folder, 9)
    found = fail(folder, InputError("rows.jsonl:3: wrong"))
    assert found.checkpoint == "step-9"
    assert repeated_failure(folder, "a") == found
    assert repeated_failure(folder, "b") is None
    save_checkpoint(folder, 10, whole=False)  # half a checkpoint is no progress
    assert repeated_failure(folder, "a") == found
    save_checkpoint(folder, 10)  # and 10 is newer than 9
    assert repeated_failure(folder, "a") is None


def test_checkpoints_are_told_from_what_looks_like_them(folder):
    assert failure.newest_checkpoint(folder) == ""
    for name in ("step-x", "step-", "best", "step-7.tmp"):
        write_file(path_in(folder, "checkpoints", name, "manifest.json"), "{}")
    write_file(path_in(folder, "checkpoints/step-8/deeper/manifest.json"), "{}")
    assert failure.newest_checkpoint(folder) == ""
    save_checkpoint(folder, 3)
    assert failure.newest_checkpoint(folder) == "step-3"


def test_a_folder_out_of_reach_does_not_hide_the_cause(folder, monkeypatch):
    def unreachable(_: Output) -> list[str]:
        raise InputError("output_dir: cannot read gs://b: 403")

    monkeypatch.setattr(Output, "names", unreachable)
    assert describe_failure(ValueError("the cause"), folder, "a").cause == "the cause"


def test_a_restart_has_the_same_fingerprint_and_a_new_submission_another():
    argv = ["job", "ppo", '--executor_input={"outputs": "run-1"}']
    assert failure.arguments_hash(argv) == failure.arguments_hash(list(argv))
    assert failure.arguments_hash(argv) != failure.arguments_hash(
        [*argv[:2], argv[2].replace("1", "2")]
    )
    assert failure.arguments_hash(["a", "b"]) != failure.arguments_hash(["ab"])


def executor_input(folder: str) -> str:
    return json.dumps(
        {
            "inputs": {"parameterValues": {"run_name": "first", "kl_coeff": 0.5}},
            "outputs": {
                "parameters": {
                    "path": {"outputFile": f"{folder}/out/path"},
                    "count": {"outputFile": f"{folder}/out/count"},
                },
                "artifacts": {
                    "metrics": {"artifacts": [{"name": "m", "uri": f"{folder}/out/metrics"}]},
                    "summary": {"artifacts": [{"name": "s", "uri": f"{folder}/out/summary"}]},
                },
                "outputFile": f"{folder}/out/executor_output.json",
            },
        }
    )


def read(path: str) -> str:
    with fsspec.open(path, "r", encoding="utf-8") as file:
        return file.read()


def test_a_task_answers_in_every_place_where_kfp_looks(folder):
    task = Task.from_executor_input(executor_input(folder))
    assert task.inputs == {"run_name": "first", "kl_coeff": 0.5}
    task.values |= {"path": "gs://bkt/ü", "count": 2}
    task.metadata["metrics"] = {"reward": 0.5}
    task.write_artifact("summary", "# ü\n")
    task.write_artifact("no such artifact", "ignored")
    task.answer()
    assert read(f"{folder}/out/path") == "gs://bkt/ü"
    assert read(f"{folder}/out/count") == "2"
    assert read(f"{folder}/out/summary") == "# ü\n"
    answer = json.loads(read(f"{folder}/out/executor_output.json"))
    assert answer["parameterValues"] == {"path": "gs://bkt/ü", "count": 2}
    [metrics] = answer["artifacts"]["metrics"]["artifacts"]
    assert metrics == {
        "name": "m",
        "uri": f"{folder}/out/metrics",
        "metadata": {"reward": 0.5},
    }


def test_an_output_without_a_value_is_empty(folder):
    task = Task.from_executor_input(executor_input(folder))
    task.answer()
    assert read(f"{folder}/out/path") == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{{$}}", '{"inputs": 3}'])
def test_a_broken_executor_input_is_one_clear_error(text):
    with pytest.raises(InputError, match="executor_input: is not what KFP writes"):
        Task.from_executor_input(text)


def test_mounted_paths_become_addresses():
    assert as_url("/gcs/bkt/x") == "gs://bkt/x"
    for same in ("gs://bkt/gcs/x", "/tmp/gcs/x", "x"):
        assert as_url(same) == same


def test_metrics_are_finite_numbers():
    metrics = {
        "eval/reward": 1,
        "kl": 0.25,
        "nan": math.nan,
        "inf": -math.inf,
        "finished": True,
        "text": "x",
        "none": None,
        "list": [1],
        "nested": {"a": 1},
    }
    assert finite_numbers(metrics) == {"eval_reward": 1.0, "kl": 0.25}
    assert all(type(value) is float for value in finite_numbers(metrics).values())


NASTY = "a | b\nc <script>alert(1)</script> `x` *y* \\| & __z__\r\n\n| --- |"


def table_rows(page: str, columns: int) -> list[str]:
    """Rows of the page's tables; each has as many cells as its header."""
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for row in rows:
        cells = row.replace("\\\\", "").replace("\\|", "").strip().strip("|").split("|")
        assert len(cells) == columns, row
    return rows


def test_samples_of_any_text_stay_in_their_cells(folder):
    rows = [
        {"step": step, "prompt | <b>": NASTY, "response": f"{step} {NASTY}", "reward": 0.123456}
        for step in (0, 5, 10)
        for _ in range(12)
    ]
    write_file(path_in(folder, "samples.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    page = markdown("ppo", folder, {}, [])
    before, after = page.split("## After: samples of step 10")
    assert "## Before: samples of step 0" in before
    for part, step in ((before.split("## Before")[1], 0), (after, 10)):
        shown = table_rows(part, columns=3)
        assert len(shown) == 2 + 8
        assert all(f"{step} a" in row for row in shown[2:])
        assert "0.1235" in shown[2]
    assert "<script" not in page
    assert "<b>" not in page


def test_a_page_has_notes_metrics_and_the_stages_own_samples(folder):
    write_file(path_in(folder, "samples.md"), "# Samples\n\n| | before | after |\n")
    write_file(path_in(folder, "samples.jsonl"), '{"step": 0, "x": "not shown"}\n')
    metrics = {"reward": 1.5, "finished": True, "kl": math.nan}
    page = markdown("inference", folder, metrics, ["everything is in gs://bkt/run", "second"])
    assert page.startswith("# inference\n\n- everything is in gs://bkt/run\n- second\n\n## Metrics")
    assert "| reward | 1.5 |" in page
    assert "finished" not in page
    assert "kl" not in page
    assert "\n## Samples\n" in page
    assert "not shown" not in page


def test_a_stage_without_samples_has_a_page_too(folder):
    write_file(path_in(folder, "samples.jsonl"), "")
    page = markdown("ppo", folder, {"reward": 1}, [])
    assert table_rows(page, columns=2)[2] == "| reward | 1 |"


class Secrets:
    """Secret Manager's client, as far as it is used."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []

    def access_secret_version(self, name: str) -> Any:
        self.asked.append(name)
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(payload=SimpleNamespace(data=self.answer))


@pytest.mark.parametrize(
    ("secret", "asked"),
    [
        ("hub", "projects/p/secrets/hub/versions/latest"),
        ("projects/q/secrets/hub", "projects/q/secrets/hub/versions/latest"),
        ("projects/q/secrets/hub/versions/3", "projects/q/secrets/hub/versions/3"),
    ],
)
def test_a_token_goes_into_the_environment_only(secret, asked, monkeypatch, capsys):
    secrets = Secrets(b"hf_value\n")
    monkeypatch.setattr("google.cloud.secretmanager.SecretManagerServiceClient", lambda: secrets)
    environment: dict[str, str] = {}
    monkeypatch.setattr("rlhf.vertex.cloud.os.environ", environment)
    export_huggingface_token(secret, "p")
    assert secrets.asked == [asked]
    assert environment == {"HF_TOKEN": "hf_value"}
    assert "hf_value" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "error", [PermissionDenied("no access"), NotFound("no secret"), DefaultCredentialsError("none")]
)
def test_a_secret_that_cannot_be_read_names_the_role(error, monkeypatch):
    monkeypatch.setattr(
        "google.cloud.secretmanager.SecretManagerServiceClient", lambda: Secrets(error)
    )
    with pytest.raises(InputError, match=r"huggingface_token_secret: .*secretAccessor"):
        export_huggingface_token("hub", "p")


def test_a_run_has_one_entry_in_the_registry(monkeypatch):
    entries: dict[str, dict[str, Any]] = {}

    class Model:
        def __init__(self, name: str) -> None:
            if name not in entries:
                raise NotFound(name)
            self.resource_name = f"projects/p/models/{name}"

        @classmethod
        def upload(cls, model_id: str, **fields: Any) -> "Model":
            entries[model_id] = fields
            return cls(model_id)

    monkeypatch.setattr("google.cloud.aiplatform.Model", Model)
    monkeypatch.setattr("google.cloud.aiplatform.init", lambda **_: None)

    def register(directory: str) -> str:
        return register_model(
            project="p",
            location="l",
            display_name="A name",
            run_directory=directory,
            model_path=f"{directory}/merged",
            serving_image="serve:1",
            encryption_key="",
        )

    long = f"Some_Bucket/{'x' * 60}/RUN.1"
    first = register(f"gs://1{long}")
    assert register(f"gs://1{long}") == first  # a restart after the upload
    assert register(f"gs://2{long}") != first  # another run whose address ends alike
    assert len(entries) == 2
    for name, fields in entries.items():
        assert len(name) <= 63
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert name[0].isalpha()
        assert fields["encryption_spec_key_name"] is None
        assert fields["serving_container_image_uri"] == "serve:1"
