"""Attention over whole rows with transformers' kernels, and of a few queries over a cache.

A family's layer is handed one of the two and never knows whether it is training or decoding.
Queries are (B, H, N, d), keys and values (B, H / G, L, d); G heads share a key. The attention
module of transformers is passed along for `scaling`, `is_causal` and whatever else a kernel reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from rlhf.models.compat import (
    attention_kind,
    register_attention,
    rotate_half,
    sdpa_attention_forward,
)

SDPA_FLOAT32 = "sdpa_float32"

# Maps an attention module, queries, keys and values to (B, N, H·d).
Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ScoreRule:
    """What a layer does to its scores before the softmax, besides hiding later tokens.

    Attributes:
        window: A token sees itself and the `window` - 1 tokens before it; None for all of them.
        cap: Scores s become cap·tanh(s / cap); None for no cap.
    """

    window: int | None = None
    cap: float | None = None


PLAIN_SCORES = ScoreRule()


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values (B, H, L, d), on a CPU in float32 unless decoding one token.

    This also applies without gradients, so that scoring a rollout and training on it agree.
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
    """Run transformers' `sdpa` on `widened` inputs, each (B, H, L, d).

    On a CPU, the backward pass of torch's fused kernel takes twice as long in bfloat16 as in
    float32.
    """
    inputs = widened(query, key, value)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(inputs[0].dtype)
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"].to(inputs[0].dtype)
    output, _ = sdpa_attention_forward(module, *inputs, attention_mask, **options)
    return output.to(query.dtype), None


register_attention(SDPA_FLOAT32, attention)


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores: (B, L) bool to (B, 1, 1, L)."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


def split_heads(states: Tensor, size: int) -> Tensor:
    """Return (B, L, heads·size) as (B, heads, L, size)."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """Squash scores or logits smoothly to between -cap and cap; None leaves them as they are."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which tokens of a row each of them sees within a window.

    Returns:
        (1, 1, length, length) bool; None where the window hides nothing and `is_causal` will do.
    """
    if window is None or window >= length:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place
    return ((back >= 0) & (back < window))[None, None]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings: (B, heads, N, d) with (B or 1, N, d).

    If the tables are narrower, they rotate as many entries of each head and leave the rest.
    """
    width = cos.shape[-1]
    if width < states.shape[-1]:
        return torch.cat([rotate(states[..., :width], cos, sin), states[..., width:]], dim=-1)
    return states * cos[:, None] + rotate_half(states) * sin[:, None]


def full_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Attend over all tokens of a row with the kernel that the model is configured for.

    Args:
        module: Attention module; without a mask, its `is_causal` decides who sees whom.
        queries: (B, H, L, d).
        keys: (B, H / G, K, d).
        values: (B, H / G, K, d).
        mask: (B, 1, L or 1, K) bool, true where a query sees a key; None to rely on `is_causal`
            alone.
        position_bias: (1, H, L, K), added to the scores; None for no bias.
        cap: Cap of the scores, which only the eager kernel can compute; None for no cap.

    Returns:
        (B, L, H·d).
    """
    kernel = AttentionInterface().get_interface(attention_kind(module.config), _eager)
    options: dict[str, Any] = {} if position_bias is None else {"position_bias": position_bias}
    if cap is not None:
        kernel, options = _eager, {**options, "cap": cap}
    heads, _ = kernel(
        module, queries, keys, values, mask, dropout=0.0, scaling=module.scaling, **options
    )
    return heads.flatten(2)


def _eager(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    position_bias: Tensor | None = None,
    cap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention step by step: the kernel of `attn_implementation: eager`."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    scores = capped(queries @ keys.transpose(2, 3) * scaling, cap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and module.is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return (weights @ values).transpose(1, 2), None


def checkpointed(block: Any, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a layer's function; with gradient checkpointing, keep only its arguments.

    Args:
        block: The layer, which transformers tells whether to checkpoint.
        function: Recomputed in the backward pass when checkpointing.
        *arguments: Arguments of `function`.
    """
    if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
        output: Tensor = checkpoint(function, *arguments, use_reentrant=False)
        return output
    return function(*arguments)
