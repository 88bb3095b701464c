"""The checker of a row: reads a JSON object field by field, and words what is wrong with it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from rlhf.data.schema import AUTHORS, Candidates, Message, PromptFields
from rlhf.errors import closest

PROMPT_FIELDS = ("input_text", "messages", "prompt", "context", "output_text")
CANDIDATE_FIELDS = (
    "candidate_0", "candidate_1", "choice", "chosen", "rejected", "candidates", "ranking"
)  # fmt: skip
# A row's pairs are all read at once, and there are as many as candidates squared.
MOST_CANDIDATES = 64
FIELDS = frozenset((*PROMPT_FIELDS, *CANDIDATE_FIELDS, "margin"))
TIE = "tie"  # a `choice` between two answers that are as good
_TURN_FIELDS = frozenset(("author", "role", "content"))
_EXCERPT = 40
_MOST_NAMES = 20
MOST_KEYS = 64  # of a row that are compared with what is known


class RowChecker:
    """Reader of one JSON object, field by field, that collects everything wrong with it.

    Attributes:
        problems: `field: what is wrong, what is expected`, in the order found.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.problems: list[str] = []

    def prompt(self) -> PromptFields:
        """Read `input_text`, `messages` or `prompt`, and `context`."""
        present = [name for name in ("input_text", "messages", "prompt") if self._has(name)]
        context = self._optional_text("context")
        if "input_text" in present and "messages" in present:
            self._wrong("messages", "stands beside input_text", "one of the two")
            return PromptFields(None, (), context)
        if "messages" in present:
            return PromptFields(None, self._messages(), context)
        name = "prompt" if present == ["prompt"] else "input_text"
        text = self._text(name, or_else="input_text or messages, or columns for other names")
        if text is not None and not text.strip():
            self._wrong(name, "is blank", "text")
        return PromptFields(text or "", (), context)

    def references(self, required: bool = False) -> list[str]:
        """Read `output_text`: a text, a list of texts, or nothing unless `required`."""
        if not self._has("output_text"):
            if required:
                self._missing("output_text", "text (the answer to learn)")
            return []
        value = self.row["output_text"]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            self._wrong("output_text", f"is {in_words(value)}", "text or a list of texts")
            return []
        if required and not texts:
            self._wrong("output_text", "is an empty list", "text (the answer to learn)")
        return texts

    def candidates(self, *, needs_order: bool = True) -> Candidates:
        """Read the answers and their order, in the first of three layouts that the row has.

        These are `candidate_0`, `candidate_1` and `choice`; `chosen` and `rejected`; `candidates`
        and `ranking` (or `scores`).

        Args:
            needs_order: Whether `choice`, `ranking` or `scores` must be there; if not, an order
                that is missing is ().
        """
        margin = self._margin()
        layout = self._candidate_layout()
        if layout == "ranking":
            if margin is not None:
                fix = "a row of candidate_0, candidate_1 and choice, or no margin"
                self._wrong("margin", f"stands beside {self._order_field()}", fix)
            texts = self._candidate_texts()
            if self._order_field() == "scores":
                return self._scored(texts)
            ordered = needs_order or self._has("ranking")
            return Candidates(texts, self._ranking(len(texts)) if ordered else (), None)
        if layout == "chosen":
            chosen, rejected = self._text("chosen"), self._text("rejected")
            return Candidates((chosen or "", rejected or ""), (0, 1), margin)
        texts = (self._text("candidate_0") or "", self._text("candidate_1") or "")
        if not needs_order and not self._has("choice"):
            return Candidates(texts, (), margin)
        if self.row.get("choice") == TIE:
            return Candidates(texts, (0, 1), None, (0, 0))
        choice = self._choice()
        return Candidates(texts, (choice, 1 - choice), margin)

    def has_candidates(self) -> bool:
        """Return whether the row has any field about several answers."""
        return any(self._has(name) for name in CANDIDATE_FIELDS)

    def used(self) -> set[str]:
        """Return the names of the fields that some stage reads; of two spellings, only one."""
        used = set(FIELDS)
        layout = self._candidate_layout()
        if layout == "ranking" and self._order_field() == "scores":
            used.add("scores")
        if self._has("input_text") or self._has("messages"):
            text = self.row.get("input_text")
            used -= {"prompt"} if self.row.get("prompt") != text else set()
        if layout == "choice" and (self._has("candidate_0") or self._has("candidate_1")):
            used -= {"chosen", "rejected", "candidates", "ranking"}
        elif layout == "chosen":
            used -= {"choice", "candidates", "ranking"}
        elif layout == "ranking":
            used -= {"choice"}
        return used

    def unused(self) -> list[str]:
        """Return the names of non-empty fields that no stage reads, including fields of turns."""
        used = self.used()
        names = [name for name, value in self.row.items() if name not in used]
        names = [name for name in names if holds_something(self.row[name])]
        turns = self.row.get("messages")
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and not turn.keys() <= _TURN_FIELDS:
                others = turn.keys() - _TURN_FIELDS
                names += [f"messages[].{key}" for key in turn if key in others and turn[key]]
        return names

    def _has(self, name: str) -> bool:
        return self.row.get(name) is not None

    def _text(self, name: str, or_else: str = "") -> str | None:
        if not self._has(name) and name not in self.row:
            self._missing(name, or_else or "text")
            return None
        value = self.row[name]
        if isinstance(value, str):
            return value
        self._wrong(name, f"is {in_words(value)}", "text")
        return None

    def _optional_text(self, name: str) -> str | None:
        return self._text(name) if self._has(name) else None

    def _candidate_layout(self) -> Literal["choice", "chosen", "ranking"]:
        if self._has("candidate_0") or self._has("candidate_1"):
            return "choice"
        if self._has("chosen") or self._has("rejected"):
            return "chosen"
        return "ranking" if self._has("candidates") or self._has("ranking") else "choice"

    def _order_field(self) -> Literal["ranking", "scores"]:
        """Return what orders `candidates`."""
        return "scores" if self._has("scores") and not self._has("ranking") else "ranking"

    def _scored(self, texts: tuple[str, ...]) -> Candidates:
        """Rank `candidates` by `scores`."""
        expected = "a finite number for each candidate, the higher the better"
        value = self.row["scores"]
        if not isinstance(value, list):
            self._wrong("scores", f"is {in_words(value)}", expected)
        elif texts and len(value) != len(texts):
            self._wrong("scores", f"has {len(value)} in it for {len(texts)} candidates", expected)
        elif texts:
            bad = [place for place, score in enumerate(value) if not is_number(score)]
            for place in bad:
                self._wrong(f"scores[{place}]", f"is {in_words(value[place])}", "a finite number")
            if not bad:
                return Candidates.by_score(texts, value)
        return Candidates((), (), None)

    def _candidate_texts(self) -> tuple[str, ...]:
        """Read `candidates`; () if there is anything wrong with them."""
        expected = f"a list of 2 to {MOST_CANDIDATES} texts"
        value = self.row.get("candidates")
        if "candidates" not in self.row:
            self._missing("candidates", expected)
        elif not isinstance(value, list):
            self._wrong("candidates", f"is {in_words(value)}", expected)
        elif not 2 <= len(value) <= MOST_CANDIDATES:
            self._wrong("candidates", f"has {len(value)} in it", expected)
        else:
            before = len(self.problems)
            for number, text in enumerate(value):
                if not isinstance(text, str):
                    self._wrong(f"candidates[{number}]", f"is {in_words(text)}", "text")
            return tuple(value) if len(self.problems) == before else ()
        return ()

    def _ranking(self, count: int) -> tuple[int, ...]:
        """Read `ranking` of `count` candidates, which are 0 if they are not known."""
        indices = f"0 to {count - 1}" if count else "the candidates from 0"
        expected = f"the indices {indices}, each once, best to worst"
        value = self.row.get("ranking")
        if "ranking" not in self.row:
            self._missing("ranking", expected)
        elif not isinstance(value, list):
            self._wrong("ranking", f"is {in_words(value)}", expected)
        elif count and len(value) != count:
            self._wrong("ranking", f"has {len(value)} in it for {count} candidates", expected)
        elif count:
            for place, index in enumerate(value):
                if type(index) is not int or not 0 <= index < count:
                    self._wrong(f"ranking[{place}]", f"is {in_words(index)}", expected)
                elif index in value[:place]:
                    self._wrong(f"ranking[{place}]", f"repeats {index}", expected)
            return tuple(value)
        return ()

    def _choice(self) -> int:
        if "choice" not in self.row:
            self._missing("choice", "0 or 1")
            return 0
        value = self.row["choice"]
        if type(value) in (int, str) and value in (0, 1, "0", "1"):
            return int(value)
        expected = f"0 or 1, the preferred candidate, or {TIE}"
        self._wrong("choice", f"is {in_words(value)}", expected)
        return 0

    def _margin(self) -> float | None:
        if not self._has("margin"):
            return None
        value = self.row["margin"]
        if is_number(value):
            return float(value)
        self._wrong("margin", f"is {in_words(value)}", "a finite number")
        return None

    def _messages(self) -> tuple[Message, ...]:
        value = self.row["messages"]
        if not isinstance(value, list) or not value:
            self._wrong("messages", f"is {in_words(value)}", "a list of turns")
            return ()
        before = len(self.problems)
        turns = [self._message(number, turn) for number, turn in enumerate(value)]
        messages = tuple(turn for turn in turns if turn is not None)
        if len(self.problems) == before:
            self._check_order([message.author for message in messages])
        return messages

    def _message(self, number: int, turn: Any) -> Message | None:
        place = f"messages[{number}]"
        if not isinstance(turn, dict):
            self._wrong(place, f"is {in_words(turn)}", "an object with author and content")
            return None
        author = turn.get("role") if turn.get("author") is None else turn["author"]
        content = turn.get("content")
        if author not in AUTHORS:
            what = "is missing" if author is None else f"is {in_words(author)}"
            self._wrong(f"{place}.author", what, "user, assistant or system")
        if not isinstance(content, str):
            what = f"is {in_words(content)}" if "content" in turn else "is missing"
            self._wrong(f"{place}.content", what, "text")
        elif author == "user" and not content.strip():
            self._wrong(f"{place}.content", "is blank", "text")
        elif author in AUTHORS:
            return Message(author, content)
        return None

    def _check_order(self, authors: list[str]) -> None:
        turns = authors[1:] if authors[0] == "system" else authors
        first = len(authors) - len(turns)
        for number, author in enumerate(turns, start=first):
            if author == "system":
                self._wrong(f"messages[{number}].author", "is system", "system only as first turn")
                return
        if not turns or turns[0] != "user":
            found = f"is {turns[0]}" if turns else "is missing"
            self._wrong(f"messages[{first}].author", found, "a conversation begun by the user")
        elif turns[-1] != "user":
            place = f"messages[{len(authors) - 1}].author"
            self._wrong(place, f"is {turns[-1]}", "user as the last author, to be answered")

    def _missing(self, name: str, expected: str) -> None:
        hint = _hint(name, tuple(key[: _EXCERPT + 1] for key in islice(self.row, MOST_KEYS)))
        self._wrong(name, f"is missing{hint}", expected)

    def _wrong(self, place: str, what: str, expected: str) -> None:
        self.problems.append(f"{place}: {what}, expected {expected}")


