"""Text to ids, exactly as the policy reads prompts and emits responses, and back.

The text of a special token means that token only in what surrounds the user's text (outside the
spans of a `PromptText`); in user text and in responses it is plain text. Nothing here pads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.batching import TokenBatch, chunks
from rlhf.data.counting import MARGIN, TokenCounter, surely_short
from rlhf.data.encoding import ANCHORS, Piece, TextEncoder, overlap
from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_table import take, text_sizes
from rlhf.data.rows import RowData, prompt_of
from rlhf.data.schema import Message, PromptFields, PromptText
from rlhf.data.sources.record import MAX_PROBLEMS
from rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKENS = "input_text: the tokenizer produces no tokens for it, expected text that it knows"
_COUNT_ROWS = 512


@dataclass(frozen=True)
class PromptLayout:
    """What is added around text when it is turned into ids.

    Attributes:
        prefix_ids: Put before a prompt (BOS, if the tokenizer itself adds it), unless a chat
            template already wrote it.
        suffix_ids: Put after a prompt, even a truncated one (EOS for T5's encoder).
        response_continues_text: Whether the response continues the prompt's text, so that its first
            token must not get the dummy space of a text's beginning.
        eos_id: Appended to responses.
        eos_ids: All ids that end a response (of tokenizer, generation config and chat template).
        turn_end_id: Appended instead to responses in a chat: the token with which the chat template
            ends a turn of the assistant. None if that is `eos_id`, or no single token.
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    response_continues_text: bool
    eos_id: int
    eos_ids: frozenset[int]
    turn_end_id: int | None = None


@dataclass(frozen=True)
class PromptLengths:
    """Prompt lengths of a data set, and the effect of the limit.

    Attributes:
        count: Number of prompts.
        shortened: How many of them exceed the limit and lose tokens.
        longest: Tokens of the longest prompt before truncation.
        limit: The limit.
    """

    count: int
    shortened: int
    longest: int
    limit: int

    def line(self) -> str:
        """Return the same in words."""
        return (
            f"{self.shortened} of {self.count} prompts are shortened to {self.limit} tokens "
            f"(the longest has {self.longest})"
        )


class PromptCodec:
    """Converter between text and the ids that one model reads and emits.

    Args:
        tokenizer: A fast Hugging Face tokenizer (character offsets are needed).
        layout: What the model expects around a prompt and after a response.
        prompt_limit: Maximum tokens of a prompt, including `layout`'s prefix and suffix.
        response_limit: Maximum tokens of a response, including the end-of-sequence token.
        truncation_side: "left" drops the oldest text of a long prompt, "right" the newest.

    Raises:
        InputError: If the tokenizer cannot report character offsets.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        layout: PromptLayout,
        prompt_limit: int,
        response_limit: int,
        truncation_side: str = "left",
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"base_model: the tokenizer of {tokenizer.name_or_path or 'the model'} has no "
                "tokenizer.json; save it with transformers' PreTrainedTokenizerFast first"
            )
        self.tokenizer = tokenizer
        self.layout = layout
        self.prompt_limit = prompt_limit
        self.response_limit = response_limit
        self.truncation_side = truncation_side
        self._encoder = TextEncoder(tokenizer)
        self._decode_anchor = self._find_decode_anchor() if layout.response_continues_text else []

    @cached_property
    def _counter(self) -> TokenCounter:
        return TokenCounter(self.tokenizer, self._encoder)

    def prompt_ids(self, prompt: PromptText) -> list[int]:
        """Return the ids of one prompt, at most `prompt_limit`; see `prompt_rows`."""
        return self.prompt_rows([prompt])[0]

    def prompt_rows(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """Return the ids of prompts with prefix and suffix, spans shortened by whole tokens.

        Raises:
            InputError: If the part of a prompt that must be kept does not fit.
        """
        rows = []
        for prompt, piece in zip(prompts, self._encoder.prompts(prompts), strict=True):
            kept = self._shorten(prompt, piece)
            if kept is None:
                raise InputError(self._too_small(prompt))
            rows.append([*self._prefix(prompt), *kept, *self.layout.suffix_ids])
            if not rows[-1]:
                raise InputError(NO_TOKENS)
        return rows

    def response_ids(self, text: str) -> list[int]:
        """Return the ids of a finished response, at most `response_limit`; see `response_rows`."""
        return self.response_rows([text])[0]

    def response_rows(
        self,
        texts: Sequence[str],
        finished: Sequence[bool] | None = None,
        prompts: Sequence[PromptText] | None = None,
    ) -> list[list[int]]:
        """Return the ids of responses. Training and all scorers share this one rule for ends.

        A finished response ends in `end_id` of its prompt, whichever EOS the policy sampled, unless
        the limit cuts it off; a response that was cut off has no EOS.

        Args:
            texts: The responses.
            finished: Whether each ended by itself; all did by default.
            prompts: What each responds to; by default no conversations.
        """
        rows = self._whole_responses(texts)
        ended = [True] * len(rows) if finished is None else finished
        ends = [self.layout.eos_id] * len(rows) if prompts is None else map(self.end_id, prompts)
        return [
            [*row, *([end] if whole else ())][: self.response_limit]
            for row, end, whole in zip(rows, ends, ended, strict=True)
        ]

    def end_id(self, prompt: PromptText) -> int:
        """Return what ends a response: as the chat template ends a turn, otherwise EOS."""
        turn_end = self.layout.turn_end_id
        return self.layout.eos_id if turn_end is None or prompt.template_bos is None else turn_end

    def unlimited_ids(self, prompt: PromptText, response: str | None = None) -> list[int]:
        """Return the ids of a prompt and a finished response as the text goes on, not shortened.

        Args:
            prompt: The prompt.
            response: The response; None for the prompt alone.
        """
        before = [*self._prefix(prompt), *self._encoder.prompts([prompt])[0].ids]
        if response is None:
            return before
        return [*before, *self._whole_responses([response])[0], self.end_id(prompt)]

    def prompt_lengths(self, prompts: Sequence[PromptText]) -> list[int]:
        """Count the tokens of prompts before truncation, prefix and suffix included."""
        return [
            len(piece.ids) + self.prompt_limit - self._room(prompt)
            for prompt, piece in zip(prompts, self._encoder.prompts(prompts), strict=True)
        ]

    def count_prompts(self, rows: RowData[Any]) -> NDArray[np.int64]:
        """Return `prompt_lengths` for all rows."""
        return self._counts(rows, 0) + self.prompt_limit - self._room()

    def count_responses(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Count the tokens of any number of responses before truncation, EOS included."""
        counter = self._counter
        continues = self.layout.response_continues_text
        counts = counter.continuations(texts) if continues else counter.literal(texts)
        return np.array(counts, np.int64) + 1

    def prompts(self, prompts: Sequence[PromptText]) -> TokenBatch:
        """Return `prompt_rows` as a batch (B, P)."""
        return TokenBatch.from_lists(self.prompt_rows(prompts))

    def responses(
        self,
        texts: Sequence[str],
        finished: Sequence[bool] | None = None,
        prompts: Sequence[PromptText] | None = None,
    ) -> TokenBatch:
        """Return `response_rows` as a batch (B, R)."""
        return TokenBatch.from_lists(self.response_rows(texts, finished, prompts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of one response, without EOS, anything after it, and special tokens."""
        return self.decode_rows([ids])[0]

    def decode_rows(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of responses; see `decode`."""
        # Decoders drop the first token's space; after an anchor the response keeps its own.
        texts = self._decode([self._decode_anchor, *map(self._until_eos, rows)])
        return [text[len(texts[0]) :] for text in texts[1:]] if self._decode_anchor else texts[1:]

    def check_template(self, renderer: PromptRenderer, conversations: bool = False) -> None:
        """Check that the limit leaves room for some input besides the fixed text.

        Args:
            renderer: The renderer of the prompts.
            conversations: Whether the data have `messages`, so that the chat template counts too.

        Raises:
            InputError: If not even one token of input fits.
        """
        word = "a"
        fields = [PromptFields(word, (), None)]
        if conversations:
            fields.append(PromptFields(None, (Message("user", word),), None))
        for prompt, piece in zip(
            prompts := [renderer.render(one) for one in fields],
            self._encoder.prompts(prompts),
            strict=True,
        ):
            if len(piece.ids) > self._room(prompt):
                raise InputError(self._too_small(prompt))

    def check_prompts(self, rows: RowData[Any]) -> PromptLengths:
        """Count the prompts that the limit shortens.

        Raises:
            InputError: If the mandatory part of some prompts does not fit; names their lines.
        """
        room = self._room()
        counts = self._counts(rows, room)
        bad = 0
        problems: list[str] = []
        doubts = np.flatnonzero(self._in_doubt(rows, counts))
        for places in chunks(doubts.tolist(), _COUNT_ROWS):
            some = [rows[place] for place in places]
            pieces = self._encoder.prompts([row.prompt for row in some])
            for row, piece in zip(some, pieces, strict=True):
                if self._shorten(row.prompt, piece) is None:
                    bad += 1
                    if len(problems) < MAX_PROBLEMS:
                        problems.append(f"{row.source}: {self._too_small(row.prompt)}")
        if bad > len(problems):
            problems.append(f"… and {bad - len(problems)} more prompts")
        if problems:
            raise InputError(problems)
        longest = int(counts.max(initial=0)) + self.prompt_limit - room
        return PromptLengths(len(rows), int((counts > room).sum()), longest, self.prompt_limit)

    def _counts(self, rows: RowData[Any], limit: int) -> NDArray[np.int64]:
        """Count the tokens of the rows' prompts; counts of at most `limit` may be too low."""
        counter = self._counter
        known = rows.token_counts.setdefault(counter.identity, _Counts(len(rows.table)))
        without_prefix = np.zeros(len(rows), bool)  # the count includes what their template wrote
        start = 0
        for batch in rows.batches(("text", "template_bos", "spans", "reserve")):
            stored = rows.stored[start : start + batch.num_rows]
            templated = batch.column("template_bos").is_valid().to_numpy(zero_copy_only=False)
            without_prefix[start : start + batch.num_rows] = templated
            start += batch.num_rows
            short = surely_short(batch.column("text"), limit, counter)
            missing = np.flatnonzero(~short & (known.counts[stored] < 0))
            for part in np.array_split(missing, -(-len(missing) // _COUNT_ROWS) or 1):
                if len(part):
                    columns = take(batch, part).to_pydict()
                    values = zip(*columns.values(), strict=True)
                    prompts = [prompt_of(dict(zip(columns, one, strict=True))) for one in values]
                    known.counts[stored[part]] = counter.prompts(prompts)
        counts: NDArray[np.int64] = np.maximum(known.counts[rows.stored], 0).astype(np.int64)
        return np.maximum(counts - without_prefix * len(self.layout.prefix_ids), 0)

    def _in_doubt(self, rows: RowData[Any], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which long prompts may have a mandatory part that does not fit."""
        doubts: list[NDArray[np.bool_]] = [np.zeros(0, bool)]
        for batch in rows.batches(("text", "spans", "reserve")):
            characters, size = text_sizes(batch.column("text"))
            fixed = characters - sum(_covered(batch.column(name)) for name in ("spans", "reserve"))
            # A character is at most its bytes; a normalizer may expand one into several characters.
            most = np.where(characters == size, fixed, 32 * fixed) + MARGIN
            self._look_at_beginnings(batch, characters, most)
            doubts.append((most > self._room()) | (not self._counter.one_per_character))
        return (counts > self._room()) & np.concatenate(doubts)

    def _look_at_beginnings(
        self, batch: Any, characters: NDArray[np.int64], most: NDArray[np.int64]
    ) -> None:
        """Set `most` where only a beginning must be kept, which is the same for all such rows."""
        counted: dict[int, int] = {}
        for place in np.flatnonzero(most > self._room()).tolist():
            spans = batch.column("spans")[place].as_py()
            reserve = batch.column("reserve")[place].as_py()
            if not reserve and len(spans) == 2 and spans[1] == characters[place]:
                start = spans[0]
                if start not in counted:
                    beginning = PromptText(batch.column("text")[place].as_py()[:start], ())
                    counted[start] = self._counter.prompts([beginning])[0] + MARGIN
                most[place] = counted[start]

    def _whole_responses(self, texts: Sequence[str]) -> list[list[int]]:
        if self.layout.response_continues_text:
            return self._encoder.continuations(texts)
        return [piece.ids for piece in self._encoder.literal(texts)]

    def _prefix(self, prompt: PromptText) -> tuple[int, ...]:
        """Return what is put before a prompt; a chat template has already written its own."""
        return self.layout.prefix_ids if prompt.template_bos is None else ()

    def _room(self, prompt: PromptText | None = None) -> int:
        """Return how many of a prompt's own tokens fit; without one, after the layout's prefix."""
        prefix = self.layout.prefix_ids if prompt is None else self._prefix(prompt)
        return self.prompt_limit - len(prefix) - len(self.layout.suffix_ids)

    def _too_small(self, prompt: PromptText) -> str:
        piece = self._encoder.prompts([prompt])[0]
        fixed = len(piece.ids) - len(self._removable(prompt, piece))
        needed = fixed + self.prompt_limit - self._room(prompt)
        return (
            f"prompt_sequence_length: is {self.prompt_limit}, expected more than {needed}, which "
            "the instruction, the chat template and special tokens alone take up"
        )

    def _shorten(self, prompt: PromptText, piece: Piece) -> list[int] | None:
        """Return the ids that fit, or None if the part that must be kept does not fit."""
        excess = len(piece.ids) - self._room(prompt)
        if excess <= 0:
            return piece.ids
        order = self._removable(prompt, piece)
        if excess > len(order):
            return None
        dropped = set(order[:excess])
        # Tokens that are bytes of the same character are dropped together.
        for place in order[excess:]:
            near = place - 1 if self.truncation_side == "left" else place + 1
            if near not in dropped or not overlap(piece.offsets[near], piece.offsets[place]):
                break
            dropped.add(place)
        if len(dropped) == len(piece.ids) and not (self._prefix(prompt) or self.layout.suffix_ids):
            dropped = set(order[:excess])  # half a character is better than an empty prompt
        return [id_ for place, id_ in enumerate(piece.ids) if place not in dropped]

    def _removable(self, prompt: PromptText, piece: Piece) -> list[int]:
        """Return the places of tokens that truncation may drop, in order of dropping."""
        order: list[int] = []
        for spans in (prompt.spans, prompt.reserve):
            places = [
                place
                for place, offset in enumerate(piece.offsets)
                if any(start <= offset[0] < offset[1] <= end for start, end in spans)
            ]
            order += places if self.truncation_side == "left" else places[::-1]
        return order

    def _until_eos(self, ids: Sequence[int]) -> list[int]:
        ends = (place for place, id_ in enumerate(ids) if id_ in self.layout.eos_ids)
        kept = list(ids)[: next(ends, len(ids))]
        return [*self._decode_anchor, *kept]

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return list(
            self.tokenizer.batch_decode(
                [list(row) for row in rows],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    def _find_decode_anchor(self) -> list[int]:
        """Return ids of visible text that decoding neither alters nor merges with what follows."""
        for anchor in ANCHORS[1:]:
            ids = self._encoder.literal([anchor])[0].ids
            if self._decode([ids])[0].strip() == anchor:
                return ids
        return []


class _Counts:
    """Token counts of all prompts in a table, -1 where not yet known."""

    def __init__(self, size: int) -> None:
        self.counts = np.full(size, -1, np.int32)


def _covered(spans: Any) -> NDArray[np.int64]:
    """Return (N,) characters in the ranges of an Arrow column of [start, end, start, end, …]."""
    ends = spans.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    ends[::2] *= -1
    sums = np.concatenate([[0], np.cumsum(ends)])
    lengths = spans.value_lengths().to_numpy(zero_copy_only=False)
    places = np.concatenate([[0], np.cumsum(lengths)])
    covered: NDArray[np.int64] = np.diff(sums[places])
    return covered
