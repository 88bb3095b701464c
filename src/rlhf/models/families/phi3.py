"""Phi 3 (Abdin et al. 2024), also 3.5 and 4: fused projections, rotation of part of each head."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from rlhf.models.attention import split_heads
from rlhf.models.decoder_only import FusedProjections, Places
from rlhf.models.families.mistral import Mistral


class Phi3(FusedProjections, Mistral):
    """Phi 3, 3.5 and 4 without experts, images or sound.

    With `longrope`, rows must fit into the original length, up to which one table applies.
    """

    name = "Phi-3"
    adapter_modules = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

    @override
    def heads(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.self_attn
        heads, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        every = split_heads(attention.qkv_proj(h), attention.head_dim)
        queries, keys, values = every.split([heads, shared, shared], dim=1)
        return self.rotated(layer, queries, places), self.rotated(layer, keys, places), values
