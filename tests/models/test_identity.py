"""What makes a run another run: the content of models, byte by byte, and nothing beside it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import Case, load_base, make_case
from support.hub import Hub
from support.tiny import make_tokenizer, tiny_model

from rlhf import InferenceConfig, SFTConfig, train_sft
from rlhf.config import LoRAConfig
from rlhf.errors import InputError
from rlhf.models import content
from rlhf.models.content import (
    check_written,
    model_fingerprint,
    remembered_checksum,
    weights_fingerprint,
)
from rlhf.models.saving import load_adapter
from rlhf.models.weights import loaded_fingerprint
from rlhf.sft import read_sft_inputs


@pytest.fixture
def case(arch: str, checkpoints: dict[str, Path], tmp_path: Path) -> Case:
    base = tmp_path / "base"
    shutil.copytree(checkpoints[arch], base)
    return make_case(arch, base, tmp_path)


def flip(path: Path, place: int) -> None:
    bytes_ = bytearray(path.read_bytes())
    bytes_[place] ^= 1
    path.write_bytes(bytes_)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(changed if changed is not None else value))


# Every byte of the weights


@pytest.mark.parametrize("place", [-1, -2, -5000, "middle"])
def test_every_flipped_byte_of_a_base_is_noticed(case: Case, place: int | str) -> None:
    path = case.base / "model.safetensors"
    before = weights_fingerprint(str(case.base))
    place = path.stat().st_size // 2 if isinstance(place, str) else place
    flip(path, place)
    assert weights_fingerprint(str(case.base)) != before
    flip(path, place)
    assert weights_fingerprint(str(case.base)) == before


def test_a_changed_base_is_refused_when_a_run_goes_on(
    case: Case, arch: str, tmp_path: Path
) -> None:
    rows = tmp_path / "sft.jsonl"
    rows.write_text(json.dumps({"input_text": "the cat", "output_text": "a dog"}) + "\n")
    config = SFTConfig(
        base_model=str(case.base), dataset=str(rows), output_dir=str(tmp_path / "out"),
        train_steps=2, batch_size=1, log_with=[], device="cpu",
        prompt_sequence_length=8, target_sequence_length=8,
    )  # fmt: skip
    train_sft(config)
    for change in (
        lambda: flip(case.base / "model.safetensors", -3),
        lambda: edit(case.base / "config.json", lambda c: c.update(initializer_factor=7.0)),
        lambda: edit(case.base / "tokenizer_config.json", lambda c: c.update(eos_token="<unk>")),
    ):
        kept = tmp_path / "kept"
        shutil.copytree(case.base, kept)
        change()
        with pytest.raises(InputError, match=r"base_model \(content\): changed from"):
            train_sft(config)
        shutil.rmtree(case.base)
        kept.rename(case.base)
    moved = tmp_path / "elsewhere"
    case.base.rename(moved)
    assert train_sft(config.model_copy(update={"base_model": str(moved)})).metrics["finished"]


def test_inference_notices_a_changed_base_policy_and_reward_model(
    case: Case, tmp_path: Path
) -> None:
    case.run(tmp_path / "out")
    for path, field in (
        (case.base / "model.safetensors", "base_model"),
        (case.policy / "adapter" / "adapter_model.safetensors", "policy_path"),
        (case.reward / "adapter" / "adapter_model.safetensors", "reward_model_path"),
        (case.reward / "head.safetensors", "reward_model_path"),
    ):
        flip(path, -1)
        with pytest.raises(InputError, match=rf"{field} \(content\): changed from"):
            case.run(tmp_path / "out")
        flip(path, -1)
    assert case.run(tmp_path / "out").metrics["finished"]


# What was written is what is read


def test_damaged_weights_of_our_own_are_refused_at_their_first_use(case: Case) -> None:
    for folder in (case.policy / "adapter", case.policy / "merged", case.reward / "adapter"):
        check_written(folder)
        name = next(path.name for path in folder.glob("*.safetensors"))
        assert json.loads((folder / "rlhf.json").read_text())["files"].keys() == {name}
        flip(folder / name, -1)
        with pytest.raises(InputError, match=rf"{name} does not match the checksum"):
            check_written(folder)
    lm = load_base(case.arch, case.base)
    with pytest.raises(InputError, match="does not match the checksum"):
        load_adapter(lm, case.policy / "adapter", "policy")
    config = InferenceConfig(
        policy_path=str(case.policy / "merged"), base_model=str(case.base),
        eval_dataset=str(case.data), output_dir="unused", device="cpu",
    )  # fmt: skip
    from rlhf.models.loading import load_language_model

    with pytest.raises(InputError, match="does not match the checksum"):
        load_language_model(config, trainable=False, base_model=str(case.policy / "merged"))


@pytest.mark.parametrize(
    "origin", ["[]", "{", '{"files": 3}', '{"files": {"../x": "0", "gone.safetensors": "0"}}', ""]
)
def test_broken_notes_are_no_checksums(case: Case, origin: str) -> None:
    folder = case.policy / "adapter"
    (folder / "rlhf.json").write_text(origin)
    check_written(folder)


# What does not matter


def test_logs_figures_order_and_versions_do_not_matter(case: Case) -> None:
    before = [weights_fingerprint(str(path)) for path in (case.reward, case.base, case.policy)]
    for folder in (case.reward, case.base, case.policy):
        (folder / "metrics.json").write_text('{"seconds": 3.2}')
        (folder / "README.md").write_text("words")
        (folder / "run.json").write_text("{}")
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "x.json").write_text("{}")
        (folder / "checkpoints" / "step-1").mkdir(parents=True)
        (folder / "checkpoints" / "step-1" / "model.safetensors").write_text("")

    def backwards(value: dict[str, Any]) -> dict[str, Any]:
        value |= {"transformers_version": "0", "version": "0", "peft_version": "0"}
        if "target_modules" in value:
            value["target_modules"] = sorted(value["target_modules"], reverse=True)
        return dict(reversed(value.items()))

    for name in ("reward_model.json", "adapter/adapter_config.json"):
        edit(case.reward / name, backwards)
    edit(case.base / "config.json", backwards)
    after = [weights_fingerprint(str(path)) for path in (case.reward, case.base, case.policy)]
    assert after == before
    edit(case.reward / "reward_model.json", lambda record: record.update(scale=3.0))
    assert weights_fingerprint(str(case.reward)) != before[0]
    edit(case.reward / "adapter" / "adapter_config.json", lambda c: c.update(lora_alpha=1))
    assert len({*before, weights_fingerprint(str(case.reward))}) == 4


def test_a_reward_model_is_another_one_on_another_base(case: Case) -> None:
    before = weights_fingerprint(str(case.reward))
    flip(case.base / "model.safetensors", -1)
    assert weights_fingerprint(str(case.reward)) != before


def test_saved_files_do_not_depend_on_the_hash_seed(case: Case, tmp_path: Path) -> None:
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from support.cases import load_base
from rlhf.config import LoRAConfig
from rlhf.models.saving import save_adapter
lm = load_base(sys.argv[2], Path("base"))
lm.add_adapter("policy", LoRAConfig(rank=2))
save_adapter(lm, "policy", Path(sys.argv[3]))
"""
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), case.arch, str(out)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]
    modules = json.loads(files[0]["adapter_config.json"])["target_modules"]
    assert modules == sorted(modules)


