"""Decode one token at a time: the cache, attention over it, and compiling a step.

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
    """A batch in the middle of decoding; `LanguageModel.decode` changes it in place.

    Keys and values are (B, heads, columns, head size) per layer, with room for the whole response.

    Attributes:
        keys: Of self-attention.
        values: Of self-attention.
        prompt_bias: (B, 1, 1, P), 0 on the prompt's tokens and the most negative number on padding.
        prompt_lengths: (B,) tokens of each prompt.
        column: (1,) where the next token's key and value go, on the device.
        used: The same number on the host.
        prompt_keys: Of the decoder's attention to the encoder, if there is one.
        prompt_values: As `prompt_keys`.
        fixed: Whether shapes and addresses must not change.
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
        """C, of which the first `used` are filled."""
        return self.keys[0].shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the state, in a fixed order."""
        values = (getattr(self, field.name) for field in fields(self))
        groups = (value if isinstance(value, tuple) else (value,) for value in values)
        return [value for group in groups for value in group if isinstance(value, Tensor)]

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows of the batch and drop the others."""
        for name in ("keys", "values", "prompt_keys", "prompt_values"):
            setattr(self, name, tuple(layer[rows] for layer in getattr(self, name)))
        self.prompt_bias, self.prompt_lengths = self.prompt_bias[rows], self.prompt_lengths[rows]

    def advance(self) -> None:
        """Move on to the next column."""
        self.column += 1
        self.used += 1


# Reads (B,) tokens, looking at as many columns of the state as the last argument says (those after
# `column` are masked), and returns (B, D).
ReadToken = Callable[[DecodeState, Tensor, int], Tensor]


def cached_attention(
    keys: Tensor, values: Tensor, column: Tensor, width: int, bias: Tensor
) -> Attend:
    """Return the attention of one new token, whose key and value go into the cache.

    Args:
        keys: (B, H / G, C, d), one layer's cached keys; changed in place.
        values: Likewise.
        column: (1,) where the token's key and value go.
        width: Number of cache columns to look at.
        bias: (B or 1, 1 or H, 1, width), added to the scores.
    """

    def attend(module: Any, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.index_copy_(2, column, key.to(keys.dtype))
        values.index_copy_(2, column, value.to(values.dtype))
        return grouped_attention(module, queries, keys[:, :, :width], values[:, :, :width], bias)

    return attend


def hide_later(bias: Tensor, column: Tensor) -> Tensor:
    """Return (..., C): the bias, with the columns after `column`, still empty, masked out."""
    later = torch.arange(bias.shape[-1], device=bias.device) > column
    return bias.masked_fill(later, torch.finfo(bias.dtype).min)


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
