"""What runs rely on when data and results lie in a bucket that fails now and then."""

import asyncio
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gcsfs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import ROWS, make_case
from support.object_store import ObjectStore, running_store
from support.toy_trainer import LastTrainer, stop_at, toy_config, without_timing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from rlhf.cli import main
from rlhf.config import InferenceConfig
from rlhf.data.convert import convert
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_prompts
from rlhf.data.sources.reading import FileSource, read_records
from rlhf.errors import InputError, StoppedBySignal, StorageError
from rlhf.files import storage
from rlhf.files.local_copy import local_folder
from rlhf.files.output import Output
from rlhf.files.run_folder import Status, prepare_output
from rlhf.inference import run_inference
from rlhf.models.loading import load_tokenizer, read_model_config
from rlhf.models.policy_folder import weights_fingerprint
from rlhf.training.checkpoints import Checkpoint, find_damage, save_checkpoint

RENDERER = PromptRenderer()
FOLDERS = itertools.count()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs's own policy, only with shorter pauses."""

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 100)

    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=sleep))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


def trouble(store: ObjectStore, times: int, when: str = "") -> None:
    """A few of everything that the library's policy covers."""
    store.fail(503, times, when)
    store.fail(429, times, when)
    store.fail(500, times, when)
    store.refuse(times, when)
    store.cut_answer(times, when)
    store.lose_answer(times, when)


def spread(store: ObjectStore, parts: Sequence[str]) -> None:
    """One fault of each kind for different requests, so that no request meets six in a row."""
    kinds: list[Any] = [store.refuse, store.cut_answer, store.lose_answer]
    kinds += [lambda times, when, s=status: store.fail(s, times, when) for status in (503, 429)]
    for number, part in enumerate(parts):
        kinds[number % len(kinds)](1, part)


# --- Data sets


