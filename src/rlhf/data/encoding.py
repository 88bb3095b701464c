"""Tokenization with character offsets, and special tokens only where they are intended.

Hugging Face tokenizers read "</s>" in a user's text as the token. Here it stays text: its
characters are encoded one by one where the tokenizer has no such option.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.data.schema import PromptText, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts put before a response while it is tokenized; the first one that the tokenizer does not
# merge with the response is used. They are of different kinds, so one always fits.
ANCHORS = ("\n", ":", "a", "1", ".", "\u00e9")
_FILLER = "\ue000"


class Piece:
    """Ids of one text and their character ranges, as parallel lists."""

    def __init__(self, ids: list[int], offsets: list[Span]) -> None:
        self.ids = ids
        self.offsets = offsets


class TextEncoder:
    """Encoder for one tokenizer; adds nothing before or after a text and truncates nothing.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        # `all_special_ids` only includes those with a name.
        added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)
        # UNK can result from plain text, except in byte-level tokenizers that reuse EOS as UNK.
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            self._special -= {tokenizer.unk_token_id}

    def prompts(self, prompts: Sequence[PromptText]) -> list[Piece]:
        """Encode prompts; nothing inside their spans becomes a special token.

        A BOS written by a chat template is encoded with the text, because some tokenizers treat
        text after a special token differently from text at the beginning; its offsets are negative.
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
        """Encode a prompt whose user text looks like special tokens in the ranges `taken`."""
        spans = [*prompt.spans, *prompt.reserve]
        while True:
            text = prompt.text
            for start, end in taken:
                text = text[:start] + _FILLER * (end - start) + text[end:]
            piece = self._encode([text])[0]
            # Hiding one may expose another ("</</s>s>").
            found = self._special_in(piece, text, spans)
            more = [o for o in found if not any(overlap(o, range_) for range_ in taken)]
            if not more:
                return self._spell_out(piece, prompt.text, taken)
            taken = taken + more

    def literal(self, texts: Sequence[str]) -> list[Piece]:
        """Encode texts in which nothing is a special token."""
        pieces = self._encode(texts, literal=True)
        for number, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            # Unigram models have special tokens among their pieces and so find them anyway.
            taken = self._special_in(piece, text, [(0, len(text))])
            if taken:
                pieces[number] = self._spell_out(piece, text, taken)
        return pieces

    def _special_in(self, piece: Piece, text: str, spans: Sequence[Span]) -> list[Span]:
        """Return where special tokens were found inside the spans of a text."""
        found = [o for id_, o in zip(piece.ids, piece.offsets, strict=True) if id_ in self._special]
        # Some scaffolding tokens swallow adjacent spaces; that does not make them the user's.
        return [o for o in found if any(overlap(_trim(text, o), span) for span in spans)]

    def _spell_out(self, piece: Piece, text: str, ranges: Sequence[Span]) -> Piece:
        """Replace the tokens in some ranges of the text with single-character tokens."""
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
        """Return the ids of one character inside a text."""
        for anchor in ANCHORS:
            ids = _after(self._encode([anchor + char], literal=True)[0], len(anchor))
            if ids is not None:
                return ids
        return [id_ for id_ in [self._tokenizer.unk_token_id] if id_ is not None]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts as they follow other text: no dummy prefix, leading space kept.

        If the tokenizer would merge the beginning of a response with the text before it, another
        anchor is used: when no token crosses the boundary, the response's tokens do not depend on
        the anchor.
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
    """Return the ids after a character boundary, or None if a token crosses it."""
    before = sum(start < boundary for start, _ in piece.offsets)
    if any(end > boundary for _, end in piece.offsets[:before]):
        return None
    return piece.ids[before:]


def _trim(text: str, span: Span) -> Span:
    word = text[span[0] : span[1]]
    start = span[0] + len(word) - len(word.lstrip())
    return start, start + len(word.strip())


def overlap(one: Span, other: Span) -> bool:
    """Return whether two ranges share a character."""
    return one[0] < other[1] and other[0] < one[1]
