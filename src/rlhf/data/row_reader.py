"""The reader of a library row: its parts and their problems, with a fast path for common rows."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rlhf.data.layouts.preferences import begins_dialogue
from rlhf.data.layouts.reader import plain_keys
from rlhf.data.layouts.table import near_miss
from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_checker import MOST_KEYS, RowChecker, add_names, holds_something
from rlhf.data.schema import Candidates, PromptText

MOST_FIELDS = 1000
_LONGEST_FIELD = 1000
_MOST_SHAPES = 1000


class Parts(NamedTuple):
    """The parts of a row, and the problems of each part.

    Attributes:
        prompt: The rendered prompt; None if it has problems.
        input_text: The row's own input.
        pair: Its answers and their order; None if it has no candidate fields or they have problems.
        references: The texts of `output_text`; None if the row has none.
        conversation: Whether it has `messages`.
        has_pair: Whether it has candidate fields.
        problems: By part: "pair", "prompt", "render", "output"; None if there are none.
        near: Of which other layout a row without candidates nearly is, in words.
    """

    prompt: PromptText | None
    input_text: str
    pair: Candidates | None
    references: list[str] | None
    conversation: bool
    has_pair: bool
    problems: dict[str, list[str]] | None
    near: str = ""


class RowShape(NamedTuple):
    """Names of a row's fields by their use, for rows without anything unusual."""

    prompt: str
    candidate_0: str | None
    candidate_1: str | None
    choice: str | None
    extras: tuple[str, ...]
    near: str


class FieldNames:
    """Names of the fields of all rows so far, a little more than `MOST_FIELDS` at most."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def note(self, names: Iterable[str]) -> None:
        """Add the names of a row's fields."""
        for name in names:
            if len(self._names) > MOST_FIELDS:
                return
            self._names.setdefault(name[:_LONGEST_FIELD])

    def listed(self) -> list[str] | None:
        """Return the names; None if there are too many to list."""
        return None if len(self._names) > MOST_FIELDS else list(self._names)


class RowReader:
    """Reader of rows, with a fast path for common ones (`read` and `read_plain` agree).

    Args:
        renderer: Renders the prompts.
        names: Where to note the names of fields, if they are wanted.

    Attributes:
        unused: Names of fields that no stage reads.
    """

    def __init__(self, renderer: PromptRenderer, names: FieldNames | None = None) -> None:
        self.renderer = renderer
        self.unused: list[str] = []
        self._names = names or FieldNames()
        self._shapes: dict[tuple[str, ...], RowShape | None] = {}

    def read(self, row: Mapping[str, Any]) -> Parts:
        """Read any row, field by field."""
        checker = RowChecker(row)
        add_names(self.unused, checker.unused())
        self._names.note(row)
        problems: dict[str, list[str]] = {}

        def found(part: str) -> bool:
            if checker.problems:
                problems[part] = checker.problems
                checker.problems = []
            return part in problems

        has_pair = checker.has_candidates()
        pair = checker.candidates() if has_pair or row.get("margin") is not None else None
        if found("pair"):
            pair = None
        fields = checker.prompt()
        prompt, input_text = None, ""
        if not found("prompt"):
            try:
                prompt, input_text = self.renderer.render(fields), self.renderer.raw_input(fields)
            except ValueError as error:
                what = f"messages: {error}, expected a conversation that it renders"
                problems["render"] = [what]
        references: list[str] | None = checker.references()
        if found("output") or row.get("output_text") is None:
            references = None
        return Parts(
            prompt,
            input_text,
            pair if has_pair else None,
            references,
            bool(fields.messages),
            has_pair,
            problems or None,
            "" if has_pair else near_miss(row),
        )

    def read_plain(self, row: Mapping[str, Any]) -> Parts | None:
        """Read a row of texts in one of the usual layouts; return None if it needs another way.

        That is conversion from another layout, or `read`.
        """
        keys = tuple(row)
        try:
            shape = self._shapes[keys]
        except KeyError:
            shape = self._learn(keys)
        if shape is None:
            return None
        text = row[shape.prompt]
        if type(text) is not str or not text or text.isspace():
            return None
        references = pair = None
        if "output_text" in row:
            value = row["output_text"]
            if type(value) is str:
                references = [value]
            elif value is not None:
                return None
        if shape.candidate_0 is not None and shape.candidate_1 is not None:
            first, second = row[shape.candidate_0], row[shape.candidate_1]
            choice = 0 if shape.choice is None else row[shape.choice]
            if type(first) is not str or type(second) is not str:
                return None
            if type(choice) is not int or choice not in (0, 1):
                return None
            if shape.choice is None and text[0] in "\nH" and begins_dialogue(text):
                return None
            pair = Candidates((first, second), (choice, 1 - choice), None)
        if shape.extras:
            more = (name for name in shape.extras if holds_something(row[name]))
            add_names(self.unused, more)
        prompt = self.renderer.render_text(text)
        return Parts(prompt, text, pair, references, False, pair is not None, None, shape.near)

    def _learn(self, keys: tuple[str, ...]) -> RowShape | None:
        self._names.note(keys)
        if len(self._shapes) >= _MOST_SHAPES:  # every row has a different shape
            self._shapes.clear()
        if len(keys) > MOST_KEYS or sum(map(len, keys)) > MOST_KEYS * 64:
            return None
        self._shapes[keys] = _shape(frozenset(keys), keys)
        return self._shapes[keys]


def _shape(keys: frozenset[str], order: tuple[str, ...]) -> RowShape | None:
    prompts = keys & {"input_text", "prompt"}
    if len(prompts) != 1 or keys & {"messages", "context", "margin"} or not plain_keys(keys):
        return None
    (prompt,) = prompts
    pair: tuple[str | None, str | None, str | None] = (None, None, None)
    candidates = keys & {"candidate_0", "candidate_1", "choice", "chosen", "rejected"}
    if candidates == {"candidate_0", "candidate_1", "choice"}:
        pair = ("candidate_0", "candidate_1", "choice")
    elif candidates == {"chosen", "rejected"}:
        pair = ("chosen", "rejected", None)
    elif candidates or keys & {"candidates", "ranking"}:
        return None
    known = candidates | prompts | {"output_text"}
    extras = tuple(key for key in order if key not in known)
    return RowShape(prompt, *pair, extras, "" if candidates else near_miss(dict.fromkeys(keys, "")))
