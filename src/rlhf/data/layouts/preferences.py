r"""Layouts with `chosen` and `rejected`.

The answers are texts or conversations, and the prompt is beside them, repeated in them, or both. A
prompt that both repeat, in whole or in part, is written once. HH-RLHF (Bai et al. 2022) writes
dialogues, "\n\nHuman: …\n\nAssistant: …", that differ in the last answer only. Two texts without
any prompt share their beginning, which is the prompt (TRL's implicit prompt).
"""

import re
from typing import Any

from rlhf.data.layouts.parts import (
    SYSTEM_NAMES,
    Converted,
    Row,
    choice_by_score,
    complete,
    has,
    has_own_prompt,
    number_of,
    own_prompt,
    pair,
    text_of,
)
from rlhf.data.layouts.turns import (
    NoPreferenceError,
    RowError,
    Turn,
    author,
    checked_turns,
    ends_with_answer,
    is_odd,
    split_answers,
    turn_paths,
)
from rlhf.data.row_checker import holds_something

_BEGINNING = re.compile(r"\n*Human:")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_AUTHORS = {"Human": "user", "Assistant": "assistant"}
_ANSWER = "\n\nAssistant:"

# Pairs of names for the scores of the two answers.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
# What asks for conversion even if all of a row's fields are texts.
_MORE = frozenset(
    (*SYSTEM_NAMES, "history", "messages", *(name for both in SCORES for name in both))
)


def begins_dialogue(text: str) -> bool:
    """Return whether a text begins as HH-RLHF's dialogues do."""
    return _BEGINNING.match(text) is not None


def may_be_plain(keys: frozenset[str]) -> bool:
    """Return whether rows with these keys can be read as they are if all fields are texts."""
    return bool(keys & {"prompt", "input_text"}) and not keys & _MORE


def reads_as_it_is(row: Row) -> bool:
    """Return whether `chosen`, `rejected` and the prompt can be read without any conversion."""
    if not (isinstance(row["chosen"], str) and isinstance(row["rejected"], str)):
        return False
    if any(has(row, *names) for names in SCORES) or any(
        holds_something(row.get(name)) for name in (*SYSTEM_NAMES, "history")
    ):
        return False
    prompt = row.get("input_text") if has(row, "input_text") else row.get("prompt")
    if has(row, "messages"):
        turns = row["messages"]
        return prompt is None and not ends_with_answer(turns) and not is_odd(turns)
    return isinstance(prompt, str) and not begins_dialogue(prompt)


def from_pair(row: Row) -> Converted:
    """Convert a row with a prompt in any spelling, or in both conversations."""
    chosen, rejected = (
        [answer] if isinstance(answer, dict) else answer
        for answer in (row["chosen"], row["rejected"])
    )
    prompt, used = own_prompt(row)
    learned: Row = {}
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, answers = split_answers(prompt, chosen, rejected)
        used |= turn_paths("chosen") | turn_paths("rejected")
    else:
        answers = [text_of(row, "chosen"), text_of(row, "rejected")]
        if isinstance(prompt, str) and _is_dialogue(prompt, *answers):
            written, kept = from_dialogues(row)
            return written, used | kept
        if prompt is None:
            text_of(row, "prompt")
        if isinstance(prompt, list) and "messages.role" in used and ends_with_answer(prompt):
            *prompt, last = prompt
            learned = {"output_text": last["content"]}
        used |= {"chosen", "rejected"}
    written, kept = complete(row, prompt)
    choice, of_choice = _choice(row)
    if not learned:
        learned, of_messages = _demonstration(row, written)
        used |= of_messages
    return learned | written | pair(answers, choice), used | kept | of_choice


def _choice(row: Row) -> tuple[int | str, set[str]]:
    """Return 0, the chosen answer, or a tie if both have the same score."""
    for names in SCORES:
        if has(row, *names):
            tied = choice_by_score(*(number_of(row, name) for name in names))
            return tied if isinstance(tied, str) else 0, set(names)
    return 0, set()


