"""Rendering: from the fields of a row to the text that the model reads.

`input_text` is never wrapped in a chat template. The prompt is the instruction, the context and the
input, as far as present, separated by empty lines. The text of special tokens in it is plain text.

`messages` are rendered with the tokenizer's chat template, generation prompt included. The
instruction, the context and the conversation's own system turn, separated by empty lines, form the
system turn; if the template does not support one, they precede the first user turn. A tokenizer
without a template gets the plain one:

    <system>

    User: <text>

    Assistant: <text>

    User: <text>

    Assistant:
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rlhf.data.schema import Message, PromptFields, PromptText, Span
from rlhf.errors import InputError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
_PLAIN_TEMPLATE = "plain 1"
# Variables of every template that are no options.
_GIVEN = frozenset({"messages", "add_generation_prompt", "tools", "documents"})
_PLAIN_NAMES = {"user": "User: ", "assistant": "Assistant: ", "system": ""}


class PromptRenderer:
    """Renderer of rows; needs no model, and a tokenizer only for its chat template.

    Args:
        instruction: Text to put before every input, or None.
        chat_template: Jinja text of a Hugging Face chat template; None for the plain one.
        special_tokens: Names and texts of tokens that the template may use, such as `bos_token`.
        options: Other variables for the template, such as `enable_thinking`.

    Raises:
        InputError: The template reads no such option.
    """

    def __init__(
        self,
        instruction: str | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.instruction = instruction or ""
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.options = dict(options or {})
        if problems := self._option_problems():
            raise InputError(problems)
        # The literal text around the turns depends only on the order of the speakers.
        self._scaffolding = lru_cache(maxsize=256)(self._find_scaffolding)

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: "PreTrainedTokenizerBase | None",
        instruction: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> "PromptRenderer":
        """Return the renderer for a tokenizer's chat template, or the plain one if it has none.

        Args:
            tokenizer: The tokenizer; of several named templates, the default one is used.
            instruction: Text to put before every input.
            options: Further variables for the template.

        Raises:
            InputError: The template reads no such option.
        """
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            return cls(instruction, options=options)
        if isinstance(template, dict):  # several named templates, one of them the default
            template = template.get("default") or next(iter(template.values()))
        names = getattr(tokenizer, "special_tokens_map", {})
        tokens = {name: str(text) for name, text in names.items() if isinstance(text, str)}
        return cls(instruction, template, tokens, options)

    def readable_options(self) -> list[str]:
        """Return the names of the options that the template reads, sorted."""
        if self.chat_template is None:
            return []
        from rlhf.data.templates import variables

        found = variables(self.chat_template) - _GIVEN - self.special_tokens.keys()
        return sorted(name for name in found if not name.endswith("_token"))

    def _option_problems(self) -> list[str]:
        if not self.options:
            return []
        readable = self.readable_options()
        if self.chat_template is None:
            reads = "there is no chat template that could read it"
        elif not readable:
            reads = "the chat template reads no options"
        else:
            reads = f"the chat template does not read it, it reads {', '.join(readable)}"
        problems = []
        for name in self.options:
            if name not in readable:
                meant = closest(name, readable)
                hint = f"; did you mean `{meant}`?" if meant else ""
                problems.append(f"chat_template_options.{name}: {reads}{hint}")
        return problems

    @property
    def identity(self) -> str:
        """16 characters that are equal for two renderers exactly if they render all rows alike."""
        parts = [self.instruction, self.chat_template or _PLAIN_TEMPLATE]
        if self.chat_template:
            parts += [f"{name}={text}" for name, text in sorted(self.special_tokens.items())]
            parts += [json.dumps(self.options, sort_keys=True)] if self.options else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def render(self, fields: PromptFields) -> PromptText:
        """Render the prompt of one row.

        Raises:
            ValueError: If the chat template refuses the conversation; the message says why.
        """
        if fields.messages:
            return self._render_messages(fields)
        if not fields.context:
            return self.render_text(fields.input_text or "")
        parts = [(self.instruction, "fixed"), (fields.context, "span")]
        turn = _join([*parts, (fields.input_text or "", "span")])
        return PromptText(turn.text, turn.marked("span"))

    def render_text(self, text: str) -> PromptText:
        """Render the prompt of a row that has only an input."""
        if not text:
            return PromptText(self.instruction, ())
        before = self.instruction + SEPARATOR if self.instruction else ""
        return PromptText(before + text, ((len(before), len(before) + len(text)),))

    def render_answered(self, fields: PromptFields, answer: str) -> PromptText:
        """Render a conversation together with the assistant's answer to it, as one text.

        Raises:
            ValueError: If the chat template refuses the conversation; the message says why.
        """
        turns = [*self._turns(fields), ("assistant", _join([(answer, "span")]))]
        return self._fill(turns, ask=False)

    def after_answers(self) -> list[str]:
        """Return what the template writes after an answer, when it is the last turn and when not.

        Empty if it refuses such conversations or does not show their turns.
        """
        found = []
        for authors in (("user", "assistant"), ("user", "assistant", "user")):
            try:
                pieces = self._scaffolding(authors, False)
            except ValueError:
                return []
            if pieces is None:
                return []
            found.append(pieces[2])
        return found

    def raw_input(self, fields: PromptFields) -> str:
        """Return the row's own input, as it appears in predictions."""
        if not fields.messages:
            return fields.input_text or ""
        turns = [{"author": turn.author, "content": turn.content} for turn in fields.messages]
        return json.dumps(turns, ensure_ascii=False)

    def _render_messages(self, fields: PromptFields) -> PromptText:
        return self._fill(self._turns(fields))

    def _turns(self, fields: PromptFields) -> "list[tuple[str, _Turn]]":
        """Return author and text of each turn that the template gets."""
        own = fields.messages[0] if fields.messages[0].author == "system" else None
        conversation = fields.messages[1:] if own else fields.messages
        parts = [(self.instruction, "fixed"), (fields.context or "", "span")]
        system = _join([*parts, (own.content if own else "", "reserve")])
        turns = [("system", system)] if system.text else []
        turns += [(turn.author, _join([(turn.content, "span")])) for turn in conversation]
        if system.text and not self._knows_system(tuple(author for author, _ in turns)):
            first = _join([*system.parts, (conversation[0].content, "span")])
            turns = [("user", first), *turns[2:]]
        return turns

    def _knows_system(self, authors: tuple[str, ...]) -> bool:
        try:
            return self._scaffolding(authors, True) is not None
        except ValueError:
            # Blame the system turn only if the template accepts the rest without it.
            self._scaffolding(authors[1:], True)
            return False

    def _fill(self, turns: "Sequence[tuple[str, _Turn]]", ask: bool = True) -> PromptText:
        """Render the turns and find their characters in the result.

        Args:
            turns: Author and text of each turn.
            ask: Whether to end with what an answer follows, the generation prompt.
        """
        text = self._apply([Message(author, turn.text) for author, turn in turns], ask)
        pieces = self._scaffolding(tuple(author for author, _ in turns), ask)
        contents = [turn for _, turn in turns]
        places = _locate(text, [turn.text for turn in contents], pieces)
        bos = self.special_tokens.get("bos_token", "")
        bos = bos if text.startswith(bos) else ""
        start = len(bos)  # kept apart, since other tokenizers and people read the rest
        marks: dict[str, list[Span]] = {"span": [], "reserve": []}
        for turn, place in zip(contents, places, strict=True):
            if place is None:
                continue
            for kind, spans in marks.items():
                for first, last in turn.marked(kind):
                    # The template may have stripped the content.
                    low = max(place[0], place[2] + first)
                    high = min(place[1], place[2] + last)
                    if low < high:
                        spans.append((low - start, high - start))
        template_bos = None if self.chat_template is None else bos
        spans, reserve = marks["span"], marks["reserve"]
        return PromptText(text[start:], tuple(spans), tuple(reserve), template_bos)

    def _find_scaffolding(self, authors: tuple[str, ...], ask: bool) -> tuple[str, ...] | None:
        """Return the literal text before, between and after the turns; None if a turn is hidden."""
        marks = [f"\ue000{number}\ue001" for number in range(len(authors))]
        turns = zip(authors, marks, strict=True)
        rest = self._apply([Message(author, mark) for author, mark in turns], ask)
        pieces = []
        for mark in marks:
            if rest.count(mark) != 1:
                return None
            piece, rest = rest.split(mark)
            pieces.append(piece)
        return (*pieces, rest)

    def _apply(self, messages: Sequence[Message], ask: bool) -> str:
        if self.chat_template is None:
            turns = [_PLAIN_NAMES[turn.author] + turn.content for turn in messages]
            return SEPARATOR.join([*turns, *(["Assistant:"] if ask else ())])
        values = {**self.special_tokens, **self.options, "add_generation_prompt": ask}
        return _apply_jinja(self.chat_template, messages, values)


