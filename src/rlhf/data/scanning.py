"""One pass over data sources, from which every stage takes the rows it needs.

Each record becomes a row of a `RowTable`, together with the problems of its parts: whether it is a
good row depends on what a stage wants (`rlhf.data.selection`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_checker import RowChecker, add_names, holds_something, in_words
from rlhf.data.row_table import Flag, RowTable, TableWriter
from rlhf.data.schema import Candidates, PromptText
from rlhf.data.sources.reading import Source, place, read_records
from rlhf.data.sources.record import MAX_PROBLEMS, Record

MOST_FIELDS = 1000
_LONGEST_FIELD = 1000
_MOST_SHAPES = 1000
_MOST_KEYS = 64


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
    """

    prompt: PromptText | None
    input_text: str
    pair: Candidates | None
    references: list[str] | None
    conversation: bool
    has_pair: bool
    problems: dict[str, list[str]] | None


class RowShape(NamedTuple):
    """Names of a row's fields by their use, for rows without anything unusual."""

    prompt: str
    candidate_0: str | None
    candidate_1: str | None
    choice: str | None
    extras: tuple[str, ...]


class RowReader:
    """Reader of rows, with a fast path for common ones (`read` and `read_plain` agree).

    Args:
        renderer: Renders the prompts.

    Attributes:
        unused: Names of fields that no stage reads.
        fields: Names of all fields so far, a little more than `MOST_FIELDS` at most.
    """

    def __init__(self, renderer: PromptRenderer) -> None:
        self.renderer = renderer
        self.unused: list[str] = []
        self.fields: dict[str, None] = {}
        self._shapes: dict[tuple[str, ...], RowShape | None] = {}

    def read(self, row: Mapping[str, Any]) -> Parts:
        """Read any row, field by field."""
        checker = RowChecker(row)
        add_names(self.unused, checker.unused())
        self._note_fields(row)
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
        )

    def read_plain(self, row: Mapping[str, Any]) -> Parts | None:
        """Read a row of texts in one of the usual layouts; return None if it needs `read`."""
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
            pair = Candidates((first, second), (choice, 1 - choice), None)
        if shape.extras:
            more = (name for name in shape.extras if holds_something(row[name]))
            add_names(self.unused, more)
        prompt = self.renderer.render_text(text)
        return Parts(prompt, text, pair, references, False, pair is not None, None)

    def _note_fields(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self.fields) > MOST_FIELDS:
                return
            self.fields.setdefault(name[:_LONGEST_FIELD])

    def _learn(self, keys: tuple[str, ...]) -> RowShape | None:
        self._note_fields(keys)
        if len(self._shapes) >= _MOST_SHAPES:  # every row has a different shape
            self._shapes.clear()
        if len(keys) > _MOST_KEYS or sum(map(len, keys)) > _MOST_KEYS * 64:
            return None
        self._shapes[keys] = _shape(frozenset(keys), keys)
        return self._shapes[keys]


def _shape(keys: frozenset[str], order: tuple[str, ...]) -> RowShape | None:
    prompts = keys & {"input_text", "prompt"}
    if len(prompts) != 1 or keys & {"messages", "context", "margin"}:
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
    return RowShape(prompt, *pair, tuple(key for key in order if key not in known))


class Faults:
    """Problems of bad rows: the texts of those that may have to be reported.

    However many rows are bad, only a few texts are kept: the first ones of each kind.
    """

    def __init__(self) -> None:
        self.whole_files: list[str] = []
        self._texts: dict[tuple[int, str], list[str]] = {}
        self._counts: dict[tuple[str, bool, bool], int] = {}

    def wanted(self, part: str, has_pair: bool, bad_pair: bool) -> bool:
        """Count another bad row; return whether its texts may have to be reported.

        Args:
            part: The part that has the problems.
            has_pair: Whether the row has candidate fields: some stages pass over those without.
            bad_pair: Whether its candidates have problems, which hide those of rendering.
        """
        key = (part, has_pair, bad_pair)
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key] <= MAX_PROBLEMS

    def add(self, row: int, part: str, texts: Sequence[str]) -> None:
        """Store the texts of one part of a row."""
        self._texts[row, part] = list(texts[:MAX_PROBLEMS])

    def of(self, row: int, parts: Sequence[str]) -> list[str]:
        """Return the texts of some parts of a row."""
        return [text for part in parts for text in self._texts.get((row, part), ())]


