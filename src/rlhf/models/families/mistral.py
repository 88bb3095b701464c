"""Mistral (Jiang et al. 2023): LLaMA with a window of attention in all layers."""

from typing import Any

from typing_extensions import override

from rlhf.models.attention import ScoreRule
from rlhf.models.families.llama import Llama


class Mistral(Llama):
    """Mistral 7B and other models with its `model_type`; from version 0.2 on without a window."""

    name = "Mistral"

    @override
    def score_rule(self, layer: Any) -> ScoreRule:
        return ScoreRule(window=self.config.sliding_window)
