"""Layouts with scores (or ranks) of several answers instead of a choice.

HelpSteer2 (Wang et al. 2024, arXiv 2406.08673) has one answer in a row, with attributes from 0 to
4. Two rows of one prompt, one after the other, make a pair: the more helpful answer wins, and the
difference in helpfulness is the margin.
"""

from typing import Any

from rlhf.data.layouts.parts import (
    Converted,
    Row,
    choice_by_score,
    has,
    number_of,
    pair,
    ranked,
    text_of,
    with_prompt,
)
from rlhf.data.layouts.turns import RowError
from rlhf.data.row_checker import TIE, in_words, is_number

LISTS = ("responses", "completions", "answers", "candidates")
# Numbers of the answers in such a list, of which the higher is better, or the lower.
HIGHER, LOWER = ("scores", "ratings"), ("rank", "ranks")
PAIR_SCORES = ("candidate_0_score", "candidate_1_score")
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def from_pair_scores(row: Row) -> Converted:
    """Convert `candidate_0`, `candidate_1` and their scores."""
    texts = [text_of(row, name) for name in ("candidate_0", "candidate_1")]
    choice = choice_by_score(*(number_of(row, name) for name in PAIR_SCORES))
    return with_prompt(row, pair(texts, choice), {"candidate_0", "candidate_1", *PAIR_SCORES})


def lists_of(row: Row) -> tuple[str, str] | None:
    """Return the names of a list of answers and of a list of their numbers, if a row has both."""
    answers = next((name for name in LISTS if isinstance(row.get(name), list)), None)
    numbers = next((name for name in HIGHER + LOWER if isinstance(row.get(name), list)), None)
    return None if answers is None or numbers is None else (answers, numbers)


def from_lists(row: Row) -> Converted:
    """Convert a list of answers with scores, or with ranks of which the lowest is the best."""
    names = lists_of(row)
    assert names is not None
    texts, numbers = (row[name] for name in names)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowError(f"{names[0]}[{place}]: is {in_words(text)}, expected text")
    if len(texts) != len(numbers) or len(texts) < 2:
        raise RowError(
            f"{names[1]}: has {len(numbers)} in it for {len(texts)} {names[0]}, expected a number "
            "for each of at least two"
        )
    for place, number in enumerate(numbers):
        if not is_number(number):
            raise RowError(f"{names[1]}[{place}]: is {in_words(number)}, expected a finite number")
    scores = [-number for number in numbers] if names[1] in LOWER else numbers
    return with_prompt(row, ranked(texts, scores), names)


def has_completions(row: Row) -> bool:
    """Return whether `completions` is UltraFeedback's list of objects."""
    value = row["completions"]
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def from_ultrafeedback(row: Row) -> Converted:
    """Convert UltraFeedback (Cui et al. 2023): `overall_score`, or the mean of all ratings."""
    items = row["completions"]
    texts = []
    for number, item in enumerate(items):
        if not isinstance(item.get("response"), str):
            what = in_words(item.get("response"))
            raise RowError(f"completions[{number}].response: is {what}, expected text")
        texts.append(item["response"])
    if len(texts) < 2:
        raise RowError(f"completions: has {len(texts)} in it, expected at least two")
    used = {"completions[].response", "completions[].overall_score"}
    scores = [item.get("overall_score") for item in items]
    if not all(map(is_number, scores)):
        scores = [_mean_rating(item, number) for number, item in enumerate(items)]
        aspects = {name for item in items for name in item["annotations"]}
        used |= {f"completions[].annotations.{name}.Rating" for name in aspects}
    return with_prompt(row, ranked(texts, scores), used)


def _mean_rating(item: Row, number: int) -> float:
    """Return the mean of the ratings in an item's annotations."""
    given = item.get("annotations")
    aspects = list(given.values()) if isinstance(given, dict) else []
    ratings = [aspect.get("Rating") for aspect in aspects if isinstance(aspect, dict)]
    numbers = []
    for rating in ratings:
        try:
            numbers.append(float(rating))  # type: ignore[arg-type]  # texts such as "4", or "N/A"
        except (TypeError, ValueError, OverflowError):
            continue
    if not numbers or not all(map(is_number, numbers)):
        raise RowError(
            f"completions[{number}].overall_score: is missing, expected a number, or a Rating in "
            "annotations"
        )
    return sum(numbers) / len(numbers)


def same_prompt(first: Row, second: Row) -> bool:
    """Return whether two rows of HelpSteer2 answer the same prompt."""
    return bool(first["prompt"] == second["prompt"])


def from_attributes(first: Row, second: Row) -> Converted:
    """Convert two rows of HelpSteer2."""
    written, used = of_attributes(first), {"response", *ATTRIBUTES}
    other = of_attributes(second)
    answers: dict[str, Any] = pair((written[0], other[0]), choice_by_score(written[1], other[1]))
    if answers["choice"] != TIE:
        answers["margin"] = abs(written[1] - other[1])
    return with_prompt(first, answers, used)


def of_attributes(row: Row) -> tuple[str, float]:
    """Return the answer of a row of HelpSteer2, and its helpfulness.

    Raises:
        RowError: One of them is missing or of another type.
    """
    if not has(row, "prompt"):
        text_of(row, "prompt")
    return text_of(row, "response"), float(number_of(row, "helpfulness"))
