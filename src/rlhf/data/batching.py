"""Ragged token rows in one tensor, and the order in which rows are visited.

Shape letters, used throughout the package: B batch, P prompt tokens, R response tokens, L any
length, V vocabulary, D hidden size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens of different lengths; values past a row's length are meaningless.

    Attributes:
        ids: (B, L) int64, right-padded with an arbitrary filler.
        lengths: (B,) int64, number of real tokens in each row.
    """

    ids: Tensor
    lengths: Tensor

    @staticmethod
    def from_lists(rows: Sequence[Sequence[int]]) -> "TokenBatch":
        """Right-pad lists of ids into one batch."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = torch.tensor(row, dtype=torch.long)
        return TokenBatch(ids, lengths)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def mask(self) -> Tensor:
        """(B, L) bool, true on real tokens. Based on lengths: PAD can be a legal, sampled id."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def select_rows(self, rows: Tensor | Sequence[int]) -> "TokenBatch":
        """Return the given rows in the given order, trimmed to the longest of them."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.ids.device)
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(lengths) else 0
        return TokenBatch(self.ids[index, :longest], lengths)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Return the batch on another device."""
        return TokenBatch(self.ids.to(device), self.lengths.to(device))

    def fill_up(self, rows: int, width: int) -> "TokenBatch":
        """Return at least so many rows, further ones of a token each, and columns of filler."""
        more, wider = max(0, rows - len(self)), max(0, width - self.ids.shape[1])
        ids = torch.nn.functional.pad(self.ids, (0, wider, 0, more))
        return TokenBatch(ids, torch.nn.functional.pad(self.lengths, (0, more), value=1))

    def tolists(self) -> list[list[int]]:
        """Return the rows as lists without padding."""
        lengths = self.lengths.tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]

    @staticmethod
    def concat(batches: "Sequence[TokenBatch]") -> "TokenBatch":
        """Stack the rows of several batches, padded to the longest."""
        longest = max(batch.ids.shape[1] for batch in batches)
        ids = [torch.nn.functional.pad(b.ids, (0, longest - b.ids.shape[1])) for b in batches]
        return TokenBatch(torch.cat(ids), torch.cat([b.lengths for b in batches]))


def join_rows(prompts: TokenBatch, responses: TokenBatch) -> Tensor:
    """Append each response to its prompt; return (B, L) ids, right-padded."""
    lengths = prompts.lengths + responses.lengths
    ids = prompts.ids.new_zeros(len(prompts), int(lengths.max()))
    column = torch.arange(ids.shape[1], device=ids.device)
    ids[column < prompts.lengths[:, None]] = prompts.ids[prompts.mask]
    is_response = (column >= prompts.lengths[:, None]) & (column < lengths[:, None])
    ids[is_response] = responses.ids[responses.mask]
    return ids


def permutation(size: int, purpose: str, *seed: int) -> list[int]:
    """Return a permutation of range(size) that depends on purpose and seeds alone."""
    return torch.randperm(size, generator=seeded_generator(purpose, *seed)).tolist()


def seeded_generator(purpose: str, *seed: int) -> torch.Generator:
    """Return a CPU generator for a purpose and integers; nearby tuples give unrelated streams.

    Args:
        purpose: What the numbers are for. Equal seeds give different streams for two purposes.
        *seed: The run's seed, then step, row and so on.
    """
    state = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    for value in seed:  # splitmix64: consecutive seeds must not give correlated streams
        state = (state ^ (value & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


class Order(Protocol):
    """An order of rows other than a plain shuffle."""

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def order_of_epoch(self, seed: int, epoch: int) -> Tensor:
        """Return as many rows as the epoch has, in the order in which it visits them."""


def rows_for_step(rows: int | Order, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows that training step `step` (from 0) visits.

    The stream is the concatenation of one order per epoch, so it needs no state: step n of a
    resumed run gets the same rows as in an uninterrupted one.

    Args:
        rows: Rows in the data set, at least 1, each visited once an epoch; or their own order.
        batch_size: Rows per step; may exceed an epoch's (rows then repeat).
        step: Training step, from 0.
        seed: The run's seed.
    """
    found: list[int] = []
    size = rows if isinstance(rows, int) else len(rows)
    position, end = step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, size)
        found += _order_of_epoch(rows, seed, epoch)[offset : offset + end - position].tolist()
        position = step * batch_size + len(found)
    return found


@lru_cache(maxsize=2)  # every step asks for its epoch's order, and a step may span two epochs
def _order_of_epoch(rows: int | Order, seed: int, epoch: int) -> Tensor:
    if not isinstance(rows, int):
        return rows.order_of_epoch(seed, epoch)
    return torch.randperm(rows, generator=seeded_generator("data order", seed, epoch))


def chunks(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive slices of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def micro_batches(tokens: Tensor, size: int, max_tokens: int) -> Iterator[list[int]]:
    """Yield groups of rows, shortest first, that fit in memory with little padding.

    Args:
        tokens: (B,) tokens that a model reads for each row.
        size: Maximum rows per group.
        max_tokens: Maximum tokens per group, padding included; a longer row gets its own group.
    """
    piece: list[int] = []
    lengths = tokens.tolist()
    for row in tokens.argsort(stable=True).tolist():
        if piece and (len(piece) == size or (len(piece) + 1) * lengths[row] > max_tokens):
            yield piece
            piece = []
        piece.append(row)
    if piece:
        yield piece
