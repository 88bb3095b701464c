"""Adapters as input: merged into their base when loaded, and classifiers' adapters as rewards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from support.cases import make_case
from support.families import DRAWS, draw_model
from support.fuzzing import mutations
from support.hub import Hub
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from support.vertex_models import SHAPES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rlhf import train_ppo, train_sft
from rlhf.config import LoRAConfig, PipelineConfig, PPOConfig, SFTConfig, StageConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.data.special_tokens import save_tokenizer
from rlhf.errors import InputError
from rlhf.models.bases import Base, merge_adapters
from rlhf.models.classifier_files import classifier_label
from rlhf.models.content import weights_fingerprint
from rlhf.models.loading import load_language_model, load_tokenizer, read_model_config
from rlhf.models.merging import plain_weights
from rlhf.models.policy_folder import find_policy
from rlhf.models.reward_model import check_reward_model, load_reward_model
from rlhf.models.saving import load_adapter, save_policy
from rlhf.reports.dry_run import dry_run_report
from rlhf.vertex.machines import choose_machine

NAMES = {"t5": ["q", "v", "wo"], "llama": ["q_proj", "v_proj", "down_proj"]}
AUTO = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}
HEAD = {"t5": "classification_head", "llama": "score"}


def fill(model: Any) -> None:
    """Give what an adapter saves random values: a fresh one is no change at all."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def save_plain(arch: str, base: str, folder: Path, **fields: Any) -> PreTrainedModel:
    """Write an adapter as plain peft does; return the base with it merged by peft."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": NAMES[arch]} | fields
    model = get_peft_model(tiny_model(arch), LoraConfig(**options))
    fill(model)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


def load(name: Path | str, **fields: Any) -> Any:
    config = StageConfig(base_model=str(name), output_dir="x", device="cpu", **fields)
    return load_language_model(config, trainable=False)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"v": 2, "v_proj": 2},
               "alpha_pattern": {"q": 9, "q_proj": 9}}]
)  # fmt: skip
def test_a_base_that_is_an_adapter_is_merged_as_peft_merges(
    arch: str, fields: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    expected = save_plain(arch, str(tiny_checkpoint), tmp_path / "adapter", **fields)
    lm = load(tmp_path / "adapter")
    weights = expected.state_dict()
    assert weights.keys() == lm.module.state_dict().keys()
    for name, tensor in lm.module.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-6)
    assert lm.base_name == str(tmp_path / "adapter")
    assert read_model_config(str(tmp_path / "adapter")).model_type == arch
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == lm.tokenizer.get_vocab()


def test_the_sum_is_made_in_float32_whatever_the_type(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    save_plain(arch, str(tiny_checkpoint), tmp_path / "adapter")
    exact = load(tmp_path / "adapter").module.state_dict()
    rounded = load(tmp_path / "adapter", dtype="bfloat16")
    for name, tensor in rounded.module.state_dict().items():
        if tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor, exact[name].bfloat16())
    assert rounded.fingerprint == load(tmp_path / "adapter").fingerprint


def test_adapters_of_a_stage_and_adapters_on_adapters(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """An adapter that was trained on an adapter names it; both are merged, one after the other."""
    case = make_case(arch, tiny_checkpoint, tmp_path)
    first = load(case.policy / "adapter")
    same_weights(first, load(case.policy / "merged"))
    first.add_adapter("policy", LoRAConfig(rank=2))
    randomize_lora(first, "policy")
    save_policy(first, "policy", tmp_path / "second", probe())
    note = json.loads((tmp_path / "second" / "adapter" / "rlhf.json").read_text())
    assert note["base_model"] == str(case.policy / "adapter")
    assert note["fingerprint"] == first.fingerprint
    second = load(tmp_path / "second" / "adapter")
    same_weights(second, load(tmp_path / "second" / "merged"))
    assert second.fingerprint != first.fingerprint
    change_weights(tiny_checkpoint, tmp_path / "moved")
    note = json.loads((case.policy / "adapter" / "rlhf.json").read_text())
    path = case.policy / "adapter" / "rlhf.json"
    path.write_text(json.dumps(note | {"base_model": str(tmp_path / "moved")}))
    with pytest.raises(InputError, match=r"adapter was trained on .*moved with weights"):
        load(case.policy / "adapter")


def same_weights(lm: Any, other: Any) -> None:
    expected = other.module.state_dict()
    assert lm.module.state_dict().keys() == expected.keys()
    for name, tensor in lm.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def change_weights(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(weights | {name: weights[name] + 1}, target / "model.safetensors", {"format": "pt"})


def probe() -> tuple[TokenBatch, TokenBatch]:
    ids = TokenBatch(torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    return ids, ids


def test_a_stage_trains_on_an_adapter_from_the_hub(
    arch: str, tiny_checkpoint: Path, hub: Hub, tmp_path: Path
) -> None:
    """Training, identity, policy card, and the trained adapter on what it was trained on."""
    base = hub.model("user/base", tiny_checkpoint)
    save_plain(arch, "user/base", tmp_path / "adapter")
    commit = hub.model("user/adapter", tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_text": "a", "output_text": "the cat"}\n' * 4)
    config = SFTConfig(
        base_model="user/adapter", dataset=str(rows), output_dir=str(tmp_path / "out"),
        batch_size=2, train_steps=2, prompt_sequence_length=16, target_sequence_length=6,
        device="cpu", dtype="float32", log_with=[], lora={"rank": 2},
    )  # fmt: skip
    train_sft(config)
    out = tmp_path / "out"
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("user/adapter", commit)
    assert "user/adapter" in (out / "README.md").read_text()
    assert set(hub.requests) & {
        f"GET /api/models/user/base/tree/{base}?recursive=true&expand=false"
    }
    hub.model("user/adapter", {"config.json": b"{}"})  # main has moved since
    source = find_policy(str(out / "adapter"))
    lm = load_language_model(
        config, trainable=False, base_model=source.base_model, revision=source.revision
    )
    load_adapter(lm, source.folder, "policy")
    plain = AUTO[arch].from_pretrained(out / "merged").state_dict()
    for name, weight in plain_weights(lm, "policy").items():
        torch.testing.assert_close(weight.make(), plain[name])


def test_a_dry_run_checks_the_adapter_without_weights(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    save_plain(arch, str(base), tmp_path / "adapter")
    config = SFTConfig(base_model=str(tmp_path / "adapter"), output_dir="x", dataset="d")
    whole = config.model_copy(update={"base_model": str(base)})
    report = dry_run_report("sft", config, 10)
    assert report.replace(str(tmp_path / "adapter"), str(base)) == dry_run_report("sft", whole, 10)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(state))
    save_file(state | {name: state[name][:1]}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"base_model: .*adapter: .*wrong shape"):
        dry_run_report("sft", config, 10)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "other types": ({"peft_type": "IA3"}, "peft_type"),
    "heads": ({"modules_to_save": ["score"]}, "modules_to_save"),
    "no base": ({"base_model_name_or_path": None}, "names no base"),
    "elsewhere": ({"base_model_name_or_path": "http://evil/x"}, "no folder, Hub id or gs://"),
    "gone": ({"base_model_name_or_path": "/no/such/base"}, "its base: there is no folder /no/such"),
    "itself": ({"base_model_name_or_path": "ITSELF"}, "on itself"),
}


def test_where_a_base_has_moved_is_said_in_the_environment(
    arch: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_plain(arch, "/gone/base", tmp_path / "adapter")
    save_reward(arch, str(tiny_checkpoint), tmp_path / "reward")
    change(tmp_path / "reward", base_model_name_or_path="/gone/base", revision="v1")
    with pytest.raises(InputError, match=r"its base: .*RLHF_BASES='/gone/base=NEW'"):
        load(tmp_path / "adapter")
    monkeypatch.setenv("RLHF_BASES", f"/other=x, /gone/base={tiny_checkpoint}")
    assert load(tmp_path / "adapter").base_name == str(tmp_path / "adapter")
    load_reward_model(str(tmp_path / "reward"), device="cpu")
    assert weights_fingerprint(str(tmp_path / "adapter")) != ""


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(
    arch: str, kind: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fields, said = REFUSED[kind]
    folder = tmp_path / "adapter"
    save_plain(arch, str(tiny_checkpoint), folder)
    change(folder, **{name: str(folder) if v == "ITSELF" else v for name, v in fields.items()})
    for check in (read_model_config, load):
        with pytest.raises(InputError, match=said) as caught:
            check(str(folder))
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(f"base_model: {folder}")
    assert isinstance(weights_fingerprint(str(folder), with_base=False), str)


def test_identity_covers_adapter_and_base(arch: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_plain(arch, str(tiny_checkpoint), tmp_path / "a")
    before = weights_fingerprint(str(tmp_path / "a"))
    moved = Path(shutil.copytree(tiny_checkpoint, tmp_path / "moved"))
    change(tmp_path / "a", base_model_name_or_path=str(moved))
    assert weights_fingerprint(str(tmp_path / "a")) == before
    change_weights(tiny_checkpoint, tmp_path / "other")
    change(tmp_path / "a", base_model_name_or_path=str(tmp_path / "other"))
    assert weights_fingerprint(str(tmp_path / "a")) != before
    change(tmp_path / "a", base_model_name_or_path=str(moved), lora_alpha=7)
    assert weights_fingerprint(str(tmp_path / "a")) != before


def save_reward(arch: str, base: str, folder: Path, labels: int = 1) -> Any:
    """Write a reward model with LoRA as TRL does; return it as plain transformers and peft."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    options: dict[str, Any] = {"target_modules": NAMES[arch], "modules_to_save": [HEAD[arch]]}
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=6, **options)
    model = get_peft_model(model, config)
    fill(model)
    model.save_pretrained(folder)
    return model.eval()


