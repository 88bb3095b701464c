"""Operations on the weights of a model: fingerprint, cast, and load or save quietly."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

_AT_ONCE = 2**24  # weights copied at once for hashing


def loaded_fingerprint(module: PreTrainedModel) -> str:
    """Return a short hash of all weights, the same in fp32 and bf16, that identifies a base.

    Adapters on the model do not count. Takes about half a second for 10⁹ weights.
    """
    digest = hashlib.sha256()
    seen: dict[int, str] = {}  # weights shared by several modules are read once
    for name, tensor in sorted(module.state_dict().items()):
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        if (first := seen.setdefault(tensor.data_ptr(), name)) != name:
            digest.update(f"{name} is {first}".encode())
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for part in tensor.detach().flatten().split(_AT_ONCE):
            content: Any = part.to("cpu", torch.bfloat16).view(torch.int16).numpy()
            digest.update(content)
    return digest.hexdigest()[:16]


def cast_weights(module: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's weights in place; shared weights stay shared.

    RoPE's frequencies are not weights: loaders keep them in fp32 whatever the weights' dtype, and
    they are restored if the whole model was cast.
    """
    cast: dict[int, torch.Tensor] = {}
    for parameter in module.parameters():
        old = parameter.data
        if old.is_floating_point() and old.dtype != dtype:
            parameter.data = cast.setdefault(old.data_ptr(), old.to(dtype))
    for part in module.modules():
        # Gemma 3 has frequencies for each kind of layer.
        frequencies = [b for name, b in part.named_buffers(recurse=False) if "inv_freq" in name]
        if any(buffer.dtype != torch.float32 for buffer in frequencies):
            rotary: Any = part
            for name, buffer in type(rotary)(rotary.config).named_buffers():
                setattr(rotary, name, buffer.to(frequencies[0].device))


def switch_off_dropout(module: nn.Module) -> None:
    """Set every dropout probability to 0; eval() would also disable checkpointing."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):  # OPT's layerdrop, MPT's attn_dropout_p
                setattr(part, name, 0.0)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice during loading and saving, but not errors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
