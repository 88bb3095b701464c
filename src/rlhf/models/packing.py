"""Real tokens in one row without padding, and the padded grids in which attention reads them.

Linear layers and norms see each real token once; only attention needs to know which tokens belong
together. A prompt shared by several responses is read once: its tokens attend among themselves,
and each response, which starts with the prompt's last token, attends to them and to itself.

Shape letters: G prompts, n responses to a prompt at most, N tokens; others as in `language_model`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from rlhf.data.batching import TokenBatch
from rlhf.models.attention import PLAIN_SCORES, ScoreRule, causal_mask, full_attention


@dataclass(frozen=True)
class Grid:
    """A grid of equal rows for items that are stored without gaps.

    Attributes:
        rows: Number of rows.
        width: Cells in each row.
        cells: (N,) cell of each item, counted through the grid, each at most once; None if item i
            is in cell i and no cell is empty.
    """

    rows: int
    width: int
    cells: Tensor | None

    @classmethod
    def of_cells(cls, rows: int, width: int, cells: Tensor) -> "Grid":
        """Make a grid of given cells, and notice if they are all of them in order."""
        if len(cells) == rows * width and bool((cells.diff() == 1).all()):
            return cls(rows, width, None)
        return cls(rows, width, cells)

    @classmethod
    def of_lengths(cls, lengths: Tensor, width: int) -> "Grid":
        """Make the grid in which row i holds `lengths[i]` items, the rows' items in sequence."""
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        return cls.of_cells(len(lengths), width, mask.flatten().nonzero()[:, 0])

    @classmethod
    def of_groups(cls, groups: Tensor, count: int) -> "Grid":
        """Make the grid in which row g holds the items i with `groups[i] == g`, in their order.

        Args:
            groups: (N,) row of each item.
            count: Number of rows.
        """
        sizes = torch.bincount(groups, minlength=count)
        order = groups.argsort(stable=True)
        ranks = (
            torch.arange(len(groups), device=groups.device)
            - (sizes.cumsum(0) - sizes)[groups[order]]
        )
        width = int(sizes.max())
        return cls.of_cells(
            count,
            width,
            torch.empty_like(order).index_copy(0, order, groups[order] * width + ranks),
        )

    def spread(self, items: Tensor) -> Tensor:
        """Put (N, ...) items into the grid: (rows, width, ...), 0 in empty cells."""
        if self.cells is None:
            return items.unflatten(0, (self.rows, self.width))
        grid: Tensor = _Spread.apply(items, self.cells, self.rows * self.width)
        return grid.unflatten(0, (self.rows, self.width))

    def collect(self, grid: Tensor) -> Tensor:
        """Take the (N, ...) items out of (rows, width, ...)."""
        items = grid.flatten(0, 1)
        return items if self.cells is None else _Collect.apply(items, self.cells)


def _spread(items: Tensor, cells: Tensor, count: int) -> Tensor:
    return items.new_zeros(count, *items.shape[1:]).index_copy_(0, cells, items)