PROMPTS = ["the cat sat [summary]: ", "a dog ran to the", "a"]
RESPONSES = ["a cat", "cat and sat", "the"]


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("own", [False, True])
def test_scores_of_a_reward_adapter_are_those_of_peft(
    arch: str, labels: int, own: bool, tiny_checkpoint: Path, tmp_path: Path, hub: Hub
) -> None:
    folder = tmp_path / "reward"
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    model = save_reward(arch, str(tiny_checkpoint), folder, labels)
    # As in real T5s, the tokenizer adds the EOS that the class pools.
    ends = [1] if arch == "t5" else []
    save_tokenizer(make_tokenizer(arch), (), ends, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if own:  # and the base has no PAD, as most language models
        described = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(described | {"pad_token_id": None}))
        save_tokenizer(make_tokenizer(arch), (), ends, folder)
    hub.model("user/base", base)
    change(folder, base_model_name_or_path="user/base")
    hub.model("user/reward", folder)
    label = {"label": 2} if labels > 1 else {}
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        expected = torch.stack(
            [model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
        )
    assert expected.std() > 1e-2
    for path in (str(folder), "user/reward"):
        scorer = load_reward_model(path, device="cpu", dtype="float32", **label)
        prompts = [PromptText(text, ()) for text in PROMPTS]
        scores = scorer.score(prompts, RESPONSES)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_reward_adapter_is_checked_before_weights(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    save_reward(arch, str(base), tmp_path / "reward", 2)
    save_plain(arch, str(base), tmp_path / "plain")
    (base / "model.safetensors").unlink()
    renderer = PromptRenderer.for_tokenizer(make_tokenizer(arch))
    check_reward_model(str(tmp_path / "reward"), renderer, label=1)
    with pytest.raises(InputError, match="has 2 labels; choose"):
        check_reward_model(str(tmp_path / "reward"), renderer)
    with pytest.raises(InputError, match=r"no head of a sequence classifier.*SEQ_CLS"):
        check_reward_model(str(tmp_path / "plain"), renderer)
    change(tmp_path / "reward", use_dora=True)
    with pytest.raises(InputError, match=r"reward_model_path: .*use_dora"):
        check_reward_model(str(tmp_path / "reward"), renderer, label=1)
    change(tmp_path / "reward", use_dora=False, r=8)
    with pytest.raises(InputError, match=r"reward_model_path: .*wrong shape"):
        check_reward_model(str(tmp_path / "reward"), renderer, label=1)


def test_ppo_on_an_adapter_with_the_reward_of_an_adapter(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As with TRL: a policy and a reward model, both tuned with LoRA on one base."""
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    save_tokenizer(make_tokenizer(arch), (), [1] if arch == "t5" else [], base)
    save_plain(arch, str(base), tmp_path / "policy")
    save_reward(arch, str(base), tmp_path / "reward")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_text": text}) + "\n" for text in PROMPTS))
    config = PPOConfig(
        base_model=str(tmp_path / "policy"), reward_model_path=str(tmp_path / "reward"),
        prompt_dataset=str(rows), output_dir=str(tmp_path / "out"), batch_size=2, train_steps=1,
        prompt_sequence_length=16, target_sequence_length=6, device="cpu", dtype="float32",
        log_with=[], lora={"rank": 2},
    )  # fmt: skip
    train_ppo(config)
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["fields"]
    assert identity["base_model (content)"] == weights_fingerprint(config.base_model or "")
    assert identity["reward_model_path (content)"] == weights_fingerprint(
        config.reward_model_path or ""
    )
    policy = find_policy(str(tmp_path / "out"))
    assert (policy.kind, policy.base_model) == ("adapter", config.base_model)
    assert "merge it first" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("model_type", DRAWS)
def test_every_familys_layers_are_merged_as_by_peft(model_type: str, tmp_path: Path) -> None:
    """GPT-2's weights are transposed; others have biases, or several projections in one."""
    for seed in range(2):
        peft_model = get_peft_model(
            draw_model(model_type, seed), LoraConfig(r=2, lora_alpha=5, target_modules="all-linear")
        )
        fill(peft_model)
        peft_model.save_pretrained(tmp_path / str(seed))
        expected = peft_model.merge_and_unload().state_dict()
        ours = draw_model(model_type, seed)
        base = Base("a", None, tmp_path, (tmp_path / str(seed),), tmp_path)
        merge_adapters(base, ours)
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_a_machine_is_chosen_by_the_base_of_an_adapter(tmp_path: Path) -> None:
    """From descriptions alone: there are no weights of the base."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(SHAPES["1b"]))
    config = LlamaConfig(**SHAPES["1b"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    lora = LoraConfig(r=1, target_modules=["v_proj"], layers_to_transform=[0])
    layer = model.model.layers[0].self_attn.v_proj
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(tmp_path / "adapter")
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    state = {
        f"{prefix}.lora_A.weight": torch.ones(1, layer.in_features),
        f"{prefix}.lora_B.weight": torch.ones(layer.out_features, 1),
    }
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    choices = []
    for name in ("base", "adapter"):
        run = PipelineConfig.model_validate(
            {
                "base_model": str(tmp_path / name),
                "preference_dataset": "gs://bkt/pairs.jsonl",
                "output_dir": "gs://bkt/runs/first",
            }
        )
        machine, why = choose_machine(run)
        choices.append((machine, why.replace(name, "model")))
    assert choices[0] == choices[1]


def test_an_adapter_in_a_store_is_fetched_whole(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    expected = save_plain(arch, str(tiny_checkpoint), tmp_path / "adapter").state_dict()
    store = MemoryFileSystem()
    store.put(str(tmp_path / "adapter"), f"/{arch}-store/adapter", recursive=True)
    lm = load(f"memory://{arch}-store/adapter")
    for name, tensor in lm.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    before = weights_fingerprint(f"memory://{arch}-store/adapter")
    change_weights(tiny_checkpoint, tmp_path / "other")
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "other"))
    described = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    store.pipe_file(f"/{arch}-store/adapter/adapter_config.json", described)
    assert weights_fingerprint(f"memory://{arch}-store/adapter") != before


TOKENS = [b"null", b"[]", b"{}", b"-1", b"0", b"1e999", b"NaN", b'"x"', b"true", b"[[1]]", b"\xff"]


def test_no_damage_to_an_adapter_ends_in_a_traceback(
    arch: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    save_plain(arch, str(tiny_checkpoint), tmp_path / "plain")
    save_reward(arch, str(tiny_checkpoint), tmp_path / "reward")
    good = {path: path.read_bytes() for path in tmp_path.glob("*/adapter_*")}
    problems: list[str] = []
    for number in range(32):
        path = sorted(good)[number % len(good)]
        path.write_bytes(next(mutations([good[path]], TOKENS, 1, seed=number)))
        try:
            read_model_config(str(tmp_path / "plain"))
            classifier_label(str(tmp_path / "reward"), None)
        except InputError as error:
            problems += error.problems
        path.write_bytes(good[path])
    assert len(problems) > 5
    assert all(str(tmp_path) in problem for problem in problems)
