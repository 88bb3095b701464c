"""Python functions as scorers: what they are given, how they are called, what they may return."""

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rlhf.data.row_checker import named
from rlhf.data.schema import PromptText
from rlhf.errors import InputError, StoppedBySignal, closest
from rlhf.models.function_calls import LOOP, CallTimedOut, Pending, in_thread

RewardFunction = Callable[..., Any]

# What a function may ask for beside the row's own fields, which these hide.
TOKEN_COLUMNS = ("prompt_tokens", "response_tokens", "finished")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Texts:
    """What a function is called with.

    Attributes:
        prompts: N prompts.
        responses: N responses to them.
        columns: Name to N values: the rows' fields and `TOKEN_COLUMNS`.
        sources: N places of the rows, `FILE:LINE`; empty if unknown.
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sources: Sequence[str] = ()

    def select(self, rows: Sequence[int]) -> "Texts":
        """Return some of the rows."""
        return Texts(
            [self.prompts[row] for row in rows],
            [self.responses[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
            [self.sources[row] for row in rows] if self.sources else (),
        )

    def where(self, index: int) -> str:
        """Return a response and its row in words."""
        row = f", row {self.sources[index]}" if self.sources else ""
        return f"response {index}, {self.responses[index]!r:.80}{row}"


class RewardFn:
    """A Python function of texts, used as a scorer.

    Args:
        function: Called with a list of prompts and a list of as many responses; returns one
            finite number per response. Parameters after these two are named columns, lists of as
            many values; `**columns` gets all of them. May be async.
        name: Its name in messages; by default its own.
        timeout: Longest time of one call, s; None for no limit.
    """

    shares_base = False

    def __init__(
        self, function: RewardFunction, name: str | None = None, timeout: float | None = None
    ) -> None:
        if not callable(function):
            raise InputError(f"reward_fn: expected a callable, got {type(function).__name__}")
        self.function = function
        self.name = name or function_name(function)
        self.timeout = timeout
        self.is_async = any(
            inspect.iscoroutinefunction(part)
            for part in (function, getattr(function, "__call__", None))  # noqa: B004 (of objects)
        )
        self.all_columns, self.columns, self._own_names = self._inspect()

    def _inspect(self) -> tuple[bool, dict[str, bool], set[str]]:
        """Return whether it takes all columns, which it names and needs, what its texts are called.

        Raises:
            InputError: It cannot be called with prompts and responses.
        """
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except ValueError:  # implemented in C, without a signature
            return False, {}, set()
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
        starred = any(one.kind is one.VAR_POSITIONAL for one in parameters)
        positional = [
            one
            for one in parameters
            if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        named_ones = [one for one in parameters if one.kind is one.KEYWORD_ONLY]
        rest = positional[2:]
        if (len(positional) < 2 and not starred) or any(
            one.kind is one.POSITIONAL_ONLY and one.default is one.empty for one in rest
        ):
            raise InputError(
                f"reward_fn {self.name}: cannot be called with prompts and responses; expected "
                "a function (prompts, responses, ...), where further parameters are columns"
            )
        named_ones += [one for one in rest if one.kind is not one.POSITIONAL_ONLY]
        columns = {one.name: one.default is one.empty for one in named_ones}
        return takes_any, columns, {one.name for one in positional[:2]}

    @property
    def reads_rows(self) -> bool:
        """Whether it may be given fields of the rows."""
        return self.all_columns or not self.columns.keys() <= set(TOKEN_COLUMNS)

    def takes(self, column: str) -> bool:
        """Return whether it is given a column of this name."""
        return column not in self._own_names and (self.all_columns or column in self.columns)

    def check_columns(self, fields: Sequence[str], where: str) -> None:
        """Check that there are the columns that it needs.

        Args:
            fields: Names of the rows' fields.
            where: What the rows are, for the message.

        Raises:
            InputError: A column is missing.
        """
        known = [*fields, *TOKEN_COLUMNS]
        problems = []
        for column, needed in self.columns.items():
            if needed and column not in known:
                near = closest(column, known)
                hint = f" (did you mean {near}?)" if near else ""
                problems.append(
                    f"reward_fn {self.name}: needs the column {column!r}{hint}, which no row of "
                    f"{where} has; there are {named(known)}"
                )
        if problems:
            raise InputError(problems)

    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,  # noqa: ARG002 (the function gets all at once)
        *,
        finished: Sequence[bool] | None = None,
    ) -> Tensor:
        """Score all texts in one call: (N,) fp32 on the CPU; see `start`."""
        texts = [prompt.text for prompt in prompts]
        ends = [True] * len(texts) if finished is None else list(finished)
        return self.start(Texts(texts, list(responses), {"finished": ends}))()

    def start(self, texts: Texts) -> Callable[[], Tensor]:
        """Start to score all texts in one call; several async functions then run concurrently.

        Returns:
            A function that waits for the scores, or for a sync function makes the call: (N,) fp32
            on the CPU. It raises InputError where the function raises (its exception is then the
            cause, and the row is searched by calling it with parts of the texts), takes too long,
            or returns anything other than one finite number per response.
        """
        pending = self._begin(texts) if self.is_async else None

        def scores() -> Tensor:
            try:
                found = self._answers(texts, pending)
            except (InputError, StoppedBySignal):
                raise
            except CallTimedOut:
                raise InputError(self._late(texts)) from None
            except Exception as error:
                row = self._row_that_raises(texts, error)
                said = f"reward_fn {self.name}: raised {_described(error)}{row}"
                raise InputError(said) from error
            return self._tensor(found, texts)

        return scores

    def _begin(self, texts: Texts) -> Pending:
        async def call() -> Any:
            return await self.function(*self._arguments(texts), **self._keywords(texts))

        return LOOP.start(call(), self.timeout)

    def _answers(self, texts: Texts, pending: Pending | None = None) -> list[Any]:
        """Return what the function answers, as a list of at most one more than there are texts."""
        if self.is_async:
            answers = (pending or self._begin(texts)).result()
            return self._listed(answers, len(texts.responses) + 1)

        def call() -> list[Any]:
            answers = self.function(*self._arguments(texts), **self._keywords(texts))
            if inspect.isawaitable(answers):
                answers = LOOP.start(_awaited(answers), self.timeout).result()
            return self._listed(answers, len(texts.responses) + 1)

        found: list[Any] = (
            call() if self.timeout is None else in_thread(call, self.timeout).result()
        )
        return found

    def _arguments(self, texts: Texts) -> tuple[list[str], list[str]]:
        return list(texts.prompts), list(texts.responses)

    def _keywords(self, texts: Texts) -> dict[str, list[Any]]:
        """Return the columns that the function asks for."""
        own = {name: list(values) for name, values in texts.columns.items() if self.takes(name)}
        missing = [name for name, needed in self.columns.items() if needed and name not in own]
        # A field that other rows of the data set have.
        return own | {name: [None] * len(texts.responses) for name in missing}

    def _late(self, texts: Texts) -> str:
        more = (
            ""
            if self.is_async
            else "; Python cannot interrupt it, so its thread runs on until the process ends"
        )
        count = len(texts.responses)
        return (
            f"reward_fn {self.name}: took longer than reward_timeout {self.timeout:g} s for "
            f"{count} response{'' if count == 1 else 's'}{more}"
        )

    def _row_that_raises(self, texts: Texts, error: Exception) -> str:
        """Find the row for which the function raises, by halves: at most one more pass."""
        rows: Sequence[int] = range(len(texts.responses))
        while len(rows) > 1:
            first = rows[: len(rows) // 2]
            raises = self._raises(texts.select(first), type(error))
            rows = first if raises else rows[len(rows) // 2 :]
        if not rows:
            return ""
        alone = len(texts.responses) == 1 or self._raises(texts.select(rows), type(error))
        return f" for {texts.where(rows[0])}" if alone else " for no single one of the responses"

    def _raises(self, texts: Texts, kind: type[Exception]) -> bool:
        try:
            self._answers(texts)
        except StoppedBySignal:
            raise
        except Exception as error:
            return type(error) is kind
        return False

    def _listed(self, answers: Any, most: int) -> list[Any]:
        """Return the answers as a list, at most `most` of them: a generator may never end."""
        unfit = (str, bytes, Mapping, Set)
        if isinstance(answers, unfit) or not (
            isinstance(answers, Iterable) or hasattr(answers, "__getitem__")
        ):
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got {type(answers).__name__}"
            )
        if getattr(answers, "ndim", 1) == 0:
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got a single one of type "
                f"{type(answers).__name__}"
            )
        return list(islice(answers.detach() if isinstance(answers, Tensor) else answers, most))

    def _tensor(self, found: Sequence[Any], texts: Texts) -> Tensor:
        count = len(texts.responses)
        if len(found) != count:
            returned = len(found) if len(found) <= count else "more"
            raise InputError(
                f"reward_fn {self.name}: returned {returned} scores for {count} "
                "responses; expected one per response"
            )
        scores = [self._number(answer, texts.where(index)) for index, answer in enumerate(found)]
        return torch.tensor(scores, dtype=torch.float32)

    def _number(self, answer: Any, where: str) -> float:
        try:
            if isinstance(answer, str | bytes):
                raise TypeError("text")
            score = float(answer)
        except OverflowError as error:
            raise InputError(
                f"reward_fn {self.name}: returned a number of hundreds of digits for {where}; "
                "expected one that fits float32"
            ) from error
        except Exception as error:  # an object's own __float__ may raise anything
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got "
                f"{type(answer).__name__} for {where}"
            ) from error
        if not math.isfinite(score) or abs(score) > _LARGEST:
            raise InputError(
                f"reward_fn {self.name}: returned {score:g} for {where}; expected a finite number "
                "that fits float32"
            )
        return score


def function_name(function: Any) -> str:
    """Return a function's own name; of a partial function, that of what it wraps."""
    inner = getattr(function, "func", function)
    name: str = getattr(inner, "__name__", type(inner).__name__)
    return name


async def _awaited(answers: Any) -> Any:
    return await answers


def _described(error: Exception) -> str:
    """Return an exception as one line, with its location in the user's code."""
    text = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
    return f"{said} (line {frame.lineno} of {frame.filename}, in {frame.name})"
