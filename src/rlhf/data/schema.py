"""The library's rows: what a JSON object must contain, and what the stages get from it.

Preference rows have `input_text` or `messages` (or `prompt`), and `candidate_0`, `candidate_1`,
`choice` (or `chosen`, `rejected`; or `candidates`, `ranking`). Prompt rows have `input_text` or
`messages` (or `prompt`). Both may have `context` and `output_text`. Other fields are ignored, and
an optional field that is null counts as missing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise
from typing import Any

Span = tuple[int, int]

AUTHORS = ("user", "assistant", "system")


@dataclass(frozen=True)
class PromptText:
    """A rendered prompt and which parts of it truncation may shorten.

    Characters outside `spans` and `reserve` (instruction, chat scaffolding) are always kept, and
    only there does the text of a special token mean that token; inside, it is plain text.

    Attributes:
        text: The prompt as the model reads it, without a beginning-of-sequence token.
        spans: Character ranges [start, end) of `text`, in text order, not overlapping.
        reserve: Like `spans`, but only shortened once nothing is left of those: the conversation's
            own system turn.
        template_bos: The beginning-of-sequence token that a chat template wrote before `text`, ""
            if it wrote none; nothing else is put before such a prompt. None for a prompt without a
            template, which gets what the tokenizer adds.
    """

    text: str
    spans: tuple[Span, ...]
    reserve: tuple[Span, ...] = ()
    template_bos: str | None = None

    def with_bos(self) -> "PromptText":
        """Return the prompt with its template's BOS as part of the text."""
        if not self.template_bos:
            return self
        shift = len(self.template_bos)
        spans, reserve = (
            tuple((start + shift, end + shift) for start, end in ranges)
            for ranges in (self.spans, self.reserve)
        )
        return PromptText(self.template_bos + self.text, spans, reserve, "")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `author` is one of `AUTHORS`."""

    author: str
    content: str


@dataclass(frozen=True)
class PromptFields:
    """The fields of a row that make up its prompt: either `input_text` or `messages`."""

    input_text: str | None
    messages: tuple[Message, ...]
    context: str | None


@dataclass(frozen=True)
class PromptRow:
    """A prompt with its human references.

    Attributes:
        prompt: Rendered prompt.
        input_text: Raw input for predictions; for `messages`, the conversation as JSON.
        references: The texts of `output_text`, possibly none.
        source: `FILE:LINE`.
        row: Index of the row in its data set, from 0.
        line: The row as in the file; None if lines were not kept (`load_prompts`).
    """

    prompt: PromptText
    input_text: str
    references: list[str]
    source: str
    row: int = 0
    line: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def columns(self) -> dict[str, Any]:
        """All fields of the row, as in the file; {} if lines were not kept.

        A row that was made of two lines has the fields of the first one.
        """
        return {} if self.line is None else json.loads(self.line.split(b"\n", 1)[0])


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with two or more answers that were ranked.

    Attributes:
        prompt: Rendered prompt.
        candidates: The answers.
        ranking: Their indices, best to worst.
        margin: By how much the better one of two was preferred, if the row says so.
        source: `FILE:LINE`.
        row: Index of the row in its data set, from 0.
        levels: Per place of `ranking` its level, from 0; tied answers share one. () if none are.
        keep_ties: Whether tied answers make two pairs, one in either order, of half weight.
    """

    prompt: PromptText
    candidates: tuple[str, ...]
    ranking: tuple[int, ...]
    margin: float | None
    source: str
    row: int = 0
    levels: tuple[int, ...] = ()
    keep_ties: bool = False

    @property
    def chosen(self) -> str:
        """The best answer."""
        return self.candidates[self.ranking[0]]

    @property
    def rejected(self) -> str:
        """The worst answer."""
        return self.candidates[self.ranking[-1]]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Each pair of different answers, as the indices of the better and the worse one."""
        return ranked_pairs(self.candidates, self.ranking, self.levels, self.keep_ties)

    @property
    def pair_weights(self) -> list[float]:
        """Weight of each of `pairs`: equal parts of 1, which the two orders of a tie halve."""
        pairs = self.pairs
        both = {*pairs} if self.levels and self.keep_ties else set()
        shares = [0.5 if pair[::-1] in both else 1.0 for pair in pairs]
        return [share / sum(shares) for share in shares]


@dataclass(frozen=True)
class Candidates:
    """The fields of a row about its answers; see `PreferenceRow`."""

    texts: tuple[str, ...]
    ranking: tuple[int, ...]
    margin: float | None
    levels: tuple[int, ...] = ()

    @classmethod
    def by_score(cls, texts: Sequence[str], scores: Sequence[float]) -> "Candidates":
        """Rank answers by their scores, the highest first; equal scores are ties."""
        ranking = tuple(sorted(range(len(texts)), key=lambda index: -scores[index]))
        steps = [scores[a] != scores[b] for a, b in pairwise(ranking)]
        levels = tuple(accumulate(steps, initial=0))
        return cls(tuple(texts), ranking, None, () if all(steps) else levels)


def ranked_pairs(
    texts: Sequence[str],
    ranking: Sequence[int],
    levels: Sequence[int] = (),
    keep_ties: bool = False,
) -> list[tuple[int, int]]:
    """Return the pairs that a ranking makes, as the indices of the better and the worse text.

    Pairs of identical texts carry no signal and are left out.

    Args:
        texts: The answers.
        ranking: Their indices, best to worst.
        levels: As in `PreferenceRow`.
        keep_ties: Whether pairs of tied answers are there in either order, or left out.
    """
    pairs = [
        (better, worse)
        for better, worse in combinations(ranking, 2)
        if texts[better] != texts[worse]
    ]
    if not levels:
        return pairs
    level = dict(zip(ranking, levels, strict=True))
    orders = (
        [pair] if level[pair[0]] != level[pair[1]] else [pair, pair[::-1]][: 2 * keep_ties]
        for pair in pairs
    )
    return [pair for both in orders for pair in both]
