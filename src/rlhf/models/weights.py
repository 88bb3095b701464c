"""What can be said and done to a model's weights as they are."""

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel


def fingerprint(module: PreTrainedModel) -> str:
    """A short hash of the weights, the same in fp32 and bf16: tells one base from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def switch_off_dropout(module: nn.Module) -> None:
    """Sets every dropout probability to 0; eval() would also disable checkpointing."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
