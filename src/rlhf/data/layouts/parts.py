"""What the layouts have in common: fields, prompts, and what of a row was used."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from rlhf.data.layouts.turns import (
    RowError,
    Turn,
    author,
    checked_turns,
    history_turns,
    joined,
    turn_paths,
)
from rlhf.data.row_checker import TIE, holds_something, in_words, is_number

Row = dict[str, Any]
# A row of the library, and the paths of the source's values used for it: "name", "name.key" of an
# object, "name[]" of each item of a list. A path includes everything below it.
Converted = tuple[Row, set[str]]

# Names of the prompt; the first one present is used.
PROMPT_NAMES = ("input_text", "prompt", "question", "instruction", "conversations", "input")
SYSTEM_NAMES = ("system", "system_prompt")
# What a row may have beside prompt and answers.
_KEPT = ("margin", "context", "output_text")


def text_of(row: Row, name: str) -> str:
    """Return a field that has to be text.

    Raises:
        RowError: It is missing or anything else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name}: is {in_words(value) if name in row else 'missing'}, expected text")
    return value


def number_of(row: Row, name: str) -> float:
    """Return a field that has to be a finite number, or its text (as in CSV files).

    Raises:
        RowError: It is missing or anything else.
    """
    value: Any = row.get(name)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if not is_number(value):
        found = in_words(row[name]) if name in row else "missing"
        raise RowError(f"{name}: is {found}, expected a finite number")
    number: float = value
    return number


def has(row: Mapping[str, Any], *names: str) -> bool:
    """Return whether a row has all of some fields; null counts as missing."""
    for name in names:  # noqa: SIM110 (`all` of a generator takes three times as long)
        if row.get(name) is None:
            return False
    return True


def has_own_prompt(row: Row) -> bool:
    """Return whether a row has a prompt beside its answers."""
    return any(has(row, name) for name in ("messages", *PROMPT_NAMES))


def own_prompt(row: Row) -> tuple[str | list[Turn] | None, set[str]]:
    """Return the prompt given next to the answers, and what it is made of."""
    names = [name for name in ("messages", *PROMPT_NAMES) if has(row, name)]
    if not names:
        return None, set()
    name = names[0]
    if name == "messages" and names[1:] and names[1] in ("input_text", "prompt"):
        name = names[1]  # `messages` is then the prompt with its answer
    if isinstance(row[name], list) and name in ("prompt", "messages", "conversations"):
        return checked_turns(row[name], name), set(turn_paths(name))
    text = text_of(row, name)
    if name == "instruction" and holds_something(row.get("input")):
        return f"{text}\n\n{text_of(row, 'input')}", {name, "input"}
    return text, {name}


def complete(row: Row, prompt: str | list[Turn] | None) -> Converted:
    """Return a prompt with the row's system text and earlier turns, and the fields used."""
    kept: Row = {name: row[name] for name in _KEPT if has(row, name)}
    used = set(kept)
    if isinstance(row.get("history"), list) and row["history"]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        prompt = joined(history_turns(row["history"]), turns)
        used |= {"history[][]", *turn_paths("history")}
    name = next((name for name in SYSTEM_NAMES if holds_something(row.get(name))), "system")
    system = text_of(row, name) if holds_something(row.get(name)) else ""
    used.add(name)
    if isinstance(prompt, str):
        if system:
            context = text_of(row, "context") if holds_something(row.get("context")) else ""
            kept["context"] = "\n\n".join(part for part in (system, context) if part)
        return {"input_text": prompt} | kept, used
    turns = prompt or []
    if system and turns and author(turns[0]) == "system":
        if turns[0]["content"].strip() != system.strip():
            raise RowError(f"{name}: is not the first turn's text, expected one system text")
    elif system:
        turns = [{"role": "system", "content": system}, *turns]
    return {"messages": turns} | kept, used


def with_prompt(row: Row, answers: Row, used: Iterable[str]) -> Converted:
    """Return answers with the prompt of their row in any of its spellings.

    Raises:
        RowError: The row has no prompt, or one that cannot be read.
    """
    prompt, of_prompt = own_prompt(row)
    if prompt is None:
        text_of(row, "prompt")
    written, kept = complete(row, prompt)
    return written | answers, of_prompt | kept | set(used)


def pair(answers: Iterable[str], choice: Any) -> Row:
    """Return the fields of two answers."""
    first, second = answers
    return {"candidate_0": first, "candidate_1": second, "choice": choice}


def choice_by_score(first: float, second: float) -> int | str:
    """Return the `choice` of two answers by their scores, of which the higher is better."""
    return TIE if first == second else int(second > first)


def ranked(texts: Sequence[str], scores: Sequence[float]) -> Row:
    """Return the fields of answers with scores, of which the higher is better."""
    if len(texts) == 2:
        return pair(texts, choice_by_score(*scores))
    return {"candidates": list(texts), "scores": list(scores)}


def unused_paths(row: Row, used: set[str]) -> Iterator[str]:
    """Yield the paths of non-empty values that were not used, in the row's order."""
    inner = _beginnings(frozenset(used))

    def walk(value: Any, path: str) -> Iterator[str]:
        if path in used or not holds_something(value):
            return
        if path not in inner or not isinstance(value, dict | list):
            yield path
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}")
        else:
            for item in value:
                yield from walk(item, f"{path}[]")

    for name, value in row.items():
        yield from walk(value, name)


@lru_cache(maxsize=1024)
def _beginnings(paths: frozenset[str]) -> set[str]:
    """Return the paths of the objects and lists that hold what other paths name."""
    return {path[:end] for path in paths for end, char in enumerate(path) if char in ".["}