# Models given as objects


def test_models_given_as_objects_are_told_apart(arch: str, tmp_path: Path) -> None:
    rows = tmp_path / "sft.jsonl"
    rows.write_text(json.dumps({"input_text": "the cat", "output_text": "a dog"}) + "\n")
    config = SFTConfig(
        dataset=str(rows), output_dir=str(tmp_path / "out"), train_steps=1, batch_size=1,
        log_with=[], device="cpu", prompt_sequence_length=8, target_sequence_length=8,
        lora=LoRAConfig(rank=2),
    )  # fmt: skip
    model, tokenizer = tiny_model(arch), make_tokenizer(arch)
    before = model_fingerprint(model)
    train_sft(config, model=model, tokenizer=tokenizer)
    # LoRA leaves the base as it was, so the same object is the same base.
    assert model_fingerprint(model) == before
    assert train_sft(config, model=model, tokenizer=tokenizer).metrics["finished"]
    with pytest.raises(InputError, match=r"base_model \(content\)"):
        read_sft_inputs(config, model=tiny_model(arch, seed=1), tokenizer=tokenizer)


def test_the_fingerprint_of_loaded_weights_reads_all_of_them_in_any_type(arch: str) -> None:
    model = tiny_model(arch)
    before = loaded_fingerprint(model)
    assert loaded_fingerprint(tiny_model(arch).bfloat16()) == before
    seen = set()
    for parameter in model.parameters():
        for place in (1, parameter.numel() // 2 + 1, parameter.numel() - 1):
            flat = parameter.data.view(-1)
            kept = flat[place].clone()
            flat[place] = kept * 1.01 + 0.01
            seen.add(loaded_fingerprint(model))
            flat[place] = kept
    assert before not in seen
    assert loaded_fingerprint(model) == before


# Each file is read once


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    read: list[Path] = []
    original = content.checksum
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_WORTH_REMEMBERING", 0)
    monkeypatch.setattr(content, "_SECONDS_OF_A_CLOCK_TICK", -1.0)
    monkeypatch.setattr(content, "checksum", lambda path: (read.append(path), original(path))[1])
    return read


def test_checksums_are_remembered_until_the_file_changes(
    counted: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 1000)
    first = remembered_checksum(path)
    assert remembered_checksum(path) == first
    assert len(counted) == 1
    times = path.stat()
    path.write_bytes(b"x" * 999 + b"y")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # hides nothing: ctime tells
    assert remembered_checksum(path) != first
    assert len(counted) == 2
    other = tmp_path / "other"
    other.write_bytes(b"x" * 1000)
    other.replace(path)
    assert remembered_checksum(path) == first


@pytest.mark.parametrize("damage", ["", "zz", "0" * 63, "\x00" * 64])
def test_a_damaged_cache_only_costs_time(counted: list[Path], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 1000)
    first = remembered_checksum(path)
    for note in (tmp_path / "cache" / "checksums").iterdir():
        note.write_text(damage)
    assert remembered_checksum(path) == first
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert remembered_checksum(path) == first


def test_a_hub_id_counts_by_its_commit(hub: Hub) -> None:
    commit = hub.model("a/b", {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.tag("a/b", "v1", commit)
    later = hub.model("a/b", {"config.json": b"{}"})
    assert weights_fingerprint("a/b", "v1") == commit
    assert weights_fingerprint("a/b") == weights_fingerprint("a/b", later) == later
    assert not any("model.safetensors" in request for request in hub.requests)
    assert weights_fingerprint("/no/such/folder") == ""
    assert weights_fingerprint("nobody/nothing") == ""


def test_weights_on_the_gpu_or_the_cpu_are_the_same(arch: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    assert loaded_fingerprint(tiny_model(arch).cuda()) == loaded_fingerprint(tiny_model(arch))
