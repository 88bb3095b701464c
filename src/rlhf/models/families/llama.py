"""LLaMA (Touvron et al. 2023): rotary positions, RMSNorm before each part, gated feed-forward."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from rlhf.models.attention import rotate, split_heads
from rlhf.models.decoder_only import DecoderOnlyModel, Places


class Llama(DecoderOnlyModel):
    """LLaMA 1 to 3, and other models with its `model_type`, such as SmolLM 1 and 2."""

    name = "LLaMA"
    adapter_modules: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip

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
    def attention_input(self, layer: Any, x: Tensor) -> Tensor:
        return layer.input_layernorm(x)

    @override
    def queries(self, layer: Any, h: Tensor, places: Places) -> Tensor:
        attention = layer.self_attn
        return self.rotated(layer, split_heads(attention.q_proj(h), attention.head_dim), places)

    @override
    def keys_values(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        keys = split_heads(attention.k_proj(h), attention.head_dim)
        values = split_heads(attention.v_proj(h), attention.head_dim)
        return self.rotated(layer, keys, places), values

    def rotated(self, layer: Any, states: Tensor, places: Places) -> Tensor:  # noqa: ARG002
        """Put positions into queries or keys (B, heads, L, d)."""
        return rotate(states, *places)

    @override
    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(heads)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    @override
    def final_norm(self, x: Tensor) -> Tensor:
        return self.module.model.norm(x)