class _Spread(Function):
    """Items to cells; the gradient of an item is that of its cell."""

    @staticmethod
    @override
    def forward(ctx: Any, items: Tensor, cells: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(cells)
        return _spread(items, cells, count)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(Function):
    """Cells to items. As no cell is taken twice, the gradient needs no (slow) `index_add`."""

    @staticmethod
    @override
    def forward(ctx: Any, grid: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.count = len(grid)
        return grid.index_select(0, cells)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(gradients[0], ctx.saved_tensors[0], ctx.count), None


@dataclass(frozen=True)
class ResponseGrids:
    """The tokens of B responses, each response after one token that precedes it.

    Attributes:
        tokens: Grid (B, R+1) of those tokens.
        shared: Grid (G, n·(R+1)) of the same tokens, by prompt.
        places: Grid (G, n) of the responses.
    """

    tokens: Grid
    shared: Grid
    places: Grid

    @classmethod
    def of(cls, responses: TokenBatch, groups: Tensor | None, count: int) -> "ResponseGrids":
        """Lay out the tokens.

        Args:
            responses: B responses.
            groups: (B,) index of each response's prompt; None for one response to each.
            count: G.
        """
        width, device = responses.ids.shape[1] + 1, responses.ids.device
        tokens = Grid.of_lengths(responses.lengths + 1, width)
        everyone = torch.arange(len(responses), device=device)
        places = Grid.of_groups(everyone if groups is None else groups.to(device), count)
        place = everyone if places.cells is None else places.cells
        cells = place[:, None] * width + torch.arange(width, device=device)
        shared = Grid.of_cells(count, places.width * width, tokens.collect(cells))
        return cls(tokens, shared, places)


# Which tokens see which, bool, by the window of a layer; None: all that come before. Windows that
# hide nothing have no entry.
Sight = Mapping[int | None, Tensor]


@dataclass(frozen=True)
class Wanted:
    """Tokens after the prompts whose states are wanted from the last layer.

    Attributes:
        items: Their indices among all packed tokens.
        grid: Grid (G, M) of them, by prompt.
        sees: (G, 1, M, P-1 + n·(R+1)), which tokens each of them sees.
    """

    items: slice | Tensor
    grid: Grid
    sees: Sight


@dataclass(frozen=True)
class SharedPrompts:
    """Tokens of G prompts and B responses in one row, each prompt once.

    First come the prompts without their last tokens, then the responses, each after the last token
    of its prompt, whose state predicts the response's first token.

    Attributes:
        ids: (1, N).
        positions: (1, N) of each token in its own sequence of prompt and response.
        prompts: Grid (G, P-1) of the prompts' tokens.
        responses: Grids of the responses' tokens.
        response_lengths: (B,).
        sees: (G, 1, n·(R+1), P-1 + n·(R+1)), which tokens each response token sees.
        sees_before: (1, 1, P-1, P-1), which tokens each prompt token sees; None is not in it.
        count: Packed tokens of the prompts.
    """

    ids: Tensor
    positions: Tensor
    prompts: Grid
    responses: ResponseGrids
    response_lengths: Tensor
    sees: Sight
    sees_before: Sight
    count: int

    @classmethod
    def of(
        cls,
        prompts: TokenBatch,
        responses: TokenBatch,
        groups: Tensor | None,
        windows: Collection[int] = (),
    ) -> "SharedPrompts":
        """Pack the tokens.

        Args:
            prompts: G prompts, each with at least one token.
            responses: B responses, possibly empty.
            groups: (B,) index of each response's prompt; None for one response to each.
            windows: Windows of the model's layers.
        """
        device, lengths = prompts.ids.device, prompts.lengths - 1
        before = torch.arange(prompts.ids.shape[1] - 1, device=device)
        grid = Grid.of_lengths(lengths, len(before))
        grids = ResponseGrids.of(responses, groups, len(prompts))
        own = slice(None) if groups is None else groups.to(device)
        last = prompts.ids.gather(1, lengths[:, None])[own]
        after = lengths[own, None] + torch.arange(grids.tokens.width, device=device)
        ids = [
            grid.collect(prompts.ids[:, :-1]),
            grids.tokens.collect(torch.cat([last, responses.ids], dim=1)),
        ]
        positions = [grid.collect(before.expand(len(prompts), -1)), grids.tokens.collect(after)]
        column = torch.arange(grids.shared.width, device=device)
        response = column // grids.tokens.width
        causal = (response[:, None] == response) & (column[:, None] >= column)
        of_prompt = (before < lengths[:, None])[:, None].expand(-1, len(column), -1)
        every = torch.cat([of_prompt, causal.expand(len(prompts), -1, -1)], dim=2)[:, None]
        places = lengths[:, None] + column % grids.tokens.width
        longest = len(before) + grids.tokens.width
        near = [window for window in windows if window < longest]
        masks = {window: causal_mask(len(before), window, device) for window in near}
        return cls(
            torch.cat(ids)[None],
            torch.cat(positions)[None],
            grid,
            grids,
            responses.lengths,
            {None: every} | {window: every & _near(before, places, window) for window in near},
            {window: mask for window, mask in masks.items() if mask is not None},
            len(ids[0]),
        )

    @property
    def every_state(self) -> Wanted:
        """All states of the responses."""
        return Wanted(slice(self.count, None), self.responses.shared, self.sees)

    @property
    def last_states(self) -> Wanted:
        """The state of each response that has seen all of it."""
        items = self.count - 1 + (self.response_lengths + 1).cumsum(0)
        places, device = self.responses.places, items.device
        start = torch.arange(places.width, device=device) * self.responses.tokens.width
        column = places.spread(self.response_lengths) + start
        group = torch.arange(places.rows, device=device)[:, None]
        sees = {window: s[:, 0][group, column][:, None] for window, s in self.sees.items()}
        return Wanted(items, places, sees)

    def attend(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rule: ScoreRule = PLAIN_SCORES,
    ) -> Tensor:
        """Attend with all tokens: (1, H, N, d) queries to (1, N, H·d)."""
        after = self.attend_after_prompt(
            module, queries[:, :, self.count :], keys, values, self.every_state, rule
        )
        if self.prompts.width == 0:
            return after
        q, k, v = (
            grid_heads(self.prompts, part[:, :, : self.count]) for part in (queries, keys, values)
        )
        mask = self.sees_before.get(rule.window)
        before = self.prompts.collect(full_attention(module, q, k, v, mask, cap=rule.cap))
        return torch.cat([before[None], after], dim=1)

    def attend_after_prompt(
        self,
        module: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        wanted: Wanted,
        rule: ScoreRule = PLAIN_SCORES,
    ) -> Tensor:
        """Attend with the wanted tokens alone.

        Args:
            module: Attention module.
            queries: (1, H, M, d) of the wanted tokens.
            keys: (1, K, N, d) of all tokens.
            values: Likewise.
            wanted: The tokens.
            rule: The layer's window and cap.

        Returns:
            (1, M, H·d).
        """
        # Prompts within the window attend by the plain causal kernel; what follows needs a mask.
        k, v = (
            torch.cat(
                [
                    grid_heads(self.prompts, part[:, :, : self.count]),
                    grid_heads(self.responses.shared, part[:, :, self.count :]),
                ],
                dim=2,
            )
            for part in (keys, values)
        )
        sees = wanted.sees.get(rule.window, wanted.sees[None])
        q = grid_heads(wanted.grid, queries)
        heads = full_attention(module, q, k, v, sees, cap=rule.cap)
        return wanted.grid.collect(heads)[None]


def _near(before: Tensor, places: Tensor, window: int) -> Tensor:
    """Return which prompt and response tokens are in the window of each response token.

    Args:
        before: (P-1,) positions of the prompts' tokens.
        places: (G, M) positions of the response tokens.
        window: Tokens that a token sees, itself included.

    Returns:
        (G, 1, M, P-1 + M) bool, true of later tokens too.
    """
    keys = torch.cat([before.expand(len(places), -1), places], dim=1)
    return (places[:, :, None] - keys[:, None] < window)[:, None]


def grid_heads(grid: Grid, packed: Tensor) -> Tensor:
    """Put (1, H, N, d) into a grid: (rows, H, width, d)."""
    return grid.spread(packed[0].transpose(0, 1)).transpose(1, 2)
