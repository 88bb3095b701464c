"""Conversations of other layouts, merged without repeating any turn.

A turn is an object with `role` (or `author`) and `content`, or with `from` and `value`; two turns
are equal if their authors and texts are, ignoring surrounding spaces.
"""

from functools import lru_cache
from typing import Any

from rlhf.data.row_checker import in_words

Turn = dict[str, Any]

# Who speaks in turns of `from` and `value` (ShareGPT).
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_TURN_KEYS = ("author", "role", "content", "from", "value")


class RowError(ValueError):
    """A row does not match its layout; the message has the form of `RowChecker`'s problems."""


class NoPreferenceError(Exception):
    """A row matches its layout but states no preference between two answers to one prompt."""


def split_answers(
    prompt: str | list[Turn] | None, chosen: list[Any], rejected: list[Any]
) -> tuple[list[Turn], list[str]]:
    """Return the turns before two answers, and the answers."""
    if not chosen or not rejected:
        raise NoPreferenceError
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        last = conversation[-1]
        if not isinstance(last, dict) or _plain_turn(last) is None:
            raise RowError(
                f"{name}[-1]: is {in_words(last)}, expected a turn with role and content"
            )
    chosen, rejected = checked_turns(chosen, "chosen"), checked_turns(rejected, "rejected")
    answers = [conversation[-1] for conversation in (chosen, rejected)]
    shared = chosen[:-1]
    if list(map(_said, shared)) != list(map(_said, rejected[:-1])) or any(
        author(answer) not in (None, "assistant") for answer in answers
    ):
        raise NoPreferenceError
    if isinstance(prompt, str) and not prompt.strip():
        prompt = None
    if isinstance(prompt, list) and prompt and _said(prompt[-1]) in map(_said, answers):
        own, others = list(map(_said, prompt[:-1])), list(map(_said, shared))
        if own[len(own) - len(others) :] == others:
            prompt = prompt[:-1]  # some files also repeat the answer
    turns = joined(prompt, shared)
    if not turns:
        raise NoPreferenceError
    return turns, [answer["content"] for answer in answers]


def joined(prompt: str | list[Turn] | None, shared: list[Turn]) -> list[Turn]:
    """Merge the prompt's own turns with those that the conversations share, each once."""
    if isinstance(prompt, str):
        if any(turn["content"].strip() == prompt.strip() for turn in shared):
            return shared
        prompt = [{"role": "user", "content": prompt}]
    before = prompt or []
    own, others = list(map(_said, before)), list(map(_said, shared))
    if _contains(others, own):
        return shared
    for common in range(min(len(own), len(others)), 0, -1):
        if own[-common:] == others[:common]:
            return before + shared[common:]
    clash = own and others and (others[0][0] == "system" or own[-1][0] == others[0][0])
    if clash or _contains(own, others):
        raise RowError(
            "prompt: is not how chosen and rejected begin, expected their first turns or none"
        )
    return before + shared


def _contains(turns: list[Any], part: list[Any]) -> bool:
    starts = range(len(turns) - len(part) + 1) if part else ()
    return any(turns[start : start + len(part)] == part for start in starts)


def history_turns(history: list[Any]) -> list[Turn]:
    """Return the turns of a list of [question, answer] pairs, or of a list of turns."""
    if all(isinstance(turn, dict) for turn in history):
        return checked_turns(history, "history")
    turns = []
    for number, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise RowError(
                f"history[{number}]: is {in_words(pair)}, expected two texts, question and answer"
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def checked_turns(values: list[Any], name: str) -> list[Turn]:
    """Return turns of one spelling whose content is text; join texts that are split into parts."""
    turns = []
    for number, turn in enumerate(values):
        plain = _plain_turn(turn) if isinstance(turn, dict) else None
        if plain is None:
            raise RowError(
                f"{name}[{number}]: is {in_words(turn)}, expected a turn with role and content"
            )
        turns.append(plain)
    return turns


@lru_cache(maxsize=64)
def turn_paths(name: str) -> frozenset[str]:
    """Return the paths of what is read of the turns in a field."""
    return frozenset(
        {f"{name}{where}.{key}" for where in ("", "[]") for key in _TURN_KEYS}
        | {f"{name}{where}.content[].{key}" for where in ("", "[]") for key in ("type", "text")}
    )


def is_odd(turns: Any) -> bool:
    """Return whether a list has turns that only `checked_turns` can read."""
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and ("from" in turn or isinstance(turn.get("content"), list))
        for turn in turns
    )


def ends_with_answer(turns: Any) -> bool:
    """Return whether the last turn of a list of turns is the assistant's."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return False
    plain = _plain_turn(turns[-1])
    return plain is not None and author(plain) == "assistant"


def _plain_turn(turn: Turn) -> Turn | None:
    """Return a turn with its author, if given, and text; None if it has no text."""
    if "from" in turn and isinstance(turn.get("value"), str):
        speaker = turn["from"]
        known = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": known, "content": turn["value"]}
    content = _content(turn)
    if not isinstance(content, str):
        return None
    return {key: turn[key] for key in ("author", "role") if key in turn} | {"content": content}


def _content(turn: Turn) -> Any:
    content = turn.get("content")
    if isinstance(content, list) and content:
        texts = [part["text"] for part in content if isinstance(part, dict) and "text" in part]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    return content


def author(turn: Turn) -> Any:
    """Return the speaker, from `author` or `role`; None if neither is given."""
    return turn.get("role") if turn.get("author") is None else turn["author"]


def _said(turn: Turn) -> tuple[Any, str]:
    """Return what makes two turns equal."""
    return author(turn), turn["content"].strip()
