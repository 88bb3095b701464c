"""Qwen 3 (Yang et al. 2025): Qwen 2 with norms of each head's queries and keys."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from rlhf.models.attention import rotate, split_heads
from rlhf.models.decoder_only import Places
from rlhf.models.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Qwen 3 without experts."""

    name = "Qwen3"

    @override
    def queries(self, layer: Any, h: Tensor, places: Places) -> Tensor:
        attention = layer.self_attn
        queries = split_heads(attention.q_proj(h), attention.head_dim)
        return rotate(attention.q_norm(queries), *places)

    @override
    def keys_values(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        keys = attention.k_norm(split_heads(attention.k_proj(h), attention.head_dim))
        return rotate(keys, *places), split_heads(attention.v_proj(h), attention.head_dim)
