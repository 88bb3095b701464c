"""Model folders that nobody made in good faith: refused by name, nothing outside is touched."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from support.cases import make_case
from support.fuzzing import CASES, mutations

from rlhf.config import SFTConfig, StageConfig
from rlhf.errors import InputError
from rlhf.files.local_copy import local_folder
from rlhf.files.output import Output
from rlhf.models.loading import load_language_model, load_tokenizer, read_model_config
from rlhf.models.reward_model import load_reward_model
from rlhf.models.reward_record import RewardRecord
from rlhf.reports.dry_run import dry_run_report
from rlhf.untrusted import inner_names


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def load(folder: Path) -> Any:
    return load_language_model(
        StageConfig(base_model=str(folder), output_dir="x", device="cpu", dtype="float32"),
        trainable=False,
    )


def refused(folder: Path, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load(folder)
    assert all(str(folder) in problem for problem in caught.value.problems)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../b",
        "a/../../b",
        "/etc/x",
        "a//b",
        "",
        ".",
        "a/.",
        "..",
        "a\\b",
        "C:x",
        "a\0",
        "a\x1b",
        "\n",
    ],
)
def test_names_that_lead_out_of_a_folder_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"gs://evil: .*not the name of a file"):
        inner_names(["fine/name.txt", name], "gs://evil")
    assert inner_names(["a/b.c", "..x", "x..", ".hidden"], "w") == [
        "a/b.c",
        "..x",
        "x..",
        ".hidden",
    ]
    with pytest.raises(InputError, match="file and a folder at once"):
        inner_names(["a", "a/b"], "w")


class Bucket:
    """A store that lists what its owner wants."""

    protocol = ("evil",)

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def invalidate_cache(self) -> None:
        pass

    def find(self, root: str, detail: bool) -> dict[str, Any]:
        return {f"{root}/{name}": {"size": 1, "type": "file"} for name in self.names}

    def get_file(self, remote: str, local: str) -> None:
        Path(local).write_text("taken over")


@pytest.mark.parametrize("name", ["../../../../precious", "x/../../../../precious", "a\\..\\x"])
def test_a_bucket_cannot_write_outside_of_the_copy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache" / "rlhf"))
    bucket = Bucket(["config.json", name])
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (bucket, "evil/m"))
    with pytest.raises(InputError, match="lead out"):
        local_folder("gs://evil/m", weights=False)
    output = Output("memory://evil/m")
    output._store._filesystem, output._store._root = bucket, "evil/m"  # type: ignore[assignment]
    with pytest.raises(InputError, match="lead out"):
        output._store.fetch(name)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not list(tmp_path.rglob("config.json"))


def shard(base: Path, weight_map: Any) -> None:
    (base / "model.safetensors").rename(base / "part.safetensors")
    names = load_file(base / "part.safetensors")
    whole = dict.fromkeys(names, "part.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map(whole)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["x.bin", "../outside.safetensors", "/tmp/x.safetensors", "sub/part.safetensors", 7]
)
def test_an_index_names_only_safetensors_beside_it(file: Any, base: Path) -> None:
    state = load_file(base / "model.safetensors")
    torch.save(state, base / "x.bin")
    shutil.copy(base / "model.safetensors", base.parent / "outside.safetensors")
    (base / "sub").mkdir()
    shutil.copy(base / "model.safetensors", base / "sub" / "part.safetensors")
    shard(base, lambda whole: whole | {next(iter(whole)): file})
    refused(base, "model.safetensors.index.json")
    for check in (read_model_config, load_reward_model):
        with pytest.raises(InputError, match=r"index\.json"):
            check(str(base))


def test_a_good_index_is_read(base: Path) -> None:
    expected = load(base).fingerprint
    shard(base, lambda whole: whole)
    assert load(base).fingerprint == expected


def test_a_base_that_is_an_adapter_is_not_followed(base: Path) -> None:
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "http://evil/x"}')
    refused(base, "adapter_config.json")


CONFIGS: dict[str, Any] = {
    "num_attention_heads": [0, -1, None, "four", 2.5, True, 10**9],
    "num_heads": [0, -1, "four", 10**9],
    "num_hidden_layers": [0, -3, 10**9, None, [1]],
    "num_layers": [0, -3, 10**9],
    "hidden_size": [0, -16, 7, 10**9, None],
    "d_model": [0, -16, 10**9],
    "d_ff": [0, -1, 10**12],
    "vocab_size": [0, -1, 3, 10**12, None],
    "max_position_embeddings": [0, -1, None, "many", 10**30],
    "num_key_value_heads": [0, 3, -1],
    "rms_norm_eps": [None, "small", -1, 1e300],
    "rope_parameters": [7, {"rope_type": "unknown"}, {"rope_theta": "x"}, [1]],
    "hidden_act": ["no_such_function", 7],
    "architectures": ["LlamaForCausalLM", 7, [7]],
    "dtype": ["float7", 7],
    "torch_dtype": ["float7", 7],
    "tie_word_embeddings": ["yes", 7],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
    "transformers_weights": ["x.bin", "../x.safetensors"],
    "auto_map": [{"AutoModelForCausalLM": "evil.Model"}],
    "attn_implementation": ["kernels-community/evil", "flash_attention_9"],
    "_attn_implementation": ["kernels-community/evil"],
    "model_type": [7, None, [], "nothing"],
    "pad_token_id": ["x", -5],
    "eos_token_id": ["x", [[1]]],
    "num_decoder_layers": [0, 10**9],
    "relative_attention_num_buckets": [0, None],
}


def whole_way(folder: Path) -> None:
    """Everything that is done with a base, before and while its weights are loaded."""
    config = SFTConfig(base_model=str(folder), output_dir="x", dataset="d", device="cpu")
    with contextlib.suppress(InputError):
        dry_run_report("sft", config, 10)
    with contextlib.suppress(InputError):
        load_tokenizer(str(folder))
    with contextlib.suppress(InputError):
        load(folder)


@pytest.mark.parametrize("field", CONFIGS)
def test_no_value_in_config_json_is_a_traceback_or_a_hang(field: str, base: Path) -> None:
    good = json.loads((base / "config.json").read_text())
    for value in CONFIGS[field]:
        (base / "config.json").write_text(json.dumps(good | {field: value}))
        whole_way(base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9, "num_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 0, "num_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -1, "d_model": -1}, "hidden_size"),
        ({"vocab_size": 2**24, "tie_word_embeddings": True}, "config.json describes"),
        ({"quantization_config": {"quant_method": "x"}}, "config.json"),
        ({"transformers_weights": "x.bin"}, "transformers_weights"),
    ],
)
def test_a_config_that_makes_no_model_is_named_with_its_field(
    change: dict[str, Any], said: str, base: Path
) -> None:
    good = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(good | change))
    refused(base, said)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"[" * 100_000, b"\xff\xfe", b"\0"])
def test_a_broken_description_is_named(file: str, content: bytes, base: Path) -> None:
    (base / file).write_bytes(content)
    refused(base, "tokenizer" if file.startswith("tokenizer") else file)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def huge_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def deep_header(path: Path) -> None:
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)


def list_header(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


@pytest.mark.parametrize("damage", [cut, cut_header, huge_header, deep_header, list_header])
def test_damaged_weights_are_named(damage: Callable[[Path], None], base: Path) -> None:
    damage(base / "model.safetensors")
    refused(base, "model.safetensors is damaged or cut short")


RECORDS: dict[str, list[Any]] = {
    "scale": [0, -1, "two", None, float("nan"), float("inf"), 10**400, True, 1e-320],
    "shift": ["much", None, float("nan"), 1e300],
    "prompt_sequence_length": [-1, 0, 2**40, True, "8", 7.5, None],
    "target_sequence_length": [-1, 0, 2**40],
    "truncation_side": ["middle", 7, None],
    "instruction": [7, None],
    "pooling": [7, "mean"],
    "tokenizer": [7],
    "base_model": [7],
    "revision": [7],
}


@pytest.mark.parametrize("field", RECORDS)
def test_a_record_that_no_training_writes_is_refused(
    field: str, arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    case = make_case(arch, tiny_checkpoint, tmp_path)
    path = case.reward / "reward_model.json"
    good = json.loads(path.read_text())
    for value in RECORDS[field]:
        path.write_text(json.dumps(good | {field: value}))
        with pytest.raises(InputError, match=rf"reward_model\.json: .*{field}|pooling"):
            load_reward_model(str(case.reward), device="cpu")
    for content in ("[]", "7", "", "{", "[" * 100_000, "{}", '{"scale": ' + "9" * 5000 + "}"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"reward_model\.json: "):
            RewardRecord.read(path)


TOKENS = [
    b"null", b"[]", b"{}", b"-1", b"0", b"1e999", b"NaN", b'"\\ud800"', b"9" * 5000, b"[" * 2000,
    b'"x"', b"true", b"10000000000", b"\x00", b"\xff", b'"../x"', b'"type": "Nothing"', b",", b":",
]  # fmt: skip


@pytest.mark.parametrize("arch", ["t5", "llama"])
def test_no_damage_to_a_model_folder_ends_in_a_traceback(
    arch: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case = make_case(arch, checkpoints[arch], tmp_path / "good")
    shutil.copytree(checkpoints[arch], tmp_path / "good" / "base")
    rng = random.Random(arch)
    for number in range(max(20, CASES // 150)):
        kind = ("base", "base", "reward")[number % 3]
        source = case.reward if kind == "reward" else tmp_path / "good" / "base"
        folder = Path(shutil.copytree(source, tmp_path / f"case{number}"))
        file = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        file.write_bytes(next(mutations([file.read_bytes()], TOKENS, 1, seed=number)))
        if kind == "base":
            whole_way(folder)
        else:
            with contextlib.suppress(InputError):
                load_reward_model(str(folder), device="cpu")
        shutil.rmtree(folder)
