"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, weights stored transposed."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.models.attention import split_heads
from rlhf.models.decoder_only import FusedProjections, Places


class GPT2(FusedProjections):
    """GPT-2, also with the scale of attention that falls from layer to layer, as in Mistral's."""

    name = "GPT-2"
    adapter_modules = ("c_attn", "c_proj", "c_fc")

    @classmethod
    @override
    def config_problems(cls, config: PretrainedConfig) -> list[str]:
        problems = super().config_problems(config)
        if config.add_cross_attention:
            problems.append("add_cross_attention: the decoder of another model cannot be trained")
        return problems

    @property
    @override
    def layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.module.transformer.h
        return layers

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        return self.module.transformer.wte(ids) + self.module.transformer.wpe(positions), ()

    @override
    def attention(self, layer: Any) -> Any:
        return layer.attn

    @override
    def attention_input(self, layer: Any, x: Tensor) -> Tensor:
        return layer.ln_1(x)

    @override
    def heads(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        parts = layer.attn.c_attn(h).chunk(3, dim=-1)
        queries, keys, values = (split_heads(part, layer.attn.head_dim) for part in parts)
        return queries, keys, values

    @override
    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        x = x + layer.attn.c_proj(heads)
        return x + layer.mlp(layer.ln_2(x))

    @override
    def final_norm(self, x: Tensor) -> Tensor:
        return self.module.transformer.ln_f(x)
