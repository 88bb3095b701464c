"""Layouts with one answer to learn, and prompts that are conversations."""

from rlhf.data.layouts.parts import Converted, Row, complete, has, text_of, with_prompt
from rlhf.data.layouts.turns import (
    RowError,
    Turn,
    checked_turns,
    ends_with_answer,
    is_odd,
    turn_paths,
)
from rlhf.data.row_checker import CANDIDATE_FIELDS, in_words

# Names of a question and of its answer.
QUESTIONS = (
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
)


def has_no_own_answer(row: Row) -> bool:
    """Return whether a row has neither the library's answer to learn nor its candidates."""
    return not any(has(row, name) for name in ("output_text", *CANDIDATE_FIELDS))


def is_unpaired(row: Row) -> bool:
    """Return whether a row is an answer with a verdict, of which no pair can be made."""
    return type(row.get("label")) in (bool, int, float) and has_no_own_answer(row)


def refuse_unpaired(row: Row) -> Converted:  # noqa: ARG001 (as all conversions)
    """Raise `RowError`: there is no second answer."""
    raise RowError(
        "label: makes it an unpaired row (KTO: prompt, completion, label), expected two answers to "
        "a prompt; to learn the good ones with rlhf sft, keep the rows whose label is true and "
        "leave label out"
    )


def from_completion(row: Row) -> Converted:
    """Convert `prompt` (or `messages`) and `completion`, each a text or a list of turns."""
    answer, used = _single_answer(row, "completion")
    return with_prompt(row, {"output_text": answer}, used)


def from_label(row: Row) -> Converted:
    """Convert `prompt` and a `label` that is the answer, as in copies of the TL;DR posts."""
    return with_prompt(row, {"output_text": text_of(row, "label")}, {"label"})


def from_alpaca(row: Row) -> Converted:
    """Convert `instruction`, `input` and `output`."""
    return with_prompt(row, {"output_text": text_of(row, "output")}, {"output"})


def asks_and_answers(row: Row) -> bool:
    """Return whether a row is a question and its answer, as texts, by one pair of their names."""
    names = (*CANDIDATE_FIELDS, "output_text", "messages", "conversations", "input_text", "prompt")
    return not any(has(row, name) for name in names) and _question_names(row) is not None


def from_question(row: Row) -> Converted:
    """Convert a question and its answer, as in Dolly (whose `context` is kept) and GSM8K."""
    names = _question_names(row)
    assert names is not None
    written, kept = complete(row, row[names[0]])
    return written | {"output_text": row[names[1]]}, kept | set(names)


def _question_names(row: Row) -> tuple[str, str] | None:
    texts = (names for names in QUESTIONS if all(isinstance(row.get(name), str) for name in names))
    return next(texts, None)


def needs_turns_read(row: Row) -> bool:
    """Return whether a conversation has an answer at its end, or turns of another spelling."""
    name = "messages" if has(row, "messages") else "prompt"
    if has(row, "input_text"):
        return False
    if name == "prompt":
        return isinstance(row.get("prompt"), list)
    return is_odd(row[name]) or (ends_with_answer(row[name]) and has_no_own_answer(row))


def from_conversation(row: Row) -> Converted:
    """Convert `messages`, `conversations` or a `prompt` of turns; a last answer is to be learned.

    Other fields of the library's are kept.
    """
    name = next(name for name in ("messages", "conversations", "prompt") if has(row, name))
    if not isinstance(row[name], list):
        raise RowError(f"{name}: is {in_words(row[name])}, expected a list of turns")
    prompt, used = checked_turns(row[name], name), set(turn_paths(name))
    if name != "prompt" and has(row, "prompt"):
        used |= _repeated_prompt(row, prompt)
    answers = {name: row[name] for name in (*CANDIDATE_FIELDS, "scores") if name in row}
    if ends_with_answer(prompt) and has_no_own_answer(row) and name != "prompt":
        *prompt, answer = prompt
        answers = {"output_text": answer["content"]}
    written, kept = complete(row, prompt)
    return written | answers, used | kept | set(answers)


def _repeated_prompt(row: Row, turns: list[Turn]) -> set[str]:
    """Return what is used of a `prompt` that the conversation has, too (UltraChat, No Robots).

    Raises:
        RowError: The conversation does not have it.
    """
    prompt = row["prompt"]
    given = checked_turns(prompt, "prompt") if isinstance(prompt, list) else [{"content": prompt}]
    said = [turn["content"].strip() for turn in turns]
    if not all(isinstance(turn["content"], str) for turn in given) or not all(
        turn["content"].strip() in said for turn in given
    ):
        raise RowError("prompt: is no turn of the conversation beside it, expected one of the two")
    return {"prompt"} | turn_paths("prompt")


def _single_answer(row: Row, name: str) -> tuple[str, set[str]]:
    """Return the text of an answer that is a text, a turn or a list of one turn."""
    value = row[name]
    if isinstance(value, str):
        return value, {name}
    given = [value] if isinstance(value, dict) else value
    turns = checked_turns(given, name) if isinstance(given, list) else []
    if len(turns) != 1 or not ends_with_answer(turns):
        raise RowError(f"{name}: is {in_words(value)}, expected text or one turn of the assistant")
    return turns[0]["content"], set(turn_paths(name))
