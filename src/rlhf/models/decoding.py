"""Decode one token at a time: the cache, attention over it, and compiling a step.

Shape letters: G prompts, n responses to a prompt at most, B rows (responses), P prompt tokens,
C columns of a response's cache, D hidden; H heads, K heads with keys of their own, d per head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError
from rlhf.models.attention import Attend, capped, padding_bias
from rlhf.models.compat import compile_error, keep_address
from rlhf.models.packing import Grid

Layers = tuple[Tensor, ...]


class Decoding(Protocol):
    """A batch in the middle of decoding, whatever its cache; `LanguageModel.decode` changes it.

    Attributes:
        used: Tokens of each response read so far.
        fixed: Whether shapes and addresses must not change.
    """

    used: int
    fixed: bool

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, (B,) bool."""
        ...

    def advance(self) -> None:
        """Count one more token of each response."""
        ...


@dataclass
class DecodeState:
    """A batch in the middle of decoding; `LanguageModel.decode` changes it in place.

    Keys and values are (rows, heads, columns, head size) per layer. Those of a prompt exist once,
    whatever the number of its responses.

    Attributes:
        keys: Of self-attention among a response's tokens: B rows, room for the whole response.
        values: Likewise.
        prompt_keys: Of attention to the prompt (or the encoder's states): G rows.
        prompt_values: Likewise.
        prompt_bias: (G, 1, 1, P), 0 on the prompt's tokens and the most negative number on padding.
        prompt_lengths: (B,) tokens of each response's prompt.
        groups: (B,) index of each response's prompt.
        places: Grid (G, n) of the responses.
        column: (1,) where the next token's key and value go, on the device.
        used: The same number on the host.
        fixed: Whether shapes and addresses must not change.
    """

    keys: Layers
    values: Layers
    prompt_keys: Layers
    prompt_values: Layers
    prompt_bias: Tensor
    prompt_lengths: Tensor
    groups: Tensor
    places: Grid
    column: Tensor
    used: int = 0
    fixed: bool = False

    @classmethod
    def begin(
        cls,
        prompts: TokenBatch,
        pairs: Sequence[tuple[Tensor, Tensor]],
        groups: Tensor | None,
        max_new_tokens: int,
    ) -> "DecodeState":
        """Return the state after reading the prompts, before any token of a response.

        Args:
            prompts: G prompts.
            pairs: Their keys and values per layer.
            groups: (B,) index of each response's prompt; None for one response to each.
            max_new_tokens: C.
        """
        device, count = prompts.ids.device, len(prompts)
        groups = torch.arange(count, device=device) if groups is None else groups.to(device)
        keys, values = (
            tuple(part.contiguous() for part in side) for side in zip(*pairs, strict=True)
        )
        shape = (len(groups), keys[0].shape[1], max_new_tokens, keys[0].shape[3])
        return cls(
            tuple(key.new_zeros(shape) for key in keys),
            tuple(value.new_zeros(shape) for value in values),
            keys,
            values,
            padding_bias(prompts.mask, keys[0].dtype),
            prompts.lengths[groups],
            groups,
            Grid.of_groups(groups, count),
            torch.zeros(1, dtype=torch.long, device=device),
        )

    @property
    def columns(self) -> int:
        """C, of which the first `used` are filled."""
        return self.keys[0].shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the state, in a fixed order."""
        values = (getattr(self, field.name) for field in fields(self))
        groups = (value if isinstance(value, tuple) else (value,) for value in values)
        return [value for group in groups for value in group if isinstance(value, Tensor)]

    @property
    def layers(self) -> "Iterator[tuple[Tensor, Tensor, Cached]]":
        """Keys and values of the responses, and the prompts' part of the cache, layer by layer."""
        parts = (self.keys, self.values, self.prompt_keys, self.prompt_values)
        for keys, values, prompt_keys, prompt_values in zip(*parts, strict=True):
            yield keys, values, Cached(prompt_keys, prompt_values, self.prompt_bias, self.places)

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, (B,) bool, and the prompts that they need."""
        self.keys, self.values = (
            tuple(layer[rows] for layer in side) for side in (self.keys, self.values)
        )
        self.prompt_lengths = self.prompt_lengths[rows]
        needed, self.groups = self.groups[rows].unique(return_inverse=True)
        if len(needed) < len(self.prompt_bias):
            self.prompt_keys, self.prompt_values = (
                tuple(layer[needed] for layer in side)
                for side in (self.prompt_keys, self.prompt_values)
            )
            self.prompt_bias = self.prompt_bias[needed]
        self.places = Grid.of_groups(self.groups, len(needed))

    def advance(self) -> None:
        """Move on to the next column."""
        self.column += 1
        self.used += 1


# Reads (B,) tokens, looking at as many columns of the state as the last argument says (those after
# `column` are masked), and returns (B, D).
ReadToken = Callable[[DecodeState, Tensor, int], Tensor]


@dataclass(frozen=True)
class Cached:
    """Keys and values that one new token of each row attends to.

    Attributes:
        keys: (B, K, L, d), or (G, K, L, d) with `places`.
        values: Likewise.
        bias: (B or G or 1, K or 1, 1, L), added to the scores.
        places: Grid (G, n) of the rows that share keys; None if each row has its own.
        cap: Cap of the scores; None for no cap.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    places: Grid | None = None
    cap: float | None = None

    def scores(self, queries: Tensor) -> Tensor:
        """Return (B, K, H / K, L) scores of (B, K, H / K, d) scaled queries."""
        if self.places is None:
            return capped(queries @ self.keys.transpose(2, 3), self.cap) + self.bias
        # The queries of all rows that share keys become one matrix: the keys are read once.
        grid = self.places.spread(queries).transpose(1, 2)
        scores = capped(grid.flatten(2, 3) @ self.keys.transpose(2, 3), self.cap) + self.bias
        return self.places.collect(scores.unflatten(2, grid.shape[2:4]).transpose(1, 2))

    def read(self, weights: Tensor) -> Tensor:
        """Return (B, K, H / K, d): the values' sums with (B, K, H / K, L) weights."""
        if self.places is None:
            return weights @ self.values
        grid = self.places.spread(weights).transpose(1, 2)
        heads = grid.flatten(2, 3) @ self.values
        return self.places.collect(heads.unflatten(2, grid.shape[2:4]).transpose(1, 2))


