"""The layouts: what each needs to be recognized, and the function that converts it.

`rows`, the library's own rows, are what no other layout fits.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlhf.data.layouts import comparisons, demonstrations, preferences, scores, verdicts
from rlhf.data.layouts.parts import PROMPT_NAMES, Converted, Row, has
from rlhf.data.row_checker import MOST_KEYS, RowChecker

Keys = frozenset[str]
# Fields that tell nothing about a layout.
_COMMON = frozenset(
    ("messages", "output", "response", "label", "history", "context", "candidates", "completions",
     "candidate_0", "candidate_1", *PROMPT_NAMES)
) - {"instruction", "conversations", "question"}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        name: As in `--layout` and in reports.
        about: Its fields, for people.
        needs: Sets of fields, of which a row has to have one.
        convert: Returns the library's row, and what was used of the source.
        fits: Whether a row that has the fields is of this layout, judging by its values.
        plain: Whether a row with these keys needs no conversion if all its fields are texts.
        joins: Whether two rows, one after the other, make one; `convert` then takes both.
    """

    name: str
    about: str
    needs: tuple[Keys, ...]
    convert: Callable[..., Converted]
    fits: Callable[[Row], bool] = lambda _: True
    plain: Callable[[Keys], bool] = lambda _: False
    joins: bool = False

    @property
    def described(self) -> str:
        """Its name and fields, for people."""
        return f"layout {self.name} ({self.about})"

    @property
    def words(self) -> Keys:
        """The words of its description, names of fields among them."""
        return frozenset(re.findall(r"\w+", self.about))

    def matches(self, row: Row) -> bool:
        """Return whether a row is of this layout."""
        return any(has(row, *fields) for fields in self.needs) and self.fits(row)


def _either(*fields: Iterable[str]) -> tuple[Keys, ...]:
    return tuple(map(frozenset, fields))


def _of_checker(row: Row) -> Converted:
    return row, RowChecker(row).used()


ROWS = Layout(
    "rows",
    "the library's and Vertex's own: input_text (or messages, prompt), candidate_0, candidate_1, "
    "choice",
    _either(("input_text",), ("messages",), ("prompt",)),
    _of_checker,
)
# In the order in which they are tried; a name may be there for several of them.
LAYOUTS = (
    Layout(
        "tldr_comparisons",
        "info, summaries, choice",
        _either(("summaries",)),
        comparisons.from_tldr,
    ),
    Layout(
        "ultrafeedback",
        "instruction (or prompt), completions of objects with response and overall_score",
        _either(("instruction", "completions"), ("prompt", "completions")),
        scores.from_ultrafeedback,
        fits=scores.has_completions,
    ),
    Layout(
        "scored_responses",
        "a prompt, responses (or completions, answers, candidates), scores (or ratings, rank)",
        _either(
            *(
                (answers, numbers)
                for answers in scores.LISTS
                for numbers in (*scores.HIGHER, *scores.LOWER)
            )
        ),
        scores.from_lists,
        fits=lambda row: scores.lists_of(row) is not None,
    ),
    Layout(
        "scored_pair",
        "a prompt, candidate_0, candidate_1, candidate_0_score, candidate_1_score",
        _either(("candidate_0", "candidate_1", *scores.PAIR_SCORES)),
        scores.from_pair_scores,
        fits=lambda row: not has(row, "choice"),
        plain=lambda keys: "choice" in keys,
    ),
    Layout(
        "shp",
        "history, human_ref_A, human_ref_B, labels (or score_A, score_B)",
        _either(
            ("history", "human_ref_A", "human_ref_B", "labels"),
            ("history", "human_ref_A", "human_ref_B", "score_A", "score_B"),
        ),
        comparisons.from_shp,
    ),
    Layout(
        "helpsteer_preference",
        "prompt (or context), response_1, response_2, preference_strength",
        _either(*comparisons.STRENGTHS),
        comparisons.from_strength,
    ),
    Layout(
        "helpsteer2",
        "prompt, response, helpfulness: two rows of a prompt make a pair",
        _either(("prompt", "response", "helpfulness")),
        scores.from_attributes,
        joins=True,
    ),
    Layout(
        "safe_rlhf",
        "prompt, response_0, response_1, better_response_id",
        _either(("prompt", "response_0", "response_1", "better_response_id")),
        verdicts.from_safe_rlhf,
    ),
    Layout(
        "webgpt",
        "question, answer_0, answer_1, score_0, score_1",
        _either(("question", "answer_0", "answer_1", "score_0", "score_1")),
        verdicts.from_webgpt,
    ),
    Layout(
        "arena",
        "conversation_a, conversation_b, winner",
        _either(("conversation_a", "conversation_b", "winner")),
        verdicts.from_arena,
    ),
    Layout(
        "arena",
        "prompt, response_a, response_b, winner_model_a, winner_model_b, winner_tie",
        _either(
            (
                "prompt",
                "response_a",
                "response_b",
                "winner_model_a",
                "winner_model_b",
                "winner_tie",
            )
        ),
        verdicts.from_arena_table,
    ),
    Layout(
        "nectar",
        "prompt, answers of objects with answer and rank",
        _either(("prompt", "answers")),
        verdicts.from_nectar,
        fits=verdicts.has_ranked_answers,
    ),
    Layout(
        "hh_rlhf",
        "chosen, rejected: dialogues of Human and Assistant",
        _either(("chosen", "rejected")),
        preferences.from_dialogues,
        fits=preferences.is_dialogue_pair,
        plain=preferences.may_be_plain,
    ),
    Layout(
        "implicit_prompt",
        "chosen, rejected: texts that begin with the prompt",
        _either(("chosen", "rejected")),
        preferences.from_implicit,
        fits=preferences.is_implicit,
        plain=preferences.may_be_plain,
    ),
    *(
        Layout(
            name,
            about,
            needs,
            preferences.from_pair,
            fits=lambda row: not preferences.reads_as_it_is(row),
            plain=preferences.may_be_plain,
        )
        for name, about, needs in (
            (
                "ultrafeedback_binarized",
                "prompt, chosen, rejected, score_chosen, score_rejected",
                _either(*(("chosen", "rejected", *names) for names in preferences.SCORES)),
            ),
            (
                "orca_pairs",
                "system, question, chosen, rejected",
                _either(("question", "chosen", "rejected")),
            ),
            (
                "sharegpt",
                "conversations of turns with from and value, or with chosen and rejected",
                _either(("conversations", "chosen", "rejected")),
            ),
            (
                "chosen_rejected",
                "a prompt, chosen, rejected: texts or conversations",
                _either(("chosen", "rejected")),
            ),
        )
    ),
    Layout(
        "unpaired",
        "prompt, completion, label (KTO)",
        _either(("prompt", "completion", "label"), ("messages", "completion", "label")),
        demonstrations.refuse_unpaired,
        fits=demonstrations.is_unpaired,
    ),
    Layout(
        "prompt_completion",
        "prompt (or messages), completion",
        _either(("prompt", "completion"), ("messages", "completion")),
        demonstrations.from_completion,
        fits=demonstrations.has_no_own_answer,
    ),
    Layout(
        "alpaca",
        "instruction, input, output",
        _either(("instruction", "output")),
        demonstrations.from_alpaca,
        fits=lambda row: (
            demonstrations.has_no_own_answer(row)
            and not any(has(row, name) for name in ("input_text", "messages"))
        ),
    ),
    Layout(
        "sharegpt",
        "conversations of turns with from and value, or with chosen and rejected",
        _either(("conversations",)),
        demonstrations.from_conversation,
        fits=lambda row: not any(has(row, name) for name in ("input_text", "messages", "prompt")),
    ),
    Layout(
        "question_answer",
        "instruction (or question, query, problem), response (or answer, solution): texts",
        _either(*demonstrations.QUESTIONS),
        demonstrations.from_question,
        fits=demonstrations.asks_and_answers,
    ),
    Layout(
        "prompt_label",
        "prompt, label: the answer as text",
        _either(("prompt", "label")),
        demonstrations.from_label,
        fits=lambda row: isinstance(row["label"], str) and demonstrations.has_no_own_answer(row),
    ),
    Layout(
        "conversation",
        "messages (or prompt) as turns, with the answer as the last one or without",
        _either(("messages",), ("prompt",)),
        demonstrations.from_conversation,
        fits=demonstrations.needs_turns_read,
        plain=lambda keys: "messages" not in keys,
    ),
)
CONVERSATION = LAYOUTS[-1]
BY_NAME: Mapping[str, tuple[Layout, ...]] = {
    name: tuple(layout for layout in (ROWS, *LAYOUTS) if layout.name == name)
    for name in dict.fromkeys(layout.name for layout in (ROWS, *LAYOUTS))
}


