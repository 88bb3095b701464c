"""Adapters of plain peft: the plain ones give peft's own logits, all others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.cases import make_case
from support.language_models import make_lm, plain_logits, ragged
from support.tiny import tiny_model

from rlhf.errors import InputError
from rlhf.files.local_copy import recorded_base
from rlhf.inference.stage import with_policy_settings
from rlhf.models.policy_folder import find_policy
from rlhf.models.reward_model import check_reward_model, load_reward_model
from rlhf.models.saving import load_adapter, save_adapter, save_merged

NAMES = {"t5": ["q", "v", "wo"], "llama": ["q_proj", "v_proj", "down_proj"]}
LAYERS = {"t5": "block", "llama": "layers"}


def save_plain(arch: str, folder: Path, **fields: Any) -> PeftModel:
    """An adapter as plain peft writes it, all its tensors random."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": NAMES[arch]} | fields))
    model = get_peft_model(tiny_model(arch), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v": 2, "v_proj": 2}, "alpha_pattern": {"q": 9, "q_proj": 9}},
    "layers": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "excluded": {"exclude_modules": ["wo", "down_proj"]},
    "pattern": {"target_modules": r".*\.(q|q_proj)"},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_adapters_give_the_logits_of_peft(arch: str, kind: str, tmp_path: Path) -> None:
    fields = dict(PLAIN[kind])
    if kind == "layers":
        fields["layers_pattern"] = LAYERS[arch]
    plain = save_plain(arch, tmp_path / "peft", **fields).eval()
    lm = make_lm(arch)
    load_adapter(lm, tmp_path / "peft", "policy")
    assert find_policy(str(tmp_path / "peft")).kind == "adapter"
    save_merged(lm, "policy", tmp_path / "merged")
    save_adapter(lm, "policy", tmp_path / "again")
    merged = type(lm.module).from_pretrained(tmp_path / "merged").eval()
    again = PeftModel.from_pretrained(tiny_model(arch), tmp_path / "again").eval()
    prompts, responses = ragged(arch)
    with torch.no_grad(), lm.using("policy"):
        ours = lm.logits(lm.response_states(prompts, responses))
    lists = zip(prompts.tolists(), responses.tolists(), strict=True)
    for row, (prompt, response) in enumerate(lists):
        expected = plain_logits(arch, plain, prompt, response)
        assert (expected - plain_logits(arch, tiny_model(arch).eval(), prompt, response)).norm() > 1
        for logits in (
            ours[row, : len(response) + 1],
            plain_logits(arch, merged, prompt, response),
            plain_logits(arch, again, prompt, response),
        ):
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["q.weight"],
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "velora_config": {"num_groups": 1},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "megatron_config": {"tensor_parallel": 1},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArBr"},
    "ensure_weight_tying": True,
    "a_field_of_the_next_version": 3,
    "peft_type": "ADALORA",
}
BEGUN_ELSEWHERE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "lora_ga", "mica")


@pytest.mark.parametrize(
    ("field", "value"),
    [*REFUSED.items(), *(("init_lora_weights", name) for name in BEGUN_ELSEWHERE)],
)
def test_what_is_not_plain_lora_is_refused_by_name(field: str, value: Any, tmp_path: Path) -> None:
    save_plain("llama", tmp_path)
    change(tmp_path, **{field: value})
    with pytest.raises(InputError, match=rf"adapter_config\.json: {field}: .*merge") as found:
        find_policy(str(tmp_path))
    assert "\n" not in str(found.value)
    lm = make_lm("llama")
    with pytest.raises(InputError, match=field):
        load_adapter(lm, tmp_path, "policy")
    assert not lm.adapters.names


