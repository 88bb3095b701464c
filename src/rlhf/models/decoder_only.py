"""Decoder-only models: the response continues the prompt in one causal sequence."""

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from rlhf.data.batching import TokenBatch, join_rows
from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.special_tokens import added_ids
from rlhf.errors import InputError
from rlhf.models.attention import grouped_attention, padding_bias, rotate, split_heads
from rlhf.models.decoding import (
    DecodeState,
    read_llama_token,
)
from rlhf.models.language_model import FORBIDDEN_LOGIT, LanguageModel, eos_ids


class DecoderOnlyModel(LanguageModel):
    """LLaMA: the response continues the prompt in one causal sequence."""

    task_type = "CAUSAL_LM"
    adapter_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @classmethod
    @override
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        # An EOS that the tokenizer puts after a text would end the response before it began.
        prefix, _ = added_ids(tokenizer)
        eos = tokenizer.eos_token_id
        return PromptLayout(prefix, (), True, eos, eos_ids(eos, extra_eos))

    @classmethod
    @override
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        if where == "encoder":
            raise InputError("lora.where: a LLaMA has no encoder; use all or decoder")
        return suffixes

    @override
    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:
        return prompts

    @override
    def response_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        ids = join_rows(prompts, responses)
        # The prompt's last token predicts response token 0.
        offsets = torch.arange(responses.ids.shape[1] + 1, device=ids.device)
        index = (prompts.lengths[:, None] - 1 + offsets).clamp(max=ids.shape[1] - 1)
        return self._states_at(index, ids)

    @override
    def final_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        index = (prompts.lengths + responses.lengths - 1)[:, None]
        return self._states_at(index, join_rows(prompts, responses))[:, 0]

    @override
    def paired_final_states(
        self, prompts: TokenBatch, first: TokenBatch, second: TokenBatch
    ) -> tuple[Tensor, Tensor]:
        # One row: prompt, first, second. The second sees prompt and itself only, and its
        # positions go on from the prompt's end as if the first were not there.
        middle = prompts.lengths + first.lengths
        ids = join_rows(TokenBatch(join_rows(prompts, first), middle), second)
        column = torch.arange(ids.shape[1], device=ids.device)
        in_first = (column >= prompts.lengths[:, None]) & (column < middle[:, None])
        in_second = column >= middle[:, None]
        hidden = in_second[:, :, None] & in_first[:, None, :]
        visible = (column[:, None] >= column) & ~hidden
        positions = column - in_second * first.lengths[:, None]
        # An empty response ends where its prompt does.
        last = torch.where(second.lengths > 0, middle + second.lengths, prompts.lengths) - 1
        states = self._states_at(torch.stack([middle - 1, last], 1), ids, positions, visible)
        return states[:, 0], states[:, 1]

    def _states_at(
        self,
        index: Tensor,
        ids: Tensor,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """States of some columns; the last layer works for these only.

        Args:
            index: (B, N) columns wanted.
            ids: (B, L).
            positions: (B, L) of the tokens; None for 0, 1, 2 and so on.
            visible: (B, L, L) bool, whether row i sees column j; None for causal attention.

        Returns:
            (B, N, D).
        """
        model, length = self.module.model, ids.shape[1]
        columns = torch.arange(length, device=ids.device)
        wanted = index[:, :, None]
        seen = columns <= wanted if visible is None else visible.take_along_dim(wanted, 1)
        mask = None if visible is None else visible[:, None]
        if self.config._attn_implementation == "eager":  # SDPA is causal without being told
            mask = columns[:, None] >= columns if mask is None else mask
            mask = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, FORBIDDEN_LOGIT)
        with self.autocast():
            x = model.embed_tokens(ids)
            rotary = model.rotary_emb(x, columns[None] if positions is None else positions)
            for layer in model.layers[:-1]:
                x = layer(x, attention_mask=mask, position_embeddings=rotary)
            layer = model.layers[-1]
            attention, h = layer.self_attn, layer.input_layernorm(x)
            cos, sin = rotary
            keys = rotate(split_heads(attention.k_proj(h), attention.head_dim), cos, sin)
            values = split_heads(attention.v_proj(h), attention.head_dim)
            cos, sin = (part.expand(len(x), -1, -1).take_along_dim(wanted, 1) for part in rotary)
            queries = split_heads(attention.q_proj(h.take_along_dim(wanted, 1)), attention.head_dim)
            heads = grouped_attention(rotate(queries, cos, sin), keys, values, seen[:, None])
            x = x.take_along_dim(wanted, 1) + attention.o_proj(heads)
            return model.norm(x + layer.mlp(layer.post_attention_layernorm(x)))

    @override
    def read_prompts(self, prompts: TokenBatch, max_new_tokens: int) -> tuple[DecodeState, Tensor]:
        cache = DynamicCache(config=self.config)
        with self.autocast():
            states = self.module.model(
                input_ids=prompts.ids, past_key_values=cache, use_cache=True
            ).last_hidden_state
        last = states[torch.arange(len(prompts), device=states.device), prompts.lengths - 1]
        keys, values = (
            tuple(nn.functional.pad(layer, (0, 0, 0, max_new_tokens)) for layer in layers)
            for layers in zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
        )
        bias, width = padding_bias(prompts.mask, keys[0].dtype), prompts.ids.shape[1]
        column = torch.tensor([width], device=last.device)
        return DecodeState(keys, values, bias, prompts.lengths, column, width), last

    @override
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        with self.autocast():
            return read_llama_token(self.module.model, state, tokens, width)
