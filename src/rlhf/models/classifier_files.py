"""Find and load a sequence classifier: a whole one, or an adapter of peft on another model.

TRL and peft write a reward model trained with LoRA as an adapter (task type SEQ_CLS) whose
`modules_to_save` is the head; its base is a language model without one. It is loaded with the
adapter merged, and the head takes its place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import InputError
from rlhf.models.bases import Base, add_lora, find_base
from rlhf.models.checkpoint_files import check_checkpoint, count_stored
from rlhf.models.plain_lora import (
    ADAPTER_CONFIG,
    HEADS,
    check_fit,
    head_names,
    read_adapter_config,
    read_adapter_weights,
)
from rlhf.models.weights import cast_weights, quiet_transformers

SETTING = "reward_model_path"


def classifier_label(source: str, label: int | str | None, revision: str | None = None) -> int:
    """Return the index of the label whose logit is the score; reads no weights.

    Args:
        source: Folder or Hub id of a sequence classifier, or of an adapter with its head.
        label: Index or name; None if there is only one label.
        revision: Hub revision.

    Raises:
        InputError: It is no sequence classifier, or has no such label.
    """
    base = _find(source, revision, weights=False)
    config, where = _read_config(base), f"{SETTING}: {source}"
    if base.adapters:
        _check_adapters(base, config)
    count = config.num_labels
    names = {index: str(name) for index, name in (config.id2label or {}).items()}
    shown = ", ".join(f"{index} ({names.get(index, index)})" for index in range(min(count, 20)))
    shown += ", …" if count > 20 else ""
    if label is None:
        if count != 1:
            raise InputError(
                f"{where}: has {count} labels; choose the one whose logit is the score with "
                f"`reward_model_label`: {shown}"
            )
        return 0
    found = [index for index in range(count) if label in (index, names.get(index))]
    if not found:  # flags are text
        found = [index for index in range(count) if label == str(index)]
    if len(found) != 1:
        raise InputError(f"{where}: has no label {label!r}; expected one of {shown}")
    return found[0]


def _find(source: str, revision: str | None, *, weights: bool) -> Base:
    folder = Path(source)
    if folder.is_dir() and not any((folder / f).is_file() for f in ("config.json", ADAPTER_CONFIG)):
        raise InputError(
            f"{SETTING}: {source}: holds neither reward_model.json (has its training finished?) "
            f"nor config.json or {ADAPTER_CONFIG}"
        )
    base = find_base(source, revision, weights=weights, where=SETTING)
    check_checkpoint(base.folder, f"{SETTING}: {source}")
    return base


def _read_config(base: Base) -> Any:
    """Return the configuration of the classifier; an adapter's head gives the number of labels."""
    where = f"{SETTING}: {base.name}"
    try:
        config: Any = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    except Exception as error:  # of transformers and the Hub's client
        reason = _first_line(error)
        raise InputError(f"{where}: not a sequence classifier that loads: {reason}") from error
    if base.adapters:
        read_adapter_config(base.adapters[-1], head=True)
        config.num_labels = _labels(read_adapter_weights(base.adapters[-1]), where)
        return config
    architectures = config.architectures or ()
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise InputError(
            f"{where}: expected a folder of `rlhf reward-model`, an adapter with a classifier's "
            f"head or a sequence classifier, got {'/'.join(architectures) or 'no architecture'}"
        )
    return config


def _labels(state: Mapping[str, Tensor], where: str) -> int:
    """Return the number of outputs of the head among an adapter's tensors."""
    found = {
        name: tensor
        for name, tensor in state.items()
        if any(f"model.{head}." in name for head in HEADS) and tensor.ndim == 2
    }
    last = [name for name in found if "lora_" not in name and name.endswith("out_proj.weight")]
    names = last or [name for name in found if "lora_" not in name]
    if len(names) != 1:
        raise InputError(
            f"{where}: the adapter has no head of a sequence classifier; a reward model with LoRA "
            f"has task_type SEQ_CLS and its head ({', '.join(HEADS)}) in modules_to_save; of one "
            "that `rlhf reward-model` trained, give the folder that adapter/ is in"
        )
    return int(found[names[0]].shape[0])


def _check_adapters(base: Base, config: Any) -> None:
    """Check that adapters and head fit, on a model without storage."""
    where = f"{SETTING}: {base.name}"
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # of transformers: no such class, or sizes that make no model
        raise InputError(
            f"{where}: its base is no {config.model_type!r} classifier: {_first_line(error)}"
        ) from error
    _merge(base, model, where, change=False)


@torch.no_grad()
def _merge(base: Base, model: Any, where: str, *, change: bool = True) -> None:
    """Merge the adapters, the last of them with its head; or only check that they fit."""
    for folder in base.adapters:
        last = folder == base.adapters[-1]
        config, state = read_adapter_config(folder, head=last), read_adapter_weights(folder)
        problems = check_fit(model, config, state)
        if problems:
            raise InputError([f"{where}: {folder}: {problem}" for problem in problems])
        if change:
            add_lora(model, config, state)
            for name, saved in head_names(model, config).items():
                model.get_parameter(name).copy_(state[saved])


def load_classifier(source: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    """Return model and tokenizer.

    Args:
        source: Folder or Hub id of a sequence classifier, or of an adapter with its head.
        dtype: Type of the weights; adapters are merged in float32.
        revision: Hub revision.

    Raises:
        InputError: It cannot be loaded, or not completely.
    """
    base, where = _find(source, revision, weights=True), f"{SETTING}: {source}"
    config = _read_config(base)
    count_stored(base.folder, where)
    exact = torch.float32 if base.adapters and config.dtype != dtype else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.tokenizer, trust_remote_code=False)
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                base.folder, config=config, dtype=exact, use_safetensors=True,
                output_loading_info=True, trust_remote_code=False,
            )  # fmt: skip
    except Exception as error:  # safetensors, tokenizers and transformers raise their own types
        reason = _first_line(error)
        raise InputError(f"{where}: not a sequence classifier that loads: {reason}") from error
    expected: set[str] = set()
    if base.adapters:  # it brings the head, which its base lacks
        expected = set(head_names(model, read_adapter_config(base.adapters[-1], head=True)))
    missing = sorted(set(info["missing_keys"]) - expected)
    _check_complete(model, tokenizer, missing + sorted(map(str, info["mismatched_keys"])), where)
    if base.adapters:
        _merge(base, model, where)
        cast_weights(model, dtype)
        text = model.config.get_text_config()
        if text.pad_token_id is None:  # as in most language models; TRL sets it for training
            text.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _check_complete(model: Any, tokenizer: Any, wrong: list[str], where: str) -> None:
    """Refuse a classifier that lacks weights or has another's tokenizer."""
    if wrong:
        raise InputError(f"{where}: the checkpoint lacks weights: {', '.join(wrong[:5])}")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{where}: the tokenizer has ids up to {largest}, the model only {rows} embeddings: "
            "they do not belong together"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
