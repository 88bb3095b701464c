"""Checkpoints that may be damaged and folders that may be in a bucket."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from support.toy_trainer import LastTrainer, ToyTrainer, lines, stop_at, toy_config, without_timing

from rlhf.errors import InputError, StoppedBySignal
from rlhf.files.output import Output, needs_publishing
from rlhf.files.run_folder import Status, prepare_output
from rlhf.training.checkpoints import (
    Best,
    Checkpoint,
    find_damage,
    load_best,
    load_checkpoint,
    read_best,
    save_best,
    save_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    # 1/3 has no short decimal form, and a transposed tensor is not contiguous.
    model = {"w": torch.full((2, 3), step + 1 / 3).t(), "b": torch.tensor(float(step))}
    optimizer = {"w.step": torch.tensor(7.0), "w.exp_avg": torch.randn(3, 2)}
    return Checkpoint(step, model, optimizer, {"extra": {"kl_coeff": 0.1 + 0.2}})


def folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved = checkpoint(3)
    save_checkpoint(tmp_path, saved, keep=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 3
    assert loaded.state == saved.state
    for one, other in ((saved.model, loaded.model), (saved.optimizer, loaded.optimizer)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    kinds = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert folders(tmp_path) == ["step-000010", "step-000100"]
    save_checkpoint(tmp_path, checkpoint(11), keep=1)  # after going back from a damaged one
    assert folders(tmp_path) == ["step-000011"]


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))


def cut_a_file(folder: Path) -> None:
    content = (folder / "optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(content[:-4])


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def tear_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {"model.saf')


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')


def remove_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()


DAMAGES = [
    flip_a_byte,
    cut_a_file,
    remove_the_manifest,
    tear_the_manifest,
    empty_the_manifest,
    remove_a_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    damage(tmp_path / "checkpoints" / "step-000002")
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert "step-000002 is passed over" in caplog.text
    damage(tmp_path / "checkpoints" / "step-000001")
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_checkpoint_before(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    LastTrainer(toy_config(tmp_path / "whole")).train()
    config = toy_config(tmp_path / "run")
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(7)]).train()
    assert folders(tmp_path / "run") == ["step-000006", "step-000007"]
    damage(tmp_path / "run" / "checkpoints" / "step-000007")
    LastTrainer(config).train()
    rows = [[*map(without_timing, lines(tmp_path / name))] for name in ("whole", "run")]
    assert rows[0] == rows[1]


def test_a_half_written_checkpoint_is_invisible(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    half = tmp_path / "checkpoints" / ".step-000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert find_damage(save_checkpoint(tmp_path, checkpoint(2), keep=2)) is None


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")
    with pytest.raises(StoppedBySignal):
        ToyTrainer(config, callbacks=[stop_at(3)]).train()
    trainer = ToyTrainer(config)
    trainer.first = torch.nn.Linear(5, 3)
    with pytest.raises(InputError, match=r"does not fit this model \(first\.bias"):
        trainer.train()


def test_best_knows_its_evaluation_and_is_replaced(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    for value in (0.1 + 0.2, 1 / 3):
        best = Best(4, "eval/loss", value, {"eval/loss": value, "eval/other": 2.0})
        save_best(tmp_path, {"w": torch.full((2,), value)}, best)
        assert read_best(tmp_path) == best
        assert torch.equal(load_best(tmp_path)["w"], torch.full((2,), value))
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["trainable.safetensors"]


def test_the_best_of_a_failed_attempt_is_forgotten(tmp_path: Path) -> None:
    class Fails(ToyTrainer):
        def save(self) -> None:
            raise RuntimeError

    config = toy_config(tmp_path / "run")
    with pytest.raises(RuntimeError):
        Fails(config).train()
    save_best(tmp_path / "run", {"w": torch.ones(2)}, Best(1, "eval/loss", -9.0, {}))
    assert ToyTrainer(config).train()["best"] > 0


@pytest.fixture(params=["memory", "file"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A remote folder; `file://` goes the same way as a bucket mounted under /gcs/."""
    url = "memory://bucket/out" if request.param == "memory" else f"file://{tmp_path}/bucket/out"
    yield url
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def remote_names(url: str) -> list[str]:
    return Output(url).names()


