"""Data sets of the Hub, through a stand-in on loopback."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub import Hub, go_offline

from rlhf.config import DPOConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts
from rlhf.data.sources import hub as hub_module
from rlhf.data.sources.reading import find_sources, read_records
from rlhf.errors import InputError
from rlhf.files.run_folder import Run, Status, prepare_output

RENDERER = PromptRenderer()
ROWS = [{"prompt": f"p{row}", "chosen": "a", "rejected": "b"} for row in range(6)]


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CARD = b"""---
configs:
- config_name: one
  data_files:
  - split: train
    path: one/*.parquet
  - split: held
    path: one-held.parquet
- config_name: two
  data_files: two.parquet
---
About
"""
FILES = {
    "README.md": CARD,
    "one/0.parquet": parquet(ROWS[:2]),
    "one/1.parquet": parquet(ROWS[2:4]),
    "one-held.parquet": parquet(ROWS[4:]),
    "two.parquet": parquet(ROWS[5:]),
}  # fmt: skip


def read(path: Any) -> list[Any]:
    found = list(read_records(find_sources(path, "dataset")))
    assert not [one.problem for one in found if one.problem]
    return [one.value for one in found]


def problems(path: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_prompts(path, renderer=RENDERER)
    return "\n".join(caught.value.problems)


def test_configurations_and_splits(hub: Hub) -> None:
    hub.dataset("user/set", FILES)
    assert read("user/set:one/train") == ROWS[:4]
    assert read("hf://datasets/user/set:one/held") == ROWS[4:]
    assert read("user/set@main:two/train") == ROWS[5:]
    data = load_preferences("user/set:one/train", renderer=RENDERER)
    assert [row.source for row in data][1:3] == [
        "hf://datasets/user/set/one/0.parquet:2", "hf://datasets/user/set/one/1.parquet:1"
    ]  # fmt: skip
    for said, expected in {
        "user/set": "has several configurations, expected one; it has no default; give one of one",
        "user/set:one": "has one as a configuration, not as a split; give user/set:one/SPLIT",
        "user/set:three/train": "has no configuration three; give one of one, two: user/set:one/tr",
        "user/set:one/test": "has no split test; give one of train, held: user/set:one/train",
    }.items():
        assert expected in problems(said)
        assert problems(said).startswith("prompt_dataset: user/set on the Hub ")


def test_the_split_is_the_only_one_or_train(hub: Hub) -> None:
    hub.dataset("user/lonely", {"rows.jsonl": lines(ROWS[:1])})
    assert read("user/lonely") == ROWS[:1]
    files = {f"{split}.jsonl": lines(rows) for split, rows in
             {"train": ROWS[:2], "test": ROWS[2:3]}.items()}  # fmt: skip
    hub.dataset("user/both", files)
    assert read("user/both") == ROWS[:2]
    assert read("user/both:test") == ROWS[2:3]
    hub.dataset("user/none", {"README.md": b"x"})
    assert "user/none on the Hub holds no data files" in problems("user/none")
    hub.dataset("user/zipped", {"a/train.jsonl.gz": gzip.compress(lines(ROWS))})
    assert read("user/zipped") == ROWS
    hub.dataset("user/odd", {"data/train_a.parquet": parquet(ROWS), "data/odd.xyz": b"?"})
    assert read("user/odd") == ROWS


def test_options_of_a_card_are_heeded(hub: Hub) -> None:
    card = b"---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: ';'\n---\n"
    hub.dataset("user/semicolons", {"README.md": card, "rows.csv": b"prompt;choice\np9;1\n"})
    assert read("user/semicolons") == [{"prompt": "p9", "choice": 1}]
    [source] = find_sources("user/semicolons", "dataset")
    assert source.name == "hf://datasets/user/semicolons:default/train"
    hub.dataset("user/texts", {"rows.txt": b"one\ntwo\n"})
    assert read("user/texts") == [{"text": "one"}, {"text": "two"}]


def test_addresses_of_files_of_the_hub(hub: Hub) -> None:
    first = hub.dataset("user/set", FILES)
    assert read("hf://datasets/user/set/one/*.parquet") == ROWS[:4]
    assert read("hf://datasets/user/set/one") == ROWS[:4]
    [source] = find_sources("hf://datasets/user/set/one-held.parquet", "dataset")
    assert source.name == "hf://datasets/user/set/one-held.parquet"
    assert source.entry.commit == f"user/set@{first}"
    assert "matches no file" in problems("hf://datasets/user/set/three.csv")


def test_one_commit_is_read_and_recorded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.dataset("user/set", {"rows.jsonl": lines(ROWS[:2])})
    sources = find_sources("user/set", "dataset")
    second = hub.dataset("user/set", {"rows.jsonl": lines(ROWS[3:])})
    assert [one.value for one in read_records(sources)] == ROWS[:2]  # though main has moved
    data = load_preferences("user/set", renderer=RENDERER)
    assert data.commits == [f"user/set@{first}"]
    monkeypatch.setattr(hub_module, "_SNAPSHOTS", {})  # another process
    assert load_preferences("user/set", renderer=RENDERER).commits == [f"user/set@{second}"]
    assert read(f"user/set@{first}") == ROWS[:2]
    hub.tag("user/set", "v1", first)
    assert read("user/set@v1:train") == ROWS[:2]


def test_large_splits_are_read_without_a_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.dataset("user/set", FILES)
    monkeypatch.setattr(hub_module, "_PATHS_AT_ONCE", 1)
    monkeypatch.setattr(hub_module, "_LARGE", len(FILES["one/0.parquet"]) + 1)  # two are large
    assert read("user/set:one/train") == ROWS[:4]
    cached = [path.name for path in Path(hub_module._snapshot("user/set", None)).rglob("*")]
    assert cached == ["README.md"]


def test_a_limit_reads_no_further_files(hub: Hub) -> None:
    hub.dataset("user/set", FILES)
    assert read({"path": "user/set:one/train", "limit": 2}) == ROWS[:2]
    assert not [text for text in hub.requests if text.startswith("GET") and "1.parquet" in text]


def test_offline_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.dataset("user/set", FILES)
    assert read("user/set:one/train") == ROWS[:4]
    go_offline(monkeypatch)
    monkeypatch.setattr(hub_module, "_SNAPSHOTS", {})
    assert read("user/set:one/train") == ROWS[:4]
    assert read("hf://datasets/user/set/one/*.parquet") == ROWS[:4]
    found = problems("user/set:one/held")
    assert "user/set" in found
    assert "HF_HUB_OFFLINE" in found
    assert "HF_HUB_OFFLINE" in problems("user/other")


def test_what_the_hub_refuses(hub: Hub) -> None:
    hub.dataset("user/gated", FILES)
    hub.gate("user/gated", "hf_member")
    assert f"user/gated on the Hub is gated: accept its license at {hub.url}/datasets" in problems(
        "user/gated:one/train"
    )
    assert "user/none is neither a folder here nor a dataset on the Hub" in problems("user/none")
    hub.dataset("user/set", FILES)
    assert "user/set on the Hub has no revision 'v9'" in problems("user/set@v9:one/train")
    mixed = {"train.jsonl": lines(ROWS), "test.parquet": parquet(ROWS)}
    hub.dataset("user/mixed", mixed)
    assert "user/mixed on the Hub is no data set that can be read: " in problems("user/mixed")
    hub.dataset("user/script", {"script.py": b"raise SystemExit", "a.jsonl": lines(ROWS)})
    assert "user/script on the Hub is a script that makes the data" in problems("user/script")


def test_too_many_requests_and_broken_downloads(hub: Hub) -> None:
    hub.dataset("user/set", {"rows.jsonl": lines(ROWS * 200)})
    hub.fail(429, 1, "rows.jsonl", headers={"Retry-After": "2"})
    hub.cut(1, "GET .*rows.jsonl")
    assert read("user/set") == ROWS * 200
    assert [text for text in hub.requests if "[cut]" in text]
    hub.dataset("user/busy", {"rows.jsonl": lines(ROWS)})
    hub.fail(429, 100)
    assert "the Hub lets nobody at this address read more for now (429" in problems("user/busy")


def test_what_exists_here_is_a_path(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.dataset("user/set", {"rows.jsonl": lines(ROWS[:1])})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/set").mkdir(parents=True)
    (tmp_path / "user/set/rows.jsonl").write_bytes(lines(ROWS[1:2]))
    assert read("user/set") == ROWS[1:2]
    assert "user/rows.jsonl does not exist" in problems("user/rows.jsonl")
    assert "user/*.csv matches no file" in problems("user/*.csv")


def test_broken_rows_of_the_hub_have_a_place(hub: Hub) -> None:
    hub.dataset("user/set", {"train.jsonl": b'{"prompt": "a"}\n{"prompt": }\n'})
    assert problems("user/set").startswith("hf://datasets/user/set/train.jsonl:2: is not JSON")


def test_splits_that_the_names_of_files_give_are_listed(hub: Hub) -> None:
    hub.dataset("user/set", {"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS[:1])})
    assert "has no split valid; give one of train, test: user/set:train" in problems(
        "user/set:valid"
    )
    assert read("user/set:test") == ROWS[:1]


def test_a_run_goes_on_with_the_commit_that_it_began_with(tmp_path: Path) -> None:
    config = DPOConfig(
        base_model="m", preference_dataset="user/set", output_dir=str(tmp_path / "out")
    )

    def prepare(content: str, commit: str) -> Run:
        found = {"preference_dataset": content}
        return prepare_output(config, found, stage="dpo", commits={"preference_dataset": commit})

    prepare("rows", "user/set@a").start()
    (tmp_path / "out/checkpoints/step-1").mkdir(parents=True)
    (tmp_path / "out/checkpoints/step-1/manifest.json").write_text("{}")
    assert prepare("rows", "user/set@a").status is Status.CONTINUE
    assert prepare("rows", "user/set@b").status is Status.CONTINUE  # only its card changed, say
    with pytest.raises(InputError) as caught:
        prepare("other rows", "user/set@b")
    assert (
        "preference_dataset (commit): changed from 'user/set@a' to 'user/set@b'; give user/set@a "
        "to continue with the old rows" in caught.value.problems
    )