class Scan:
    """Result of one pass over data sources.

    Attributes:
        files: Their names.
        table: A row for each record.
        faults: Problems of the bad rows.
        unused: Names of fields that no stage reads.
        fields: Names of all fields; None if there are more than `MOST_FIELDS`.
        token_counts: Token counts of the prompts by tokenizer, cached for the next stage.
        selections: What stages selected, likewise.
    """

    def __init__(
        self,
        files: Sequence[str],
        table: RowTable,
        faults: Faults,
        unused: list[str],
        fields: Sequence[str] | None = (),
    ) -> None:
        self.files = list(files)
        self.table = table
        self.faults = faults
        self.unused = unused
        self.fields = fields
        self.token_counts: dict[str, Any] = {}
        self.selections: dict[Any, Any] = {}


def scan(sources: Sequence[Source], renderer: PromptRenderer, keep_lines: bool = False) -> Scan:
    """Read data sources once, in bounded memory.

    Args:
        sources: Files and the like.
        renderer: Renders the prompts.
        keep_lines: Whether to keep every row as a line of JSON, too: its own, if it has one.
    """
    reader, faults = RowReader(renderer), Faults()
    with TableWriter() as writer:
        for line in read_records(sources):
            if line.problem or not isinstance(line.value, dict):
                _add_fault(line, sources, faults, writer)
                continue
            parts = reader.read_plain(line.value) or reader.read(line.value)
            raw = None
            if keep_lines:
                raw = b"" if line.mended else line.raw
                raw = raw or json.dumps(line.value).encode()
            _add_row(parts, line, faults, writer, raw)
        table = writer.finish()
    fields = None if len(reader.fields) > MOST_FIELDS else list(reader.fields)
    return Scan([source.name for source in sources], table, faults, reader.unused, fields)


def _add_fault(
    line: Record, sources: Sequence[Source], faults: Faults, writer: TableWriter
) -> None:
    """Add a record that contains no JSON object."""
    problem = line.problem or f"is {in_words(line.value)}, expected a JSON object"
    flags = Flag.BAD_LINE
    if line.whole_file:
        flags |= Flag.WHOLE_FILE
        faults.whole_files.append(f"{place(sources, line)}: {problem}")
    elif faults.wanted("line", False, False):
        faults.add(writer.rows, "line", [problem])
    writer.add(None, "", None, None, None, (line.file, line.line), flags)


_FLAG_OF_PART = {
    "pair": Flag.BAD_PAIR,
    "prompt": Flag.BAD_PROMPT,
    "render": Flag.BAD_RENDER,
    "output": Flag.BAD_OUTPUT,
}


def _add_row(
    parts: Parts, line: Record, faults: Faults, writer: TableWriter, raw: bytes | None
) -> None:
    prompt, pair, references = parts.prompt, parts.pair, parts.references
    flags = Flag.OBJECT
    counts = (0, 0, 0)
    if parts.conversation:
        flags |= Flag.CONVERSATION
    if line.mended:
        flags |= Flag.MENDED
    if parts.has_pair:
        flags |= Flag.HAS_PAIR
    elif faults.wanted("pair", False, False):
        faults.add(writer.rows, "pair", _problems_of_no_pair(line.value))
    if not references:
        flags |= Flag.NO_OUTPUT
        bad_output = bool(parts.problems) and "output" in (parts.problems or {})
        if not bad_output and faults.wanted("no output", parts.has_pair, False):
            checker = RowChecker(line.value)
            checker.references(required=True)
            faults.add(writer.rows, "no output", checker.problems)
    if parts.problems:
        bad_pair = "pair" in parts.problems
        for part, texts in parts.problems.items():
            flags |= _FLAG_OF_PART[part]
            if faults.wanted(part, parts.has_pair, bad_pair):
                faults.add(writer.rows, part, texts)
        counts = tuple(  # type: ignore[assignment]
            len(parts.problems.get(part, ())) for part in ("pair", "prompt", "output")
        )
    if pair is not None:
        if len(set(pair.texts)) == 1:
            flags |= Flag.IDENTICAL
        text = parts.input_text
        if text and all(candidate.startswith(text) for candidate in pair.texts):
            flags |= Flag.REPEATS
    place = (line.file, line.line)
    writer.add(prompt, parts.input_text, pair, references, raw, place, flags, counts)


def _problems_of_no_pair(row: Mapping[str, Any]) -> list[str]:
    checker = RowChecker(row)
    checker.candidates()
    return checker.problems