def test_tensors_of_embeddings_and_magnitudes_are_refused(arch: str, tmp_path: Path) -> None:
    save_plain(arch, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    first = next(iter(state))
    module = first.partition(".lora_")[0]
    for name in (
        f"{module}.lora_magnitude_vector",
        f"{module}.lora_B.bias",
        "base_model.model.shared.weight",
        "base_model.model.shared.lora_embedding_A",
    ):
        save_file(state | {name: torch.ones(4)}, file)
        with pytest.raises(InputError, match=f"1 are too many .*such as {name}; .*merge"):
            load_adapter(make_lm(arch), tmp_path, "policy")
    save_file({name: tensor for name, tensor in state.items() if name != first}, file)
    with pytest.raises(InputError, match="1 tensors are missing"):
        load_adapter(make_lm(arch), tmp_path, "policy")
    save_file(state | {first: state[first] * float("nan")}, file)
    with pytest.raises(InputError, match="NaN or infinite"):
        load_adapter(make_lm(arch), tmp_path, "policy")


def test_adapters_on_tied_heads_and_embeddings_are_refused(arch: str, tmp_path: Path) -> None:
    embedding = {"t5": "shared", "llama": "embed_tokens"}[arch]
    for name, reason in (("lm_head", "the weight is shared"), (embedding, "not a linear layer")):
        save_plain(arch, tmp_path / name, target_modules=[*NAMES[arch], name])
        lm = make_lm(arch)
        with pytest.raises(InputError, match=rf"target_modules: .*{name}.*{reason}.*merge"):
            load_adapter(lm, tmp_path / name, "policy")
        assert not lm.adapters.names


MALFORMED: dict[str, Any] = {
    "r": [-1, 0, 10**9, 10**400, 2.5, "8", None, True, [8], ...],
    "lora_alpha": ["x", None, [1], {}, ..., float("nan"), float("inf")],
    "target_modules": [None, [], {}, 5, [5], "(", "nothing", ["nothing"], ...],
    "peft_type": [None, 5, "lora?", [], ...],
    "rank_pattern": [[1], {"q_proj": 0}, {"q_proj": 10**9}, {"q_proj": "x"}, {"(": 2}, "x"],
    "alpha_pattern": [[1], {"q_proj": "x"}, {"(": 2.0}],
    "use_rslora": ["yes", 1, None],
    "layers_to_transform": ["x", {}, [9], 1.5],
    "layers_pattern": [5, ["("]],
    "exclude_modules": [5, "("],
    "lora_dropout": ["x", -1, 2, None],
    "base_model_name_or_path": [5, ["x"]],
    "revision": [5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in MALFORMED.items() for value in values]
)
def test_malformed_configurations_give_one_clear_error(
    field: str, value: Any, tmp_path: Path
) -> None:
    save_plain("llama", tmp_path)
    change(tmp_path, **{field: value})
    lm = make_lm("llama")
    with pytest.raises(InputError) as found:
        load_adapter(lm, tmp_path, "policy")
    assert len(found.value.problems) == 1
    assert str(tmp_path) in str(found.value)
    assert not lm.adapters.names


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", '"x"', "[" * 100_000, "\xff"])
def test_configurations_that_are_no_object(text: str, tmp_path: Path) -> None:
    save_plain("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    for load in (
        lambda: find_policy(str(tmp_path)),
        lambda: load_adapter(make_lm("llama"), tmp_path, "policy"),
    ):
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            load()


# --- bases that files name -----------------------------------------------------------------------

ADDRESSES = [
    "http://127.0.0.1:9/model",
    "HTTPS://user:secret@example.com/model",
    "ftp://example.com/model",
    "s3://bucket/model",
    "file:///etc",
    "gs://bucket/x::http://127.0.0.1:9/model",
    "simplecache::http://127.0.0.1:9/model",
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("somebody was called")

    for name in (
        "rlhf.files.local_copy.open_store",
        "socket.socket.connect",
        "fsspec.core.url_to_fs",
    ):
        monkeypatch.setattr(name, refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_somebodys_record_is_never_called(
    arch: str, address: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    case = make_case(arch, tiny_checkpoint, tmp_path)
    note = case.policy / "adapter" / "rlhf.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"base_model": address}))
    plain = tmp_path / "peft"
    save_plain(arch, plain)
    change(plain, base_model_name_or_path=address)
    for folder in (case.policy, case.policy / "adapter", plain):
        config = case.config(tmp_path / "out", policy_path=str(folder), base_model=None)
        with pytest.raises(InputError, match="no folder, Hub id or gs:// address") as found:
            with_policy_settings(config, find_policy(config.policy_path))
        assert "secret" not in str(found.value)
        given = case.config(tmp_path / "out", policy_path=str(folder), base_model="mine")
        assert with_policy_settings(given, find_policy(str(folder))).base_model == "mine"
    record = case.reward / "reward_model.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base_model": address}))
    with pytest.raises(InputError, match="base"):
        load_reward_model(str(case.reward), device="cpu")


def test_folders_hub_ids_and_gs_are_bases(tmp_path: Path) -> None:
    for name in (str(tmp_path), "google/flan-t5-small", "gs://bucket/model", "/gcs/bucket/model"):
        assert recorded_base(name, "x", "v1") == (name, "v1")


def test_a_reward_models_adapter_is_looked_at_before_weights(
    arch: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    from support.tiny import make_tokenizer

    from rlhf.data.prompts import PromptRenderer

    case = make_case(arch, tiny_checkpoint, tmp_path)
    renderer = PromptRenderer.for_tokenizer(make_tokenizer(arch))
    check_reward_model(str(case.reward), renderer)
    change(case.reward / "adapter", use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        check_reward_model(str(case.reward), renderer)
