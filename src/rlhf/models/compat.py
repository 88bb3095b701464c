"""Where models rely on more than the public interfaces of torch, transformers and peft.

Checked with torch 2.13.0, transformers 5.23.0 and peft 0.21.2; after an upgrade, look here first.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import AttentionInterface, Conv1D, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import rotate_half

__all__ = ["rotate_half", "sdpa_attention_forward"]


def attention_kind(config: PretrainedConfig) -> str | None:
    """Return the attention a model computes with: "eager", "sdpa" or a registered name."""
    kind: str | None = config._attn_implementation
    return kind


def set_attention_kind(config: PretrainedConfig, kind: str) -> None:
    """Choose the attention of a model that is already built."""
    config._attn_implementation = kind


def register_attention(kind: str, forward: Callable[..., Any]) -> None:
    """Register a kind of attention with transformers; it takes the same masks as `sdpa`."""
    AttentionInterface.register(kind, forward)
    AttentionMaskInterface.register(kind, sdpa_mask)


def keep_address(tensor: Tensor) -> None:
    """Promise torch.compile that a tensor's memory does not move, so that it is not copied."""
    torch._dynamo.mark_static_address(tensor, guard=False)


def compile_error() -> type[Exception]:
    """Return the exception that torch.compile raises; calling this loads the compiler."""
    error: type[Exception] = torch._dynamo.exc.TorchDynamoException
    return error


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer computes xWᵀ + b, and nothing else, with W stored either way."""
    # Falcon's only adds the bias in a step of its own.
    return type(layer) in (nn.Linear, Conv1D) or type(layer).__name__ == "FalconLinear"


def supports_sdpa(model_class: type[PreTrainedModel]) -> bool:
    """Return whether a class can compute attention with torch's fused kernel."""
    return bool(model_class._supports_sdpa)


def is_stateful(model_class: type[PreTrainedModel]) -> bool:
    """Return whether a class decodes with a recurrent state that cannot be cut or padded."""
    return bool(model_class._is_stateful)


def has_adapters(module: nn.Module) -> bool:
    """Return whether peft has added adapters of any kind to a model."""
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def is_targeted(config: LoraConfig, layer: str) -> bool:
    """Return whether peft would put an adapter on the layer with that name."""
    return bool(check_target_module_exists(config, layer))


def rank_of(config: LoraConfig, layer: str) -> int:
    """Return the rank that peft would give the adapter on the layer with that name."""
    rank: int = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
    return rank


def scale_of(config: LoraConfig, layer: str) -> float:
    """Return the factor by which peft would multiply BA on the layer with that name."""
    pattern = get_pattern_key(config.alpha_pattern, layer)
    alpha, rank = config.alpha_pattern.get(pattern, config.lora_alpha), rank_of(config, layer)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))
