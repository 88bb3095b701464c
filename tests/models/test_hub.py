"""Models on the Hub, through a stand-in that speaks its wire format."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from support.cases import make_case
from support.hub import Hub, go_offline
from support.tiny import make_tokenizer

from rlhf.cli import main
from rlhf.config import StageConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.content import weights_fingerprint
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model, load_tokenizer, read_model_config
from rlhf.models.policy_folder import find_policy
from rlhf.models.reward_model import check_reward_model, load_reward_model
from rlhf.vertex.failure import describe_failure


def test_the_stand_in_serves_small_and_large_files_by_commit(hub: Hub, tmp_path: Path) -> None:
    first = hub.model("user/m", {"config.json": b"{}", "model.safetensors": b"0123456789"})
    second = hub.model("user/m", {"config.json": b"[]"})
    hub.tag("user/m", "v1", first)
    folder = Path(snapshot_download("user/m", revision="v1"))
    assert folder.name == first
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "model.safetensors").read_bytes() == b"0123456789"
    assert Path(hf_hub_download("user/m", "config.json")).parent.name == second
    assert any("resolve-cache" in request for request in hub.requests)


def test_the_stand_in_resumes_waits_and_refuses(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bytes(range(256)) * 16
    hub.model("user/m", {"model.safetensors": weights, "config.json": b"{}"})
    hub.cut(when="GET /[0-9a-f]{64}")
    file = Path(hf_hub_download("user/m", "model.safetensors"))
    assert file.read_bytes() == weights
    assert hub.requests[-1].endswith(" bytes=2048-")
    hub.pauses.clear()
    hub.fail(429, times=2, when="GET .*/config.json", headers={"Retry-After": "40"})
    assert Path(hf_hub_download("user/m", "config.json")).read_bytes() == b"{}"
    assert hub.pauses == [41.0, 41.0]
    hub.model("user/gated", {"config.json": b"{}"})
    hub.gate("user/gated", "hf_good")
    for token, status in (("", 401), ("hf_other", 403)):
        hub.tokens.add("hf_other")
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("user/gated", "config.json")
        assert caught.value.response.status_code == status
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert Path(hf_hub_download("user/gated", "config.json")).read_bytes() == b"{}"
    hub.requests.clear()
    go_offline(monkeypatch)
    assert Path(hf_hub_download("user/m", "config.json")).read_bytes() == b"{}"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("user/m", "README.md")
    assert hub.requests == []


def test_the_stand_in_serves_data_sets(hub: Hub) -> None:
    import datasets

    card = b"---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n---\n"
    hub.dataset("user/rows", {"README.md": card, "a/x.jsonl": b'{"n":1}\n', "b.jsonl": b"bad"})
    assert datasets.load_dataset("user/rows", "a", split="train")[0] == {"n": 1}
    assert list(datasets.load_dataset("user/rows", split="train", streaming=True)) == [{"n": 1}]
    names = HfFileSystem().ls("datasets/user/rows", detail=False)
    assert [name.rsplit("/")[-1] for name in names] == ["README.md", "a", "b.jsonl"]


def load(name: str, revision: str | None = None, **fields: Any) -> LanguageModel:
    fields = {"base_model": name, "revision": revision, "output_dir": "x", "device": "cpu"} | fields
    return load_language_model(StageConfig(**fields), trainable=False)


@pytest.fixture
def sharded(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in shards, among files that are never needed."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "sharded"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {
        name: f"model-{number % 2 + 1:05d}-of-00002.safetensors"
        for number, name in enumerate(weights)
    }
    for file in set(index.values()):
        part = {name: weights[name] for name in index if index[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "README.md", "original/x.safetensors", "unused.safetensors"):
        (folder / name).write_bytes(b"not needed")
    return folder


def test_a_model_of_the_hub_is_the_one_of_its_revision(
    arch: str, sharded: Path, tiny_checkpoint: Path, hub: Hub
) -> None:
    first = hub.model("user/m", sharded)
    hub.tag("user/m", "v1", first)
    hub.model("user/m", {"config.json": b"{}"})
    assert read_model_config("user/m", "v1").model_type == arch
    assert not any("model-0" in request for request in hub.requests)
    lm = load("user/m", "v1")
    assert lm.fingerprint == load(str(tiny_checkpoint)).fingerprint
    assert (lm.base_name, lm.revision) == ("user/m", first)
    assert lm.tokenizer.get_vocab() == make_tokenizer(arch).get_vocab()
    assert lm.module.generation_config.eos_token_id == {"t5": 1, "llama": 2}[arch]
    asked = {request.split("/")[-1] for request in hub.requests if "/resolve/" in request}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= asked
    assert not asked & {"pytorch_model.bin", "README.md", "x.safetensors", "unused.safetensors"}


def test_a_process_reads_one_commit_of_a_branch(
    tiny_checkpoint: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that moves while a stage reads its config must not give it other weights."""
    commit = hub.model("user/m", tiny_checkpoint)
    read_model_config("user/m")
    before = weights_fingerprint("user/m")
    hub.model("user/m", {"config.json": b"{}"})
    lm = load("user/m")
    assert (lm.revision, before, weights_fingerprint("user/m")) == (commit, commit, commit)
    go_offline(monkeypatch)
    hub.requests.clear()
    assert load("user/m", commit).fingerprint == lm.fingerprint
    assert load("user/m").fingerprint == lm.fingerprint
    assert hub.requests == []


