"""Merge an adapter into its base without a second model: layer by layer, shard by shard.

The model's device never holds more than one merged layer. The written tensors pass through CPU
memory, one file of the checkpoint at a time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.files.text import write_text
from rlhf.models import logprobs
from rlhf.models.language_model import LanguageModel
from rlhf.models.lora import LoRALinear

# Size of one weight file; writing it takes about twice as much CPU memory.
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint that is only made when it is written.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        make: Returns the tensor, on the CPU.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return self.shape.numel() * self.dtype.itemsize


def plain_weights(lm: LanguageModel, adapter: str | None) -> dict[str, Weight]:
    """Return the model's weights in its dtype by their plain names, with an adapter folded in.

    Tied weights appear once, under their first name.
    """
    layers = {
        f"{name}.base_layer.weight": part
        for name, part in lm.module.named_modules()
        if adapter is not None and isinstance(part, LoRALinear) and adapter in part.lora_A
    }
    weights: dict[str, Weight] = {}
    seen: set[int] = set()
    for name, tensor in lm.module.state_dict().items():
        if ".lora_" in name or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        # A mask that some old class keeps in its files stays what it is.
        dtype = lm.dtype if tensor.is_floating_point() else tensor.dtype
        make = _maker(tensor, dtype, layers.get(name), adapter)
        weights[name.replace(".base_layer.", ".")] = Weight(tensor.shape, dtype, make)
    return weights


def _maker(
    tensor: Tensor, dtype: torch.dtype, layer: LoRALinear | None, adapter: str | None
) -> Callable[[], Tensor]:
    if layer is None or adapter is None:
        return lambda: tensor.detach().cpu().to(dtype).contiguous()
    return lambda: layer.merged_weight(adapter, dtype, torch.device("cpu"))


@torch.no_grad()
def write_weights(weights: Mapping[str, Weight], folder: Path) -> None:
    """Write a checkpoint's tensors with the names and files that transformers expects."""
    for old in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    shards = _shards(weights)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        tensors = {name: weights[name].make() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        sizes = {
            "total_parameters": sum(weight.shape.numel() for weight in weights.values()),
            "total_size": sum(weight.bytes for weight in weights.values()),
        }
        index = {"metadata": sizes, "weight_map": files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_text(folder / "model.safetensors.index.json", text)


def _shards(weights: Mapping[str, Weight]) -> list[list[str]]:
    """Group names into shards of at most `SHARD_BYTES`; a larger tensor gets its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.bytes
    return shards


@torch.no_grad()
def kl_of_merging(
    lm: LanguageModel, adapter: str, prompts: TokenBatch, responses: TokenBatch
) -> float:
    """Return the mean KL(merged‖adapter) per response token, in nats.

    Each layer is merged when a forward pass reaches it, and logits are made in chunks of tokens.
    """
    mask = responses.mask
    with lm.using(adapter):
        apart = lm.response_states(prompts, responses)[:, :-1][mask]
    with lm.adapters.merging(adapter):
        merged = lm.response_states(prompts, responses)[:, :-1][mask]
    rows = max(1, logprobs.LOGITS_PER_CHUNK_CPU // lm.vocab_size)
    total = 0.0
    for some, others in zip(apart.split(rows), merged.split(rows), strict=True):
        with lm.adapters.merging(adapter):
            p = lm.logits(others).log_softmax(-1)
        with lm.using(adapter):
            difference = lm.logits(some).log_softmax(-1).neg_().add_(p)
        total += float(difference.mul_(p.exp_()).sum(dtype=torch.float64))
    return total / len(apart)
