"""The built-in corpus: posts with facts, summaries, and preferences from a known gold reward.

Everything is generated from the small grammar below and a seed, so the quickstart needs no download
and we know what the annotator wants. That makes over-optimization visible: PPO sees only the reward
model (the proxy), while ``gold_reward`` tells whether the summaries really became better (Gao et
al. 2022, arXiv 2210.10760).

Who writes what:

* *demonstrations* (``sft.jsonl``): a hurried writer forgets facts, invents some and rambles. A
  converged SFT model copies those habits, which leaves PPO something to gain.
* *candidates* (``preferences.jsonl``, ``eval.jsonl``): writers from careful to hopeless, so that
  the reward model sees both better and worse texts than the policy starts with.
* *references* for ROUGE (``output_text`` in ``eval.jsonl``): a careful writer, several wordings.

A post belongs to the held-out or the training set by a hash of its text, whatever the seed: no
``eval.jsonl`` shares a prompt with any other file of any seed, nor with the data used to train the
shipped checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlhf.files.text import write_text

CUE = " [summary]:"
"""The end of every post; summaries continue it with a space, as in the TL;DR data."""

COVERED = 1.0
"""Gold reward per fact of the post that the summary states."""
INVENTED = -1.0
"""Gold reward per fact in the summary that is not in the post."""
EXCESS_WORD = -0.15
"""Gold reward per word over the budget."""
WORD_BUDGET = 16
"""Enough for a careful summary of any post, give or take a word; rambling costs."""
ANNOTATOR_SHARPNESS = 1.25
"""The annotator prefers a to b with probability sigmoid(sharpness * (gold a - gold b))."""

# Each value belongs to exactly one slot and appears in no other sentence, so a word identifies its
# fact.
_VALUES = {
    "who": "Anna Boris Clara David Elena Felix Grace Henry Irene Jonas Karla Liam Maria Nils "
    "Olga Peter",
    "action": "bought sold lost found broke borrowed painted repaired stole dropped hid polished",
    "object": "lamp guitar kettle bicycle ladder camera mirror carpet violin blanket teapot "
    "suitcase radio shovel helmet clock",
    "place": "Rome Oslo Lima Cairo Delhi Paris Quito Tokyo Vienna Zurich Dublin Havana Lisbon "
    "Madrid Nairobi Sydney",
    "month": "January February March April May June July August September October November "
    "December",
    "price": "ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety hundred",
    "feeling": "proud happy angry sad jealous nervous grateful lonely guilty relieved bored "
    "excited",
    "cause": "rain traffic noise holiday weather neighbour wedding strike smoke storm deadline "
    "fever",
}
FACTS = {slot: tuple(words.split()) for slot, words in _VALUES.items()}
CORE_SLOTS = ("who", "action", "object")
EXTRA_SLOTS = ("place", "month", "price", "feeling", "cause")

_FACT_WORDS = {value.lower() for values in FACTS.values() for value in values}

_CORE_SENTENCES = (
    "My friend {who} {action} a {object} .",
    "It all began when {who} {action} a {object} .",
    "So {who} from work {action} a {object} .",
    "I have to tell you that {who} {action} a {object} .",
)
_EXTRA_SENTENCES = {
    "place": ("We were in {place} .", "This was in {place} by the way .", "I live in {place} ."),
    "month": ("It was last {month} .", "That was back in {month} .", "We are talking of {month} ."),
    "price": ("It was {price} euros .", "The price was {price} euros .", "All for {price} euros ."),
    "feeling": ("Now I am {feeling} .", "We all felt {feeling} .", "I am a bit {feeling} now ."),
    "cause": (
        "I blame the {cause} .",
        "It was all because of the {cause} .",
        "The {cause} , again .",
    ),
}
_FILLERS = (
    "I do not know what to think .",
    "Please be kind .",
    "Sorry for my English .",
    "Thanks for reading .",
    "What would you do ?",
    "This is a long one .",
    "Am I wrong here ?",
    "My mother says it is nothing .",
    "Any advice is welcome .",
    "I could not sleep at all .",
)
# Replacements for forgotten core facts.
_VAGUE = {"who": "Someone", "action": "had", "object": "thing"}
_CLAUSES = {
    "place": ("in {place}",),
    "month": ("last {month}", "in {month}"),
    "price": ("for {price} euros",),
    "feeling": ("and felt {feeling}", "and was {feeling}"),
    "cause": ("because of the {cause}", "due to the {cause}"),
}
_OPENINGS = ("Long story short :", "The story again :", "To be honest :")


@dataclass(frozen=True)
class Post:
    """A post and its facts.

    Attributes:
        text: what the model reads, ending in ``CUE``.
        facts: slot -> value.
    """

    text: str
    facts: dict[str, str]

    @property
    def held_out(self) -> bool:
        """Whether the post belongs to the held-out eighth, judging by its text alone."""
        return hashlib.sha256(self.text.encode()).digest()[0] % 8 == 0


@dataclass(frozen=True)
class Writer:
    """Habits of a writer of summaries.

    Attributes:
        forget: probability of leaving out a fact of the post, independently for each fact.
        invent: probability of getting a fact wrong, or of making one up.
        ramble: probability of a rambling opening.
    """

    forget: float
    invent: float
    ramble: float


HURRIED = Writer(forget=0.5, invent=0.03, ramble=0.3)
CAREFUL = Writer(forget=0.0, invent=0.0, ramble=0.0)


def make_post(rng: random.Random) -> Post:
    """Draw a post of 5 to 7 facts, 40 to 70 words."""
    slots = list(CORE_SLOTS) + rng.sample(EXTRA_SLOTS, rng.choice((2, 3, 4)))
    facts = {slot: rng.choice(FACTS[slot]) for slot in slots}
    sentences = [rng.choice(_EXTRA_SENTENCES[slot]) for slot in slots[len(CORE_SLOTS) :]]
    sentences += rng.sample(_FILLERS, 6 - len(sentences))
    rng.shuffle(sentences)
    sentences.insert(rng.choice((0, 0, 1, 2)), rng.choice(_CORE_SENTENCES))
    text = " ".join(sentences).format(**facts)
    return Post(_join_punctuation(text) + CUE, facts)


def write_summary(rng: random.Random, facts: dict[str, str], writer: Writer) -> str:
    """Write a summary as ``writer`` would; it starts with a space."""
    told: dict[str, str] = {}
    for slot, values in FACTS.items():
        if slot in facts and rng.random() < writer.forget:
            continue
        if rng.random() < writer.invent:
            told[slot] = rng.choice([value for value in values if value != facts.get(slot)])
        elif slot in facts:
            told[slot] = facts[slot]
    words = ["{who} {action} a {object}".format(**(_VAGUE | told))]
    words += [rng.choice(_CLAUSES[slot]).format(**told) for slot in EXTRA_SLOTS if slot in told]
    if rng.random() < writer.ramble:
        words.insert(0, rng.choice(_OPENINGS))
    return " " + _join_punctuation(" ".join(words) + " .")


def vocabulary() -> list[str]:
    """Return every word and mark that the grammar can produce, in order, and the cue."""
    by_slot = [*_EXTRA_SENTENCES.values(), *_CLAUSES.values()]
    texts = [*_CORE_SENTENCES, *_FILLERS, *_VAGUE.values(), *_OPENINGS]
    texts += [text for texts_of_slot in by_slot for text in texts_of_slot]
    values = [value for values in FACTS.values() for value in values]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    return sorted({*words, *values, "a", ".", CUE.strip()})


def _join_punctuation(text: str) -> str:
    return re.sub(r" ([.,?:])", r"\1", text)


def facts_in(text: str) -> set[str]:
    """Return the fact values that occur in a text, however messy, in lower case."""
    return {word for word in re.findall(r"[a-z]+", text.lower()) if word in _FACT_WORDS}


def gold_reward(post: str, summary: str) -> float:
    """Return the annotator's reward: +1 per fact covered, -1 per fact invented, less excess words.

    A fact counts once however often it is stated. Accepts any text, even an empty one (0.0).
    """
    asked, told = facts_in(post), facts_in(summary)
    excess = max(0, len(summary.split()) - WORD_BUDGET)
    return COVERED * len(asked & told) + INVENTED * len(told - asked) + EXCESS_WORD * excess


def preference_probability(post: str, candidate_0: str, candidate_1: str) -> float:
    """Return the probability that the annotator prefers candidate 1 (Bradley & Terry 1952)."""
    difference = gold_reward(post, candidate_1) - gold_reward(post, candidate_0)
    return 1.0 / (1.0 + math.exp(-ANNOTATOR_SHARPNESS * difference))


def allowed_accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """Return the accuracy ceiling that label noise sets on these rows: mean max(p, 1-p)."""
    probabilities = [
        preference_probability(row["input_text"], row["candidate_0"], row["candidate_1"])
        for row in rows
    ]
    return sum(max(p, 1.0 - p) for p in probabilities) / len(probabilities)


@dataclass(frozen=True)
class CorpusSizes:
    """Rows per file."""

    sft: int = 4096
    preferences: int = 4096
    prompts: int = 4096
    eval: int = 512


def write_corpus(folder: str | Path, seed: int = 0, sizes: CorpusSizes | None = None) -> None:
    """Write ``sft``, ``preferences``, ``prompts`` and ``eval`` ``.jsonl`` into a folder."""
    sizes = sizes or CorpusSizes()
    for name, make_row, held_out in (
        ("sft", _sft_row, False),
        ("preferences", _preference_row, False),
        ("prompts", _prompt_row, False),
        ("eval", _eval_row, True),
    ):
        rng = random.Random(f"{name} {seed}")  # noqa: S311 (no secret)
        posts = _posts(rng, held_out)
        rows = (make_row(rng, next(posts)) for _ in range(getattr(sizes, name)))
        write_text(Path(folder, f"{name}.jsonl"), (json.dumps(row) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read one of the corpus files."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _posts(rng: random.Random, held_out: bool) -> Iterator[Post]:
    """Yield distinct posts from one side of the split, without end."""
    seen: set[str] = set()
    while True:
        post = make_post(rng)
        if post.held_out is held_out and post.text not in seen:
            seen.add(post.text)
            yield post


def _sft_row(rng: random.Random, post: Post) -> dict[str, object]:
    return {"input_text": post.text, "output_text": write_summary(rng, post.facts, HURRIED)}


def _prompt_row(_: random.Random, post: Post) -> dict[str, object]:
    return {"input_text": post.text}


def _preference_row(rng: random.Random, post: Post) -> dict[str, object]:
    candidates = [write_summary(rng, post.facts, _any_writer(rng)) for _ in range(2)]
    probability = preference_probability(post.text, *candidates)
    return {
        "input_text": post.text,
        "candidate_0": candidates[0],
        "candidate_1": candidates[1],
        "choice": int(rng.random() < probability),
    }


def _eval_row(rng: random.Random, post: Post) -> dict[str, object]:
    references = sorted({write_summary(rng, post.facts, CAREFUL) for _ in range(3)})
    return _preference_row(rng, post) | {"output_text": references}


def _any_writer(rng: random.Random) -> Writer:
    """Draw a writer, from careful to hopeless."""
    return Writer(rng.uniform(0.0, 0.9), rng.uniform(0.0, 0.05), 0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a corpus from the command line: ``python -m rlhf.quickstart.corpus FOLDER``."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.quickstart.corpus", description=main.__doc__
    )
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(CorpusSizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="ROWS")
    options = vars(parser.parse_args(arguments))
    write_corpus(options.pop("folder"), options.pop("seed"), CorpusSizes(**options))


if __name__ == "__main__":
    main()
