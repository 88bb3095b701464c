"""Adapters and merged models on disk, in the formats that plain peft and transformers load."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.disk import settle
from rlhf.errors import InputError
from rlhf.models.language_model import LanguageModel
from rlhf.models.plain_lora import check_fit, read_adapter_config
from rlhf.models.weights import quiet_transformers
from rlhf.untrusted import parse_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ORIGIN = "rlhf.json"


def save_adapter(lm: LanguageModel, adapter: str, folder: Path) -> None:
    """Writes one adapter, flat, as plain peft reads it, with a note of the base it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    assert lm.adapters.peft_model is not None
    config: Any = copy.deepcopy(lm.adapters.peft_model.peft_config[adapter])
    config.base_model_name_or_path = lm.base_name
    config.revision = lm.revision
    config.inference_mode = True
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(
        lm.adapters.peft_model, adapter_name=adapter, save_embedding_layers=False
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _write_origin(lm, folder)


def load_adapter(
    lm: LanguageModel, folder: Path, name: str, *, trainable: bool = False
) -> LoraConfig:
    """Puts a saved adapter onto a base under a role's name.

    Args:
        lm: The base it was trained on.
        folder: Written by `save_adapter` (or by peft; then the base cannot be checked).
        name: Role, such as "reward".
        trainable: Whether it is trained further.

    Raises:
        InputError: It is no plain LoRA, or it belongs to another base.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder} is no adapter: it has no {ADAPTER_WEIGHTS}")
    origin = read_origin(folder)
    if origin and origin["fingerprint"] != lm.fingerprint:
        raise InputError(
            f"{folder} was trained on {origin['base_model']} (weights {origin['fingerprint']}), "
            f"but base_model is {lm.base_name} (weights {lm.fingerprint}); use the same base"
        )
    config = read_adapter_config(folder)
    try:
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, ValueError, OSError, TypeError) as error:
        raise InputError(f"{folder}: the adapter cannot be read: {error}") from error
    problems = check_fit(lm.module, config, state)
    if problems:
        fit = f"{folder}: the adapter does not fit {lm.base_name}"
        raise InputError([f"{fit}: {problem}" for problem in problems])
    if not trainable:
        config.lora_dropout = 0.0  # it belongs to the training that is over
    lm.adapters.add(name, config, trainable=trainable)
    set_peft_model_state_dict(lm.adapters.peft_model, state, adapter_name=name)
    return config


def read_origin(folder: Path) -> dict[str, Any] | None:
    """The note of base, revision and fingerprint beside saved weights, if there is one.

    Raises:
        InputError: It cannot be read as one.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        origin: dict[str, Any] = parse_json(path.read_bytes())
        known = {name: origin[name] for name in ("base_model", "revision", "fingerprint")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not the note that rlhf writes: {error!r:.200}") from error
    if not isinstance(known["fingerprint"], str) or not all(
        value is None or isinstance(value, str) for value in known.values()
    ):
        raise InputError(f"{path}: not the note that rlhf writes: expected three texts")
    return origin


def save_merged(
    lm: LanguageModel,
    adapter: str | None,
    folder: Path,
    probe: tuple[TokenBatch, TokenBatch] | None = None,
) -> float | None:
    """Writes the whole model, adapter folded in, as plain transformers (so vLLM, TGI) load it.

    The sum is made in fp32 and cast once to the model's dtype.

    Args:
        lm: The model.
        adapter: Adapter to fold in; None for a fully fine-tuned model.
        folder: Where to.
        probe: Prompts and responses on which to measure what the cast cost.

    Returns:
        Mean per-token KL(merged‖adapter) in nats over the probe, None without a probe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged = _merged_weights(lm, adapter) if adapter else {}
    kl = _kl_of_merging(lm, adapter, merged, probe) if adapter and probe else None
    state = _plain_weights(lm, merged)
    with torch.device("meta"):
        plain: Any = type(lm.module)(copy.deepcopy(lm.module.config))
    plain.load_state_dict(state, strict=True, assign=True)
    _tie_what_is_equal(plain, state)
    plain.generation_config = lm.module.generation_config
    with quiet_transformers():
        plain.save_pretrained(folder)
    _keep_head_scaling(plain, folder)
    lm.tokenizer.save_pretrained(folder)
    _write_origin(lm, folder)
    return kl


def _write_origin(lm: LanguageModel, folder: Path) -> None:
    origin = {"base_model": lm.base_name, "revision": lm.revision, "fingerprint": lm.fingerprint}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
    settle(folder)


def merged_weights(lm: LanguageModel, adapter: str | None) -> dict[str, Tensor]:
    """All weights of the model in its dtype, by their plain names, an adapter folded in."""
    return _plain_weights(lm, _merged_weights(lm, adapter) if adapter else {})


def _plain_weights(lm: LanguageModel, merged: dict[LoraLayer, Tensor]) -> dict[str, Tensor]:
    with _weights(merged):
        return {
            name.replace(".base_layer.", "."): tensor.detach().to(lm.dtype)
            for name, tensor in lm.module.state_dict().items()
            if ".lora_" not in name
        }


@torch.no_grad()
def _merged_weights(lm: LanguageModel, adapter: str) -> dict[LoraLayer, Tensor]:
    merged = {}
    for part in lm.module.modules():
        if isinstance(part, LoraLayer) and adapter in part.lora_A:
            weight = part.get_base_layer().weight
            delta = part.get_delta_weight(adapter).float()
            merged[part] = (weight.float() + delta).to(lm.dtype)
    return merged


@torch.no_grad()
def add_adapter_to_weights(source: LanguageModel, adapter: str, target: LanguageModel) -> None:
    """Adds what an adapter of `source` changes to the weights of `target`, which has none.

    Args:
        source: Has the adapter.
        adapter: Its name.
        target: Same architecture; its weights are changed in place, in their own type.
    """
    for name, part in source.module.named_modules():
        if isinstance(part, LoraLayer) and adapter in part.lora_A:
            weight = target.module.get_submodule(name).weight
            weight.add_(part.get_delta_weight(adapter).to(weight.device, torch.float32))


@contextmanager
def _weights(replaced: dict[LoraLayer, Tensor]) -> Iterator[None]:
    """Swaps base weights in, and the very same tensors back afterwards."""
    originals = {layer: layer.get_base_layer().weight.data for layer in replaced}
    for layer, weight in replaced.items():
        layer.get_base_layer().weight.data = weight
    try:
        yield
    finally:
        for layer, weight in originals.items():
            layer.get_base_layer().weight.data = weight


@torch.no_grad()
def _kl_of_merging(
    lm: LanguageModel,
    adapter: str,
    merged: dict[LoraLayer, Tensor],
    probe: tuple[TokenBatch, TokenBatch],
) -> float:
    prompts, responses = probe
    mask = responses.mask

    def distribution() -> Tensor:
        return lm.logits(lm.response_states(prompts, responses)[:, :-1][mask]).log_softmax(-1)

    with lm.using(adapter):
        with_adapter = distribution()
    with _weights(merged), lm.using(None):
        with_merged = distribution()
    return float((with_merged.exp() * (with_merged - with_adapter)).sum(-1).mean())


def _tie_what_is_equal(plain: Any, state: dict[str, Tensor]) -> None:
    """Shares the tensors that the source shared, so that save_pretrained writes them once."""
    by_storage: dict[int, str] = {}
    for name, tensor in state.items():
        first = by_storage.setdefault(tensor.data_ptr(), name)
        if first != name:
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, plain.get_parameter(first))


def _keep_head_scaling(plain: Any, folder: Path) -> None:
    # T5Config derives scale_decoder_outputs from tie_word_embeddings when it is read, but
    # transformers 5 always writes tie_word_embeddings=true: a v1.1 or Flan model saved so would
    # come back with scaled outputs.
    if getattr(plain.config, "scale_decoder_outputs", True):
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
