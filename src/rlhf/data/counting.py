"""Token counts of texts, without ids and offsets, fast enough for millions of rows.

Counts equal the lengths of the ids that `rlhf.data.encoding` returns.
"""

import hashlib
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.encoding import ANCHORS, TextEncoder
from rlhf.data.row_table import text_sizes
from rlhf.data.schema import PromptText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer may add a few tokens before or between texts.
MARGIN = 16


class TokenCounter:
    """Token counter for one tokenizer.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        encoder: Its encoder.

    Attributes:
        identity: Equal for two counters exactly if their tokenizers are.
        one_per_character: Whether an ASCII text with a visible character has at least one token
            and, give or take `MARGIN`, no more tokens than characters.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer.backend_tokenizer
        special = [
            str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        special += [text for text in tokenizer.all_special_tokens if isinstance(text, str)]
        # Texts without these characters contain nothing that looks like a special token.
        self._first = {text[0] for text in special if text}
        self._ascii_only = any(
            token.special and token.normalized for token in tokenizer.added_tokens_decoder.values()
        )
        state = f"{self._tokenizer.to_str()}{sorted(special)}{tokenizer.unk_token_id}"
        self.identity = hashlib.sha256(state.encode()).hexdigest()
        alone = self._count(["a"])[0]
        after_a = self._count([f"a{char}" for char in string.printable])
        visible = [char for char in string.printable if not char.isspace()]
        seen = self._count([*visible, "".join(visible)])
        self.one_per_character = max(after_a) <= alone + 1 and min(seen) > 0

    def prompts(self, prompts: Sequence[PromptText]) -> list[int]:
        """Count the tokens of prompts, without prefix and suffix."""
        prompts = [prompt.with_bos() for prompt in prompts]
        counts = self._count([prompt.text for prompt in prompts])
        odd = [number for number, prompt in enumerate(prompts) if not self._plain_prompt(prompt)]
        pieces = self._encoder.prompts([prompts[number] for number in odd])
        for number, piece in zip(odd, pieces, strict=True):
            counts[number] = len(piece.ids)
        return counts

    def literal(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of texts in which nothing is a special token."""
        counts = self._count(texts)
        odd = [number for number, text in enumerate(texts) if not self._plain(text)]
        pieces = self._encoder.literal([texts[number] for number in odd])
        for number, piece in zip(odd, pieces, strict=True):
            counts[number] = len(piece.ids)
        return counts

    def continuations(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of texts that follow other text."""
        anchor = ANCHORS[0]
        before = self._encoder.literal([anchor])[0].ids
        self._no_extras()
        counts = []
        odd = []
        encoded = self._tokenizer.encode_batch_fast(
            [anchor + text for text in texts], add_special_tokens=False
        )
        for number, (text, one) in enumerate(zip(texts, encoded, strict=True)):
            counts.append(len(one) - len(before) if text else 0)
            # If a token crosses the boundary, another anchor is needed.
            if text and not (self._plain(text) and one.ids[: len(before)] == before):
                odd.append(number)
        rows = self._encoder.continuations([texts[number] for number in odd])
        for number, row in zip(odd, rows, strict=True):
            counts[number] = len(row)
        return counts

    def _count(self, texts: Sequence[str]) -> list[int]:
        self._no_extras()
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(one) for one in encoded]

    def _no_extras(self) -> None:
        """Switch off truncation, padding and anything else the last caller left on."""
        self._encoder.prompts([PromptText("a", ((0, 1),))])

    def _plain_prompt(self, prompt: PromptText) -> bool:
        spans = (*prompt.spans, *prompt.reserve)
        if len(spans) == 1 and spans[0] == (0, len(prompt.text)):
            return self._plain(prompt.text)
        return all(self._plain(prompt.text[start:end]) for start, end in spans)

    def _plain(self, text: str) -> bool:
        if self._ascii_only and not text.isascii():
            return False
        return not any(char in text for char in self._first)


def surely_short(texts: Any, limit: int, counter: TokenCounter) -> NDArray[np.bool_]:
    """Return which texts certainly have 1 to `limit` tokens, judging by their characters alone.

    Args:
        texts: (N,) Arrow column.
        limit: A number of tokens.
        counter: Counter of the tokenizer.
    """
    import pyarrow.compute as pc

    characters, size = text_sizes(texts)
    visible = pc.match_substring_regex(texts, "[!-~]").to_numpy(zero_copy_only=False)
    short: NDArray[np.bool_] = (characters == size) & (characters + MARGIN <= limit) & visible
    return short & counter.one_per_character
