"""Two writers on one folder: the second is told who the first is, a dead one blocks nobody."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.object_store import ObjectStore
from support.toy_trainer import LastTrainer, lines, toy_config, without_timing

from rlhf.errors import InputError, StorageError
from rlhf.files import lease as leases
from rlhf.files.lease import LOCK, NOTE, Holder, Lease, lease
from rlhf.files.owners import Process
from rlhf.files.run_folder import prepare_output


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SECONDS_BETWEEN_RENEWALS", 0.05)
    monkeypatch.setattr(leases, "SECONDS_TO_EXPIRE", 1.0)


@pytest.fixture(params=["local", "gs", "memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "gs":
        store: ObjectStore = request.getfixturevalue("object_store")
        yield f"{store.bucket()}/out"
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}/out"
        memory = fsspec.filesystem("memory")
        if memory.exists(f"/{tmp_path.name}"):
            memory.rm(f"/{tmp_path.name}", recursive=True)
    else:
        yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/bucket/out"


def files(folder: str) -> list[str]:
    filesystem, root = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    return sorted(name.rsplit("/", 1)[-1] for name in filesystem.find(root))


def write_note(folder: str, note: bytes) -> None:
    filesystem, root = fsspec.core.url_to_fs(folder)
    if folder.startswith("gs://"):
        filesystem.pipe_file(f"{root}/{NOTE}", note)
    else:
        filesystem.makedirs(root, exist_ok=True)
        filesystem.pipe_file(f"{root}/{NOTE}", note + b"version\n")


def test_the_second_is_told_who_the_first_is_and_gets_in_after_it(folder: str) -> None:
    first = Lease(folder, "rlhf ppo")
    who = rf"'rlhf ppo' \(process {os.getpid()} on .+, since 20..-..-.. ..:..:.. UTC\)"
    with pytest.raises(InputError, match=who):
        Lease(folder, "rlhf sft")
    first.check()
    first.release()
    assert files(folder) == []
    with lease(folder, "rlhf sft"), pytest.raises(InputError, match="'rlhf sft'"):
        Lease(folder, "rlhf ppo")
    assert files(folder) == []


def test_it_is_released_when_something_fails(folder: str) -> None:
    with pytest.raises(ZeroDivisionError), lease(folder, "rlhf sft"):
        raise ZeroDivisionError
    Lease(folder, "rlhf sft").release()


HOLD = """
import sys
from rlhf.files.lease import Lease
held = Lease(sys.argv[1], "rlhf held")
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_refused_and_a_killed_one_blocks_nobody(folder: str) -> None:
    if folder.startswith("memory"):
        pytest.skip("a memory of one process")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"'rlhf held' \(process {process.pid} on "):
        Lease(folder, "rlhf sft")
    process.kill()
    process.wait()
    assert NOTE in files(folder)
    Lease(folder, "rlhf sft").release()  # at once: its process is seen to be gone
    assert files(folder) == []


def elsewhere() -> bytes:
    return Holder("other-host", "0123abcd", 7, 8, "rlhf far", "2026-01-01 UTC", "abc").note()


@pytest.fixture
def shared(folder: str) -> str:
    if "://" not in folder:
        pytest.skip("the lock of this machine needs no expiry")
    return folder


@pytest.mark.parametrize("note", [elsewhere(), b"{", b"", b"[" * 100_000])
def test_a_lease_of_another_machine_that_is_not_renewed_is_taken_over(
    shared: str, note: bytes
) -> None:
    write_note(shared, note)
    held = Lease(shared, "rlhf sft")
    held.check()
    held.release()
    assert files(shared) == []


def test_a_lease_of_another_machine_that_is_renewed_is_respected(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SECONDS_TO_EXPIRE", 600.0)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.02):
            write_note(shared, elsewhere())

    write_note(shared, elsewhere())
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        if shared.startswith("gs://"):
            with pytest.raises(InputError, match=r"'rlhf far' \(process 7 on other-host, since"):
                Lease(shared, "rlhf sft")
        else:
            monkeypatch.setattr(leases._PlainFile, "read", changing(leases._PlainFile.read))
            with pytest.raises(InputError, match="being written by"):
                Lease(shared, "rlhf sft")
    finally:
        over.set()
        thread.join()


def test_a_note_that_is_just_being_written_is_a_note(tmp_path: Path) -> None:
    """A file that is written in place is empty for a moment."""
    path = tmp_path / "bucket" / "out" / NOTE
    path.parent.mkdir(parents=True)
    path.touch()
    note = leases._PlainFile(fsspec.filesystem("file"), str(path))
    assert note.read()[1]
    assert note.write(b"{}", "") is None
    assert path.read_bytes() == b""


def changing(read: Callable[[Any], tuple[bytes, str | None]]) -> Any:
    def changed(self: Any) -> tuple[bytes, str | None]:
        note, version = read(self)
        return note, version and os.urandom(4).hex()

    return changed


def test_whoever_lost_it_writes_nothing_more(shared: str) -> None:
    held = Lease(shared, "rlhf sft")
    write_note(shared, elsewhere())
    lost = held._held
    lost._thread.join(30)  # type: ignore[union-attr]
    with pytest.raises(StorageError, match=r"\.lease\.json: the lease is another process's now"):
        held.check()
    held.release()
    assert files(shared) == [NOTE]  # which is not ours to remove


def test_it_is_renewed_and_an_outage_shorter_than_its_term_is_survived(
    object_store: ObjectStore,
) -> None:
    folder = f"{object_store.bucket()}/out"
    with lease(folder, "rlhf sft") as held:
        object_store.lose_answer(2, f"POST .*{NOTE}")
        first = held._held._version  # type: ignore[union-attr]
        for _ in range(1000):
            if held._held._version != first and object_store.faults_served == 2:  # type: ignore[union-attr]
                break
            threading.Event().wait(0.02)
        else:
            pytest.fail("it was not renewed")
        held.check()


def test_a_create_whose_answer_is_lost_is_still_ours(object_store: ObjectStore) -> None:
    folder = f"{object_store.bucket()}/out"
    object_store.lose_answer(1, f"POST .*{NOTE}")
    with lease(folder, "rlhf sft") as held:
        held.check()
    assert object_store.faults_served == 1


def test_of_many_that_start_at_once_one_gets_in(object_store: ObjectStore, tmp_path: Path) -> None:
    for folder in (f"{object_store.bucket()}/out", str(tmp_path / "out")):
        held: list[Lease] = []
        refused: list[InputError] = []
        start = threading.Barrier(8)

        def race(folder: str = folder, start: Any = start, held: Any = held, no: Any = refused):
            start.wait()
            try:
                held.append(Lease(folder, "rlhf sft"))
            except InputError as error:
                no.append(error)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 7)
        held[0].release()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: cannot write to .*: Not a directory"):
        Lease(str(tmp_path / "file" / "out"), "rlhf sft")
    with pytest.raises(InputError, match="output_dir: cannot write to nowhere://x"):
        Lease("nowhere://x", "rlhf sft")


