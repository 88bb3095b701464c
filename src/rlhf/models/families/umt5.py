"""umT5 (Chung et al. 2023): mT5 with a bias of positions in each layer."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.models.families.mt5 import MT5


class UMT5(MT5):
    """UMT5."""

    name = "umT5"

    @override
    def position_biases(self, length: int, columns: int, first: int | Tensor) -> list[Tensor]:
        return [
            layer.layer[0].SelfAttention.compute_bias(length, columns, past_seen_tokens=first)
            for layer in self.layers
        ]

    @override
    def scale_for_head(self, states: Tensor) -> Tensor:
        # transformers 5 always sets tie_word_embeddings, and so scales for heads of their own too.
        return states * self.config.d_model**-0.5 if self.config.tie_word_embeddings else states

    @classmethod
    @override
    def saved_fields(cls, config: PretrainedConfig) -> dict[str, Any]:
        return {}
