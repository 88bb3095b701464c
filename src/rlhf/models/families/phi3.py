"""Phi 3 (Abdin et al. 2024), also 3.5 and 4: fused projections, rotation of part of each head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from rlhf.models.attention import ScoreRule, rotate, split_heads
from rlhf.models.decoder_only import FusedProjections, Places


class Phi3(FusedProjections):
    """Phi 3, 3.5 and 4 without experts, images or sound.

    With `longrope`, rows must fit into the original length, up to which one table applies.
    """

    name = "Phi-3"
    adapter_modules = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

    @property
    @override
    def layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.module.model.layers
        return layers

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        x = self.module.model.embed_tokens(ids)
        return x, self.module.model.rotary_emb(x, positions)

    @override
    def attention(self, layer: Any) -> Any:
        return layer.self_attn

    @override
    def score_rule(self, layer: Any) -> ScoreRule:
        return ScoreRule(window=self.config.sliding_window)

    @override
    def attention_input(self, layer: Any, x: Tensor) -> Tensor:
        return layer.input_layernorm(x)

    @override
    def heads(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.self_attn
        heads, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        every = split_heads(attention.qkv_proj(h), attention.head_dim)
        queries, keys, values = every.split([heads, shared, shared], dim=1)
        return rotate(queries, *places), rotate(keys, *places), values

    @override
    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(heads)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    @override
    def final_norm(self, x: Tensor) -> Tensor:
        return self.module.model.norm(x)