def test_folders_made_for_nothing_are_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with lease(str(tmp_path / "mine"), "x"), lease(str(tmp_path / "a" / "b"), "x"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# What holds it


def test_two_trainers_of_one_process_cannot_share_a_folder(folder: str) -> None:
    config = toy_config(folder)
    said: list[str] = []

    def second(trainer: Any, step: int, *_: Any) -> None:
        if step in (1, 5):
            with pytest.raises(InputError, match="is being written by"):
                LastTrainer(config).train()
            said.append("refused")

    first = LastTrainer(config, callbacks=[second]).train()
    assert said == ["refused"] * 2
    assert LastTrainer(config).train() == first  # finished: needs no lease
    assert not {NOTE, LOCK} & set(files(folder))


def test_a_trainer_that_fails_lets_the_next_one_in(folder: str) -> None:
    config = toy_config(folder)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        LastTrainer(config, callbacks=[fail]).train()
    assert LastTrainer(config).train()["finished"]


def test_what_another_process_did_meanwhile_is_seen(tmp_path: Path) -> None:
    """Between looking at the folder and getting the lease, somebody else may have finished."""
    late = LastTrainer(toy_config(tmp_path / "run"))
    first = LastTrainer(toy_config(tmp_path / "run")).train()
    other = prepare_output(toy_config(tmp_path / "empty", batch_size=6), {}, stage="toy")
    assert late.train() == first
    LastTrainer(toy_config(tmp_path / "empty")).train()
    with pytest.raises(InputError, match="batch_size: changed from 5 to 6"), other.held():
        pass


def test_a_lost_lease_ends_the_run_before_it_writes(tmp_path: Path) -> None:
    folder = f"file://{tmp_path}/bucket/out"

    def rob(trainer: Any, step: int, *_: Any) -> None:
        if step == 4:
            write_note(folder, elsewhere())
            trainer.run.lease._held._thread.join(30)

    with pytest.raises(StorageError, match="another process's now"):
        LastTrainer(toy_config(folder), callbacks=[rob]).train()
    saved = lines(tmp_path / "bucket" / "out")
    assert [row["step"] for row in saved] == [1, 2, 3]


def test_steps_and_saves_by_hand_are_under_the_lease_too(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")
    trainer = LastTrainer(config)
    trainer.step()
    trainer.save()
    with lease(str(tmp_path / "run"), "rlhf other"), pytest.raises(InputError, match="rlhf other"):
        trainer.save()
    LastTrainer(config).train()
    LastTrainer(toy_config(tmp_path / "whole")).train()
    whole = [*map(without_timing, lines(tmp_path / "whole"))]
    assert [*map(without_timing, lines(tmp_path / "run"))] == whole[1:]


def test_this_process_lives() -> None:
    holder = Holder.this("x")
    assert holder.lives() is True
    assert holder == Holder.read(holder.note())
    assert Process.this().lives() is True


def test_a_lease_that_could_not_be_given_back_does_not_keep_its_own_process_out(
    object_store: ObjectStore,
) -> None:
    folder = f"{object_store.bucket()}/out"
    held = Lease(folder, "rlhf sft")
    object_store.fail(403, 1000, "DELETE")
    held.release()
    object_store.heal()
    assert files(folder) == [NOTE]
    Lease(folder, "rlhf sft").release()
    assert files(folder) == []


def test_a_bucket_that_cannot_be_written_is_refused_with_the_reason(
    object_store: ObjectStore,
) -> None:
    folder = f"{object_store.bucket()}/out"
    object_store.fail(403, 1000, "POST")
    with pytest.raises(InputError, match=r"output_dir: cannot write gs://.*: told to fail"):
        Lease(folder, "rlhf sft")
    object_store.heal()
    with pytest.raises(InputError, match="there is no bucket nowhere"):
        Lease("gs://nowhere/out", "rlhf sft")
