r"""Conversion of files in other common layouts to the library's rows.

Layouts:

* `rows`: the library's own rows, possibly as a JSON array.
* `chosen_rejected`: `prompt` (or `input_text`, `question`, `instruction` with `input`), `chosen`,
  `rejected` as texts, or as lists of turns with `role` and `content`. The two conversations may
  contain all or part of the prompt; it is written only once.
* `alpaca`: `instruction`, optional `input`, `output`: demonstrations. The prompt is the instruction
  and the input, separated by an empty line.
* `tldr_comparisons`: the published comparisons of Stiennon et al. 2020: `info.post`,
  `summaries[].text`, `choice`. With a subreddit or title the input is formatted as in the paper
  ("SUBREDDIT: …", "TITLE: …", "POST: …", "TL;DR:"); otherwise it is the post alone.
* `hh_rlhf`: Bai et al. 2022: `chosen` and `rejected` are dialogues "\n\nHuman: …\n\nAssistant: …"
  that differ in the last answer only.

In all but `rows` and `tldr_comparisons` a `system` text becomes the system turn (or the `context`
of a plain-text prompt), and a `history` of [question, answer] pairs becomes the earlier turns.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.row_checker import RowChecker, add_names, holds_something, in_words, named
from rlhf.data.sources.reading import Source, find_sources, place, read_records
from rlhf.data.sources.record import MAX_PROBLEMS
from rlhf.data.turns import (
    NoPreferenceError,
    RowError,
    Turn,
    author,
    checked_turns,
    history_turns,
    joined,
    split_answers,
)
from rlhf.errors import InputError
from rlhf.files.text import whole_file

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_AUTHORS = {"Human": "user", "Assistant": "assistant"}
_ANSWER = "\n\nAssistant:"

# Possible names of a prompt field next to `chosen` and `rejected`; the first one present is used.
_PROMPT_FIELDS = ("input_text", "prompt", "question", "instruction")

Row = dict[str, Any]
# A row of the library, and the names of the source fields used for it.
_Converted = tuple[Row, set[str]]


@dataclass
class ConvertReport:
    """Summary of a conversion.

    Attributes:
        layout: The layout that was read.
        output: The file that was written.
        rows: Rows written.
        left_out: Rows that are not two answers to the same user prompt.
        repeating: Written rows whose answers all begin with the whole prompt.
        unused: Names of the first few non-empty fields that were not used.
    """

    layout: str
    output: str
    rows: int = 0
    left_out: int = 0
    repeating: int = 0
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report for people, one fact per line."""
        said = [f"{self.output}: {self.rows} rows from layout {self.layout}"]
        if self.left_out:
            said.append(f"left out, not two answers to the same user prompt: {self.left_out}")
        if self.repeating:
            said.append(
                f"all answers begin with the whole prompt: {self.repeating} (kept as they are; "
                "remove it if it is not part of the answer)"
            )
        if self.unused:
            said.append(f"fields not used: {named(self.unused)}")
        return said


def convert(
    source_path: str | Sequence[str], output_path: str, layout: str = "auto"
) -> ConvertReport:
    """Convert files in another layout to the library's rows, all of them or nothing.

    Args:
        source_path: A path, glob, folder, fsspec address, or a list of these.
        output_path: Local path or fsspec address of the file to write; replaced if it exists.
        layout: One of those in the module docstring; "auto" recognizes it from the first row.

    Raises:
        InputError: If the layout is unknown, files are missing or rows do not match the layout.
    """
    if layout not in ("auto", *_LAYOUTS):
        raise InputError(f"layout: is {layout!r}, expected one of {', '.join(('auto', *_LAYOUTS))}")
    sources = find_sources(source_path, "source_path")
    report = ConvertReport(layout, output_path)
    problems: list[str] = []
    count = 0
    with whole_file(output_path, "output_path") as output:
        for where, value, problem in _values(sources):
            try:
                if problem or not isinstance(value, dict):
                    raise RowError(problem or f"is {in_words(value)}, expected a JSON object")
                if report.layout == "auto":
                    report.layout = _recognize(value)
                row, used = _LAYOUTS[report.layout](value)
                _check(row)
            except NoPreferenceError:
                report.left_out += 1
                continue
            except RowError as error:
                count += 1
                if len(problems) < MAX_PROBLEMS:
                    problems.append(f"{where}: {error}")
                continue
            output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            report.rows += 1
            report.repeating += _repeats_prompt(row)
            left = (name for name in value if name not in used and holds_something(value[name]))
            add_names(report.unused, left)
        if count > len(problems):
            problems.append(f"… and {count - len(problems)} more problems")
        if not problems and not report.rows:
            problems = [*report.lines()[1:], "source_path: no row can be converted"]
        if problems:
            raise InputError(problems)
    return report


