"""Reward functions: the columns they get, how they are called, and what is said when they fail."""

import asyncio
import functools
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.reward_functions import TOKEN_COLUMNS, RewardFn, Texts
from rlhf.signals import SignalGuard, StopRequested

LONG = 3600.0  # s; a limit that nothing in a test reaches


def texts(*responses: str, **columns: Sequence[Any]) -> Texts:
    sources = [f"rows.jsonl:{line + 1}" for line in range(len(responses))]
    return Texts(["p"] * len(responses), responses, columns, sources)


def scores(function: Any, given: Texts, timeout: float | None = None) -> list[float]:
    return RewardFn(function, timeout=timeout).start(given)().tolist()


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that nobody sets before the test has ended."""
    event = threading.Event()
    yield event
    event.set()


# --- columns -------------------------------------------------------------------------------------


def test_a_function_gets_the_columns_that_it_asks_for() -> None:
    seen: dict[str, Any] = {}
    row = texts("a", "b", answer=["x", None], level=[1, 2], other=[[1], {"k": 2}])

    def two(prompts: Any, responses: Any) -> list[float]:
        seen["two"] = (prompts, responses)
        return [0.0, 0.0]

    def named(prompts: Any, responses: Any, level: Any, *, answer: Any) -> list[float]:
        seen["named"] = {"level": level, "answer": answer}
        return [0.0, 0.0]

    def with_default(prompts: Any, responses: Any, level: Any = 7, absent: Any = 8) -> list[float]:
        seen["default"] = (level, absent)
        return [0.0, 0.0]

    def everything(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        seen["all"] = columns
        return [0.0, 0.0]

    def both(prompts: Any, responses: Any, level: Any, **columns: Any) -> list[float]:
        seen["both"] = (level, set(columns))
        return [0.0, 0.0]

    class Callable:
        def __call__(self, prompts: Any, responses: Any, answer: Any) -> list[float]:
            seen["object"] = answer
            return [0.0, 0.0]

    bound = functools.partial(named, level="fixed")
    for function in (two, named, with_default, everything, both, Callable()):
        scores(function, row)
    assert seen == {
        "two": (["p", "p"], ["a", "b"]),
        "named": {"level": [1, 2], "answer": ["x", None]},
        "default": ([1, 2], 8),
        "all": {"answer": ["x", None], "level": [1, 2], "other": [[1], {"k": 2}]},
        "both": ([1, 2], {"answer", "other"}),
        "object": ["x", None],
    }
    scores(bound, texts("a", "b", answer=["x", None]))
    assert seen["named"]["level"] == "fixed"


def test_a_column_with_the_name_of_a_texts_parameter_is_left_out() -> None:
    def function(question: Any, answers: Any, **columns: Any) -> list[float]:
        assert columns == {"prompts": [3]}
        assert (question, answers) == (["p"], ["a"])
        return [1.0]

    assert scores(function, texts("a", question=[1], answers=[2], prompts=[3])) == [1.0]


def test_a_needed_column_that_only_other_rows_have_is_none() -> None:
    def function(prompts: Any, responses: Any, answer: Any) -> list[float]:
        return [float(one is None) for one in answer]

    assert scores(function, texts("a", "b")) == [1.0, 1.0]


def test_a_missing_column_is_named_with_those_there_are() -> None:
    def judge(prompts: Any, responses: Any, anwser: Any, level: Any = 1) -> list[float]:
        return []

    with pytest.raises(InputError) as caught:
        RewardFn(judge).check_columns(["input_text", "answer"], "prompt_dataset")
    assert caught.value.problems == [
        "reward_fn judge: needs the column 'anwser' (did you mean answer?), which no row of "
        "prompt_dataset has; there are input_text, answer, prompt_tokens, response_tokens, finished"
    ]
    RewardFn(judge).check_columns(["anwser"], "prompt_dataset")
    RewardFn(lambda prompts, responses, **columns: []).check_columns([], "prompt_dataset")
    RewardFn(lambda p, r, prompt_tokens, response_tokens, finished: []).check_columns([], "x")


@pytest.mark.parametrize(
    "function",
    [
        list,
        lambda prompts: [],
        lambda prompts, *, responses: [],
        lambda prompts, responses, answer, /: [],
    ],
)
def test_what_cannot_take_two_lists_is_refused(function: Any) -> None:
    with pytest.raises(InputError, match="cannot be called with prompts and responses"):
        RewardFn(function)


@pytest.mark.parametrize(
    ("function", "reads"),
    [
        (lambda prompts, responses: [], False),
        (lambda prompts, responses, response_tokens, finished: [], False),
        (lambda prompts, responses, answer=None: [], True),
        (lambda prompts, responses, **columns: [], True),
        (lambda *texts: [], False),
    ],
)
def test_rows_are_kept_only_for_functions_that_read_them(function: Any, reads: bool) -> None:
    assert RewardFn(function).reads_rows == reads


def test_two_functions_do_not_share_lists() -> None:
    def greedy(prompts: list[Any], responses: list[Any], level: list[Any]) -> list[float]:
        found = [float(one) for one in level]
        for given_list in (prompts, responses, level):
            given_list.clear()
        return found

    row = texts("a", "b", level=[1, 2])
    assert scores(greedy, row) == scores(greedy, row) == [1.0, 2.0]


# --- errors --------------------------------------------------------------------------------------


def divide(prompts: Any, responses: Any, level: Any) -> list[float]:
    return [1 / one for one in level]


async def divide_later(prompts: Any, responses: Any, level: Any) -> list[float]:
    await asyncio.sleep(0)
    return divide(prompts, responses, level)


@pytest.mark.parametrize("function", [divide, divide_later])
@pytest.mark.parametrize("timeout", [None, LONG])
@given(row=st.integers(0, 8), size=st.integers(1, 9))
def test_an_exception_names_function_and_row(
    function: Any, timeout: float | None, row: int, size: int
) -> None:
    row %= size
    level = [0.0 if place == row else 1.0 for place in range(size)]
    given_texts = texts(*(f"text {place}" for place in range(size)), level=level)
    with pytest.raises(InputError) as caught:
        scores(function, given_texts, timeout)
    said = str(caught.value)
    assert said.startswith(f"reward_fn {function.__name__}: raised ZeroDivisionError: ")
    assert "test_reward_functions.py, in " in said
    assert said.endswith(f" for response {row}, 'text {row}', row rows.jsonl:{row + 1}")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_the_whole_call_blames_no_row() -> None:
    def needs_three(prompts: Any, responses: Any) -> list[float]:
        if len(responses) >= 3:
            raise RuntimeError("too many")
        return [0.0] * len(responses)

    with pytest.raises(InputError, match=r"too many.* for no single one of the responses$"):
        scores(needs_three, texts("a", "b", "c"))


def test_a_bad_number_names_its_row() -> None:
    with pytest.raises(InputError, match=r"returned nan for response 1, 'b', row rows.jsonl:2;"):
        scores(lambda prompts, responses: [0.0, float("nan")], texts("a", "b"))


def test_a_timeout_error_of_its_own_is_no_limit_of_ours() -> None:
    def function(prompts: Any, responses: Any) -> list[float]:
        raise TimeoutError("the server is slow")

    async def later(prompts: Any, responses: Any) -> list[float]:
        raise TimeoutError("the server is slow")

    for one in (function, later):
        for timeout in (None, LONG):
            with pytest.raises(InputError, match="raised TimeoutError: the server is slow"):
                scores(one, texts("a"), timeout)


# --- limits of time ------------------------------------------------------------------------------


def test_a_sync_function_that_takes_too_long_is_an_error(never: threading.Event) -> None:
    def slow(prompts: Any, responses: Any) -> list[float]:
        never.wait()
        return [0.0, 0.0]

    with pytest.raises(InputError) as caught:
        scores(slow, texts("a", "b"), 0.05)
    assert caught.value.problems == [
        "reward_fn slow: took longer than reward_timeout 0.05 s for 2 responses; Python cannot "
        "interrupt it, so its thread runs on until the process ends"
    ]
    assert scores(lambda prompts, responses: [1.0], texts("a"), LONG) == [1.0]


def test_an_async_function_that_takes_too_long_is_cancelled() -> None:
    begun, left = threading.Event(), threading.Event()

    async def slow(prompts: Any, responses: Any) -> list[float]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return [0.0]

    waiting = RewardFn(slow, timeout=0.05).start(texts("a"))
    assert begun.wait(LONG)
    with pytest.raises(InputError) as caught:
        waiting()
    assert caught.value.problems == [
        "reward_fn slow: took longer than reward_timeout 0.05 s for 1 response"
    ]
    assert left.wait(LONG)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_signal_ends_the_wait(kind: str, never: threading.Event) -> None:
    begun = threading.Event()

    def slow(prompts: Any, responses: Any) -> list[float]:
        begun.set()
        never.wait()
        return [0.0]

    async def later(prompts: Any, responses: Any) -> list[float]:
        begun.set()
        await asyncio.Event().wait()
        return [0.0]

    with SignalGuard() as guard:

        def stop() -> None:
            begun.wait()
            guard.requested = True

        threading.Thread(target=stop).start()
        with pytest.raises(StopRequested):
            scores(slow if kind == "sync" else later, texts("a"), LONG)


# --- async functions -----------------------------------------------------------------------------


def test_async_functions_run_at_the_same_time() -> None:
    """Each waits for the other: one after the other, neither would end."""
    both = asyncio.Barrier(2)

    def function(value: float) -> RewardFn:
        async def meet(prompts: Any, responses: Any, level: Any) -> list[float]:
            async with both:
                return [value * one for one in level]

        return RewardFn(meet, timeout=LONG)

    row = texts("a", "b", level=[1, 2])
    waiting = [function(value).start(row) for value in (1.0, 10.0)]
    assert [one().tolist() for one in waiting] == [[1.0, 2.0], [10.0, 20.0]]


def test_sessions_live_from_one_call_to_the_next() -> None:
    """A future belongs to the loop in which it was made; another loop would refuse it."""
    kept: list[Any] = []

    async def function(prompts: Any, responses: Any) -> list[float]:
        loop = asyncio.get_running_loop()
        if not kept:
            kept.append(loop.create_future())
            kept[0].set_result(3.0)
        return [await kept[0]]

    assert scores(function, texts("a")) == scores(function, texts("a")) == [3.0]


def test_an_async_function_works_inside_a_running_loop() -> None:
    async def function(prompts: Any, responses: Any) -> list[float]:
        await asyncio.sleep(0)
        return [5.0]

    async def notebook() -> list[float]:
        return scores(function, texts("a"))

    assert asyncio.run(notebook()) == [5.0]


def test_a_function_that_returns_a_coroutine_is_async_too() -> None:
    async def inner(responses: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(response)) for response in responses]

    class Judge:
        async def __call__(self, prompts: Any, responses: Any) -> list[float]:
            return await inner(responses)

    for timeout in (None, LONG):
        assert scores(lambda p, r: inner(r), texts("ab", "c"), timeout) == [2.0, 1.0]
        assert scores(Judge(), texts("ab", "c"), timeout) == [2.0, 1.0]
        partial = functools.partial(Judge.__call__, Judge())
        assert scores(partial, texts("ab", "c"), timeout) == [2.0, 1.0]


def test_scoring_texts_alone_gives_no_columns_but_the_ends() -> None:
    def function(prompts: Any, responses: Any, finished: Any, **columns: Any) -> list[float]:
        assert not columns
        return [float(ended) for ended in finished]

    prompts = [PromptText("p", ())] * 2
    scorer = RewardFn(function)
    assert scorer.score(prompts, ["a", "b"], finished=[True, False]).tolist() == [1.0, 0.0]
    assert scorer.score(prompts, ["a", "b"]).tolist() == [1.0, 1.0]
    assert set(TOKEN_COLUMNS) >= {"finished"}


def test_the_message_about_a_late_call_in_a_blocked_loop(never: threading.Event) -> None:
    """An async function that blocks holds up the loop, which cannot keep time any more."""
    blocked = threading.Event()

    async def blocks(prompts: Any, responses: Any) -> list[float]:
        blocked.set()
        never.wait()
        return [0.0]

    waiting = RewardFn(blocks, timeout=0.05).start(texts("a"))
    assert blocked.wait(LONG)
    with pytest.raises(InputError, match=re.escape("took longer than reward_timeout 0.05 s")):
        waiting()
