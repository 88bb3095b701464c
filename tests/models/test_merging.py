"""Merging without a second model: the same files, the same KL, little memory."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.language_models import LORA, plain_logits, ragged
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from rlhf.config import PPOConfig
from rlhf.data.batching import TokenBatch
from rlhf.models import logprobs, lora, merging
from rlhf.models.families import FAMILIES
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.memory import memory_per_role, total_memory
from rlhf.models.saving import save_adapter, save_merged
from rlhf.models.sequence_classifier import save_sequence_classifier

AUTO = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}
DTYPES = [torch.float32, torch.bfloat16]


def adapted(
    arch: str, dtype: torch.dtype = torch.float32, *, untied: bool = False, **sizes: int
) -> LanguageModel:
    model = tiny_model(arch, untied=untied, **sizes).to(dtype)
    lm = FAMILIES[arch](model, make_tokenizer(arch), dtype=dtype, base_name="tiny")
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy", std=0.3)
    return lm


def merged_by_peft(
    arch: str, lm: LanguageModel, folder: Path, *, untied: bool = False
) -> torch.nn.Module:
    """The adapter on the base's values in float64, merged by peft."""
    base = tiny_model(arch, untied=untied).to(lm.dtype).double()
    save_adapter(lm, "policy", folder)
    plain = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).double()
    return plain.merge_and_unload().eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("untied", [False, True])
def test_files_are_those_that_transformers_writes(
    arch: str, dtype: torch.dtype, untied: bool, tmp_path: Path
) -> None:
    lm = adapted(arch, dtype, untied=untied)
    save_merged(lm, "policy", tmp_path / "ours")
    plain = merged_by_peft(arch, lm, tmp_path / "adapter", untied=untied).to(dtype)
    plain.config.tie_word_embeddings = lm.config.tie_word_embeddings
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype
        torch.testing.assert_close(
            ours[name], tensor, atol=1e-6, rtol=0.01 if dtype != torch.float32 else 1e-5
        )

    def written(side: str, file: str) -> dict[str, Any]:
        return json.loads((tmp_path / side / file).read_text())

    expected = written("theirs", "config.json")
    if arch == "t5" and untied:  # what transformers 5 forgets
        expected["tie_word_embeddings"] = False
    assert written("ours", "config.json") == expected
    # Of the settings for generation the ids only: we decode without a checkpoint's own filters.
    ids = {n: v for n, v in written("theirs", "generation_config.json").items() if "_id" in n}
    own = written("ours", "generation_config.json")
    assert {name: value for name, value in own.items() if name != "transformers_version"} == ids


@pytest.mark.parametrize("untied", [False, True])
def test_several_files_load_in_plain_transformers(
    arch: str, untied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = adapted(arch, untied=untied)
    save_merged(lm, "policy", tmp_path / "one")
    monkeypatch.setattr(merging, "SHARD_BYTES", 8000)
    monkeypatch.setattr(lora, "MERGED_AT_ONCE", 100)  # three rows or less
    save_merged(lm, "policy", tmp_path / "many")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    parts = [load_file(file) for file in files]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 8000
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-5)
    models = [AUTO[arch].from_pretrained(tmp_path / name) for name in ("one", "many")]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-6, rtol=1e-5)
    monkeypatch.undo()
    save_merged(lm, "policy", tmp_path / "many")
    assert [path.name for path in (tmp_path / "many").glob("model*")] == ["model.safetensors"]


