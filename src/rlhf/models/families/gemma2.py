"""Gemma 2 (Gemma Team 2024): norms after each part too, windows in turn, caps."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.models.attention import ScoreRule, capped
from rlhf.models.compat import set_attention_kind
from rlhf.models.decoder_only import window_of
from rlhf.models.families.llama import Llama
from rlhf.models.family import Shape


class Gemma(Llama):
    """What Gemma 2 and 3 share.

    Their embedding modules scale what they return, and their norms multiply by 1 + weight.
    """

    @override
    def score_rule(self, layer: Any) -> ScoreRule:
        return ScoreRule(window_of(self.config, layer))

    @override
    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        x = x + layer.post_attention_layernorm(layer.self_attn.o_proj(heads))
        fed = layer.mlp(layer.pre_feedforward_layernorm(x))
        return x + layer.post_feedforward_layernorm(fed)

    @override
    def finish_logits(self, logits: Tensor) -> Tensor:
        return capped(logits, self.config.final_logit_softcapping)


class Gemma2(Gemma):
    """Gemma 2."""

    name = "Gemma 2"

    def __init__(self, module: Any, *arguments: Any, **options: Any) -> None:
        # By default, older versions of transformers (5.17) use a kernel that leaves out the cap.
        set_attention_kind(module.config, "eager")
        super().__init__(module, *arguments, **options)

    @override
    def score_rule(self, layer: Any) -> ScoreRule:
        return ScoreRule(window_of(self.config, layer), self.config.attn_logit_softcapping)

    @classmethod
    @override
    def shape(cls, config: PretrainedConfig) -> Shape:
        # Capped scores are stored, and so is what the softmax makes of them, in fp32.
        shape, heads = super().shape(config), int(config.num_attention_heads)
        return Shape(0, shape.decoder_layers, kept_matrices=3 * heads, cached=shape.cached)
