"""Attention: transformers' for bfloat16 models on a CPU, and what decoding does by itself.

torch's fused kernel takes twice as long for the backward pass in bfloat16 as in float32 on a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.compat import register_attention, rotate_half, sdpa_attention_forward

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


register_attention(SDPA_FLOAT32, attention)


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) bool to (B, 1, 1, L), what attention adds to its scores."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


def split_heads(states: Tensor, size: int) -> Tensor:
    """(B, L, heads·size) to (B, heads, L, size)."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. (B, heads, N, d) with (B or 1, N, d)."""
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


def grouped_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of a few queries, of which several heads may share keys.

    Args:
        queries: (B, H, N, d).
        keys: (B, H / G, L, d).
        values: (B, H / G, L, d).
        mask: (B, 1, N, L), bool or added to the scores.

    Returns:
        (B, N, H·d).
    """
    groups, dtype = queries.shape[1] // keys.shape[1], queries.dtype
    queries, keys, values = widened(queries, keys, values)
    # Heads that share keys become further queries of one head: keys are not copied.
    stacked = queries.unflatten(1, (-1, groups)).flatten(2, 3)
    heads = nn.functional.scaled_dot_product_attention(
        stacked, keys, values, attn_mask=mask.repeat(1, 1, groups, 1) if groups > 1 else mask
    )
    return heads.to(dtype).reshape(queries.shape).transpose(1, 2).flatten(2)


def t5_attention(attention: Any, h: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """T5 does not scale its scores. (B, 1, D) to (B, 1, D)."""
    heads = nn.functional.scaled_dot_product_attention(
        split_heads(attention.q(h), attention.key_value_proj_dim),
        keys,
        values,
        attn_mask=bias,
        scale=1.0,
    )
    return attention.o(heads.transpose(1, 2).flatten(2))
