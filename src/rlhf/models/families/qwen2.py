"""Qwen 2 (Yang et al. 2024), also 2.5: biased queries, keys and values; windows in some layers."""

from typing import Any

from typing_extensions import override

from rlhf.models.attention import ScoreRule
from rlhf.models.decoder_only import window_of
from rlhf.models.families.llama import Llama


class Qwen2(Llama):
    """Qwen 2 and 2.5 without experts."""

    name = "Qwen2"

    @override
    def score_rule(self, layer: Any) -> ScoreRule:
        return ScoreRule(window=window_of(self.config, layer))
