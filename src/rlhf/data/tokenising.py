"""Text to ids exactly as the policy reads prompts and emits responses, and back.

What a special token looks like in text means that token only in what surrounds the user's text
(`PromptText` outside its spans); in user text and in responses it is plain text. Nothing here pads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from rlhf.data.batching import TokenBatch
from rlhf.data.encoding import ANCHORS, Piece, TextEncoder, overlap
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import Message, PromptFields, PromptText
from rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHECK_ROWS = 256


@dataclass(frozen=True)
class PromptLayout:
    """What surrounds text when it becomes ids.

    Attributes:
        prefix_ids: Put before a prompt (BOS, where the tokenizer has one, for decoder-only).
        suffix_ids: Put after a prompt, also after a truncated one (EOS for T5's encoder).
        response_continues_text: True if the response goes on in the prompt's text, so that its
            first token must not get the dummy space of a text's beginning.
        eos_id: Appended to responses.
        eos_ids: All ids that end a response (tokenizer and generation config).
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    response_continues_text: bool
    eos_id: int
    eos_ids: frozenset[int]


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

    def prompt_ids(self, prompt: PromptText) -> list[int]:
        """Ids of one prompt, at most `prompt_limit`; see `prompt_rows`."""
        return self.prompt_rows([prompt])[0]

    def prompt_rows(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """Ids of prompts with the layout's prefix and suffix, spans shortened by whole tokens.

        Raises:
            InputError: If what must be kept of a prompt does not fit.
        """
        rows = []
        for prompt, piece in zip(prompts, self._encoder.prompts(prompts), strict=True):
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
        rows = self._whole_responses(texts)
        return [[*row, self.layout.eos_id][: self.response_limit] for row in rows]

    def prompt_lengths(self, prompts: Sequence[PromptText]) -> list[int]:
        """Tokens of prompts before truncation, prefix and suffix included."""
        around = self.prompt_limit - self._room()
        return [len(piece.ids) + around for piece in self._encoder.prompts(prompts)]

    def response_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of responses before truncation, EOS included."""
        return [len(row) + 1 for row in self._whole_responses(texts)]

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
            self._encoder.prompts(prompts),
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
        around = self.prompt_limit - self._room()
        problems: list[str] = []
        for batch in _batches(rows, _CHECK_ROWS):
            prompts = [row.prompt for row in batch]
            for row, piece in zip(batch, self._encoder.prompts(prompts), strict=True):
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

    def _whole_responses(self, texts: Sequence[str]) -> list[list[int]]:
        if self.layout.response_continues_text:
            return self._encoder.continuations(texts)
        return [piece.ids for piece in self._encoder.literal(texts)]

    def _room(self) -> int:
        return self.prompt_limit - len(self.layout.prefix_ids) - len(self.layout.suffix_ids)

    def _too_small(self, prompt: PromptText) -> str:
        piece = self._encoder.prompts([prompt])[0]
        fixed = len(piece.ids) - len(self._removable(prompt, piece))
        needed = fixed + self.prompt_limit - self._room()
        return (
            f"prompt_sequence_length: is {self.prompt_limit}, expected more than {needed}, which "
            "the instruction, the chat template and special tokens take alone"
        )

    def _shorten(self, prompt: PromptText, piece: Piece) -> list[int] | None:
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
            if near not in dropped or not overlap(piece.offsets[near], piece.offsets[place]):
                break
            dropped.add(place)
        return [id_ for place, id_ in enumerate(piece.ids) if place not in dropped]

    def _removable(self, prompt: PromptText, piece: Piece) -> list[int]:
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
        for anchor in ANCHORS[1:]:
            ids = self._encoder.literal([anchor])[0].ids
            if self._decode([ids])[0].strip() == anchor:
                return ids
        return []


def _batches(rows: Iterable[PromptSource], size: int) -> Iterator[list[PromptSource]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
