"""mT5 (Xue et al. 2021): T5 v1.1 for many languages."""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.models.families.t5 import T5


class MT5(T5):
    """MT5, whose LM head is not the embedding and reads unscaled states."""

    name = "mT5"

    @override
    def scale_for_head(self, states: Tensor) -> Tensor:
        return states

    @classmethod
    @override
    def head_is_tied(cls, config: PretrainedConfig) -> bool:
        # transformers 5 always sets tie_word_embeddings, and unties what a checkpoint stores twice,
        # as all published ones do.
        return False

    @classmethod
    @override
    def saved_fields(cls, config: PretrainedConfig) -> dict[str, Any]:
        # transformers 4 scales the outputs of a model with tie_word_embeddings=true.
        return {"tie_word_embeddings": False}
