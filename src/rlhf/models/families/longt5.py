"""LongT5 (Guo et al. 2022): T5 v1.1 with an encoder whose tokens see their neighborhood.

With transient-global attention they also see a summary of each block of the prompt. Both kinds are
transformers' own; they hide padding, so a prompt has the same states in any batch.
"""

from dataclasses import replace

from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.models.families.t5 import T5
from rlhf.models.family import Shape


class LongT5(T5):
    """LongT5 with local or transient-global attention."""

    name = "LongT5"

    @classmethod
    @override
    def shape(cls, config: PretrainedConfig) -> Shape:
        near = 3 * (int(config.local_radius) + 1)  # a token's block, and one on each side
        block = int(config.global_block_size)
        has_globals = config.encoder_attention_type == "transient-global"
        return replace(
            super().shape(config),
            encoder_keys=lambda prompt: near + (prompt // block if has_globals else 0),
        )
