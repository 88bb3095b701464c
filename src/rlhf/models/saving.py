"""Adapters and merged models on disk, in formats that plain peft and transformers load."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig

from rlhf.data.batching import TokenBatch
from rlhf.data.special_tokens import save_tokenizer
from rlhf.errors import InputError
from rlhf.files.disk import settle
from rlhf.files.text import write_text
from rlhf.models.content import ORIGIN, check_written, read_origin, written_checksums
from rlhf.models.family import Family
from rlhf.models.language_model import LanguageModel
from rlhf.models.merging import kl_of_merging, plain_weights, write_weights
from rlhf.models.plain_lora import (
    ADAPTER_WEIGHTS,
    check_fit,
    read_adapter_config,
    read_adapter_weights,
)
from rlhf.models.weights import quiet_transformers
from rlhf.untrusted import without_secrets


def save_adapter(lm: LanguageModel, adapter: str, folder: Path) -> None:
    """Write one adapter, flat, as plain peft reads it, with a note of the base it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    assert lm.adapters.peft_model is not None
    config: Any = copy.deepcopy(lm.adapters.peft_model.peft_config[adapter])
    config.base_model_name_or_path = without_secrets(lm.base_name)
    config.revision = lm.revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # its order differs between processes
        config.target_modules = sorted(config.target_modules)
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
    """Load a saved adapter onto a base under a role's name.

    Args:
        lm: The base it was trained on.
        folder: Written by `save_adapter`, or by peft, in which case the base cannot be checked.
        name: Role, such as "reward".
        trainable: Whether training continues.

    Raises:
        InputError: It is not a plain LoRA adapter, or it belongs to another base.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder} is no adapter: it has no {ADAPTER_WEIGHTS}")
    check_written(folder)
    origin = read_origin(folder)
    if origin and origin["fingerprint"] != lm.fingerprint:
        raise InputError(
            f"{folder} was trained on {origin['base_model']} (weights {origin['fingerprint']}), "
            f"but base_model is {lm.base_name} (weights {lm.fingerprint}); use the same base"
        )
    config, state = read_adapter_config(folder), read_adapter_weights(folder)
    problems = check_fit(lm.module, config, state)
    if problems:
        fit = f"{folder}: the adapter does not fit {lm.base_name}"
        raise InputError([f"{fit}: {problem}" for problem in problems])
    if not trainable:
        config.lora_dropout = 0.0  # a setting of the training that is over
    lm.adapters.add(name, config, trainable=trainable)
    set_peft_model_state_dict(lm.adapters.peft_model, state, adapter_name=name)
    return config


def save_policy(
    lm: LanguageModel, adapter: str | None, folder: Path, probe: tuple[TokenBatch, TokenBatch]
) -> float | None:
    """Write adapter/, if there is one, and merged/ below a folder.

    Returns:
        What `save_merged` returns.
    """
    if adapter is not None:
        save_adapter(lm, adapter, folder / "adapter")
    return save_merged(lm, adapter, folder / "merged", probe)


def save_merged(
    lm: LanguageModel,
    adapter: str | None,
    folder: Path,
    probe: tuple[TokenBatch, TokenBatch] | None = None,
) -> float | None:
    """Write the whole model, adapter folded in, for plain transformers (and so vLLM) to load.

    The sum is computed in fp32 and cast once to the model's dtype, in CPU memory, holding at most
    one file of the checkpoint at a time; the model's device never holds a second model.

    Args:
        lm: The model.
        adapter: Adapter to fold in; None for a fully fine-tuned model.
        folder: Where to write it.
        probe: Prompts and responses on which to measure the loss from the cast.

    Returns:
        Mean per-token KL(merged‖adapter) in nats over the probe; None without a probe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kl = kl_of_merging(lm, adapter, *probe) if adapter and probe else None
    write_weights(plain_weights(lm, adapter), folder)
    write_config(type(lm), lm.config, type(lm.module).__name__, lm.dtype, folder)
    with quiet_transformers():
        _plain_generation(lm).save_pretrained(folder)
    save_tokenizer(lm.tokenizer, lm.layout.prefix_ids, lm.layout.suffix_ids, folder)
    _write_origin(lm, folder)
    return kl


def _plain_generation(lm: LanguageModel) -> GenerationConfig:
    """Return our decoding: greedy until any EOS, without the checkpoint's penalties and filters."""
    ends = sorted(lm.layout.eos_ids)
    return GenerationConfig(eos_token_id=ends[0] if len(ends) == 1 else ends, **lm.generation_ids())


def _write_origin(lm: LanguageModel, folder: Path) -> None:
    base = without_secrets(lm.base_name)
    origin: dict[str, Any] = {"base_model": base, "revision": lm.revision}
    origin |= {"fingerprint": lm.fingerprint, "files": written_checksums(folder)}
    write_text(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
    settle(folder)


@torch.no_grad()
def add_adapter_to_weights(source: LanguageModel, adapter: str, target: LanguageModel) -> None:
    """Add the change that an adapter of `source` makes to the weights of `target`.

    Args:
        source: The model with the adapter.
        adapter: Name of the adapter.
        target: Same architecture, without adapters; its weights change in place, in their dtype.
    """
    for name, part in source.module.named_modules():
        if isinstance(part, LoraLayer) and adapter in part.lora_A:
            weight = target.module.get_submodule(name).weight
            weight.add_(part.get_delta_weight(adapter).to(weight.device, torch.float32))


def write_config(
    family: type[Family],
    config: PretrainedConfig,
    architecture: str,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write config.json as `save_pretrained` of a model of that class would."""
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    config.dtype = str(dtype).removeprefix("torch.")
    with quiet_transformers():
        config.save_pretrained(folder)
    if right := family.saved_fields(config):
        path = folder / "config.json"
        values = json.loads(path.read_text()) | right
        write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