@lru_cache(maxsize=256)
def _hint(name: str, keys: tuple[str, ...]) -> str:
    """Guess what a row with these keys meant by a field that it lacks."""
    if not keys:
        return " (the row is empty)"
    own = [key for key in keys if key not in FIELDS]
    near = closest(name, own)
    missing = FIELDS - {name} - set(keys)
    # Suggest renaming a field only if no other field would lose its content by it.
    if near and all(key == near or closest(key, missing) for key in own):
        return f" (did you mean {name} where it says {_shorten(near)}?)"
    return f" (the row has {named(keys[:8])})"


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:  # an integer of hundreds of digits
        return False


def holds_something(value: Any) -> bool:
    """Return whether dropping a field with this value would lose information."""
    return value is not None and value != "" and value != [] and value != {}


def add_names(names: list[str], more: Iterable[str]) -> None:
    """Add the names that are missing, up to a few more than are ever shown."""
    for name in more:
        if len(names) > _MOST_NAMES:
            return
        if (short := name[: _EXCERPT + 1]) not in names:
            names.append(short)


def named(names: Sequence[str]) -> str:
    """List names of fields for people, only some of them if there are many."""
    rest = ["…"] if len(names) > _MOST_NAMES else []
    return ", ".join([*map(_shorten, names[:_MOST_NAMES]), *rest])


def _shorten(text: str) -> str:
    shown = text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
    # Bad rows are quoted in terminals and logs: no control characters, no broken surrogates.
    return "".join(char if char.isprintable() else "\ufffd" for char in shown)


def in_words(value: Any) -> str:
    """Describe a JSON value in words that a person can match to the file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a number of hundreds of digits"  # str() of a huge int may refuse
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f'the text "{_shorten(value)}"'
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return "an object"
