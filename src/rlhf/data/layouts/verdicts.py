"""Layouts of other public comparisons, each with its own words for who won."""

import json
from typing import Any

from rlhf.data.layouts.parts import (
    Converted,
    Row,
    choice_by_score,
    complete,
    has,
    number_of,
    pair,
    ranked,
    text_of,
    with_prompt,
)
from rlhf.data.layouts.preferences import begins_dialogue, dialogue_turns
from rlhf.data.layouts.turns import (
    NoPreferenceError,
    RowError,
    checked_turns,
    split_answers,
    turn_paths,
)
from rlhf.data.row_checker import TIE, in_words

_WINNERS = {"model_a": 0, "model_b": 1} | dict.fromkeys(
    ("tie", "tie (bothbad)", "both_bad", "bothbad"), TIE
)
_WON = ("winner_model_a", "winner_model_b", "winner_tie")
_VERDICTS: tuple[int | str, ...] = (0, 1, TIE)


def from_safe_rlhf(row: Row) -> Converted:
    """Convert PKU-SafeRLHF (Ji et al. 2024): the more helpful answer is the choice.

    `safer_response_id` is another choice, which is not used.
    """
    better = number_of(row, "better_response_id")
    if better not in (0, 1):
        raise RowError(
            f"better_response_id: is {in_words(row['better_response_id'])}, expected 0 or 1"
        )
    names = ("response_0", "response_1")
    answers = pair([text_of(row, name) for name in names], int(better))
    return with_prompt(row, answers, (*names, "better_response_id"))


def from_webgpt(row: Row) -> Converted:
    """Convert the comparisons of WebGPT (Nakano et al. 2021): the higher score is better."""
    question = row["question"]
    path = "question"
    if isinstance(question, dict):
        path, question = "question.full_text", question.get("full_text")
    if not isinstance(question, str):
        raise RowError(f"{path}: is {in_words(question)}, expected text")
    answers, scores = ("answer_0", "answer_1"), ("score_0", "score_1")
    choice = choice_by_score(*(number_of(row, name) for name in scores))
    written, kept = complete(row, question)
    texts = [text_of(row, name) for name in answers]
    return written | pair(texts, choice), kept | {path, *answers, *scores}


def from_arena(row: Row) -> Converted:
    """Convert battles of Chatbot Arena and MT-Bench (Zheng et al. 2023).

    Battles of several turns whose earlier answers differ have no prompt in common.
    """
    winner = row["winner"]
    if not isinstance(winner, str) or winner not in _WINNERS:
        raise RowError(f"winner: is {in_words(winner)}, expected model_a, model_b or tie")
    names = ("conversation_a", "conversation_b")
    for name in names:
        if not isinstance(row[name], list):
            raise RowError(f"{name}: is {in_words(row[name])}, expected a list of turns")
    first, second = (checked_turns(row[name], name) for name in names)
    turns, answers = split_answers(None, first, second)
    written, kept = complete(row, turns)
    used = kept | {"winner"} | turn_paths(names[0]) | turn_paths(names[1])
    return written | pair(answers, _WINNERS[winner]), used


def from_arena_table(row: Row) -> Converted:
    """Convert Chatbot Arena's table of battles, whose texts may be JSON lists, one item a turn."""
    won = [number_of(row, name) for name in _WON]
    if sorted(won) != [0, 0, 1]:
        raise RowError(f"winner_model_a: is {in_words(row[_WON[0]])}, expected one 1 of {_WON}")
    names = ("prompt", "response_a", "response_b")
    texts = [text_of(row, name) for name in names]
    lists = [found for found in map(_turn_texts, texts) if found]
    said = lists if len(lists) == len(texts) else [[text] for text in texts]
    if len(set(map(len, said))) > 1:
        raise RowError("prompt: has another number of turns than the responses, expected as many")
    (*asked, last), first, second = said
    if first[:-1] != second[:-1]:
        raise NoPreferenceError
    turns: list[Any] = []
    for question, answer in zip(asked, first[:-1], strict=True):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = [*turns, {"role": "user", "content": last}] if turns else last
    written, kept = complete(row, prompt)
    choice = _VERDICTS[won.index(1)]
    return written | pair((first[-1], second[-1]), choice), kept | {*names, *_WON}


def _turn_texts(text: str) -> list[str] | None:
    """Return the texts of a JSON list; None if it is no such list."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(items, list) and items and all(isinstance(item, str) for item in items)
    return items if is_list else None


def has_ranked_answers(row: Row) -> bool:
    """Return whether `answers` is a list of objects with `answer` and `rank`."""
    items = row["answers"]
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(item, dict) and has(item, "answer", "rank") for item in items)
    )


def from_nectar(row: Row) -> Converted:
    """Convert Nectar (Zhu et al. 2023): the lower the rank, the better the answer."""
    items = row["answers"]
    if len(items) < 2:
        raise RowError("answers: has 1 in it, expected at least two")
    texts, scores = [], []
    for place, item in enumerate(items):
        try:
            texts.append(text_of(item, "answer"))
            scores.append(-number_of(item, "rank"))
        except RowError as error:
            raise RowError(f"answers[{place}].{error}") from None
    used = {"answers[].answer", "answers[].rank"}
    text = row["prompt"]
    if not isinstance(text, str) or not begins_dialogue(text):
        return with_prompt(row, ranked(texts, scores), used)
    ending = text.rstrip().removesuffix("Assistant:").rstrip()
    written, kept = complete(row, dialogue_turns(ending))
    return written | ranked(texts, scores), used | kept | {"prompt"}