def read(url: str, name: str) -> str:
    with fsspec.open(f"{url}/{name}", "r") as file:
        return file.read()


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_remote_run_stops_and_goes_on_elsewhere(bucket: str, tmp_path: Path, step: int) -> None:
    local = without_timing(LastTrainer(toy_config(tmp_path / "whole")).train())
    config = toy_config(bucket, save_total_limit=1)
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(step)]).train()
    names = remote_names(bucket)
    assert f"checkpoints/step-{step:06d}/manifest.json" in names
    assert len([name for name in names if name.endswith("manifest.json")]) == 1
    assert "metrics.json" not in names
    assert prepare_output(config, {}, stage="toy").status is Status.CONTINUE
    remote = LastTrainer(config).train()
    assert without_timing(remote) == local
    rows = [json.loads(line) for line in read(bucket, "metrics.jsonl").splitlines()]
    assert [*map(without_timing, rows)] == [*map(without_timing, lines(tmp_path / "whole"))]
    names = remote_names(bucket)
    assert {"w.pt", "metrics.json", "config.yaml", "best/trainable.safetensors"} <= set(names)
    assert not any(name.startswith("checkpoints/") for name in names)
    assert LastTrainer(config).train() == remote
    with pytest.raises(InputError, match="batch_size"):
        LastTrainer(toy_config(bucket, batch_size=6))


def test_an_upload_that_was_cut_off_is_no_checkpoint(bucket: str) -> None:
    config = toy_config(bucket)
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(7)]).train()
    filesystem, root = fsspec.core.url_to_fs(bucket)
    filesystem.rm_file(f"{root}/checkpoints/step-000007/manifest.json")
    trainer = LastTrainer(config)
    trainer.train()
    assert "metrics.json" in remote_names(bucket)


def test_manifests_go_after_their_files_and_the_finished_mark_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output("memory://bucket/order")
    sent: list[str] = []
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(store, "put_file", lambda _, remote: sent.append(Path(remote).name))
    save_checkpoint(output.path, checkpoint(1), keep=1)
    for name in ("metrics.json", "metrics.jsonl", "zebra.txt", ".hidden"):
        (output.path / name).write_text("{}")
    output.publish()
    assert sent[-2:] == ["manifest.json", "metrics.json"]
    assert ".hidden" not in sent
    assert len(sent) == 7
    output.publish()
    assert len(sent) == 7  # unchanged files stay


@pytest.mark.parametrize("output", ["local", "remote"])
@pytest.mark.parametrize("copy", ["local", "remote"])
def test_tensorboard_files_go_to_a_second_folder_too(
    tmp_path: Path, output: str, copy: str
) -> None:
    store = fsspec.filesystem("memory")
    folder = str(tmp_path / "out") if output == "local" else "memory://bucket/tb-out"
    other = str(tmp_path / "a" / "b") if copy == "local" else "memory://bucket/tb-copy"
    config = toy_config(folder, log_with=["tensorboard"], tensorboard_dir=other)
    copied: list[int] = []

    def look(trainer: Any, step: int, *_: Any) -> None:
        files = Output(other).names()
        copied.append(len(files))

    try:
        with pytest.raises(StoppedBySignal):
            LastTrainer(config, callbacks=[look, stop_at(5)]).train()
        assert copied == [0, 0, 0, 1, 1]  # from the first save on, after step 3
        LastTrainer(config).train()
        files, kept = Output(other), Output(f"{folder}/tensorboard")
        assert files.names() == kept.names()
        assert len(files.names()) == 2  # one for each start
        for output_ in (files, kept):
            output_.fetch("*")
        for name in files.names():
            assert (files.path / name).read_bytes() == (kept.path / name).read_bytes()
        # Where the files go is no reason to refuse a run, and a finished one stays as it is.
        moved = toy_config(folder, log_with=["tensorboard"], tensorboard_dir=f"{other}/x")
        assert LastTrainer(moved).train()["finished"]
    finally:
        for address in ("/bucket/tb-out", "/bucket/tb-copy"):
            if store.exists(address):
                store.rm(address, recursive=True)


def test_a_second_tensorboard_folder_may_be_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = toy_config(folder, log_with=["tensorboard"], tensorboard_dir=f"{folder}/tensorboard")
    assert LastTrainer(config).train()["finished"]
    with pytest.raises(InputError, match="tensorboard_dir: cannot write to nowhere://x"):
        LastTrainer(toy_config(tmp_path / "other", tensorboard_dir="nowhere://x"))


def test_a_note_about_a_failure_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text("{}")
    assert prepare_output(toy_config(tmp_path), {}, stage="toy").status is Status.FRESH
    assert prepare_output(toy_config(tmp_path, resume="never"), {}, stage="toy")


def test_which_folders_are_remote() -> None:
    assert needs_publishing("gs://bucket/out")
    assert needs_publishing("/gcs/bucket/out")
    assert not needs_publishing("out/policy")
    assert not needs_publishing("/data/gcs/out")


def test_remote_folders_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="output_dir: cannot write to nowhere://x"):
        Output("nowhere://x")
    output = Output("memory://bucket/forbidden")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no access to this bucket")

    monkeypatch.setattr(fsspec.filesystem("memory"), "find", refuse)
    with pytest.raises(InputError, match="cannot read memory://bucket/forbidden: no access"):
        output.names()
