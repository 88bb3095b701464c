"""Decoding a token at a time: the cache, attention over it, and compiling a step.

Shape letters: B rows, P prompt tokens, R response tokens,
C columns of the cache, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError
from rlhf.models.attention import Attend, grouped_attention
from rlhf.models.compat import compile_error, keep_address

Layers = tuple[Tensor, ...]


@dataclass
class DecodeState:
    """A batch in the middle of decoding; changed in place by `LanguageModel.decode`.

    Keys and values are (B, heads, columns, head size) per layer, with room for the whole response.

    Attributes:
        keys: Of self-attention.
        values: Likewise.
        prompt_bias: (B, 1, 1, P), 0 on the prompt's tokens and the least number on padding.
        prompt_lengths: (B,) tokens of each prompt.
        column: (1,) where the next token's key and value go, on the device.
        used: The same number on the host.
        prompt_keys: Of attention from decoder to encoder, if there is one.
        prompt_values: Likewise.
        fixed: Whether shapes and addresses must stay as they are.
    """

    keys: Layers
    values: Layers
    prompt_bias: Tensor
    prompt_lengths: Tensor
    column: Tensor
    used: int
    prompt_keys: Layers = ()
    prompt_values: Layers = ()
    fixed: bool = False

    @property
    def columns(self) -> int:
        """C, of which `used` hold something."""
        return self.keys[0].shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        values = (getattr(self, field.name) for field in fields(self))
        groups = (value if isinstance(value, tuple) else (value,) for value in values)
        return [value for group in groups for value in group if isinstance(value, Tensor)]

    def keep(self, rows: Tensor) -> None:
        """Keeps the given rows of the batch and forgets the others."""
        for name in ("keys", "values", "prompt_keys", "prompt_values"):
            setattr(self, name, tuple(layer[rows] for layer in getattr(self, name)))
        self.prompt_bias, self.prompt_lengths = self.prompt_bias[rows], self.prompt_lengths[rows]

    def advance(self) -> None:
        """Goes on to the next column."""
        self.column += 1
        self.used += 1


# Reads (B,) tokens with the first columns of the state, as many as the last argument says, of which
# those after `column` are not looked at; returns (B, D).
ReadToken = Callable[[DecodeState, Tensor, int], Tensor]


def cached_attention(
    keys: Tensor, values: Tensor, column: Tensor, width: int, bias: Tensor
) -> Attend:
    """Return attention of one more token, whose key and value go into the cache.

    Args:
        keys: (B, H / G, C, d), a layer's in the cache; changed in place.
        values: Likewise.
        column: (1,) where the token's go.
        width: Columns of the cache that are looked at.
        bias: (B or 1, 1 or H, 1, width), added to the scores.
    """

    def attend(module: Any, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.index_copy_(2, column, key.to(keys.dtype))
        values.index_copy_(2, column, value.to(values.dtype))
        return grouped_attention(module, queries, keys[:, :, :width], values[:, :, :width], bias)

    return attend


def hide_later(bias: Tensor, column: Tensor) -> Tensor:
    """Return (..., C): the bias, and the least number after `column`, where nothing is yet."""
    later = torch.arange(bias.shape[-1], device=bias.device) > column
    return bias.masked_fill(later, torch.finfo(bias.dtype).min)


class CompiledDecoding:
    """One token's step as one compiled graph, with shapes and addresses that never change.

    Batches are filled up to one size with rows that nobody reads, prompts to one width; attention
    looks at the whole cache, whose unused part is masked. The cache stays where it is between
    batches, because a CUDA graph writes to fixed addresses.

    Args:
        read: The step.
        rows: Rows of a batch.
        prompt_width: Tokens of the longest prompt.
        options: For `torch.compile`.
    """

    def __init__(self, read: ReadToken, rows: int, prompt_width: int, **options: Any) -> None:
        self._read = torch.compile(read, fullgraph=True, dynamic=False, **options)
        self._rows = rows
        self._prompt_width = prompt_width
        self._kept: dict[tuple[torch.Size, ...], DecodeState] = {}

    def fill_up(self, prompts: TokenBatch) -> TokenBatch:
        """The prompts in a batch of the one size; what is larger already stays as it is."""
        return prompts.fill_up(self._rows, self._prompt_width)

    def hold(self, state: DecodeState) -> DecodeState:
        """The state in the tensors of the first one that had its shapes."""
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
        """The step. (B,) tokens to (B, D), B as many as there were prompts before filling up.

        Raises:
            InputError: torch cannot compile it here.
        """
        padding = state.prompt_lengths.shape[0] - len(tokens)
        torch.compiler.cudagraph_mark_step_begin()  # the states before are not needed any more
        filled = nn.functional.pad(tokens, (0, padding))
        try:
            return self._read(state, filled, state.columns)[: len(tokens)]
        except compile_error() as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise InputError(f"compile_decode: cannot be compiled here ({reason})") from error
