"""Causal models whose layers their family defines.

Common to all of them: which tokens a row holds, who sees whom, which tokens' states are wanted, and
the cache. A family only defines, in a few functions that know nothing of this, how a layer computes
(see `rlhf.models.families.llama`).

Shape letters: L tokens of a row, N of them wanted; others as in `language_model`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.data.batching import TokenBatch
from rlhf.models.attention import (
    PLAIN_SCORES,
    Attend,
    ScoreRule,
    causal_mask,
    checkpointed,
    full_attention,
)
from rlhf.models.causal import CausalModel
from rlhf.models.decoding import Cached, DecodeState, cached_responses, hide_later, hide_outside
from rlhf.models.family import Shape, one_table_limit
from rlhf.models.packing import Grid, SharedPrompts, Wanted, grid_heads

# What layers need to know about the tokens' positions: tensors of (B or 1, L, any).
Places = tuple[Tensor, ...]
# The values of `layer_types` in config.json that are supported.
FULL, SLIDING = "full_attention", "sliding_attention"


class DecoderOnlyModel(CausalModel):
    """A model of one causal stack of layers; a family fills in the abstract methods.

    A layer is `attention_input`, from which `queries` and `keys_values` are made, then attention,
    then `after_attention`. Each of these gets the states of some tokens and returns as many.
    `score_rule` and `projections` are for families whose layers differ from that.
    """

    has_sequence_classifier = True

    @property
    @abstractmethod
    def layers(self) -> Sequence[Any]:
        """Transformers' modules of the layers, first to last."""

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Places]:
        """Return the first layer's input, and what all layers need to know about positions.

        Args:
            ids: (B, L).
            positions: (B or 1, L) of the tokens in their sequence, from 0.

        Returns:
            (B, L, D), and any number of tensors.
        """

    @abstractmethod
    def attention(self, layer: Any) -> Any:
        """Return the attention module, whose settings transformers' kernels read."""

    @abstractmethod
    def attention_input(self, layer: Any, x: Tensor) -> Tensor:
        """Compute the (B, L, D) input of queries, keys and values: usually a norm of x."""

    @abstractmethod
    def queries(self, layer: Any, h: Tensor, places: Places) -> Tensor:
        """Compute queries from (B, L, D): (B, H, L, d)."""

    @abstractmethod
    def keys_values(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Compute keys and values from (B, L, D): (B, H / G, L, d) each."""

    def score_rule(self, layer: Any) -> ScoreRule:  # noqa: ARG002
        """Return the layer's attention window and the cap of its scores; most have neither."""
        return PLAIN_SCORES

    def projections(
        self, layer: Any, h: Tensor, places: Places, wanted: slice | Tensor = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the wanted tokens' queries, and all keys and values, from (B, L, D)."""
        keys, values = self.keys_values(layer, h, places)
        there = tuple(part[:, wanted] for part in places)
        return self.queries(layer, h[:, wanted], there), keys, values

    @abstractmethod
    def after_attention(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        """Compute the rest of the layer.

        Args:
            layer: The layer.
            x: (B, L, D), the layer's input.
            heads: (B, L, H·d), the output of attention.

        Returns:
            (B, L, D).
        """

    @abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """Compute what the LM head reads from the last layer's (B, L, D): (B, L, D)."""

    @classmethod
    @override
    def shape(cls, config: PretrainedConfig) -> Shape:
        layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        # Causal kernels store no attention matrix.
        return Shape(0, layers, kept_matrices=0, cached=2 * layers * shared * size)

    @classmethod
    @override
    def position_limit(cls, config: PretrainedConfig) -> int | None:
        limits = (int(config.max_position_embeddings), one_table_limit(config))
        return min(limit for limit in limits if limit)

    @classmethod
    @override
    def config_problems(cls, config: PretrainedConfig) -> list[str]:
        heads, hidden = int(config.num_attention_heads or 0), int(config.hidden_size or 0)
        problems: list[str] = []
        if hidden % heads and not getattr(config, "head_dim", None):
            problems.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        shared = getattr(config, "num_key_value_heads", None) or heads
        if heads % shared:
            problems.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {shared}"
            )
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := sorted(kinds - {FULL, SLIDING}):
            problems.append(
                f"layer_types: {', '.join(unknown)} is not supported; expected {FULL} or {SLIDING}"
            )
        if SLIDING in kinds and not config.sliding_window:
            problems.append(f"layer_types: {SLIDING} needs a sliding_window")
        if getattr(config, "use_bidirectional_attention", None):
            problems.append(
                "use_bidirectional_attention: a model that generates reads forward only"
            )
        return problems

    @override
    def response_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        row = SharedPrompts.of(prompts, responses, groups, self._windows)
        return row.responses.tokens.spread(self._states(row, row.every_state))

    @override
    def final_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        row = SharedPrompts.of(prompts, responses, groups, self._windows)
        return self._states(row, row.last_states)

    @property
    def _rules(self) -> list[ScoreRule]:
        return [self.score_rule(layer) for layer in self.layers]

    @property
    def _windows(self) -> list[int]:
        """All different windows of layers."""
        return sorted({rule.window for rule in self._rules if rule.window is not None})

    def _layer(self, layer: Any, x: Tensor, places: Places, attend: Attend) -> Tensor:
        """Compute one layer for all of its tokens: (B, L, D)."""
        h = self.attention_input(layer, x)
        heads = attend(self.attention(layer), *self.projections(layer, h, places))
        return self.after_attention(layer, x, heads)

    def _last_layer(
        self, layer: Any, x: Tensor, places: Places, row: SharedPrompts, wanted: Wanted
    ) -> Tensor:
        """Compute the last layer for the wanted tokens alone: (1, N, D) to (1, N wanted, D)."""
        h = self.attention_input(layer, x)
        parts = self.projections(layer, h, places, wanted.items)
        rule = self.score_rule(layer)
        heads = row.attend_after_prompt(self.attention(layer), *parts, wanted, rule)
        return self.after_attention(layer, x[:, wanted.items], heads)

    def _states(self, row: SharedPrompts, wanted: Wanted) -> Tensor:
        """Compute the states of the wanted tokens: (N wanted, D)."""
        with self.autocast():
            x, places = self.embed(row.ids, row.positions)
            for layer in self.layers[:-1]:
                attend = partial(row.attend, rule=self.score_rule(layer))
                x = checkpointed(layer, self._layer, layer, x, places, attend)
            return self.final_norm(self._last_layer(self.layers[-1], x, places, row, wanted))[0]

    @override
    def read_prompts(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[DecodeState, Tensor]:
        pairs: list[tuple[Tensor, Tensor]] = []
        grid = Grid.of_lengths(prompts.lengths, prompts.ids.shape[1])
        device = prompts.ids.device
        masks = {window: causal_mask(grid.width, window, device) for window in self._windows}

        def attend(
            module: Any, queries: Tensor, keys: Tensor, values: Tensor, rule: ScoreRule
        ) -> Tensor:
            pairs.append((grid_heads(grid, keys), grid_heads(grid, values)))
            mask = None if rule.window is None else masks[rule.window]
            q = grid_heads(grid, queries)
            return grid.collect(full_attention(module, q, *pairs[-1], mask, cap=rule.cap))[None]

        columns = torch.arange(grid.width, device=device).expand(grid.rows, -1)
        with self.autocast():
            x, places = self.embed(grid.collect(prompts.ids)[None], grid.collect(columns)[None])
            for layer in self.layers:
                x = self._layer(layer, x, places, partial(attend, rule=self.score_rule(layer)))
            last = self.final_norm(x[:, prompts.lengths.cumsum(0) - 1])[0]
        state = DecodeState.begin(prompts, pairs, groups, max_new_tokens)
        return state, last[state.groups]

    @override
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        # Positions continue from the length of each row's own prompt.
        positions = (state.prompt_lengths + state.column)[:, None]
        bias = hide_later(state.prompt_bias.new_zeros(1, 1, 1, width), state.column)
        rules = self._rules
        windows = {rule.window for rule in rules}
        sights = {window: hide_outside(window, state, bias) for window in windows}
        with self.autocast():
            x, places = self.embed(tokens[:, None], positions)
            for layer, rule, (keys, values, prompt) in zip(
                self.layers, rules, state.layers, strict=True
            ):
                own, before = sights[rule.window]
                seen = Cached(prompt.keys, prompt.values, before, prompt.places, rule.cap)
                attend = cached_responses(keys, values, state.column, own, seen, rule.cap)
                x = self._layer(layer, x, places, attend)
            return self.final_norm(x)[:, 0]


class FusedProjections(DecoderOnlyModel):
    """A model in which one matrix computes queries, keys and values."""

    @abstractmethod
    def heads(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries (B, H, L, d), keys and values (B, H / G, L, d) from (B, L, D)."""

    @override
    def queries(self, layer: Any, h: Tensor, places: Places) -> Tensor:
        return self.heads(layer, h, places)[0]

    @override
    def keys_values(self, layer: Any, h: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        return self.heads(layer, h, places)[1:]

    @override
    def projections(
        self, layer: Any, h: Tensor, places: Places, wanted: slice | Tensor = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = self.heads(layer, h, places)
        return queries[:, :, wanted], keys, values


def window_of(config: PretrainedConfig, layer: Any) -> int | None:
    """Return the window of a layer whose attention `layer_types` in config.json describes."""
    if config.layer_types[layer.self_attn.layer_idx] != SLIDING:
        return None
    return int(config.sliding_window)