def _values(sources: Sequence[Source]) -> Iterator[tuple[str, Any, str]]:
    """Yield every row as (place, value, problem)."""
    for record in read_records(sources):
        yield place(sources, record), record.value, record.problem


def _recognize(row: Row) -> str:
    """Return the layout of a row, judging by its fields."""
    if "summaries" in row:
        return "tldr_comparisons"
    if "chosen" in row and "rejected" in row:
        texts = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
        own_prompt = any(name in row for name in ("messages", *_PROMPT_FIELDS))
        return "hh_rlhf" if texts and not own_prompt else "chosen_rejected"
    if "input_text" in row or "messages" in row or ("candidates" in row and "ranking" in row):
        return "rows"
    if "instruction" in row and "output" in row:
        return "alpaca"
    names = named(list(row)[:8]) or "none"
    raise RowError(
        f"has the fields {names}, expected those of one of the layouts {', '.join(_LAYOUTS)}"
    )


def _check(row: Row) -> None:
    """Raise RowError if the stages could not read the converted row."""
    checker = RowChecker(row)
    checker.prompt()
    checker.references()
    if checker.has_candidates():
        checker.candidates()
    if checker.problems:
        raise RowError("; ".join(checker.problems))


def _repeats_prompt(row: Row) -> bool:
    """Return whether all answers begin with a prompt that is a text."""
    prompt = row.get("input_text")
    answers: list[Any] = [row.get("candidate_0"), row.get("candidate_1")]
    if answers == [None, None] and isinstance(row.get("candidates"), list):
        answers = row["candidates"]
    return isinstance(prompt, str) and all(
        isinstance(answer, str) and answer.startswith(prompt) for answer in answers
    )


def _from_rows(row: Row) -> _Converted:
    return row, RowChecker(row).used()


def _from_alpaca(row: Row) -> _Converted:
    prompt, used = _own_prompt(row)
    written, kept = _complete(row, prompt)
    return written | {"output_text": _field(row, "output")}, used | kept | {"output"}


def _from_chosen_rejected(row: Row) -> _Converted:
    chosen, rejected = (
        [answer] if isinstance(answer, dict) else answer
        for answer in (row.get("chosen"), row.get("rejected"))
    )
    prompt, used = _own_prompt(row)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, answers = split_answers(prompt, chosen, rejected)
    else:
        answers = [_field(row, "chosen"), _field(row, "rejected")]
        if isinstance(prompt, str) and _is_dialogue(prompt, *answers):
            written, kept = _from_hh(row)
            return written, used | kept
        if prompt is None:
            _field(row, "prompt")
    written, kept = _complete(row, prompt)
    return _preference(written, *answers), used | kept | {"chosen", "rejected"}


def _is_dialogue(prompt: str, chosen: str, rejected: str) -> bool:
    """Return whether the answers are HH-RLHF dialogues, which begin with the prompt."""
    begins = prompt.strip()
    return begins.startswith("Human:") and all(
        text.lstrip().startswith(begins) and _ANSWER in text for text in (chosen, rejected)
    )