class _Turn:
    """A text made of parts, each of some kind."""

    def __init__(self, parts: Sequence[tuple[str, str]]) -> None:
        self.parts = list(parts)
        self.text = SEPARATOR.join(text for text, _ in parts)

    def marked(self, kind: str) -> tuple[Span, ...]:
        """Return the ranges of the parts of one kind."""
        spans, start = [], 0
        for text, own in self.parts:
            if own == kind:
                spans.append((start, start + len(text)))
            start += len(text) + len(SEPARATOR)
        return tuple(spans)


def _join(parts: Sequence[tuple[str, str]]) -> _Turn:
    """Join the non-empty parts."""
    return _Turn([(text, kind) for text, kind in parts if text])


def _apply_jinja(template: str, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
    from rlhf.data.templates import render, template_date

    conversation = [{"role": turn.author, "content": turn.content} for turn in messages]
    try:
        given: dict[str, Any] = {
            "messages": conversation,
            "tools": None,
            "documents": None,
            "date_string": template_date("%d %b %Y"),
        }
        return render(template, **{**given, **values})
    except ValueError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def _locate(
    text: str, contents: Sequence[str], pieces: Sequence[str] | None
) -> list[tuple[int, int, int] | None]:
    """Find each content in the rendered text.

    Returns:
        Per content (start, end, origin), where origin is the position its first character would
        have if the template had not stripped it; None if the template changed it otherwise.
    """
    if pieces is not None and (exact := _locate_exactly(text, contents, pieces)) is not None:
        return exact
    # The template inspects the contents (to hide earlier reasoning, say): find what is left.
    places: list[tuple[int, int, int] | None] = []
    position = 0
    for content in contents:
        trimmed = content.strip()
        start = text.find(trimmed, position)
        if start < 0 or not trimmed:
            places.append(None)
            continue
        position = start + len(trimmed)
        places.append((start, position, start - content.index(trimmed)))
    return places


def _locate_exactly(
    text: str, contents: Sequence[str], pieces: Sequence[str]
) -> list[tuple[int, int, int] | None] | None:
    if not text.startswith(pieces[0]):
        return None
    places: list[tuple[int, int, int] | None] = []
    position = len(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        lead = len(content) - len(content.lstrip())
        variants = (
            (content, 0),
            (content.strip(), lead),
            (content.lstrip(), lead),
            (content.rstrip(), 0),
        )
        matches = (
            (position + len(variant), trimmed)
            for variant, trimmed in variants
            if text.startswith(variant + piece, position)
        )
        if (match := next(matches, None)) is None:
            return None
        end, trimmed = match
        places.append((position, end, position - trimmed))
        position = end + len(piece)
    return places if position == len(text) else None