def possible(keys: Iterable[str]) -> tuple[Layout, ...]:
    """Return the layouts that a row with these keys may be of, beside the library's rows."""
    known = frozenset(keys)
    return tuple(layout for layout in LAYOUTS if any(fields <= known for fields in layout.needs))


def layout_of(row: Row, among: Iterable[Layout]) -> Layout:
    """Return the layout of a row.

    Args:
        row: The row.
        among: What is `possible`.
    """
    if _is_own(row):
        return CONVERSATION if demonstrations.needs_turns_read(row) else ROWS
    return next((layout for layout in among if layout.matches(row)), ROWS)


def has_prompt(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the library's own prompt."""
    return any(has(row, name) for name in ("input_text", "messages", "prompt"))


def _is_own(row: Row) -> bool:
    """Return whether a row has the library's own answers in full, so that nothing else is meant."""
    return has_prompt(row) and (
        has(row, "candidate_0", "candidate_1", "choice")
        or (has(row, "candidates") and (has(row, "ranking") or has(row, "scores")))
    )


def near_miss(row: Mapping[str, Any]) -> str:
    """Say of which layout a row nearly is, and what it lacks; "" if it is like none.

    Args:
        row: A row that is of no other layout than `rows`.
    """
    if len(row) > MOST_KEYS:
        return ""
    return _near(tuple(name[:MOST_KEYS] for name, value in row.items() if value is not None))


@lru_cache(maxsize=1024)
def _near(names: tuple[str, ...]) -> str:
    keys = frozenset(names)
    found = [
        (len(fields - keys), -len(fields & keys), -len(layout.words & keys), place)
        for place, (layout, fields) in enumerate(_NEEDS)
        if fields & keys - _COMMON and len(fields & keys) >= len(fields - keys)
    ]
    if not found:
        return ""
    layout, fields = _NEEDS[min(found)[-1]]
    lacks = sorted(fields - keys, key=layout.about.find)
    if not lacks:
        return f"is nearly of layout {layout.name}, expected {layout.about}"
    verb = "is" if len(lacks) == 1 else "are"
    return f"is nearly of {layout.described}: {' and '.join(lacks)} {verb} missing"


_NEEDS = [(layout, fields) for layout in LAYOUTS for fields in layout.needs]
