"""Layouts with two answers by name, of which a field says the better one."""

from typing import Any

from rlhf.data.layouts.parts import (
    Converted,
    Row,
    choice_by_score,
    has,
    number_of,
    pair,
    text_of,
    with_prompt,
)
from rlhf.data.layouts.turns import RowError, checked_turns, turn_paths
from rlhf.data.row_checker import TIE, in_words

_VERDICTS = {0: 1, 1: 0, "0": 1, "1": 0}
# The fields of the published sets: prompt, answers, and by how much the second one is better.
STRENGTHS = (
    ("prompt", "response_1", "response_2", "preference_strength"),
    ("context", "response1", "response2", "overall_preference"),
)


def from_tldr(row: Row) -> Converted:
    """Convert the comparisons of Stiennon et al. 2020, of TL;DR posts and CNN/DM articles.

    With a subreddit or title the input is formatted as in the paper: "SUBREDDIT: …", "TITLE: …",
    "POST: …", "TL;DR:".
    """
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(info, dict):
        raise RowError(f"info: is {in_words(info)}, expected an object with post")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise RowError(f"summaries: is {in_words(summaries)}, expected a list of two")
    texts = [summary.get("text") if isinstance(summary, dict) else None for summary in summaries]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowError(f"summaries[{number}].text: is {in_words(text)}, expected text")
    name = "post" if info.get("post") is not None else "article"  # the CNN/DM rows
    if not isinstance(info.get(name), str):
        raise RowError(f"info.post: is {in_words(info.get('post'))}, expected text")
    # A title of an article is no part of what was summarized.
    known = (("subreddit", "SUBREDDIT: r/"), ("title", "TITLE: ")) if name == "post" else ()
    heads = {key: head for key, head in known if isinstance(info.get(key), str)}
    parts = [head + info[key] for key, head in heads.items()]
    text = "\n\n".join([*parts, f"POST: {info[name]}", "TL;DR:"]) if parts else info[name]
    choice = {"choice": row["choice"]} if "choice" in row else {}
    used = {f"info.{name}", "summaries[].text", "choice", *(f"info.{key}" for key in heads)}
    written = {"input_text": text, "candidate_0": texts[0], "candidate_1": texts[1]}
    return written | choice, used


def from_shp(row: Row) -> Converted:
    """Convert the Stanford Human Preferences (Ethayarajh et al. 2022): `labels` 1 is answer A."""
    answers = [text_of(row, name) for name in ("human_ref_A", "human_ref_B")]
    used = {"history", "human_ref_A", "human_ref_B", "labels"}
    choice: Any
    if has(row, "labels"):
        value = row["labels"]
        if type(value) not in (int, str) or value not in _VERDICTS:
            raise RowError(f"labels: is {in_words(value)}, expected 1 for A or 0 for B")
        choice = _VERDICTS[value]
    else:
        names = ("score_A", "score_B")
        choice = choice_by_score(*(number_of(row, name) for name in names))
        used |= set(names)
    return {"input_text": text_of(row, "history")} | pair(answers, choice), used


def from_strength(row: Row) -> Converted:
    """Convert HelpSteer's preferences, from -3 (the first is much better) to 3 (the second).

    The strength is the margin (Wang et al. 2024, arXiv 2410.01257).
    """
    prompt, first, second, strength = next(names for names in STRENGTHS if has(row, *names))
    value = number_of(row, strength)
    choice = TIE if not value else int(value > 0)
    answers = pair((text_of(row, first), text_of(row, second)), choice)
    if value:
        answers["margin"] = abs(float(value))
    used = {first, second, strength}
    if prompt == "prompt":
        return with_prompt(row, answers, used)
    if not isinstance(row[prompt], list):
        return {"input_text": text_of(row, prompt)} | answers, used | {prompt}
    return {"messages": checked_turns(row[prompt], prompt)} | answers, used | turn_paths(prompt)
