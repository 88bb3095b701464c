"""Gemma 3 (Gemma Team 2025), text only: Gemma 2 with norms of queries and keys instead of a cap.

Layers with a window rotate by other frequencies than those without.
"""

from typing import Any

from torch import Tensor
from typing_extensions import override

from rlhf.models.attention import rotate, split_heads
from rlhf.models.decoder_only import Places
from rlhf.models.families.gemma2 import Gemma


class Gemma3(Gemma):
    """Gemma 3 of 270M and 1B, and the text part of others as a model of its own."""

    name = "Gemma 3"

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        x, rotary = self.module.model.embed_tokens(ids), self.module.model.rotary_emb
        return x, tuple(part for kind in self._kinds for part in rotary(x, positions, kind))

    @override
    def queries(self, layer: Any, h: Tensor, places: Places) -> Tensor:
        attention = layer.self_attn
        queries = attention.q_norm(split_heads(attention.q_proj(h), attention.head_dim))
        return rotate(queries, *self._table(layer, places))

    @override
    def keys_values(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        keys = attention.k_norm(split_heads(attention.k_proj(h), attention.head_dim))
        values = split_heads(attention.v_proj(h), attention.head_dim)
        return rotate(keys, *self._table(layer, places)), values

    @property
    def _kinds(self) -> list[str]:
        return sorted(set(self.config.layer_types))

    def _table(self, layer: Any, places: Places) -> Places:
        """Return cos and sin of the layer's kind."""
        kind = self.config.layer_types[layer.self_attn.layer_idx]
        first = 2 * self._kinds.index(kind)
        return places[first : first + 2]