def test_kl_of_a_merge_that_is_known_to_be_off(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged weights a tenth too large, in a float32 model: the KL is large and exact."""
    lm = adapted(arch)
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK_CPU", 3 * lm.vocab_size)
    exact = lora.LoRALinear.merged_weight
    monkeypatch.setattr(lora.LoRALinear, "merged_weight", lambda *given: 1.1 * exact(*given))
    prompts, responses = ragged(arch)
    kl = save_merged(lm, "policy", tmp_path / "merged", (prompts, responses))
    merged = AUTO[arch].from_pretrained(tmp_path / "merged").double().eval()
    monkeypatch.undo()
    right = merged_by_peft(arch, lm, tmp_path / "adapter")
    terms: list[torch.Tensor] = []
    for prompt, response in zip(prompts.tolists(), responses.tolists(), strict=True):
        p, q = (
            plain_logits(arch, model, prompt, response)[:-1].log_softmax(-1)
            for model in (merged, right)
        )
        terms.append((p.exp() * (p - q)).sum(-1))
    expected = float(torch.cat(terms).mean())
    assert expected > 1e-3
    assert kl == pytest.approx(expected, rel=1e-2)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch held on the CPU beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_no_second_model_is_made(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = adapted(arch, layers=24)
    limit = 32 * 1024
    monkeypatch.setattr(merging, "SHARD_BYTES", limit)
    layers = sum(
        part.base_layer.weight.nbytes
        for part in lm.module.modules()
        if isinstance(part, lora.LoRALinear)
    )
    used = peak_bytes(lambda: save_merged(lm, "policy", tmp_path / "merged"))
    assert layers > 20 * limit
    assert used < 3 * limit


def test_logits_of_all_tokens_are_never_held(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, rows, length = 4000, 8, 40
    lm = adapted(arch, vocab=vocab)
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK_CPU", 8 * vocab)
    probe = (
        TokenBatch.from_lists([[5, 6]] * rows),
        TokenBatch.from_lists([[7] * length] * rows),
    )
    used = peak_bytes(lambda: save_merged(lm, "policy", tmp_path / "merged", probe))
    assert used < rows * length * vocab * 4 / 2


def test_the_peak_of_export_is_below_that_of_training_and_counted(
    arch: str, tmp_path: Path
) -> None:
    vocab, rows, length = 500, 8, 20
    config = PPOConfig(
        output_dir="x", prompt_dataset="x", device="cpu", dtype="float32", batch_size=rows,
        micro_batch_size=rows, prompt_sequence_length=8, target_sequence_length=length,
        lora={"rank": 4},
    )  # fmt: skip
    lm = adapted(arch, vocab=vocab)
    probe = (
        TokenBatch.from_lists([[5] * 8] * rows),
        TokenBatch.from_lists([[7] * length] * rows),
    )
    export = peak_bytes(lambda: save_merged(lm, "policy", tmp_path / "merged", probe))

    def train() -> None:
        with lm.using("policy"):
            states = lm.response_states(*probe)
            lm.token_logprobs(states, probe[1]).logprobs.sum().backward()

    assert export < peak_bytes(train)
    roles = memory_per_role(lm.config, config)
    assert export < max(roles["activations"], roles["export"])
    assert total_memory(roles) >= total_memory(roles | {"activations": 0, "cache": 0})
    huge = roles | {"export": 10**15}
    assert total_memory(huge) > 10**15


# --- the reward model for servers ----------------------------------------------------------------


def test_a_classifier_from_bfloat16_tells_300_responses_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").bfloat16()
    tokenizer = make_tokenizer("llama")
    lm = FAMILIES["llama"](model, tokenizer, dtype=torch.bfloat16, base_name="tiny")
    lm.add_adapter("reward", LORA)
    randomize_lora(lm, "reward")
    head = ScalarHead(lm.hidden_size, seed=1)
    save_sequence_classifier(lm, "reward", head, tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompts = TokenBatch.from_lists([[1, 5, 6]] * 300)
    responses = TokenBatch.from_lists(
        [[*torch.randint(3, 90, (9,), generator=generator).tolist(), 2] for _ in range(300)]
    )
    with torch.no_grad(), lm.using("reward"):
        raw = head(lm.final_states(prompts, responses))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.cat([prompts.ids, responses.ids], dim=1)
    with torch.no_grad():
        scores = plain(input_ids=ids).logits[:, 0]
    assert len(set(scores.tolist())) == 300
    assert torch.corrcoef(torch.stack([scores, raw]))[0, 1] > 0.999
    assert (scores - raw).abs().max() < 0.1 * raw.std()
    # The same weights in the same arithmetic agree to rounding.
    exact = FAMILIES["llama"](copy.deepcopy(plain_base(tmp_path)), tokenizer)
    with torch.no_grad():
        again = head(exact.final_states(prompts, responses))
    torch.testing.assert_close(scores, again, atol=1e-4, rtol=1e-4)


def plain_base(folder: Path) -> torch.nn.Module:
    """The classifier's layers as a language model, whose LM head nobody asks."""
    return AutoModelForCausalLM.from_pretrained(folder)
