"""What is saved loads elsewhere without us, and what cannot be loaded says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.language_models import EOS, LORA, make_lm, ragged
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertConfig

from rlhf.config import LoRAConfig, StageConfig
from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError
from rlhf.files.local_copy import local_folder
from rlhf.models.families import FAMILIES
from rlhf.models.loading import (
    check_limits,
    load_language_model,
    load_tokenizer,
    read_model_config,
)
from rlhf.models.saving import load_adapter, save_adapter, save_merged

PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
job = json.load(open(sys.argv[1]))
auto = AutoModelForSeq2SeqLM if job["arch"] == "t5" else AutoModelForCausalLM
inputs = {name: torch.tensor(rows) for name, rows in job["inputs"].items()}
with torch.no_grad():
    adapted = PeftModel.from_pretrained(auto.from_pretrained(job["base"]), job["adapter"]).eval()
    results = {"adapter": adapted(**inputs).logits.tolist()}
    results["merged"] = auto.from_pretrained(job["merged"]).eval()(**inputs).logits.tolist()
AutoTokenizer.from_pretrained(job["merged"])
assert "rlhf" not in sys.modules
json.dump(results, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("untied", [False, True])
def test_exports_load_in_plain_transformers_and_peft(
    arch: str, untied: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny_model(arch, untied=untied).save_pretrained(base)
    if arch == "t5" and untied:  # transformers 5 forgets it when it saves; hub files have it
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    make_tokenizer(arch).save_pretrained(base)
    config = StageConfig(base_model=str(base), output_dir="unused", dtype="float32")
    lm = load_language_model(config, trainable=False)
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy", std=0.3)
    prompts, responses = ragged(arch)
    before = {n: t.clone() for n, t in lm.module.state_dict().items()}
    save_adapter(lm, "policy", tmp_path / "adapter")
    kl = save_merged(lm, "policy", tmp_path / "merged", (prompts, responses))
    assert kl == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in lm.module.state_dict().items())

    prompt, response = prompts.tolists()[0], responses.tolists()[0]
    inputs = {"input_ids": [[*prompt, *response]]}
    if arch == "t5":
        inputs = {"input_ids": [prompt], "decoder_input_ids": [[0, *response]]}
    job = tmp_path / "job.json"
    paths = {name: str(tmp_path / name) for name in ("base", "adapter", "merged")}
    job.write_text(json.dumps({"arch": arch, "inputs": inputs, **paths}))
    subprocess.run([sys.executable, "-c", PLAIN, str(job)], check=True, cwd=tmp_path)
    results = json.loads(job.read_text())
    with lm.using("policy"), torch.no_grad():
        states = lm.response_states(prompts.select_rows([0]), responses.select_rows([0]))
        expected = lm.logits(states)[0]
    for logits in results.values():
        actual = torch.tensor(logits)[0, -len(expected) :]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_adapter_comes_back_and_belongs_to_its_base(arch: str, tmp_path: Path) -> None:
    lm = make_lm(arch)
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy")
    save_adapter(lm, "policy", tmp_path / "adapter")
    again = make_lm(arch)
    load_adapter(again, tmp_path / "adapter", "reward")
    for (_, a), (_, b) in zip(
        lm.named_trainable("policy"), again.named_trainable("reward"), strict=True
    ):
        assert torch.equal(a, b)
        assert not b.requires_grad
    other = FAMILIES[arch](tiny_model(arch, seed=5), make_tokenizer(arch), base_name="other")
    with pytest.raises(InputError, match=r"trained on tiny .* but base_model is other"):
        load_adapter(other, tmp_path / "adapter", "reward")
    with pytest.raises(InputError, match="no adapter"):
        load_adapter(again, tmp_path, "x")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08" * 40)
    with pytest.raises(InputError, match="does not match the checksum"):
        load_adapter(make_lm(arch), tmp_path / "adapter", "reward")
    (tmp_path / "adapter" / "rlhf.json").unlink()  # an adapter of plain peft
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(make_lm(arch), tmp_path / "adapter", "reward")


def test_merging_into_bf16_reports_what_the_cast_cost(arch: str, tmp_path: Path) -> None:
    lm = FAMILIES[arch](
        tiny_model(arch).bfloat16(), make_tokenizer(arch), dtype=torch.bfloat16, base_name="x"
    )
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy")
    kl = save_merged(lm, "policy", tmp_path / "merged", ragged(arch))
    assert kl is not None
    assert 0 < kl < 0.05
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def copy_of(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def load(folder: Path | str, **options: object) -> None:
    config = StageConfig(base_model=str(folder), output_dir="unused", **options)
    load_language_model(config, trainable=False)


def test_a_good_checkpoint_loads(arch: str, tiny_checkpoint: Path) -> None:
    config = StageConfig(base_model=str(tiny_checkpoint), output_dir="unused")
    lm = load_language_model(config, trainable=False)
    assert lm.dtype == torch.float32
    assert lm.base_name == str(tiny_checkpoint)
    assert lm.layout.eos_id == EOS[arch]
    assert not any(p.requires_grad for p in lm.module.parameters())


def test_folders_that_are_no_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        load(tiny_checkpoint / "config.json")
    with pytest.raises(InputError, match="base_model: nobody/nothing"):
        load("nobody/nothing")


def test_broken_config_json(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="base_model"):
        load(folder)


def test_without_safetensors(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="can run code"):
        load(folder)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="'bert' model cannot be trained: it reads a text in both directions"
    ):
        read_model_config(str(tmp_path))


def test_weights_with_nan(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "norm" in n)
    tensors[name][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} holds NaN"):
        load(folder)


def test_missing_tensors_are_not_made_up(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(n for n in tensors if "norm" in n))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="incomplete: 1 tensors are missing"):
        load(folder)


def test_truncated_weights(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="base_model"):
        load(folder)


def test_tokenizer_problems(tmp_path: Path, arch: str, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(str(folder))
    tokenizer = make_tokenizer(arch)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        load_language_model(
            StageConfig(output_dir="unused"), trainable=False,
            model=tiny_model(arch), tokenizer=tokenizer,
        )  # fmt: skip
    with pytest.raises(InputError, match="do not belong together"):
        load_language_model(
            StageConfig(output_dir="unused"), trainable=False,
            model=tiny_model(arch, vocab=50), tokenizer=make_tokenizer(arch),
        )  # fmt: skip
    with pytest.raises(InputError, match="needs its tokenizer"):
        load_language_model(
            StageConfig(output_dir="unused"), trainable=False, model=tiny_model(arch)
        )


def test_sequence_limits(arch: str) -> None:
    config = tiny_model(arch).config
    assert check_limits(config, 64, 64) == []
    problems = check_limits(config, 100, 29)
    assert bool(problems) is (arch == "llama")
    assert all("100" in p and "128 positions" in p for p in problems)


def test_remote_checkpoints_are_copied_once(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_checkpoint), "/bucket/model", recursive=True)
    folder = local_folder("memory://bucket/model")
    assert (folder / "config.json").is_file()
    stamp = folder.stat().st_mtime_ns
    assert local_folder("memory://bucket/model/") == folder
    assert folder.stat().st_mtime_ns == stamp
    load(folder)
    with pytest.raises(InputError, match="nothing under"):
        local_folder("memory://bucket/nothing")


def test_plain_sequence_classifier_is_not_confused_with_a_base(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(BertConfig(num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'bert'"):
        load(tmp_path)


def test_bf16_on_a_cpu_attends_in_float32_and_multiplies_in_bf16(
    arch: str, tiny_checkpoint: Path
) -> None:
    config = StageConfig(base_model=str(tiny_checkpoint), output_dir="out", dtype="bfloat16")
    lm = load_language_model(config, trainable=False)
    seen: dict[str, set[torch.dtype]] = {"attention": set(), "linear": set()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            if "scaled_dot_product" in name or "_softmax" in name:
                seen["attention"].add(args[0].dtype)
            if name.startswith(("aten.mm", "aten.addmm")):
                seen["linear"].add(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    prompts = TokenBatch.from_lists([[5, 6, 7], [8, 9]])
    responses = TokenBatch.from_lists([[10, 11], [12]])
    lm.add_adapter("policy", LoRAConfig(rank=2))
    with Watch(), lm.using("policy"):
        lm.response_states(prompts, responses).float().sum().backward()
    assert seen == {"attention": {torch.float32}, "linear": {torch.bfloat16}}
