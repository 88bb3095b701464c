"""Whether prompt and response are the tokens of one conversation, as a chat program writes it.

Training reads a prompt and a response that are tokenized one after the other. A chat program
renders the whole conversation, answer included, with the same template. Where the two differ, a
model meets its own earlier answers in another form than it learned to write them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_table import Flag
from rlhf.data.rows import RowData
from rlhf.data.schema import Message, PreferenceRow, PromptFields, PromptText
from rlhf.untrusted import parse_json

_MOST_ROWS = 8
_BEFORE, _AFTER = 3, 4  # tokens shown around the first difference
_COLUMNS = ("input_text", "candidates", "ranking", "references")
_ANSWER = "Yes, it is."  # for rows without an answer


@dataclass(frozen=True)
class Difference:
    """Where prompt and response part from the conversation as one text.

    Attributes:
        ours: Texts of the tokens around the first difference, as trained.
        whole: The same in the conversation as one text.
        meaning: What it is about, in words.
    """

    ours: Sequence[str]
    whole: Sequence[str]
    meaning: str


def check_conversations(
    data: RowData[Any], codec: PromptCodec, renderer: PromptRenderer, name: str
) -> list[str]:
    """Compare the first few conversations of a data set with their rendering as one text.

    Args:
        data: The rows.
        codec: Of the model that reads them; one with an encoder never reads both as one text.
        renderer: What rendered the rows' prompts.
        name: Configuration field to name in the warning.

    Returns:
        Lines of a warning; none if nothing differs.
    """
    if renderer.chat_template is None or not codec.layout.response_continues_text:
        return []
    checked = 0
    found: list[tuple[str, Difference]] = []
    for source, fields, answer in _answered(data, renderer):
        checked += 1
        difference = find_difference(codec, renderer, fields, answer)
        if difference is not None:
            found.append((source, difference))
    if not found:
        return []
    source, first = found[0]
    return [
        f"{name}: warning: in {len(found)} of the first {checked} conversations, prompt and answer "
        f"are other tokens than the whole conversation in the chat template; at {source}:",
        f"  prompt, then answer: {' '.join(first.ours)}",
        f"  whole conversation:  {' '.join(first.whole)}",
        f"  {first.meaning}",
    ]


def find_difference(
    codec: PromptCodec, renderer: PromptRenderer, fields: PromptFields, answer: str
) -> Difference | None:
    """Return the first difference between prompt and answer and the conversation as one text.

    What the template writes after the end of the answer, such as a line break, is none.

    Args:
        codec: Makes the ids.
        renderer: Renders the conversation.
        fields: A row with `messages`.
        answer: The assistant's answer.
    """
    prompt = renderer.render(fields)
    try:
        whole = renderer.render_answered(fields, answer)
    except ValueError:  # a template need not render what ends in an answer
        return None
    ours = codec.unlimited_ids(prompt, answer)
    theirs = codec.unlimited_ids(whole)
    pairs = zip(ours, theirs, strict=False)
    place = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        place = min(len(ours), len(theirs))
    if place >= len(ours) - 1:  # all but the end, which some templates leave out
        return None
    start = max(0, place - _BEFORE)
    before, after = (_texts(codec, ids, start, place) for ids in (ours, theirs))
    return Difference(before, after, _meaning(renderer, prompt, whole, answer))


def _texts(codec: PromptCodec, ids: Sequence[int], start: int, place: int) -> list[str]:
    decode = codec.tokenizer.decode
    pieces = [
        repr(decode([id_], clean_up_tokenization_spaces=False))
        for id_ in ids[start : place + _AFTER]
    ]
    more = ["…"] if place + _AFTER < len(ids) else []
    return ["…" if start else "", *pieces, *more][0 if start else 1 :]


def _meaning(renderer: PromptRenderer, prompt: PromptText, whole: PromptText, answer: str) -> str:
    """Say what the template does differently."""
    names = renderer.readable_options()
    options = f" (chat_template_options can set {', '.join(names)})" if names else ""
    if not whole.text.startswith(prompt.text):
        return (
            f"the template writes the turns before an answer differently once it is there{options}"
        )
    rest, core = whole.text[len(prompt.text) :], answer.strip()
    if rest.startswith(answer):
        return (
            "the text is the same, but tokens reach across the beginning or the end of the answer"
        )
    if core and core in rest:
        added = rest[: rest.index(core)]
        own = answer[: len(answer) - len(answer.lstrip())]
        if added != own:
            return (
                f"the template puts {added!r} before an answer, where the row has {own!r}{options}"
            )
        lost = answer[len(answer.rstrip()) :]
        if lost and not rest[len(own) + len(core) :].startswith(lost):
            return f"the template leaves out {lost!r} at the end of the answer"
    return f"the template rewrites the answer{options}"


def _answered(
    data: RowData[Any], renderer: PromptRenderer
) -> Iterator[tuple[str, PromptFields, str]]:
    """Yield source, fields and answer of the first few conversations."""
    for number in _first_conversations(data):
        row = data[number]
        columns = data.table.row(int(data.stored[number]), _COLUMNS)
        turns = parse_json(columns["input_text"] or "[]")
        messages = tuple(Message(turn["author"], turn["content"]) for turn in turns)
        fields = PromptFields(None, messages, None)
        # The row's `context` is not stored by itself; a conversation that has one is passed over.
        if not messages or renderer.render(fields).text != row.prompt.text:
            continue
        best = [columns["candidates"][place] for place in columns["ranking"][:1]]
        texts = best if isinstance(row, PreferenceRow) else [*columns["references"], *best]
        yield row.source, fields, next((text for text in texts if text.strip()), _ANSWER)


def _first_conversations(data: RowData[Any]) -> list[int]:
    found: list[int] = []
    start = 0
    for batch in data.batches(("flags",)):
        flags = batch.column("flags").to_numpy(zero_copy_only=False)
        places = np.flatnonzero(flags & Flag.CONVERSATION)[: _MOST_ROWS - len(found)]
        found += (places + start).tolist()
        start += batch.num_rows
        if len(found) >= _MOST_ROWS:
            break
    return found
