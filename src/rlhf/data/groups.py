"""Groups: the responses to one prompt, which is read once for all of them.

A batch has G prompts and B responses; `groups` (B,) holds the index of each response's prompt. The
responses of a group may stand anywhere, and groups may differ in size.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch, chunks

ItemT = TypeVar("ItemT")


def select_group_rows(
    prompts: TokenBatch, groups: Tensor, rows: Sequence[int]
) -> tuple[TokenBatch, Tensor]:
    """Return the prompts that some responses need, and the index of each response's prompt there.

    Args:
        prompts: G prompts.
        groups: (B,) index of each response's prompt.
        rows: Responses.
    """
    index = torch.as_tensor(rows, dtype=torch.long, device=groups.device)
    needed, renumbered = groups[index].unique(return_inverse=True)
    return prompts.select_rows(needed), renumbered


def group_batches(
    prompts: Tensor, responses: Tensor, groups: Tensor, size: int, max_tokens: int
) -> Iterator[list[int]]:
    """Yield batches of responses, shortest first, that fit in memory with little padding.

    A group is only split if it does not fit on its own.

    Args:
        prompts: (G,) tokens of each prompt.
        responses: (B,) tokens of each response.
        groups: (B,) index of each response's prompt.
        size: Maximum responses per batch.
        max_tokens: Maximum tokens per batch, padding included; what does not fit even alone gets
            its own batch.
    """
    pieces: list[tuple[int, int, list[int]]] = []  # tokens of prompt and longest response, rows
    prompt_tokens, response_tokens = prompts.tolist(), responses.tolist()
    for group, rows in members(groups).items():
        prompt, longest = prompt_tokens[group], max(response_tokens[row] for row in rows)
        most = max(1, min(size, (max_tokens - prompt) // max(1, longest)))
        pieces += [
            (prompt, max(response_tokens[row] for row in piece), list(piece))
            for piece in chunks(rows, most)
        ]
    pieces.sort(key=lambda piece: piece[0] + len(piece[2]) * piece[1])
    batch: list[int] = []
    wide = long = count = 0  # longest prompt and response of the batch, and its pieces
    for prompt, response, rows in pieces:
        then = (count + 1) * max(wide, prompt) + (len(batch) + len(rows)) * max(long, response)
        if batch and (len(batch) + len(rows) > size or then > max_tokens):
            yield batch
            batch, wide, long, count = [], 0, 0, 0
        batch = batch + rows
        wide, long, count = max(wide, prompt), max(long, response), count + 1
    if batch:
        yield batch


def members(groups: Tensor) -> dict[int, list[int]]:
    """Return the responses of each group, in order of the groups.

    Args:
        groups: (B,) index of each response's group.
    """
    found: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        found.setdefault(group, []).append(row)
    return dict(sorted(found.items()))


def consecutive(prompts: Sequence[ItemT]) -> tuple[list[ItemT], Tensor]:
    """Return the prompts with consecutive equal ones once, and (B,) the index of each there."""
    different: list[ItemT] = []
    groups = []
    for prompt in prompts:
        if not different or prompt != different[-1]:
            different.append(prompt)
        groups.append(len(different) - 1)
    return different, torch.tensor(groups, dtype=torch.long)
