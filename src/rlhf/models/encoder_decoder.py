"""Encoder-decoder models: the prompt goes to the encoder, the response to the decoder.

Common to all of them: when the encoder must run, who sees whom, and the cache. A family only
defines how a layer of the decoder computes (see `rlhf.models.families.t5`); the encoder is
transformers' own.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedTokenizerBase
from typing_extensions import override

from rlhf.data.batching import TokenBatch, chunks
from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.special_tokens import added_ids
from rlhf.models.attention import Attend, checkpointed, full_attention
from rlhf.models.decoding import (
    Cached,
    DecodeState,
    cached_attention,
    cached_responses,
    hide_later,
)
from rlhf.models.family import eos_ids
from rlhf.models.language_model import LanguageModel
from rlhf.models.packing import ResponseGrids, grid_heads
from rlhf.signals import stop_point

# Attention to the prompt: maps an attention module and queries (B, H, N, d) to (B, N, H·d).
AttendPrompt = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class EncodedPrompts(TokenBatch):
    """Prompts with the states that a frozen encoder computed from them.

    Attributes:
        states: (B, L, D).
    """

    states: Tensor

    @override
    def select_rows(self, rows: Tensor | Sequence[int]) -> "EncodedPrompts":
        plain = super().select_rows(rows)
        index = torch.as_tensor(rows, dtype=torch.long, device=self.states.device)
        states = self.states[index, : plain.ids.shape[1]]
        return EncodedPrompts(plain.ids, plain.lengths, states)

    @override
    def to(self, device: torch.device | str) -> "EncodedPrompts":
        plain = super().to(device)
        return EncodedPrompts(plain.ids, plain.lengths, self.states.to(device))

    @override
    def fill_up(self, rows: int, width: int) -> "EncodedPrompts":
        plain = super().fill_up(rows, width)
        more, wider = len(plain) - len(self), plain.ids.shape[1] - self.ids.shape[1]
        states = nn.functional.pad(self.states, (0, 0, 0, wider, 0, more))
        return EncodedPrompts(plain.ids, plain.lengths, states)


class EncoderDecoderModel(LanguageModel):
    """A model of an encoder and a decoder; a family fills in the abstract methods."""

    task_type = "SEQ_2_SEQ_LM"
    auto_class = AutoModelForSeq2SeqLM
    # transformers' class of that name feeds one text to both encoder and decoder.
    has_sequence_classifier = False

    @property
    @abstractmethod
    def layers(self) -> Sequence[Any]:
        """Transformers' modules of the decoder's layers, first to last."""

    @abstractmethod
    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the encoder on (B, P) ids and their mask: (B, P, D)."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Return the input of the decoder's first layer for (B, L) ids: (B, L, D)."""

    @abstractmethod
    def position_bias(self, length: int, columns: int, first: int | Tensor) -> Tensor:
        """Return the positions' bias on the scores of the decoder's self-attention.

        Args:
            length: L, number of queries.
            columns: K, number of keys, from position 0 on.
            first: Position of the first query, an int or (1,).

        Returns:
            (1, H, L, K).
        """

    @abstractmethod
    def layer(self, layer: Any, x: Tensor, attend: Attend, attend_prompt: AttendPrompt) -> Tensor:
        """Compute one layer of the decoder.

        Args:
            layer: transformers' module.
            x: (B, L, D).
            attend: Self-attention.
            attend_prompt: Attention to the encoder's states; gets queries only.

        Returns:
            (B, L, D).
        """

    @abstractmethod
    def prompt_attention(self, layer: Any) -> Any:
        """Return the layer's module of attention to the encoder's states."""

    @abstractmethod
    def prompt_keys_values(self, attention: Any, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of (B, P, D) encoder states: (B, H, P, d) each."""

    @abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """Compute what the LM head reads from the last layer's (B, L, D): (B, L, D)."""

    @classmethod
    @override
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        prefix, suffix = added_ids(tokenizer)
        eos = tokenizer.eos_token_id
        suffix = suffix if suffix[-1:] == (eos,) else (*suffix, eos)
        return PromptLayout(prefix, suffix, False, eos, eos_ids(eos, extra_eos))

    @classmethod
    @override
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        names = "|".join(map(re.escape, suffixes))
        return suffixes if where == "all" else rf"(?={where}\.)(?:.*\.)?(?:{names})"

    @classmethod
    @override
    def position_limit(cls, config: PretrainedConfig) -> int | None:
        return None  # relative positions

    @property
    def start_id(self) -> int:
        """The id that the decoder reads first."""
        start = getattr(self.config, "decoder_start_token_id", None)
        return int(self.config.pad_token_id if start is None else start)

    @override
    def response_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        grids = ResponseGrids.of(responses, groups, len(prompts))
        encoded, mask = self._encode(prompts), prompts.mask[:, None, None]
        length = grids.tokens.width

        def attend(module: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            q, k, v = (grid_heads(grids.tokens, part) for part in (queries, keys, values))
            heads = full_attention(module, q, k, v, position_bias=bias)
            return grids.tokens.collect(heads)[None]

        def attend_prompt(attention: Any, queries: Tensor) -> Tensor:
            keys, values = self.prompt_keys_values(attention, encoded)
            shared = grid_heads(grids.shared, queries)
            return grids.shared.collect(full_attention(attention, shared, keys, values, mask))[None]

        with self.autocast():
            bias = self.position_bias(length, length, 0)
            x = self.embed(grids.tokens.collect(self._shifted(responses))[None])
            for layer in self.layers:
                x = checkpointed(layer, self.layer, layer, x, attend, attend_prompt)
            return grids.tokens.spread(self.final_norm(x)[0])

    @override
    def transformers_logits(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        with self.autocast():
            output = self.module(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                decoder_input_ids=self._shifted(responses),
                use_cache=False,
            )
        return output.logits.float()

    def _shifted(self, responses: TokenBatch) -> Tensor:
        """Return the (B, R+1) ids that the decoder reads."""
        start = responses.ids.new_full((len(responses), 1), self.start_id)
        return torch.cat([start, responses.ids], dim=1)

    @override
    def read_prompts(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[DecodeState, Tensor]:
        encoded = self._encode(prompts)
        with self.autocast():
            pairs = [
                self.prompt_keys_values(self.prompt_attention(layer), encoded)
                for layer in self.layers
            ]
        state = DecodeState.begin(prompts, pairs, groups, max_new_tokens)
        return state, self.decode(state, torch.full_like(state.groups, self.start_id))

    @override
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        with self.autocast():
            bias = hide_later(self.position_bias(1, width, state.column), state.column)
            x = self.embed(tokens[:, None])
            for layer, (keys, values, prompt) in zip(self.layers, state.layers, strict=True):
                attend = cached_responses(keys, values, state.column, bias)
                x = self.layer(layer, x, attend, partial(_attend_cached, prompt))
            return self.final_norm(x)[:, 0]

    @override
    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:
        """Return the prompts, with the encoder's states if the active adapter leaves it alone.

        All roles that leave the encoder alone then reuse these states instead of running it again.

        Args:
            prompts: B prompts.
            batch_size: Rows that the encoder reads at once.
        """
        if self._encoder_changes():
            return prompts
        width = prompts.ids.shape[1]
        parts = []
        with self.inference():
            for rows in chunks(range(len(prompts)), batch_size):
                stop_point()
                encoded = self._encode(prompts.select_rows(rows))
                parts.append(nn.functional.pad(encoded, (0, 0, 0, width - encoded.shape[1])))
        return EncodedPrompts(prompts.ids, prompts.lengths, torch.cat(parts))

    def _encoder_changes(self) -> bool:
        """Return whether the active role has its own encoder states, by training or an adapter."""
        return self.trainable or self.adapters.active_reaches("encoder.")

    def _encode(self, prompts: TokenBatch) -> Tensor:
        """Return the encoder's states: (B, P, D)."""
        if isinstance(prompts, EncodedPrompts) and not self._encoder_changes():
            return prompts.states
        with self.autocast():
            return self.encode(prompts.ids, prompts.mask)


def _attend_cached(prompt: Cached, module: Any, queries: Tensor) -> Tensor:
    """Attend to prompts whose keys and values are already computed."""
    return cached_attention(module, queries, prompt)
