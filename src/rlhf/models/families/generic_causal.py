"""Any causal model without a family of its own, computed by transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from typing_extensions import override

from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError
from rlhf.models.causal import CausalModel, joined_rows
from rlhf.models.compat import supports_sdpa
from rlhf.models.family import Shape, one_table_limit
from rlhf.models.generic import CacheState, GenericModel, takes


class GenericCausal(GenericModel, CausalModel):
    """A causal model of transformers, whatever its layers compute."""

    name = "generic causal model"
    classes = MODEL_FOR_CAUSAL_LM_MAPPING
    group_note = "prompts of a group are read once per response"

    @classmethod
    @override
    def shape(cls, config: PretrainedConfig) -> Shape:
        layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        shared = _key_heads(config) or heads
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        # Without a fused kernel, autograd keeps the scores and their softmax.
        kept = 0 if supports_sdpa(cls.classes[type(config)]) else 2 * heads
        return Shape(0, layers, kept, 2 * layers * shared * size, shares_prompts=False)

    @classmethod
    @override
    def position_limit(cls, config: PretrainedConfig) -> int | None:
        names = ("max_position_embeddings", "max_seq_len")  # the latter is MPT's
        limits = [getattr(config, name, None) for name in names]
        limits.append(one_table_limit(config))
        return min((int(limit) for limit in limits if limit), default=None)

    @override
    def response_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        every = prompts if groups is None else prompts.select_rows(groups)
        columns, rows = joined_rows(every, responses)
        positions = torch.arange(rows.ids.shape[1], device=rows.ids.device).expand_as(rows.ids)
        with self.autocast():
            # Padding on the right sees all before it, and nothing sees the padding.
            states: Tensor = self._run(rows.ids, rows.mask.long(), positions, use_cache=False)[0]
        return states.take_along_dim(columns[:, :, None], 1)

    @override
    def read_prompts(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[CacheState, Tensor]:
        every = prompts if groups is None else prompts.select_rows(groups)
        # Padded on the left, as transformers' own generation is: windows and ALiBi count columns of
        # the cache, so no gap may be left between a prompt and its response.
        columns = torch.arange(every.ids.shape[1], device=every.ids.device)
        positions = columns - (len(columns) - every.lengths[:, None])
        mask, positions = positions >= 0, positions.clamp(min=0)
        with self.autocast():
            states, cache = self._run(
                every.ids.gather(1, positions), mask.long(), positions, use_cache=True
            )
        if cache is None:
            raise InputError(
                f"model: {self.config.model_type!r} models keep no key-value cache, so responses "
                "cannot be generated"
            )
        return CacheState(cache, mask, every.lengths), states[:, -1]

    @override
    def read_token(self, state: CacheState, tokens: Tensor, width: int) -> Tensor:
        positions = (state.lengths + state.used)[:, None]
        with self.autocast():
            states, _ = self._run(
                tokens[:, None],
                state.seen(),
                positions,
                use_cache=True,
                past_key_values=state.cache,
            )
        return states[:, -1]

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> tuple[Any, Any]:
        """Return the (B, L, D) states that the LM head reads, and the cache."""
        body = self.body
        if takes(type(body), "position_ids"):
            options["position_ids"] = positions
        output = body(input_ids=ids, attention_mask=mask, **options)
        return output.last_hidden_state, output.past_key_values


def _key_heads(config: PretrainedConfig) -> int | None:
    """Return how many heads have keys of their own in the cache; None for all of them."""
    # GPTBigCode and Falcon 7B; Falcon's later models share keys, but cache a copy for every head.
    if getattr(config, "multi_query", False):
        return None if getattr(config, "new_decoder_architecture", False) else 1
    shared: int | None = getattr(config, "num_key_value_heads", None)
    return shared