def test_another_process_sees_the_branch_where_it_is_now(
    tiny_checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StageConfig(base_model="user/m", output_dir="x")
    commits = [hub.model("user/m", tiny_checkpoint)]
    found = [weights_fingerprint(config.base_model or "")]
    commits.append(hub.model("user/m", {"config.json": b"{}"}))
    monkeypatch.setattr("rlhf.files.hub._COMMITS", {})
    found.append(weights_fingerprint(config.base_model or ""))
    assert found == commits


def test_only_safetensors_are_loaded(tiny_checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.model("user/m", folder)
    with pytest.raises(InputError, match=r"base_model: user/m: .*no \*\.safetensors file"):
        load("user/m")
    assert not any("pytorch_model.bin" in request for request in hub.requests)


@pytest.mark.usefixtures("arch")
def test_a_broken_download_is_resumed(tiny_checkpoint: Path, hub: Hub) -> None:
    hub.model("user/m", tiny_checkpoint)
    hub.cut(times=2, when="GET /[0-9a-f]{64}")
    assert load("user/m").fingerprint == load(str(tiny_checkpoint)).fingerprint
    resumed = [request for request in hub.requests if "bytes=" in request]
    assert len(resumed) == 2


def test_a_busy_hub_is_waited_for_by_its_client(tiny_checkpoint: Path, hub: Hub) -> None:
    hub.model("user/m", tiny_checkpoint)
    for when in ("HEAD .*/config.json", "GET .*/tree/", "HEAD .*/tokenizer.json"):
        hub.fail(429, times=2, when=when, headers={"Retry-After": "7"})
    assert load_tokenizer("user/m").eos_token == "</s>"
    assert 8.0 in hub.pauses


def gated(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.gate("user/m", "hf_good")


def not_a_member(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.gate("user/m", "hf_good")
    hub.tokens.add("hf_other")
    patch.setenv("HF_TOKEN", "hf_other")


def bad_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_unknown")


def hidden(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.hide("user/m", "hf_good")


def busy(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.fail(429, times=99, headers={"Retry-After": "7"})


def down(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.fail(503, times=99)


def unreachable(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.refuse(times=99)


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    go_offline(patch)


def fine(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    pass


# What is wrong, other settings, what is said, and whether it may pass by itself.
WRONG: dict[str, tuple[Any, dict[str, str], str, bool]] = {
    "gated": (gated, {}, "is gated: accept its license at {url}/user/m, .*HF_TOKEN", False),
    "no member": (not_a_member, {}, "gated, and this token's account has no access: ask", False),
    "bad token": (bad_token, {}, "the Hub refuses the token: .*renew it", False),
    "private": (hidden, {}, "user/m is neither .* nor a model on the Hub; .*give a token", False),
    "missing": (
        fine,
        {"base_model": "user/n"},
        "user/n is neither a folder here nor a model",
        False,
    ),
    "revision": (fine, {"revision": "v9"}, "user/m .*has no revision 'v9'; give a branch", False),
    "busy": (busy, {}, "user/m on the Hub: .*429, .*wait some minutes, or give a token", True),
    "down": (down, {}, "user/m on the Hub cannot be read, .*503.*; try again later", True),
    "unreachable": (unreachable, {}, "user/m on the Hub cannot be read, .*try again later", True),
    "offline": (offline, {}, "user/m .*not in the cache .*HF_HUB_OFFLINE.*hf download", False),
    "empty": (fine, {"base_model": "user/empty"}, "user/empty on the Hub holds no model", False),
    "no name": (fine, {"base_model": "a--b/c"}, "there is no folder a--b/c", False),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_the_hub_refuses_is_one_line_with_the_fix(
    kind: str, tmp_path: Path, checkpoints: dict[str, Path], hub: Hub,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change, fields, said, passing = WRONG[kind]
    hub.model("user/m", checkpoints["llama"])
    hub.model("user/empty", {"README.md": b"nothing"})
    change(hub, monkeypatch)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_text": "a", "output_text": "b"}\n')
    values = {"base_model": "user/m", "dataset": str(rows), "output_dir": str(tmp_path / "out")}
    flags = [f"--{name}={value}" for name, value in (values | fields).items()]
    assert main(["sft", *flags, "--device=cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if "base_model: " in line]
    assert len(shown) == 1
    assert re.search("base_model: .*" + said.format(url=hub.url), shown[0])
    assert "Traceback" not in "".join(lines)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError) as caught:
        read_model_config((values | fields)["base_model"], fields.get("revision"))
    assert (not describe_failure(caught.value, str(tmp_path), "1").permanent) == passing


def test_a_token_opens_what_is_gated(
    checkpoints: dict[str, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model("user/m", checkpoints["llama"])
    hub.gate("user/m", "hf_good")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert load("user/m").base_name == "user/m"


def test_other_settings_name_themselves(hub: Hub, tmp_path: Path) -> None:
    del hub
    with pytest.raises(InputError, match=r"^policy_path: user/p is neither"):
        find_policy("user/p")
    renderer = PromptRenderer.for_tokenizer(make_tokenizer("llama"))
    with pytest.raises(InputError, match=r"^reward_model_path: user/r is neither"):
        check_reward_model("user/r", renderer)


def test_policies_and_reward_models_of_a_stage_may_be_on_the_hub(
    arch: str, tiny_checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    case = make_case(arch, tiny_checkpoint, tmp_path)
    hub.model("user/policy", case.policy / "adapter")
    hub.model("user/reward", case.reward)
    source = find_policy("user/policy")
    assert (source.kind, source.base_model) == ("adapter", str(tiny_checkpoint))
    here, there = (
        load_reward_model(path, device="cpu", dtype="float32").score(
            [PromptText("a", ())], ["the cat"]
        )
        for path in (str(case.reward), "user/reward")
    )
    assert torch.equal(here, there)
