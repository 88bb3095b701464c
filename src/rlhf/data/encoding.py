"""Texts to ids and character offsets, with special tokens only where they are meant.

Hugging Face tokenizers take "</s>" in a user's text for the token. Here it is text there: its
characters are encoded one by one where the tokenizer cannot be told.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.data.schema import PromptText, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts to stand before a response while it is tokenized; the first one that the tokenizer does not
# merge with the response is used. They differ in kind, so one always fits.
ANCHORS = ("\n", ":", "a", "1", ".", "\u00e9")
_FILLER = "\ue000"


class Piece:
    """Ids of one text and where their characters are; the lists run in parallel."""

    def __init__(self, ids: list[int], offsets: list[Span]) -> None:
        self.ids = ids
        self.offsets = offsets


class TextEncoder:
    """Encodes for one tokenizer; adds nothing before or after and cuts nothing.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        # `all_special_ids` knows only those with a name.
        added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)
        # UNK can come from plain text; byte-level tokenizers that name their EOS as UNK do not.
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            self._special -= {tokenizer.unk_token_id}

    def prompts(self, prompts: Sequence[PromptText]) -> list[Piece]:
        """Encodes prompts; in their spans nothing is a special token.

        A BOS that a chat template wrote is read with the text, because what follows a special
        token is not a text's beginning to some tokenizers; its offsets are below 0.
        """
        shifts = [len(prompt.template_bos or "") for prompt in prompts]
        pieces = self._prompts([prompt.with_bos() for prompt in prompts])
        for piece, shift in zip(pieces, shifts, strict=True):
            if shift:
                piece.offsets = [(start - shift, end - shift) for start, end in piece.offsets]
        return pieces

    def _prompts(self, prompts: Sequence[PromptText]) -> list[Piece]:
        pieces = self._encode([prompt.text for prompt in prompts])
        for number, (prompt, piece) in enumerate(zip(prompts, pieces, strict=True)):
            taken = self._special_in(piece, prompt.text, [*prompt.spans, *prompt.reserve])
            if taken:
                pieces[number] = self._encode_hiding(prompt, taken)
        return pieces

    def _encode_hiding(self, prompt: PromptText, taken: list[Span]) -> Piece:
        """Encodes a prompt in whose user text the ranges `taken` look like special tokens."""
        spans = [*prompt.spans, *prompt.reserve]
        while True:
            text = prompt.text
            for start, end in taken:
                text = text[:start] + _FILLER * (end - start) + text[end:]
            piece = self._encode([text])[0]
            # Behind a hidden one another may come to light ("</</s>s>").
            found = self._special_in(piece, text, spans)
            more = [o for o in found if not any(overlap(o, range_) for range_ in taken)]
            if not more:
                return self._spell_out(piece, prompt.text, taken)
            taken = taken + more

    def literal(self, texts: Sequence[str]) -> list[Piece]:
        """Encodes texts in which nothing is a special token."""
        pieces = self._encode(texts, literal=True)
        for number, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            # Unigram has its special tokens among its pieces, so it finds them all the same.
            taken = self._special_in(piece, text, [(0, len(text))])
            if taken:
                pieces[number] = self._spell_out(piece, text, taken)
        return pieces

    def _special_in(self, piece: Piece, text: str, spans: Sequence[Span]) -> list[Span]:
        """Where special tokens were found in the spans of a text."""
        found = [o for id_, o in zip(piece.ids, piece.offsets, strict=True) if id_ in self._special]
        # Some tokens of the scaffolding swallow the space before or after them: not the user's.
        return [o for o in found if any(overlap(_trim(text, o), span) for span in spans)]

    def _spell_out(self, piece: Piece, text: str, ranges: Sequence[Span]) -> Piece:
        """Replaces the tokens over some ranges of the text by tokens of single characters."""
        ids: list[int] = []
        offsets: list[Span] = []
        spelled = 0
        for id_, offset in zip(piece.ids, piece.offsets, strict=True):
            if not any(overlap(offset, range_) for range_ in ranges):
                ids.append(id_)
                offsets.append(offset)
                continue
            for place in range(max(offset[0], spelled), offset[1]):
                for char_id in self._character(text[place]):
                    ids.append(char_id)
                    offsets.append((place, place + 1))
            spelled = max(spelled, offset[1])
        return Piece(ids, offsets)

    def _character(self, char: str) -> list[int]:
        """Ids of one character inside a text."""
        for anchor in ANCHORS:
            ids = _after(self._encode([anchor + char], literal=True)[0], len(anchor))
            if ids is not None:
                return ids
        return [id_ for id_ in [self._tokenizer.unk_token_id] if id_ is not None]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they follow other text: no dummy prefix, leading space kept.

        A tokenizer that would merge a response's beginning with what stands before it gets another
        anchor: where no token crosses the boundary, the tokens behind it do not depend on it.
        """
        rows: list[list[int] | None] = [None if text else [] for text in texts]
        for anchor in ANCHORS:
            missing = [number for number, row in enumerate(rows) if row is None]
            if not missing:
                break
            pieces = self.literal([anchor + texts[number] for number in missing])
            for number, piece in zip(missing, pieces, strict=True):
                rows[number] = _after(piece, len(anchor))
        return [
            self.literal([text])[0].ids if row is None else row
            for text, row in zip(texts, rows, strict=True)
        ]

    def _encode(self, texts: Sequence[str], literal: bool = False) -> list[Piece]:
        if not texts:
            return []
        encoded = self._tokenizer(
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
        return [Piece(list(ids), [tuple(offset) for offset in offsets]) for ids, offsets in pairs]


def _after(piece: Piece, boundary: int) -> list[int] | None:
    """The ids behind a character boundary, or None if a token crosses it."""
    before = sum(start < boundary for start, _ in piece.offsets)
    if any(end > boundary for _, end in piece.offsets[:before]):
        return None
    return piece.ids[before:]


def _trim(text: str, span: Span) -> Span:
    word = text[span[0] : span[1]]
    start = span[0] + len(word) - len(word.lstrip())
    return start, start + len(word.strip())


def overlap(one: Span, other: Span) -> bool:
    """Whether two ranges share a character."""
    return one[0] < other[1] and other[0] < one[1]
