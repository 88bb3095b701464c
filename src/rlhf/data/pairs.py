"""Tokenized candidates of preference rows, and the pairs that they make."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PreferenceRow


@dataclass(frozen=True)
class Pairs:
    """All pairs of the candidates of G rows; each candidate is there once, however many it is in.

    Candidates are in the order of the rows, and pairs too. N is the number of pairs.

    Attributes:
        prompts: (G, P), one per row.
        responses: (B, R) candidates.
        groups: (B,) int64, the row of each candidate.
        winners: (N,) int64, the better candidate of each pair, as an index of `responses`.
        losers: (N,) the worse one.
        margin: (N,) by how much the better one should win; 0 where the row does not say.
        weight: (N,) 1 / number of the row's pairs, so that every row weighs 1 (Ouyang et al. 2022,
            eq. 1). A tie that is kept is there in either order, each with half of its weight.
    """

    prompts: TokenBatch
    responses: TokenBatch
    groups: Tensor
    winners: Tensor
    losers: Tensor
    margin: Tensor
    weight: Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[PreferenceRow], codec: PromptCodec) -> "Pairs":
        """Tokenize rows, on the CPU."""
        groups = [number for number, row in enumerate(rows) for _ in row.candidates]
        pairs, start = [], 0
        for row in rows:
            found = row.pairs
            margin, shares = row.margin or 0.0, row.pair_weights
            pairs += [
                (start + better, start + worse, margin, weight)
                for (better, worse), weight in zip(found, shares, strict=True)
            ]
            start += len(row.candidates)
        winners, losers, margins, weights = zip(*pairs, strict=True) if pairs else ((),) * 4
        return cls(
            codec.prompts([row.prompt for row in rows]),
            codec.responses(
                [text for row in rows for text in row.candidates],
                prompts=[row.prompt for row in rows for _ in row.candidates],
            ),
            torch.tensor(groups, dtype=torch.long),
            torch.tensor(winners, dtype=torch.long),
            torch.tensor(losers, dtype=torch.long),
            torch.tensor(margins, dtype=torch.float32),
            torch.tensor(weights, dtype=torch.float32),
        )

    def __len__(self) -> int:
        """Return G, the number of rows."""
        return len(self.prompts)

    @property
    def rows(self) -> Tensor:
        """(N,) int64, the row of each pair."""
        return self.groups[self.winners]

    @property
    def tokens(self) -> Tensor:
        """(G,) tokens that a model reads for each row, with the prompt counted once."""
        return self.prompts.lengths.index_add(0, self.groups, self.responses.lengths)

    def responses_of(self, rows: Sequence[int]) -> Tensor:
        """Return the indices of the candidates of some rows, row after row."""
        return _places(self.groups, rows, len(self))

    def select_rows(self, rows: Sequence[int]) -> "Pairs":
        """Return the given rows in the given order, each at most once."""
        responses = self.responses_of(rows)
        place = torch.empty_like(self.groups)
        place[responses] = torch.arange(len(responses), device=place.device)
        number = torch.empty(len(self), dtype=torch.long, device=place.device)
        number[list(rows)] = torch.arange(len(rows), device=place.device)
        pairs = _places(self.rows, rows, len(self))
        return Pairs(
            self.prompts.select_rows(rows),
            self.responses.select_rows(responses),
            number[self.groups[responses]],
            place[self.winners[pairs]],
            place[self.losers[pairs]],
            self.margin[pairs],
            self.weight[pairs],
        )

    def to(self, device: torch.device | str) -> "Pairs":
        """Return the same on another device."""
        return Pairs(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _places(owners: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Return the places in `owners`, (L,) numbers below `count`, of each of `rows` in turn."""
    turn = torch.full((count,), -1, dtype=torch.long, device=owners.device)
    turn[list(rows)] = torch.arange(len(rows), device=owners.device)
    wanted = turn[owners]
    order = wanted.argsort(stable=True)
    return order[int((wanted < 0).sum()) :]