def test_200_shards_are_read_in_order_each_row_once(object_store: ObjectStore) -> None:
    bucket = object_store.bucket()
    texts = []
    for shard in range(200):
        rows = [f"shard {shard} row {row} {'x' * (37 * row % 101)}" for row in range(3)]
        content = "".join(json.dumps({"input_text": text}) + "\n" for text in rows)
        object_store.write(f"{bucket}/data/shard-{shard:03d}.jsonl", content.encode())
        texts += rows
    spread(object_store, [f"GET .*shard-{n:03d}" for n in range(0, 200, 9)])
    object_store.fail(503, 3, "GET /storage/v1/b/[^/]*/o[?]")  # the listing
    loaded = load_prompts(f"{bucket}/data/shard-*.jsonl", renderer=RENDERER)
    assert [row.input_text for row in loaded] == texts
    assert loaded[-1].source == f"{bucket}/data/shard-199.jsonl:3"
    assert object_store.faults_served == 23 + 3
    again = load_prompts(f"{bucket.replace('gs:/', '/gcs')}/data/*.jsonl", renderer=RENDERER)
    assert again.fingerprint == loaded.fingerprint


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ObjectStore, str]]:
    """A store for many examples; tests of it must leave no faults."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch, running_store(folder, patch) as store:
        yield store, store.bucket("shelf")


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=25),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    buffer=st.integers(16, 400),
    block=st.integers(16, 700),
    seed=st.integers(0, 99),
)
def test_lines_survive_the_borders_of_blocks(
    shelf: tuple[ObjectStore, str],
    lengths: list[int],
    end: bytes,
    last: bool,
    buffer: int,
    block: int,
    seed: int,
) -> None:
    store, bucket = shelf
    rows = [{"row": number, "text": "é" * length} for number, length in enumerate(lengths)]
    content = end.join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    store.write(f"{bucket}/rows.jsonl", content + (end if last else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "READ_BUFFER", buffer)
        patch.setattr(gcsfs.GCSFileSystem, "default_block_size", block)
        if random.Random(seed).random() < 0.5:
            store.cut_answer(1, "GET /download")
        found = list(read_records([FileSource(f"{bucket}/rows.jsonl")]))
        store.heal()
    assert [line.problem for line in found] == [""] * len(rows)
    assert [line.value for line in found] == rows
    assert [line.line for line in found] == [*range(1, len(rows) + 1)]


def test_lines_longer_than_a_block_of_gcsfs(object_store: ObjectStore) -> None:
    rows = [{"row": row, "text": chr(97 + row) * (3 * 2**20)} for row in range(5)]
    address = f"{object_store.bucket()}/rows.jsonl"
    object_store.write(address, "\n".join(map(json.dumps, rows)).encode())
    trouble(object_store, 1, "GET /download")
    assert [line.value for line in read_records([FileSource(address)])] == rows
    assert object_store.faults_served >= 4


def test_a_store_that_stays_away_is_one_clear_problem(object_store: ObjectStore) -> None:
    address = f"{object_store.bucket()}/rows.jsonl"
    object_store.write(address, b'{"input_text": "a"}\n')
    object_store.fail(503, 1000, "GET /download")
    with pytest.raises(InputError, match=r"rows.jsonl.*cannot be read.*told to fail") as caught:
        load_prompts(address, renderer=RENDERER)
    assert len(caught.value.problems) == 1
    object_store.heal()
    object_store.fail(503, 1000, "GET /storage")
    with pytest.raises(InputError, match=r"rows.jsonl cannot be read: told to fail"):
        load_prompts(address, renderer=RENDERER)


def test_a_connection_that_goes_silent_is_given_up_and_tried_again(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{object_store.bucket()}/rows.jsonl"
    object_store.write(address, b'{"input_text": "slowly but surely"}\n')
    monkeypatch.setattr(storage, "SECONDS_OF_SILENCE", 0.5)
    object_store.slow(2.0, 1, "GET /download")  # a piece every 0.25 seconds: slow, not silent
    assert len(load_prompts(address, renderer=RENDERER)) == 1
    before = len(object_store.requests)
    object_store.slow(60.0, 1, "GET /download")
    assert len(load_prompts(address, renderer=RENDERER)) == 1
    asked = [text for text in object_store.requests[before:] if "/download" in text]
    assert len([text for text in asked if "[slow]" in text]) == 1
    assert len(asked) >= 2


def test_marks_of_empty_folders_are_no_files(object_store: ObjectStore) -> None:
    bucket = object_store.bucket()
    for name in ("data/", "data/rows.jsonl"):
        object_store.write(f"{bucket}/{name}", b'{"input_text": "a"}' if name[-1] != "/" else b"")
    assert len(load_prompts(f"{bucket}/data/*", renderer=RENDERER)) == 1
    folder = local_folder(f"{bucket}/data")
    assert [path.name for path in folder.rglob("*")] == ["rows.jsonl"]
    assert Output(f"{bucket}/data").names() == ["rows.jsonl"]


# --- Folders of runs


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_64_mib_go_up_and_come_down_bit_by_bit(object_store: ObjectStore, tmp_path: Path) -> None:
    bucket = object_store.bucket()
    output = Output(f"{bucket}/out")
    tensors = {"w": torch.randn(16 * 2**20, generator=torch.Generator().manual_seed(0))}
    folder = save_checkpoint(output.path, Checkpoint(3, tensors, {}, {}), keep=1)
    sums = {path.name: checksum(path) for path in folder.iterdir()}
    object_store.fail(503, 1, "POST .*uploadType=resumable model")
    object_store.lose_answer(1, "POST .*upload_id")  # the first of two parts
    object_store.refuse(1, "POST .*upload_id")
    object_store.fail(500, 1, "POST .*upload_id")
    object_store.lose_answer(1, "POST .*manifest.json")
    output.publish()
    assert sorted(object_store.names(f"{bucket}/out/checkpoints/step-000003")) == sorted(sums)
    uploads, object_store.faults_served = object_store.faults_served, 0
    assert uploads >= 4
    again = Output(f"{bucket}/out")
    object_store.cut_answer(2, "GET /download.*model")
    object_store.fail(429, 1, "GET /download.*model")
    object_store.refuse(1, "GET /download.*state")
    again.fetch("checkpoints/*")
    assert object_store.faults_served == 4
    there = again.path / "checkpoints" / "step-000003"
    assert {path.name: checksum(path) for path in there.iterdir()} == sums
    assert find_damage(there) is None
    copy = local_folder(f"{bucket}/out/checkpoints/step-000003")
    assert {path.name: checksum(path) for path in copy.iterdir()} == sums


@pytest.mark.parametrize("size", [1000, 6 * 2**20])
def test_an_upload_that_arrives_damaged_is_noticed(object_store: ObjectStore, size: int) -> None:
    output = Output(f"{object_store.bucket()}/out")
    (output.path / "weights.bin").write_bytes(os.urandom(size))
    object_store.corrupt(1, "POST .*(upload_id|weights.bin)")
    if size > 5 * 2**20:  # not the request that only begins the upload
        object_store.heal()
        object_store.corrupt(1, "POST .*upload_id")
    with pytest.raises(StorageError, match=r"cannot write gs://.*/weights.bin: MD5"):
        output.publish()
    output.publish()  # and was not taken for done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final metrics of the toy run without any trouble."""
    return without_timing(LastTrainer(toy_config(tmp_path_factory.mktemp("whole"))).train())


