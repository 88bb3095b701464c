"""GPT-NeoX (Black et al. 2022) and Pythia: rotary positions in part of each head, LayerNorm."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from rlhf.models.attention import rotate, split_heads
from rlhf.models.decoder_only import FusedProjections, Places


class GPTNeoX(FusedProjections):
    """GPT-NeoX; its feed-forward part reads the layer's input beside attention, or comes after."""

    name = "GPT-NeoX"
    adapter_modules = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

    @property
    @override
    def layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.module.gpt_neox.layers
        return layers

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        x = self.module.gpt_neox.embed_in(ids)
        return x, self.module.gpt_neox.rotary_emb(x, positions)

    @override
    def attention(self, layer: Any) -> Any:
        return layer.attention

    @override
    def attention_input(self, layer: Any, x: Tensor) -> Tensor:
        return layer.input_layernorm(x)

    @override
    def heads(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.attention
        fused = split_heads(attention.query_key_value(h), 3 * attention.head_size)
        queries, keys, values = fused.chunk(3, dim=-1)
        return _rotated(queries, places), _rotated(keys, places), values

    @override
    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        attended = x + layer.attention.dense(heads)
        read = x if layer.use_parallel_residual else attended
        return attended + layer.mlp(layer.post_attention_layernorm(read))

    @override
    def final_norm(self, x: Tensor) -> Tensor:
        return self.module.gpt_neox.final_layer_norm(x)


def _rotated(states: Tensor, places: Places) -> Tensor:
    """Put positions into the first part of each head of (B, H, L, d)."""
    width = places[0].shape[-1]
    return torch.cat([rotate(states[..., :width], *places), states[..., width:]], dim=-1)
