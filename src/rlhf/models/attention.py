"""Attention for training a bfloat16 model on a CPU.

torch's fused kernel takes twice as long for the backward pass in bfloat16 as in float32 there.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SDPA_FLOAT32 = "sdpa_float32"


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, L, d), in float32 on a CPU unless a single token is decoded.

    Without gradients too, so that scoring a rollout and training on it see the same numbers.
    """
    if tensors[0].device.type == "cpu" and tensors[0].shape[2] > 1:
        return tuple(tensor.float() for tensor in tensors)
    return tensors


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' `sdpa` on `widened` inputs. (B, H, L, d) each."""
    inputs = widened(query, key, value)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(inputs[0].dtype)
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"].to(inputs[0].dtype)
    output, _ = sdpa_attention_forward(module, *inputs, attention_mask, **options)
    return output.to(query.dtype), None


AttentionInterface.register(SDPA_FLOAT32, attention)
AttentionMaskInterface.register(SDPA_FLOAT32, sdpa_mask)
