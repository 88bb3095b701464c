"""Run folders after kills, damage and full disks: the same command goes on, nobody else gets in."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cases import make_case, read
from support.toy_trainer import LastTrainer, ToyTrainer, lines, stop_at, toy_config, without_timing

from rlhf.errors import InputError, StoppedBySignal, StorageError
from rlhf.files import owners, run_folder
from rlhf.files.output import RUN_FILE, Output
from rlhf.files.owners import Process, remove_abandoned, temporary_folder, temporary_name
from rlhf.files.run_folder import Status, prepare_output
from rlhf.files.text import whole_file, write_text
from rlhf.process import exit_code
from rlhf.training import checkpoints, tracking
from rlhf.training import trainer as training
from rlhf.training.checkpoints import BEST, Best, load_best, restore_best, save_best


class Killed(BaseException):
    """Nothing catches it, as nothing survives SIGKILL."""


def stopped(folder: Path, step: int, **fields: Any) -> Any:
    """The configuration of a run that was stopped after a step."""
    config = toy_config(folder, **fields)
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(step)]).train()
    return config


def same_as_whole(folder: Path, whole: Path) -> None:
    LastTrainer(toy_config(whole)).train()
    rows = [[*map(without_timing, lines(path))] for path in (folder, whole)]
    assert rows[0] == rows[1]


# A kill before run.json, and run.json damaged


@pytest.mark.parametrize("first", [RUN_FILE, "config.yaml"])
def test_a_kill_while_the_folder_is_claimed_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    write = run_folder.write_text

    def killed(path: Path, text: str) -> None:
        if path.name == first:
            raise Killed
        write(path, text)

    monkeypatch.setattr(run_folder, "write_text", killed)
    config = toy_config(tmp_path / "run")
    with pytest.raises(Killed):
        LastTrainer(config).train()
    monkeypatch.undo()
    assert LastTrainer(config).train()["finished"]


def test_a_folder_with_this_runs_config_alone_is_this_runs(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")
    run = prepare_output(config, {}, stage="toy")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(run.config_text)
    assert prepare_output(config, {}, stage="toy").status is Status.FRESH
    (tmp_path / "run" / "config.yaml").write_text("my: own\n")
    with pytest.raises(InputError, match="files of no run of rlhf"):
        prepare_output(config, {}, stage="toy")


@pytest.mark.parametrize("content", [None, "", '{"stage": "to', "[]", "{}", "\x00" * 40])
def test_a_damaged_run_json_beside_a_checkpoint_is_recovered(
    tmp_path: Path, content: str | None
) -> None:
    config = stopped(tmp_path / "run", 5)
    path = tmp_path / "run" / RUN_FILE
    expected = path.read_bytes()
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match="batch_size: changed from 5 to 6"):
        prepare_output(toy_config(tmp_path / "run", batch_size=6), {}, stage="toy")
    with pytest.raises(InputError, match="holds a run of toy, not of sft"):
        prepare_output(config, {}, stage="sft")
    assert prepare_output(config, {}, stage="toy").status is Status.CONTINUE
    trainer = LastTrainer(config)
    trainer.train()
    assert path.read_bytes() == expected
    same_as_whole(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_run_json_is_recovered_in_a_store(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/run"
    config = stopped(url, 5)  # type: ignore[arg-type]
    (tmp_path / "bucket" / "run" / RUN_FILE).write_text('{"sta')
    with pytest.raises(InputError, match="batch_size: changed from 5 to 6"):
        prepare_output(toy_config(url, batch_size=6), {}, stage="toy")
    assert LastTrainer(config).train()["finished"]


def test_a_damaged_run_json_with_nothing_saved_is_a_new_start(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    (tmp_path / RUN_FILE).write_text('{"stage": "t')
    (tmp_path / "config.yaml").write_text("half")
    assert LastTrainer(config).train()["finished"]
    (tmp_path / RUN_FILE).write_text("")
    with pytest.raises(InputError, match=r"finished run whose run\.json is damaged"):
        LastTrainer(config)


def test_in_a_store_the_owner_is_told_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = Output("memory://bucket/first")
    sent: list[str] = []
    monkeypatch.setattr(
        output._store._filesystem, "put_file", lambda _, remote: sent.append(Path(remote).name)
    )
    for name in ("config.yaml", "run.json", "metrics.json", "a.txt"):
        (output.path / name).write_text("{}")
    output.publish()
    assert (sent[0], sent[-1]) == ("run.json", "metrics.json")


# What a kill leaves


def left_by(monkeypatch: pytest.MonkeyPatch, process: Process, prefix: str) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(Process, "this", lambda: process)
        return temporary_name(prefix)


def test_what_a_killed_writer_left_goes_with_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = dead_process()
    for name in ("notes.txt", "other.txt"):
        (tmp_path / left_by(monkeypatch, dead, f".{name}")).write_text("hal")
    write_text(tmp_path / "notes.txt", (f"{word} " for word in ("all", "of", "it")))
    names = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in names if name.startswith(".notes.txt")]
    with whole_file(str(tmp_path / "other.txt"), "output") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "other.txt"]
    assert (tmp_path / "notes.txt").read_text() == "all of it "


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError):
        write_text(tmp_path / "a.txt", (str(1 // n) for n in (1, 0)))
    pieces = (b"half" * (1_000_000 // n) for n in (1, 0))
    with pytest.raises(ZeroDivisionError), whole_file(str(tmp_path / "a.txt"), "output") as file:
        file.writelines(pieces)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_checkpoints_of_a_finished_run_go_with_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped(tmp_path / "run", 5)
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "run" / "checkpoints", saved)
    metrics = LastTrainer(config).train()
    for name in (".step-000008", ".step-000009/x"):
        (saved / name).mkdir(parents=True)
    shutil.copytree(saved, tmp_path / "run" / "checkpoints")
    for name in (".metrics.json.tmp", left_by(monkeypatch, dead_process(), ".config.yaml")):
        (tmp_path / "run" / name).write_text("{")
    mine = temporary_name(".scores.jsonl")
    elsewhere = mine.replace(Process.this().machine, "0123abcd")
    for name in (mine, elsewhere):
        (tmp_path / "run" / name).write_text("being written")
    old = tmp_path / "run" / elsewhere.replace("scores", "older")
    old.write_text("{")
    os.utime(old, (0, 0))
    (tmp_path / "run" / "best" / ".tmpAb12x_").write_text("safetensors leaves this")
    for name in (".rlhf.lock", ".lease.json"):
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / ".env").write_text("the user's own")
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert LastTrainer(config).train() == metrics
    assert not (tmp_path / "run" / "checkpoints").exists()
    hidden = [path.name for path in (tmp_path / "run").rglob(".*")]
    assert sorted(hidden) == sorted([".env", mine, elsewhere])
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_checkpoints_of_a_finished_run_go_from_a_store(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket/run"
    config = stopped(url, 5)  # type: ignore[arg-type]
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "bucket" / "run" / "checkpoints", saved)
    LastTrainer(config).train()
    names = Output(url).names()
    assert not [name for name in names if name.startswith("checkpoints/")]
    shutil.copytree(saved, tmp_path / "bucket" / "run" / "checkpoints", dirs_exist_ok=True)
    LastTrainer(config).train()
    assert Output(url).names() == names


def test_a_half_checkpoint_in_a_store_does_not_stay(tmp_path: Path) -> None:
    """An upload that was cut off before the first manifest leaves a new start behind."""
    folder = tmp_path / "bucket" / "run"
    url = f"file://{folder}"
    stopped(url, 2)  # type: ignore[arg-type]
    for path in folder.glob("checkpoints/*/manifest.json"):
        path.unlink()
    config = toy_config(url)
    assert prepare_output(config, {}, stage="toy").status is Status.FRESH
    LastTrainer(config).train()
    assert not [name for name in Output(url).names() if name.startswith("checkpoints/")]


def dead_process() -> Process:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return Process("h", Process.this().machine, process.pid, 1)


def test_temporary_folders_of_dead_processes_go_and_those_of_the_living_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = dead_process()
    names = [left_by(monkeypatch, dead, "rlhf-data") for _ in range(2)]
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[0] / "rows.arrow").write_text("")
    (tmp_path / names[1]).write_text("")
    elsewhere = names[0].replace(dead.machine, "0123abcd")
    (tmp_path / elsewhere).mkdir()
    (tmp_path / "rlhf-mine").mkdir()
    mine = temporary_folder("data", tmp_path)
    kept = {mine.name, elsewhere, "rlhf-mine"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    code = "import sys, time; from pathlib import Path; from rlhf.files.owners import *\n"
    code += "print(temporary_folder('data', Path(sys.argv[1])).name, flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    name = other.stdout.readline().strip()
    remove_abandoned(tmp_path, "rlhf-")
    assert {path.name for path in tmp_path.iterdir()} == kept | {name}
    other.kill()
    other.wait()
    remove_abandoned(tmp_path, "rlhf-")
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_has_the_mode_of_the_umask(
    tmp_path: Path, checkpoints: dict[str, Path], arch: str, mask: int
) -> None:
    before = os.umask(mask)
    try:
        config = stopped(tmp_path / "toy", 5)
        modes = [path.stat().st_mode for path in (tmp_path / "toy").rglob("*") if path.is_file()]
        case = make_case(arch, checkpoints[arch], tmp_path / "case")
        case.run(tmp_path / "inference")
        LastTrainer(config).train()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "trainable.safetensors", "predictions.jsonl"} <= {
        path.name for path in files
    }
    wrong = [path for path in files if path.stat().st_mode & 0o777 != 0o666 & ~mask]
    assert not wrong
    assert {mode & 0o777 for mode in modes} == {0o666 & ~mask}


# Damage to what is best, and to predictions


def flip_a_byte(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def damaged_best(folder: Path, how: str) -> None:
    path = folder / BEST
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        flip_a_byte(path)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("step", [3, 4, 7])
def test_damaged_best_weights_are_noticed_and_found_again(
    tmp_path: Path, step: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    ToyTrainer(toy_config(tmp_path / "whole")).train()
    config = toy_config(tmp_path / "run")
    with pytest.raises(StoppedBySignal):
        ToyTrainer(config, callbacks=[stop_at(step)]).train()
    damaged_best(tmp_path / "run", how)
    with caplog.at_level(logging.WARNING):
        ToyTrainer(config).train()
    assert how == "gone" or "trainable.safetensors" in caplog.text
    whole, run = (torch.load(tmp_path / name / "w.pt") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole)
    best = [load_file(tmp_path / name / BEST) for name in ("whole", "run")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    rows = [[*map(without_timing, lines(tmp_path / name))] for name in ("whole", "run")]
    assert rows[0] == rows[1]


def test_best_weights_of_the_checkpoints_own_step_come_from_it(tmp_path: Path) -> None:
    model = {"w": torch.tensor([1.0, 1 / 3])}
    best = Best(3, "eval/loss", 0.1, {"eval/loss": 0.1})
    state = {"best": vars(best)}
    at = checkpoints.Checkpoint(3, model, {}, state)
    assert restore_best(tmp_path, at)
    assert torch.equal(load_best(tmp_path)["w"], model["w"])
    save_best(tmp_path, model, best)
    flip_a_byte(tmp_path / BEST)
    with pytest.raises(StorageError, match="checksum"):
        load_best(tmp_path)
    assert not restore_best(tmp_path, checkpoints.Checkpoint(4, model, {}, state))
    assert restore_best(tmp_path, checkpoints.Checkpoint(2, model, {}, {"best": None}))


class StopsAfter:
    """Ends inference after so many pieces, as a kill would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
        from rlhf.inference import stage as inference

        self.calls, self.pieces = 0, pieces
        self.predict = inference.predict_rows
        monkeypatch.setattr(inference, "predict_rows", self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.pieces < self.calls:
            raise Killed
        return self.predict(*args, **options)


PARTIAL, SUMS = "predictions.partial.jsonl", "predictions.partial.sums.jsonl"


@pytest.mark.parametrize("damage", ["first", "second", "letter", "sums", "no sums", "torn", "none"])
def test_damaged_predictions_are_made_again(
    tmp_path: Path,
    checkpoints: dict[str, Path],
    arch: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(arch, checkpoints[arch], tmp_path / "case")
    whole = case.run(tmp_path / "whole", batch_size=2)
    with monkeypatch.context() as patch:
        StopsAfter(patch, 2)
        with pytest.raises(Killed):
            case.run(tmp_path / "run", batch_size=2)
    partial, sums = tmp_path / "run" / PARTIAL, tmp_path / "run" / SUMS
    good = partial.read_bytes()
    if damage in ("first", "second"):  # another number is valid JSON all the same
        rows = good.splitlines(keepends=True)
        number = 0 if damage == "first" else 2
        rows[number] = rows[number].replace(b'"kl": ', b'"kl": 1')
        partial.write_bytes(b"".join(rows))
    elif damage == "letter":
        partial.write_bytes(good.replace(b"the cat sat", b"the cat sit", 1))
    elif damage == "sums":
        sums.write_bytes(sums.read_bytes()[:-5])
    elif damage == "no sums":
        sums.unlink()
    elif damage == "torn":
        partial.write_bytes(good[:-7])
    expected = {"none": 2, "second": 3, "sums": 3, "torn": 3}.get(damage, 4)
    counter = StopsAfter(monkeypatch, 99)
    result = case.run(tmp_path / "run", batch_size=2)
    assert counter.calls == expected
    assert read(result.predictions) == read(whole.predictions)
    assert not sums.exists()
    assert not partial.exists()


# Disks that are full, folders that cannot be written


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        yield


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (run_folder, "write_text"),
        (checkpoints, "save_file"),
        (checkpoints, "write_text"),
        (tracking.JsonLog, "write"),
        (training.Trainer, "_finish"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    name: str,
) -> None:
    config = stopped(tmp_path / "run", 4)
    with full_disk(monkeypatch, module, name):
        assert exit_code(LastTrainer(config).train) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf: ")]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "Traceback" not in said[0]
    assert not [*(tmp_path / "run").rglob(".*.partial")]
    assert not [*(tmp_path / "run").rglob(".step-*")]
    LastTrainer(config).train()
    same_as_whole(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_under_safetensors_is_one_line_too(tmp_path: Path) -> None:
    """Its errors are no OSError; a limit on the size of files stands for the disk."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from rlhf.training.checkpoints import Checkpoint, save_checkpoint
from rlhf.process import exit_code
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
tensors = {"w": torch.ones(5000)}
save_checkpoint(folder, Checkpoint(1, {"w": torch.ones(2)}, {}, {}), 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
sys.exit(exit_code(lambda: save_checkpoint(folder, Checkpoint(2, tensors, {}, {}), 2)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("below", ["file", "file/out", "file/out/deep"])
def test_an_output_dir_that_cannot_be_made_is_refused_before_anything(
    tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir: "):
        prepare_output(toy_config(tmp_path / below), {}, stage="toy")


def test_an_output_dir_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may do anything
    with pytest.raises(InputError, match=r"output_dir: cannot write to .*out: no permission for"):
        prepare_output(toy_config(tmp_path / "deep" / "out"), {}, stage="toy")


def test_processes_are_told_apart() -> None:
    me = Process.this()
    assert me.lives() is True
    assert dead_process().lives() is False
    assert Process(me.host, me.machine, me.pid, me.started + 1).lives() is False
    assert Process(me.host, "elsewhere", me.pid, me.started).lives() is None
    assert owners._started(2**30) is None


def test_a_run_from_before_a_field_existed_goes_on_with_its_default(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(3)]).train()
    file = tmp_path / "run" / RUN_FILE
    identity = json.loads(file.read_text())
    assert identity["fields"].pop("max_grad_norm") == config.max_grad_norm == 1.0
    file.write_text(json.dumps(identity))
    with pytest.raises(InputError, match=r"max_grad_norm: changed from 1\.0 to 0\.5"):
        LastTrainer(toy_config(tmp_path / "run", max_grad_norm=0.5)).train()
    assert LastTrainer(config).train()["finished"]