def cached_attention(module: Any, queries: Tensor, *parts: Cached) -> Tensor:
    """Attend with one token of each row to all parts of the cache at once.

    Plain products, because torch's fused kernels read shared keys once for each row.

    Args:
        module: Attention module.
        queries: (B, H, 1, d).
        *parts: What the token sees.

    Returns:
        (B, 1, H·d).
    """
    heads = parts[0].keys.shape[1]
    scaled = (queries[:, :, 0] * module.scaling).unflatten(1, (heads, -1))
    scores = torch.cat([part.scores(scaled) for part in parts], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(queries.dtype)
    widths = [part.keys.shape[2] for part in parts]
    read = [part.read(w) for part, w in zip(parts, weights.split(widths, -1), strict=True)]
    return sum(read[1:], start=read[0]).flatten(1)[:, None]


def cached_responses(
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    bias: Tensor,
    prompt: Cached | None = None,
    cap: float | None = None,
) -> Attend:
    """Return the attention of one new token to its response, into whose cache it goes.

    Args:
        keys: (B, K, C, d), one layer's cached keys; changed in place.
        values: Likewise.
        column: (1,) where the token's key and value go.
        bias: (1, K or 1, 1, width) on the first `width` columns of the cache, the others are empty.
        prompt: What the token sees besides, as part of the same softmax.
        cap: Cap of the scores; None for no cap.
    """
    width = bias.shape[-1]

    def attend(module: Any, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.index_copy_(2, column, key.to(keys.dtype))
        values.index_copy_(2, column, value.to(values.dtype))
        own = Cached(keys[:, :, :width], values[:, :, :width], bias, cap=cap)
        parts = (own,) if prompt is None else (prompt, own)
        return cached_attention(module, queries, *parts)

    return attend


def hide_later(bias: Tensor, column: Tensor) -> Tensor:
    """Return (..., C): the bias, with the columns after `column`, still empty, masked out."""
    later = torch.arange(bias.shape[-1], device=bias.device) > column
    return bias.masked_fill(later, torch.finfo(bias.dtype).min)


def hide_outside(window: int | None, state: DecodeState, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Hide from the new token of each row what lies before a layer's window.

    Args:
        window: Tokens that a token sees, itself included; None for all of them.
        state: The state, whose `column` is that of the new token.
        bias: (1, 1, 1, width) on the columns of the responses.

    Returns:
        That bias, and the (G, 1, 1, P) bias on the prompts.
    """
    before = state.prompt_bias
    if window is None or window >= before.shape[-1] + state.columns:
        return bias, before
    # All responses to a prompt are as long as each other by now, so they see the same of it.
    first = state.column - window + 1
    lengths = (before == 0).sum(-1, keepdim=True)
    columns = torch.arange(max(before.shape[-1], bias.shape[-1]), device=before.device)
    lowest = torch.finfo(bias.dtype).min
    return (
        bias.masked_fill(columns[: bias.shape[-1]] < first, lowest),
        before.masked_fill(columns[: before.shape[-1]] < first + lengths, lowest),
    )


class CompiledDecoding:
    """One decoding step as a compiled graph, with shapes and addresses that never change.

    Batches are padded to a fixed size with dummy rows, and prompts to a fixed width; attention
    looks at the whole cache with its unused part masked. The cache stays at the same addresses
    between batches, because a CUDA graph writes to fixed addresses.

    Args:
        read: The step.
        rows: Rows in a batch.
        prompt_width: Tokens in the longest prompt.
        options: For `torch.compile`.
    """

    def __init__(self, read: ReadToken, rows: int, prompt_width: int, **options: Any) -> None:
        self._read = torch.compile(read, fullgraph=True, dynamic=False, **options)
        self._rows = rows
        self._prompt_width = prompt_width
        self._kept: dict[tuple[torch.Size, ...], DecodeState] = {}

    def fill_up(self, prompts: TokenBatch) -> TokenBatch:
        """Pad the batch to the fixed size; return a larger batch as it is."""
        return prompts.fill_up(self._rows, self._prompt_width)

    def hold(self, state: DecodeState) -> DecodeState:
        """Copy the state into the tensors of the first state with its shapes, and return that."""
        shapes = tuple(tensor.shape for tensor in state.tensors)
        if shapes not in self._kept:
            for tensor in state.tensors:
                keep_address(tensor)
            self._kept[shapes] = replace(state, fixed=True)
        kept = self._kept[shapes]
        for target, source in zip(kept.tensors, state.tensors, strict=True):
            target.copy_(source)
        kept.used = state.used
        return kept

    def read(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Run the step: (B,) tokens to (B, D), where B is the number of prompts before padding.

        Raises:
            InputError: torch cannot compile it on this machine.
        """
        padding = state.prompt_lengths.shape[0] - len(tokens)
        torch.compiler.cudagraph_mark_step_begin()  # earlier states are no longer needed
        filled = nn.functional.pad(tokens, (0, padding))
        try:
            return self._read(state, filled, state.columns)[: len(tokens)]
        except compile_error() as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise InputError(f"compile_decode: cannot be compiled here ({reason})") from error