@settings(max_examples=12, deadline=None)
@given(sent=st.integers(0, 12), kind=st.sampled_from(["fail", "lose"]))
def test_an_upload_that_ends_between_two_files_costs_at_most_one_checkpoint(
    shelf: tuple[ObjectStore, str], whole: dict[str, Any], sent: int, kind: str
) -> None:
    """The bucket goes away for good, before or after it stored a file, at any file."""
    store, bucket = shelf
    config = toy_config(f"{bucket}/{next(FOLDERS)}", save_total_limit=1)

    def cut_off(trainer: Any, step: int, *_: Any) -> None:
        if step == 6:
            store.pass_by(sent, "(POST|DELETE) ")
            if kind == "lose":
                store.lose_answer(1, "(POST|DELETE) ")
            store.fail(403, 1000, "(POST|DELETE) ")

    try:
        with pytest.raises(StorageError, match=r"the same command continues") as caught:
            LastTrainer(config, callbacks=[cut_off]).train()
    finally:
        store.heal()
    assert f"output_dir: cannot write {config.output_dir}/" in str(caught.value)
    assert prepare_output(config, {}, stage="toy").status is Status.CONTINUE
    trainer = LastTrainer(config)
    steps = []
    trainer.callbacks = [lambda _, step, *__: steps.append(step)]
    assert without_timing(trainer.train()) == whole
    assert steps[0] in (4, 7, 9)
    rows = store.read(f"{config.output_dir}/metrics.jsonl").decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(1, 9)]
    assert not [name for name in store.names(config.output_dir) if "checkpoints" in name]


def test_a_removal_whose_answer_was_lost_is_done(object_store: ObjectStore) -> None:
    output = Output(f"{object_store.bucket()}/out")
    for name in ("a.txt", "b.txt"):
        (output.path / name).write_text(name)
    output.publish()
    (output.path / "a.txt").unlink()
    object_store.lose_answer(1, "DELETE")
    output.publish()
    assert object_store.names(output.folder) == ["b.txt"]
    assert object_store.requests[-2].startswith("DELETE")


def test_a_bucket_that_is_not_there_is_said_before_anything_runs(object_store: ObjectStore) -> None:
    with pytest.raises(InputError, match="output_dir: cannot read gs://nowhere/out"):
        prepare_output(toy_config("gs://nowhere/out"), {}, stage="toy")
    object_store.fail(503, 1000)
    with pytest.raises(InputError, match=r"output_dir: cannot read gs://nowhere.*told to fail"):
        prepare_output(toy_config("gs://nowhere/out"), {}, stage="toy")