def _own_prompt(row: Row) -> tuple[str | list[Turn] | None, set[str]]:
    """Return the prompt given next to the answers, and the fields it is made of."""
    name = next((name for name in ("messages", *_PROMPT_FIELDS) if row.get(name) is not None), None)
    if name == "messages" and row.get("prompt") is not None:
        name = "prompt"  # `messages` is then the prompt with its answer
    if name is None:
        return None, set()
    if isinstance(row[name], list) and name in ("prompt", "messages"):
        return checked_turns(row[name], name), {name}
    text = _field(row, name)
    if name == "instruction" and holds_something(row.get("input")):
        return f"{text}\n\n{_field(row, 'input')}", {name, "input"}
    return text, {name}


def _complete(row: Row, prompt: str | list[Turn] | None) -> tuple[Row, set[str]]:
    """Return a prompt with the row's system text and earlier turns, and the fields used."""
    kept: Row = {name: row[name] for name in ("margin", "context", "output_text") if name in row}
    used = set(kept)
    if isinstance(row.get("history"), list) and row["history"]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        prompt = joined(history_turns(row["history"]), turns)
        used.add("history")
    system = _field(row, "system") if holds_something(row.get("system")) else ""
    used.add("system")
    if isinstance(prompt, str):
        if system:
            context = _field(row, "context") if holds_something(row.get("context")) else ""
            kept["context"] = "\n\n".join(part for part in (system, context) if part)
        return {"input_text": prompt} | kept, used
    turns = prompt or []
    if system and turns and author(turns[0]) == "system":
        if turns[0]["content"].strip() != system.strip():
            raise RowError("system: is not the first turn's text, expected one system text")
    elif system:
        turns = [{"role": "system", "content": system}, *turns]
    return {"messages": turns} | kept, used


def _from_tldr(row: Row) -> _Converted:
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
    heads = (("subreddit", "SUBREDDIT: r/"), ("title", "TITLE: "))
    parts = [head + info[key] for key, head in heads if isinstance(info.get(key), str)]
    text = "\n\n".join([*parts, f"POST: {info[name]}", "TL;DR:"]) if parts else info[name]
    pair = {"input_text": text, "candidate_0": texts[0], "candidate_1": texts[1]}
    choice = {"choice": row["choice"]} if "choice" in row else {}
    return pair | choice, {"info", "summaries", "choice"}


def _from_hh(row: Row) -> _Converted:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    end = chosen.rfind(_ANSWER)
    if end < 0 or not chosen.lstrip().startswith("Human:"):
        raise RowError('chosen: is no dialogue, expected "\\n\\nHuman: …\\n\\nAssistant: …"')
    prompt = chosen[: end + len(_ANSWER)]
    if not rejected.startswith(prompt) or _SPEAKER.search(rejected, len(prompt)):
        raise NoPreferenceError
    turns: list[dict[str, str]] = []
    pieces = _SPEAKER.split("\n\n" + chosen[:end].lstrip())[1:]
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        author = _AUTHORS[speaker]
        if turns and turns[-1]["author"] == author:  # the same speaker continues
            turns[-1]["content"] += "\n\n" + content.strip()
        else:
            turns.append({"author": author, "content": content.strip()})
    if turns[-1]["author"] != "user" or any(
        turn["author"] == "user" and not turn["content"].strip() for turn in turns
    ):
        raise NoPreferenceError
    answers = (text[len(prompt) :].strip() for text in (chosen, rejected))
    written, kept = _complete(row, turns)
    return _preference(written, *answers), kept | {"chosen", "rejected"}


def _field(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name}: is {in_words(value) if name in row else 'missing'}, expected text")
    return value


def _preference(prompt: Row, chosen: str, rejected: str) -> Row:
    return prompt | {"candidate_0": chosen, "candidate_1": rejected, "choice": 0}


_LAYOUTS: dict[str, Callable[[Row], _Converted]] = {
    "rows": _from_rows,
    "chosen_rejected": _from_chosen_rejected,
    "alpaca": _from_alpaca,
    "tldr_comparisons": _from_tldr,
    "hh_rlhf": _from_hh,
}
