"""Encoder-decoder models whose decoder is our own: who sees whom, and the cache.

A family only defines how a layer of the decoder computes (see `rlhf.models.families.t5`); the
encoder is transformers' own.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from rlhf.data.batching import TokenBatch
from rlhf.models.attention import Attend, checkpointed, full_attention
from rlhf.models.decoding import (
    Cached,
    DecodeState,
    cached_attention,
    cached_responses,
    hide_later,
)
from rlhf.models.encoders import ModelWithEncoder
from rlhf.models.packing import ResponseGrids, grid_heads

# Attention to the prompt: maps an attention module and queries (B, H, N, d) to (B, N, H·d).
AttendPrompt = Callable[[Any, Tensor], Tensor]


class EncoderDecoderModel(ModelWithEncoder):
    """A model of an encoder and a decoder; a family fills in the abstract methods."""

    @property
    @abstractmethod
    def layers(self) -> Sequence[Any]:
        """Transformers' modules of the decoder's layers, first to last."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Return the input of the decoder's first layer for (B, L) ids: (B, L, D)."""

    @abstractmethod
    def position_biases(self, length: int, columns: int, first: int | Tensor) -> list[Tensor]:
        """Return the positions' biases on the scores of the decoder's self-attention.

        Args:
            length: L, number of queries.
            columns: K, number of keys, from position 0 on.
            first: Position of the first query, an int or (1,).

        Returns:
            (1, H, L, K) for each layer, or a single one for all of them.
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

    @override
    def response_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        grids = ResponseGrids.of(responses, groups, len(prompts))
        encoded, mask = self.encoded(prompts), prompts.mask[:, None, None]
        length = grids.tokens.width

        def attend(
            bias: Tensor, module: Any, queries: Tensor, keys: Tensor, values: Tensor
        ) -> Tensor:
            q, k, v = (grid_heads(grids.tokens, part) for part in (queries, keys, values))
            heads = full_attention(module, q, k, v, position_bias=bias)
            return grids.tokens.collect(heads)[None]

        def attend_prompt(attention: Any, queries: Tensor) -> Tensor:
            keys, values = self.prompt_keys_values(attention, encoded)
            shared = grid_heads(grids.shared, queries)
            return grids.shared.collect(full_attention(attention, shared, keys, values, mask))[None]

        with self.autocast():
            biases = self.position_biases(length, length, 0)
            x = self.embed(grids.tokens.collect(self.decoder_ids(responses))[None])
            for layer, bias in zip(self.layers, self._per_layer(biases), strict=True):
                own = partial(attend, bias)
                x = checkpointed(layer, self.layer, layer, x, own, attend_prompt)
            return grids.tokens.spread(self.final_norm(x)[0])

    def _per_layer(self, biases: list[Tensor]) -> list[Tensor]:
        """Return a bias for each layer, given those of `position_biases`."""
        return biases if len(biases) > 1 else biases * len(self.layers)

    @override
    def read_prompts(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[DecodeState, Tensor]:
        encoded = self.encoded(prompts)
        with self.autocast():
            pairs = [
                self.prompt_keys_values(self.prompt_attention(layer), encoded)
                for layer in self.layers
            ]
        state = DecodeState.begin(prompts, pairs, groups, max_new_tokens)
        return state, self.decode(state, torch.full_like(state.groups, *self.start_ids))

    @override
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        with self.autocast():
            biases = [
                hide_later(bias, state.column)
                for bias in self.position_biases(1, width, state.column)
            ]
            x = self.embed(tokens[:, None])
            for layer, bias, (keys, values, prompt) in zip(
                self.layers, self._per_layer(biases), state.layers, strict=True
            ):
                attend = cached_responses(keys, values, state.column, bias)
                x = self.layer(layer, x, attend, partial(_attend_cached, prompt))
            return self.final_norm(x)[:, 0]


def _attend_cached(prompt: Cached, module: Any, queries: Tensor) -> Tensor:
    """Attend to prompts whose keys and values are already computed."""
    return cached_attention(module, queries, prompt)
