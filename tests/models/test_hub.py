"""Models on the Hub, through a stand-in that speaks its wire format."""

from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from support.hub import Hub, go_offline


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