def _demonstration(row: Row, written: Row) -> Converted:
    """Return the answer to learn if `messages` repeats the prompt, and what was used of it."""
    if not ends_with_answer(row.get("messages")) or has(row, "output_text"):
        return {}, set()
    *turns, answer = checked_turns(row["messages"], "messages")
    prompt = written.get("messages") or [{"role": "user", "content": written.get("input_text")}]
    if [_said(turn) for turn in turns] != [_said(turn) for turn in prompt]:
        return {}, set()
    return {"output_text": answer["content"]}, set(turn_paths("messages"))


def _said(turn: Turn) -> tuple[Any, str]:
    return author(turn), turn["content"].strip()


def is_dialogue_pair(row: Row) -> bool:
    """Return whether the answers are HH-RLHF's dialogues, with nothing else that is a prompt."""
    texts = (row["chosen"], row["rejected"])
    return (
        not has_own_prompt(row)
        and all(isinstance(text, str) for text in texts)
        and any(begins_dialogue(text) and _ANSWER in text for text in texts)
    )


def _is_dialogue(prompt: str, chosen: str, rejected: str) -> bool:
    """Return whether the answers are HH-RLHF dialogues, which begin with the prompt."""
    begins = prompt.strip()
    return begins_dialogue(prompt) and all(
        text.lstrip().startswith(begins) and _ANSWER in text for text in (chosen, rejected)
    )


def dialogue_turns(text: str) -> list[Turn]:
    """Return the turns of a dialogue that the user ends.

    Raises:
        NoPreferenceError: Another one ends it, or the user says nothing in it.
    """
    turns: list[Turn] = []
    pieces = _SPEAKER.split("\n\n" + text.lstrip())[1:]
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        said_by = _AUTHORS[speaker]
        if turns and turns[-1]["author"] == said_by:  # the same speaker continues
            turns[-1]["content"] += "\n\n" + content.strip()
        else:
            turns.append({"author": said_by, "content": content.strip()})
    if turns[-1]["author"] != "user" or any(
        turn["author"] == "user" and not turn["content"].strip() for turn in turns
    ):
        raise NoPreferenceError
    return turns


def from_dialogues(row: Row) -> Converted:
    """Convert a row of HH-RLHF."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    end = chosen.rfind(_ANSWER)
    if end < 0 or not begins_dialogue(chosen):
        raise RowError('chosen: is no dialogue, expected "\\n\\nHuman: …\\n\\nAssistant: …"')
    prompt = chosen[: end + len(_ANSWER)]
    if not rejected.startswith(prompt) or _SPEAKER.search(rejected, len(prompt)):
        raise NoPreferenceError
    turns = dialogue_turns(chosen[:end])
    answers = (text[len(prompt) :].strip() for text in (chosen, rejected))
    written, kept = complete(row, turns)
    return written | pair(answers, 0), kept | {"chosen", "rejected"}


def is_implicit(row: Row) -> bool:
    """Return whether two texts are all there is, so that they have to share the prompt."""
    texts = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    return texts and not has_own_prompt(row)


def from_implicit(row: Row) -> Converted:
    """Convert two texts that begin with the same prompt, up to the last word they share."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    ends = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    end = next(ends, min(len(chosen), len(rejected)))
    if chosen == rejected:
        raise NoPreferenceError
    end = max((i for i in range(end + 1) if chosen[i : i + 1].isspace()), default=0)
    if not chosen[:end].strip():
        raise RowError(
            "chosen: does not begin as rejected does, expected both to begin with the prompt, or a "
            "field prompt"
        )
    written, kept = complete(row, chosen[:end])
    choice, of_choice = _choice(row)
    answers = pair((chosen[end:], rejected[end:]), choice)
    return written | answers, kept | of_choice | {"chosen", "rejected"}