def events(folder: Path) -> dict[str, list[int]]:
    """Steps of every scalar that TensorBoard shows; every record of every file is read."""
    files = list(folder.rglob("events*"))
    assert files
    for file in files:
        content, start = file.read_bytes(), 0
        while start < len(content):  # a record: length, its checksum, an event, its checksum
            size = int.from_bytes(content[start : start + 8], "little")
            Event.FromString(content[start + 12 : start + 12 + size])
            start += 16 + size
        assert start == len(content)
    shown = EventAccumulator(str(files[0].parent))
    shown.Reload()
    return {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def download(store: ObjectStore, address: str, folder: Path) -> Path:
    for name in store.names(address):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(store.read(f"{address}/{name}"))
    return folder


@pytest.mark.parametrize("step", [2, 5])
def test_logs_in_the_bucket_are_whole_after_trouble_a_signal_and_a_second_start(
    object_store: ObjectStore, tmp_path: Path, step: int
) -> None:
    bucket = object_store.bucket()
    config = toy_config(
        f"{bucket}/out", log_with=["tensorboard"], tensorboard_dir=f"{bucket}/logs/all"
    )
    parts = ["config.yaml", "events", "metrics.jsonl", "model", "manifest", "state", "best"]
    spread(object_store, [f"POST .*{part}" for part in parts])
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(step)]).train()
    # Those that are sent: nothing is evaluated, hence the best yet, before step 3.
    assert object_store.faults_served == len(parts) - (step < 3)
    rows = object_store.read(f"{bucket}/out/metrics.jsonl").decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(1, step + 1)]
    spread(object_store, [f"(POST|GET|DELETE) .*{part}" for part in parts])
    LastTrainer(config).train()
    rows = object_store.read(f"{bucket}/out/metrics.jsonl").decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(1, 9)]
    for address in (f"{bucket}/out/tensorboard", f"{bucket}/logs/all"):
        shown = events(download(object_store, address, tmp_path / address[5:]))
        assert shown["toy/loss"] == [*range(1, 9)]
    assert object_store.names(f"{bucket}/logs/all") == object_store.names(
        f"{bucket}/out/tensorboard"
    )


# --- Vertex's paths


