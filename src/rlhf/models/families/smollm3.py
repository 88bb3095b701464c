"""SmolLM 3 (Bakouch et al. 2025): LLaMA in which some layers do not rotate queries and keys."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from rlhf.models.decoder_only import Places
from rlhf.models.families.qwen2 import Qwen2


class SmolLM3(Qwen2):
    """SmolLM 3; SmolLM 1 and 2 are of `model_type` llama."""

    name = "SmolLM3"

    @override
    def rotated(self, layer: Any, states: Tensor, places: Places) -> Tensor:
        return super().rotated(layer, states, places) if layer.self_attn.use_rope else states
