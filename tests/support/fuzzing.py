"""Seeded damage to texts, for tests that feed broken files to readers."""

import os
import random
from collections.abc import Iterator, Sequence

# Cases per fuzz test; a thorough run sets RLHF_FUZZ=30000.
CASES = int(os.environ.get("RLHF_FUZZ", "400"))


def mutations(
    originals: Sequence[bytes], tokens: Sequence[bytes], cases: int = CASES, seed: int = 0
) -> Iterator[bytes]:
    """Yield damaged copies: pieces removed, doubled or swapped, tokens and bytes inserted."""
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        text = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            start = rng.randrange(len(text) + 1)
            end = min(len(text), start + rng.choice((0, 0, 1, 1, 2, 5, 30)))
            kind = rng.randrange(6)
            if kind == 0:
                del text[start:end]
            elif kind == 1:
                text[start:end] = rng.choice(tokens)
            elif kind == 2:  # a token in place of a value
                stop = text.find(b"\n", start)
                at = text.find(b": ", start, stop)
                text[at + 2 if at >= 0 else start : max(stop, start)] = rng.choice(tokens)
            elif kind == 3:
                text[start:start] = text[start:end] * rng.choice((1, 2, 50))
            elif kind == 4:
                other = rng.choice(originals)
                piece = rng.randrange(len(other) + 1)
                text[start:end] = other[piece : piece + rng.choice((1, 10, 60))]
            else:
                text[start:end] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 4))))
        yield bytes(text)