@pytest.fixture(params=["gs", "unmounted", "mounted"])
def bucket(
    request: pytest.FixtureRequest,
    object_store: ObjectStore,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The address of a bucket with a base, a policy, a reward model and rows in it."""
    here = tmp_path / "here"
    shutil.copytree(checkpoints["t5"], here / "base")
    make_case("t5", here / "base", here)
    address = object_store.bucket("team-bucket")
    root = {"gs": address, "mounted": f"{tmp_path}/gcs/team-bucket"}.get(request.param)
    root = root or "/gcs/team-bucket"
    for path in here.rglob("*.json"):  # the base that policy and reward model name
        path.write_text(path.read_text().replace(f"{here}/base", f"{root}/base"))
    if request.param == "mounted":
        monkeypatch.setattr(storage, "MOUNT", str(tmp_path / "gcs"))
        here.rename(tmp_path / "gcs-team-bucket")
        (tmp_path / "gcs").mkdir()
        (tmp_path / "gcs-team-bucket").rename(tmp_path / "gcs" / "team-bucket")
        object_store.fail(403, 1000)  # going past the mount is a mistake
        return root
    for path in here.rglob("*"):
        if path.is_file():
            object_store.write(f"{address}/{path.relative_to(here)}", path.read_bytes())
    shutil.rmtree(here)
    return root


def result(object_store: ObjectStore, address: str) -> str:
    """A file that was written, as it lies in the bucket or in its mounted folder."""
    if Path(address).is_file():
        return Path(address).read_text()
    return object_store.read(address.replace("/gcs/", "gs://")).decode()


def test_inference_takes_buckets_for_every_path(
    object_store: ObjectStore, bucket: str, tmp_path: Path
) -> None:
    fields = {
        "base_model": f"{bucket}/base",
        "policy_path": f"{bucket}/policy",
        "eval_dataset": [f"{bucket}/rows.jsonl"],
        "reward_model_path": f"{bucket}/reward",
        "device": "cpu",
    }
    outcome = run_inference(InferenceConfig(**fields, output_dir=f"{bucket}/out"))
    rows = result(object_store, f"{bucket}/out/predictions.jsonl").splitlines()
    assert len(rows) == len(ROWS)
    assert json.loads(rows[0])["reward"] is not None
    assert json.loads(result(object_store, f"{bucket}/out/metrics.json"))["finished"]
    # The other way to write the same address is the same run.
    if bucket.startswith("/gcs/"):
        other = {
            name: json.loads(json.dumps(value).replace("/gcs/", "gs://"))
            for name, value in fields.items()
        }
        again = run_inference(InferenceConfig(**other, output_dir="gs://team-bucket/out"))
        assert again.metrics == outcome.metrics


def test_scores_and_conversions_take_buckets(object_store: ObjectStore, bucket: str) -> None:
    flags = ["--dataset", f"{bucket}/rows.jsonl", "--reward_model_path", f"{bucket}/reward"]
    flags += ["--output", f"{bucket}/scored.jsonl", "--device", "cpu"]
    assert main(["score", "--on_bad_rows", "skip", *flags]) == 0
    scored = result(object_store, f"{bucket}/scored.jsonl").splitlines()
    answered = [isinstance(row.get("output_text"), str) or "choice" in row for row in ROWS]
    assert len(scored) == sum(answered)
    convert(f"{bucket}/rows.jsonl", f"{bucket}/converted.jsonl")
    assert len(result(object_store, f"{bucket}/converted.jsonl").splitlines()) == len(ROWS)


def test_another_reward_model_at_the_same_address_is_noticed(
    object_store: ObjectStore, bucket: str
) -> None:
    before = weights_fingerprint(f"{bucket}/reward")
    assert before
    weights = "reward/adapter/adapter_model.safetensors"
    if Path(bucket).is_dir():
        content = (Path(bucket) / weights).read_bytes()
        (Path(bucket) / weights).write_bytes(content[:-1] + b"?")
    else:
        content = object_store.read(f"gs://team-bucket/{weights}")
        object_store.write(f"gs://team-bucket/{weights}", content[:-1] + b"?")
    assert weights_fingerprint(f"{bucket}/reward") != before


def test_a_pipelines_dry_run_does_not_look_for_what_it_would_write(
    object_store: ObjectStore, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"input_text": "the cat", "candidate_0": " a", "candidate_1": " the", "choice": 1}
    content = "".join(json.dumps({**pair, "input_text": f"cat {n}"}) + "\n" for n in range(6))
    if Path(bucket).is_dir():
        (Path(bucket) / "pairs.jsonl").write_text(content)
    else:
        object_store.write("gs://team-bucket/pairs.jsonl", content.encode())
    flags = ["--base_model", f"{bucket}/base", "--preference_dataset", f"{bucket}/pairs.jsonl"]
    flags += ["--output_dir", f"{bucket}/out", "--device", "cpu", "--batch_size", "2"]
    assert main(["run", "--dry_run", *flags]) == 0, capsys.readouterr().err
    if not Path(bucket).is_dir():
        assert "out" not in {name.split("/")[0] for name in object_store.names("gs://team-bucket")}


def test_an_outage_is_no_traceback(
    object_store: ObjectStore, bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if Path(bucket).is_dir():
        pytest.skip("a mounted bucket is its driver's business")
    flags = ["--policy_path", f"{bucket}/policy", "--eval_dataset", f"{bucket}/rows.jsonl"]
    flags += ["--output_dir", f"{bucket}/out", "--device", "cpu"]
    object_store.fail(503, 1000, "POST")
    assert main(["infer", *flags]) == 1
    problem = capfd.readouterr().err.splitlines()[-1]
    assert problem.startswith(f"rlhf: output_dir: cannot write {bucket}/out/")
    assert "told to fail" in problem
    object_store.heal()
    assert main(["infer", *flags]) == 0


@pytest.mark.slow
def test_a_real_run_with_trouble_stops_at_sigterm_and_goes_on(
    object_store: ObjectStore, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As on Vertex: every path below /gcs, the process told to stop, the same command again."""
    store, steps = object_store, 12
    store.bucket("team-bucket")
    for path in checkpoints["t5"].iterdir():
        store.write(f"gs://team-bucket/base/{path.name}", path.read_bytes())
    rows = [{"input_text": f"the cat {n}", "output_text": "a cat"} for n in range(6)]
    for shard in range(3):
        part = "".join(json.dumps(row) + "\n" for row in rows[shard::3])
        store.write(f"gs://team-bucket/data/{shard}.jsonl", part.encode())
    command = [sys.executable, "-m", "rlhf", "sft", "--device", "cpu", "--batch_size", "2"]
    command += ["--base_model", "/gcs/team-bucket/base", "--dataset", "/gcs/team-bucket/data/*"]
    command += ["--output_dir", "/gcs/team-bucket/out", "--train_steps", str(steps)]
    command += ["--save_every", "1", "--tensorboard_dir", "/gcs/team-bucket/logs"]
    environment = {**os.environ, "RLHF_CACHE": str(tmp_path / "cache")}

    def start(name: str) -> subprocess.Popen[bytes]:
        log = (tmp_path / name).open("wb")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    spread(store, ["GET .*data/1", "GET .*base/model", "POST .*manifest", "POST .*metrics.jsonl"])
    # While it waits for the answer to its second checkpoint, it cannot have begun another step.
    store.first(lambda: process.send_signal(signal.SIGTERM), "POST .*step-000002/manifest")
    process = start("first.log")
    assert process.wait(600) == 75, (tmp_path / "first.log").read_text()
    assert store.faults_served == 4 + 1
    done = store.read("gs://team-bucket/out/metrics.jsonl").decode().splitlines()
    assert 2 <= len(done) < steps
    spread(store, ["GET .*model.safetensors", "POST .*events", "POST .*manifest", "DELETE"])
    process = start("second.log")
    assert process.wait(600) == 0, (tmp_path / "second.log").read_text()
    assert store.faults_served == 8 + 1
    told = re.search(r"continues after step (\d+)", (tmp_path / "second.log").read_text())
    # Stopped in an evaluation, the step is done and logged when it has been evaluated.
    assert told is not None
    assert int(told[1]) - len(done) in (0, 1)
    lines = store.read("gs://team-bucket/out/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, steps + 1)]
    for address in ("gs://team-bucket/out/tensorboard", "gs://team-bucket/logs"):
        shown = events(download(store, address, tmp_path / address[5:]))
        assert shown["sft/loss"] == [*range(1, steps + 1)]
    names = store.names("gs://team-bucket/out")
    assert {"metrics.json", "adapter/adapter_model.safetensors"} <= set(names)
    assert not [name for name in names if name.startswith("checkpoints/")]
    assert not Path("/gcs").exists()


def test_checks_of_a_checkpoint_in_a_bucket_leave_its_weights_there(
    object_store: ObjectStore, tiny_checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    base = f"{object_store.bucket()}/model"
    for file in tiny_checkpoint.iterdir():
        object_store.write(f"{base}/{file.name}", file.read_bytes())
    assert read_model_config(base).vocab_size == 120
    assert load_tokenizer(base).eos_token == "</s>"
    assert not any("safetensors?alt" in line for line in object_store.requests)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    folder = local_folder(base)
    assert (folder / "model.safetensors").read_bytes() == (
        tiny_checkpoint / "model.safetensors"
    ).read_bytes()
    assert local_folder(base, weights=False) == folder
