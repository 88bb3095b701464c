"""Text to ids exactly as the policy reads prompts and emits responses, and back.

What a special token looks like in text means that token only in what surrounds the user's text
(`PromptText` outside its spans); in user text and in responses it is plain text. Nothing here pads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from rlhf.data.batching import TokenBatch
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import Message, PromptFields, PromptText, Span
from rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.models.language_model import PromptLayout

# Texts to stand before a response while it is tokenised; the first one that the tokenizer does not
# merge with the response is used. They differ in kind, so one always fits.
_ANCHORS = ("\n", ":", "a", "1", ".", "\u00e9")
_FILLER = "\ue000"
_CHECK_ROWS = 256


class PromptSource(Protocol):
    """A row that has a prompt and knows where it was read."""

    @property
    def prompt(self) -> PromptText:
        """The rendered prompt."""

    @property
    def source(self) -> str:
        """`FILE:LINE`."""


@dataclass(frozen=True)
class PromptLengths:
    """How long the prompts of a data set are, and what the limit does to them.

    Attributes:
        count: Number of prompts.
        shortened: How many of them lose tokens to the limit.
        longest: Tokens of the longest prompt before truncation.
        limit: The limit.
    """

    count: int
    shortened: int
    longest: int
    limit: int

    def line(self) -> str:
        """The same in words."""
        return (
            f"{self.shortened} of {self.count} prompts are shortened to {self.limit} tokens "
            f"(the longest has {self.longest})"
        )


class _Piece:
    """Ids of one text and where their characters are; the lists run in parallel."""

    def __init__(self, ids: list[int], offsets: list[Span]) -> None:
        self.ids = ids
        self.offsets = offsets


class Tokeniser:
    """Turns prompts and responses into ids as one model reads and emits them.

    Args:
        tokenizer: A fast Hugging Face tokenizer (character offsets are needed).
        layout: What the model wants around a prompt and after a response.
        prompt_limit: Most tokens of a prompt, `layout`'s prefix and suffix included.
        response_limit: Most tokens of a response, the end-of-sequence token included.
        truncation_side: "left" drops the oldest text of a long prompt, "right" the newest.

    Raises:
        InputError: If the tokenizer cannot tell character offsets.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        layout: "PromptLayout",
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
        # `all_special_ids` knows only those with a name; UNK can come from plain text.
        added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
        self._decode_anchor = self._find_decode_anchor() if layout.response_continues_text else []

    def prompt_ids(self, prompt: PromptText) -> list[int]:
        """Ids of one prompt, at most `prompt_limit`; see `prompt_rows`."""
        return self.prompt_rows([prompt])[0]

    def prompt_rows(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """Ids of prompts with the layout's prefix and suffix, spans shortened by whole tokens.

        Raises:
            InputError: If what must be kept of a prompt does not fit.
        """
        rows = []
        for prompt, piece in zip(prompts, self._encode_prompts(prompts), strict=True):
            kept = self._shorten(prompt, piece)
            if kept is None:
                raise InputError(self._too_small(prompt))
            rows.append([*self.layout.prefix_ids, *kept, *self.layout.suffix_ids])
        return rows

    def response_ids(self, text: str) -> list[int]:
        """Ids of one response, at most `response_limit`; see `response_rows`."""
        return self.response_rows([text])[0]

    def response_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of responses as the policy emits them, with EOS unless the limit cuts it off."""
        if self.layout.response_continues_text:
            rows = self._encode_continuations(texts)
        else:
            rows = [piece.ids for piece in self._encode_literally(texts)]
        return [[*row, self.layout.eos_id][: self.response_limit] for row in rows]

    def prompts(self, prompts: Sequence[PromptText]) -> TokenBatch:
        """`prompt_rows` as a batch (B, P)."""
        return TokenBatch.from_lists(self.prompt_rows(prompts))

    def responses(self, texts: Sequence[str]) -> TokenBatch:
        """`response_rows` as a batch (B, R)."""
        return TokenBatch.from_lists(self.response_rows(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of one response: EOS and what follows dropped, special tokens skipped."""
        return self.decode_rows([ids])[0]

    def decode_rows(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of responses; see `decode`."""
        # Decoders drop the first token's space; behind an anchor the response has none to lose.
        texts = self._decode([self._decode_anchor, *map(self._until_eos, rows)])
        return [text[len(texts[0]) :] for text in texts[1:]] if self._decode_anchor else texts[1:]

    def check_template(self, renderer: PromptRenderer, conversations: bool = False) -> None:
        """Checks that the limit leaves room for some input beside the fixed text.

        Args:
            renderer: The renderer of the prompts.
            conversations: Whether the data have `messages`, so that the chat template counts too.

        Raises:
            InputError: If not a single token of input fits.
        """
        word = "a"
        fields = [PromptFields(word, (), None)]
        if conversations:
            fields.append(PromptFields(None, (Message("user", word),), None))
        for prompt, piece in zip(
            prompts := [renderer.render(one) for one in fields],
            self._encode_prompts(prompts),
            strict=True,
        ):
            if len(piece.ids) > self._room():
                raise InputError(self._too_small(prompt))

    def check_prompts(self, rows: Iterable[PromptSource]) -> PromptLengths:
        """Counts the prompts that the limit shortens.

        Raises:
            InputError: For prompts of which more must be kept than fits, with their lines.
        """
        count = shortened = longest = bad = 0
        around = len(self.layout.prefix_ids) + len(self.layout.suffix_ids)
        problems: list[str] = []
        for batch in _batches(rows, _CHECK_ROWS):
            prompts = [row.prompt for row in batch]
            for row, piece in zip(batch, self._encode_prompts(prompts), strict=True):
                count += 1
                shortened += len(piece.ids) > self._room()
                longest = max(longest, len(piece.ids) + around)
                if self._shorten(row.prompt, piece) is None:
                    bad += 1
                    if len(problems) < 20:
                        problems.append(f"{row.source}: {self._too_small(row.prompt)}")
        if bad > len(problems):
            problems.append(f"… and {bad - len(problems)} more prompts")
        if problems:
            raise InputError(problems)
        return PromptLengths(count, shortened, longest, self.prompt_limit)

    def _room(self) -> int:
        return self.prompt_limit - len(self.layout.prefix_ids) - len(self.layout.suffix_ids)

    def _too_small(self, prompt: PromptText) -> str:
        piece = self._encode_prompts([prompt])[0]
        fixed = len(piece.ids) - len(self._removable(prompt, piece))
        needed = fixed + self.prompt_limit - self._room()
        return (
            f"prompt_sequence_length: is {self.prompt_limit}, expected more than {needed}, which "
            "the instruction, the chat template and special tokens take alone"
        )

    def _shorten(self, prompt: PromptText, piece: _Piece) -> list[int] | None:
        """The ids that fit, or None if what must be kept does not fit."""
        excess = len(piece.ids) - self._room()
        if excess <= 0:
            return piece.ids
        order = self._removable(prompt, piece)
        if excess > len(order):
            return None
        dropped = set(order[:excess])
        # Tokens that are bytes of one character go together.
        for place in order[excess:]:
            near = place - 1 if self.truncation_side == "left" else place + 1
            if near not in dropped or not _overlap(piece.offsets[near], piece.offsets[place]):
                break
            dropped.add(place)
        return [id_ for place, id_ in enumerate(piece.ids) if place not in dropped]

    def _removable(self, prompt: PromptText, piece: _Piece) -> list[int]:
        """Places of tokens that truncation may drop, the first to go first."""
        order: list[int] = []
        for spans in (prompt.spans, prompt.reserve):
            places = [
                place
                for place, offset in enumerate(piece.offsets)
                if any(start <= offset[0] < offset[1] <= end for start, end in spans)
            ]
            order += places if self.truncation_side == "left" else places[::-1]
        return order

    def _encode_prompts(self, prompts: Sequence[PromptText]) -> list[_Piece]:
        pieces = self._encode([prompt.text for prompt in prompts])
        for number, (prompt, piece) in enumerate(zip(prompts, pieces, strict=True)):
            taken = self._special_in(piece, prompt.text, [*prompt.spans, *prompt.reserve])
            if taken:
                pieces[number] = self._encode_hiding(prompt, taken)
        return pieces

    def _encode_hiding(self, prompt: PromptText, taken: list[Span]) -> _Piece:
        """Encodes a prompt in whose user text the ranges `taken` look like special tokens."""
        spans = [*prompt.spans, *prompt.reserve]
        while True:
            text = prompt.text
            for start, end in taken:
                text = text[:start] + _FILLER * (end - start) + text[end:]
            piece = self._encode([text])[0]
            # Behind a hidden one another may come to light ("</</s>s>").
            more = self._special_in(piece, text, spans)
            if not more:
                return self._spell_out(piece, prompt.text, taken)
            taken = taken + more

    def _encode_literally(self, texts: Sequence[str]) -> list[_Piece]:
        """Encodes texts in which nothing is a special token."""
        pieces = self._encode(texts, literal=True)
        for number, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            # Unigram has its special tokens among its pieces, so it finds them all the same.
            taken = self._special_in(piece, text, [(0, len(text))])
            if taken:
                pieces[number] = self._spell_out(piece, text, taken)
        return pieces

    def _special_in(self, piece: _Piece, text: str, spans: Sequence[Span]) -> list[Span]:
        """Where special tokens were found in the spans of a text."""
        found = [o for id_, o in zip(piece.ids, piece.offsets, strict=True) if id_ in self._special]
        # Some tokens of the scaffolding swallow the space before or after them: not the user's.
        return [o for o in found if any(_overlap(_trim(text, o), span) for span in spans)]

    def _spell_out(self, piece: _Piece, text: str, ranges: Sequence[Span]) -> _Piece:
        """Replaces the tokens over some ranges of the text by tokens of single characters."""
        ids: list[int] = []
        offsets: list[Span] = []
        spelled = 0
        for id_, offset in zip(piece.ids, piece.offsets, strict=True):
            if not any(_overlap(offset, range_) for range_ in ranges):
                ids.append(id_)
                offsets.append(offset)
                continue
            for place in range(max(offset[0], spelled), offset[1]):
                for char_id in self._character(text[place]):
                    ids.append(char_id)
                    offsets.append((place, place + 1))
            spelled = max(spelled, offset[1])
        return _Piece(ids, offsets)

    def _character(self, char: str) -> list[int]:
        """Ids of one character inside a text."""
        for anchor in _ANCHORS:
            ids = _after(self._encode([anchor + char], literal=True)[0], len(anchor))
            if ids is not None:
                return ids
        return [id_ for id_ in [self.tokenizer.unk_token_id] if id_ is not None]

    def _encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they follow other text: no dummy prefix, leading space kept.

        A tokenizer that would merge a response's beginning with what stands before it gets another
        anchor: where no token crosses the boundary, the tokens behind it do not depend on it.
        """
        rows: list[list[int] | None] = [None if text else [] for text in texts]
        for anchor in _ANCHORS:
            missing = [number for number, row in enumerate(rows) if row is None]
            if not missing:
                break
            pieces = self._encode_literally([anchor + texts[number] for number in missing])
            for number, piece in zip(missing, pieces, strict=True):
                rows[number] = _after(piece, len(anchor))
        return [
            self._encode_literally([text])[0].ids if row is None else row
            for text, row in zip(texts, rows, strict=True)
        ]

    def _encode(self, texts: Sequence[str], literal: bool = False) -> list[_Piece]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=literal,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [_Piece(list(ids), [tuple(offset) for offset in offsets]) for ids, offsets in pairs]

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
        """Ids of a visible text that decoding neither changes nor joins to what follows."""
        for anchor in _ANCHORS[1:]:
            ids = self._encode([anchor], literal=True)[0].ids
            if self._decode([ids])[0].strip() == anchor:
                return ids
        return []


def _after(piece: _Piece, boundary: int) -> list[int] | None:
    """The ids behind a character boundary, or None if a token crosses it."""
    before = sum(start < boundary for start, _ in piece.offsets)
    if any(end > boundary for _, end in piece.offsets[:before]):
        return None
    return piece.ids[before:]


def _trim(text: str, span: Span) -> Span:
    word = text[span[0] : span[1]]
    start = span[0] + len(word) - len(word.lstrip())
    return start, start + len(word.strip())


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _batches(rows: Iterable[PromptSource], size: int) -> Iterator[list[PromptSource]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
