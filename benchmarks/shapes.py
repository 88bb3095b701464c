"""Sizes of the compared models and lengths of the texts. Needs nothing but Python."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Llama:
    """A decoder-only model, with parts named as in transformers.

    Attributes:
        hidden: D.
        layers: Number of blocks.
        heads: Query heads, each hidden / heads wide.
        kv_heads: Key and value heads.
        ffn: Inner width of the feed-forward network.
        vocab: V.
        tied: Whether the LM head shares the embedding.
    """

    arch: ClassVar[str] = "llama"
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = False

    @property
    def inner(self) -> int:
        """Total width of all query heads."""
        return self.hidden

    @property
    def kv_width(self) -> int:
        """Total width of all key heads."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def block(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of a block."""
        d, f, kv = self.hidden, self.ffn, self.kv_width
        attention = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


@dataclass(frozen=True)
class T5:
    """An encoder-decoder model of T5 v1.0: ReLU, LM head tied to the embedding.

    Attributes:
        hidden: D.
        layers: Number of blocks in the encoder, and in the decoder.
        heads: Attention heads.
        head_width: Width of each.
        ffn: Inner width of the feed-forward network.
        vocab: V.
    """

    arch: ClassVar[str] = "t5"
    tied: ClassVar[bool] = True
    hidden: int
    layers: int
    heads: int
    head_width: int
    ffn: int
    vocab: int

    @property
    def inner(self) -> int:
        """Total width of all heads."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """The same: every head has its own keys."""
        return self.inner

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of one attention layer."""
        d, inner = self.hidden, self.inner
        return {"q": (d, inner), "k": (d, inner), "v": (d, inner), "o": (inner, d)}

    @property
    def feed_forward(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of one feed-forward network."""
        return {"wi": (self.hidden, self.ffn), "wo": (self.ffn, self.hidden)}


Model = Llama | T5

MODELS: dict[str, Model] = {
    "llama_toy": Llama(128, 4, 4, 4, 344, 294, tied=True),
    "llama_15m": Llama(288, 6, 6, 6, 2048, 4096),
    "llama_38m": Llama(512, 8, 8, 8, 1728, 8192),
    "llama_1b": Llama(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama_7b": Llama(4096, 32, 32, 32, 11008, 32000),
    "t5_toy": T5(64, 2, 4, 16, 128, 294),
    "t5_small": T5(512, 6, 8, 64, 2048, 32128),
}

# Lengths of TL;DR posts and their summaries: quantiles over 741 prompts and 1560 candidates from
# the files that Google's tuning pipeline used, words times 1.3 tokens, plus EOS after a summary.
QUANTILES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
POST_TOKENS = (12, 151, 170, 230, 320, 395, 454, 477, 519)
SUMMARY_TOKENS = (1, 18, 21, 26, 34, 41, 50, 60, 157)


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts and responses, in tokens, BOS or EOS included.

    Attributes:
        prompt: Longest prompt.
        response: Longest response.
        real: Whether to draw lengths like TL;DR's, cut at these limits, instead of one fixed
            length; a response then ends in EOS, whereas one of fixed length is cut by the limit.
    """

    prompt: int
    response: int
    real: bool = False

    def draw(self, count: int, seed: int = 0) -> list[tuple[int, int]]:
        """Draw `count` pairs (prompt, response), the same for the same seed."""
        if not self.real:
            return [(self.prompt, self.response)] * count
        source = random.Random(seed)
        return [
            (
                min(self.prompt, quantile(POST_TOKENS, source.random())),
                min(self.response, quantile(SUMMARY_TOKENS, source.random())),
            )
            for _ in range(count)
        ]


def quantile(values: Sequence[int], level: float) -> int:
    """Return the value at `level` of a distribution given at QUANTILES, interpolated linearly."""
    after = min(bisect_right(QUANTILES, level), len(QUANTILES) - 1)
    low, high = QUANTILES[after - 1], QUANTILES[after]
    share = (level - low) / (high - low)
    return round(values[after - 1] + share * (values[after] - values[after - 1]))
