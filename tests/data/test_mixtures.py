"""Data sets mixed by weight: what an epoch holds, against a slow reference."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DPOConfig, InferenceConfig, PipelineConfig, SourceEntry, load_config
from rlhf.config.loading import to_yaml
from rlhf.data.batching import rows_for_step
from rlhf.data.mixtures import Mixture, draws_of_epoch
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts, read_once, split_holdout
from rlhf.errors import InputError

RENDERER = PromptRenderer()
WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def write(path: Path, count: int, text: str) -> str:
    path.write_text(
        "".join(json.dumps({"input_text": f"{text} {row}"}) + "\n" for row in range(count))
    )
    return str(path)


def texts(paths: Any, **options: Any) -> list[str]:
    return [row.input_text for row in load_prompts(paths, renderer=RENDERER, **options)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 500), WEIGHTS)
def test_draws_are_shared_out_by_largest_remainders(total: int, weights: list[int]) -> None:
    exact = [Fraction(total * weight, sum(weights)) for weight in weights]
    expected = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda k: (expected[k] - exact[k], k))
    for k in order[: total - sum(expected)]:
        expected[k] += 1
    found = draws_of_epoch(total, weights)
    assert sum(found) == total
    # Equal remainders are told apart by rounding of the quotients: compare what is determined.
    assert all(abs(count - share) < 1 for count, share in zip(found, exact, strict=True))
    if len({share - int(share) for share in exact}) == len(exact):
        assert found == expected


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.integers(1, 20), min_size=4, max_size=4),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(1, 60),
)
def test_epochs_have_exact_counts_and_no_row_overtakes_another(
    groups: list[int], weights: list[int], seed: int, epochs: int, batch: int
) -> None:
    size = len(groups)
    mixture = Mixture(np.array(groups), dict(enumerate(weights)))
    draws = dict(zip(sorted(set(groups)), draws_of_epoch(
        size, [weights[group] for group in sorted(set(groups))]), strict=True
    ))  # fmt: skip
    stream = [
        row for epoch in range(epochs) for row in mixture.order_of_epoch(seed, epoch).tolist()
    ]
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        part = stream[epoch * size : (epoch + 1) * size]
        assert Counter(groups[row] for row in part) == {k: n for k, n in draws.items() if n}
        seen.update(part)
        for group in draws:
            counts = [seen[row] for row, of in enumerate(groups) if of == group]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == (epoch + 1) * draws[group]
    steps = -(-len(stream) // batch)
    visited = [row for step in range(steps) for row in rows_for_step(mixture, batch, step, seed)]
    assert visited[: len(stream)] == stream
    again = Mixture(np.array(groups), dict(enumerate(weights)))
    assert rows_for_step(again, batch, steps - 1, seed) == visited[-batch:]


def test_epochs_and_seeds_draw_differently() -> None:
    mixture = Mixture(np.repeat([0, 1], 50), {0: 1.0, 1: 3.0})
    orders = {tuple(mixture.order_of_epoch(s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    first = mixture.order_of_epoch(0, 0).numpy() < 50  # shuffled, not one data set after the other
    assert np.count_nonzero(np.diff(first)) > 5


def test_weights_make_a_mixture_and_rows_keep_their_place(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 30, "a"), write(tmp_path / "b.jsonl", 10, "b")
    data = load_prompts([a, {"path": b, "weight": 3}], renderer=RENDERER)
    assert [row.source for row in data] == [
        *(f"{a}:{line}" for line in range(1, 31)), *(f"{b}:{line}" for line in range(1, 11))
    ]  # fmt: skip
    assert isinstance(data.visits, Mixture)
    assert data.visits.draws == {0: 10, 1: 30}
    assert data.report.lines()[1] == (
        f"prompt_dataset: rows of an epoch: 10 of {a} (0.333 passes over 30 rows), "
        f"30 of {b} (3 passes over 10 rows)"
    )
    plain = load_prompts([a, b], renderer=RENDERER)
    assert plain.visits == 40
    assert plain.fingerprint == data.fingerprint
    order = rows_for_step(data.visits, 40, 0, 1)
    assert Counter(data[row].source.rpartition(":")[0] for row in order) == {a: 10, b: 30}
    part = data.select_rows([*range(5), *range(30, 35)])
    assert isinstance(part.visits, Mixture)
    assert part.visits.draws == {0: 3, 1: 7}  # of two halves the first is rounded up


def test_a_glob_is_one_data_set_of_a_mixture(tmp_path: Path) -> None:
    for name in ("a0", "a1", "b"):
        write(tmp_path / f"{name}.jsonl", 4, name)
    entries = [{"path": f"{tmp_path}/a*.jsonl", "weight": 1}, {"path": f"{tmp_path}/b.jsonl"}]
    data = load_prompts(entries, renderer=RENDERER)
    assert isinstance(data.visits, Mixture)
    assert {k: len(rows) for k, rows in data.visits.rows.items()} == {0: 8, 1: 4}
    assert data.visits.draws == {0: 6, 1: 6}


def test_a_limit_takes_the_first_rows_over_all_files_of_its_entry(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", 3, name) for name in "abc"]
    assert texts({"path": f"{tmp_path}/*.jsonl", "limit": 4}) == ["a 0", "a 1", "a 2", "b 0"]
    mixed = [{"path": paths[2], "limit": 1}, paths[0], {"path": paths[2], "limit": 9}]
    assert texts(mixed) == ["c 0", "a 0", "a 1", "a 2", "c 0", "c 1", "c 2"]
    (tmp_path / "b.jsonl").write_text("{broken\n")
    assert texts({"path": f"{tmp_path}/*.jsonl", "limit": 3}) == ["a 0", "a 1", "a 2"]
    with read_once():  # the limit tells two scans of a file apart
        assert len(texts({"path": paths[0], "limit": 1})) == 1
        assert len(texts(paths[0])) == 3


def test_weights_that_draw_nothing_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 9, "a"), write(tmp_path / "b.jsonl", 1, "b")
    with pytest.raises(InputError, match=r"prompt_dataset: .*b.jsonl: weight 0.01 is less than a"):
        texts([a, {"path": b, "weight": 0.01}])
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"b.jsonl has a weight but no valid row"):
        texts([a, {"path": b, "weight": 1}], on_bad_rows="skip")


def test_rows_held_out_leave_a_mixture_of_the_others(tmp_path: Path) -> None:
    paths = []
    for name, count in (("a", 60), ("b", 40)):
        rows = [{"prompt": f"{name}{n}", "chosen": "x", "rejected": "y"} for n in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append({"path": str(tmp_path / name), "weight": 2 if name == "a" else 1})
    train, held = split_holdout(load_preferences(paths, renderer=RENDERER))
    assert (len(train), len(held)) == (95, 5)
    assert isinstance(train.visits, Mixture)
    assert train.visits.draws == {0: 63, 1: 32}
    parts = train.weighted_parts()
    assert [entry.weight for entry, _ in parts] == [2, 1]
    assert sum(len(part) for _, part in parts) == 95
    assert all(row.prompt.text.startswith("ab"[n]) for n, (_, p) in enumerate(parts) for row in p)


# --- Fields of a configuration


def config(value: Any, **fields: Any) -> DPOConfig:
    given = {"base_model": "m", "output_dir": "o", "preference_dataset": value}
    return load_config(DPOConfig, None, given | fields)


def test_every_way_to_write_a_mixture_means_the_same(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "base_model: m\noutput_dir: o\n"
        "preference_dataset:\n- a\n- path: b\n  weight: 2\n  limit: 5\n"
    )
    expected = ["a", SourceEntry(path="b", weight=2, limit=5)]
    text = '["a", {"path": "b", "weight": 2, "limit": 5}]'
    for value in (
        expected,
        text,
        json.loads(text),
        ["a", '{"path": "b", "weight": 2, "limit": 5}'],
    ):
        assert config(value).preference_dataset == expected
    assert load_config(DPOConfig, str(file)).preference_dataset == expected
    assert config(Path("a")).preference_dataset == "a"
    resolved = config(text).resolved()["preference_dataset"]
    assert resolved == ["a", {"path": "b", "weight": 2.0, "limit": 5}]
    assert config(resolved).preference_dataset == expected
    assert "weight: 2.0" in to_yaml(config(text).resolved())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "preference_dataset: expected a path, address or Hub id, {path, weight, limit}"),
        ([], "preference_dataset: expected a path"),
        ("", "preference_dataset: expected a path"),
        ("[1", "preference_dataset: expected a path, or JSON such as"),
        (["a", 3], "preference_dataset.1: expected a path, address or Hub id, got 3"),
        (["a", {"path": "b", "wieght": 1}], "preference_dataset.1.wieght: unknown field; did you"),
        ([{"weight": 1}], "preference_dataset.0.path: is required, but not given"),
        ([{"path": "b", "weight": 0}], "preference_dataset.0.weight: expected number greater than"),
        ([{"path": "b", "limit": 0}], "preference_dataset.0.limit: expected integer greater than"),
        ([{"path": "b", "limit": True}], "preference_dataset.0.limit: expected integer, got True"),
        ([{"path": ""}], "preference_dataset.0.path: expected a path"),
        ({"prompt": "a"}, "preference_dataset.0.path: is required"),
        (DatasetDict({"test": Dataset.from_list([{"a": 1}])}), "preference_dataset: holds the s"),
        (iter([{}]), "preference_dataset: expected a path"),
    ],
)  # fmt: skip
def test_what_is_no_data_set(value: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        config(value)
    assert caught.value.problems[0].startswith(expected)


def test_weights_are_for_training_alone() -> None:
    with pytest.raises(InputError, match=r"eval_dataset: a weight is for rows to train on"):
        config("a", eval_dataset=[{"path": "b", "weight": 1}])
    assert config("a", eval_dataset={"path": "b", "limit": 7}).eval_dataset[0].limit == 7
    pipeline = PipelineConfig(
        base_model="m", output_dir="o", preference_dataset=[{"path": "a", "weight": 2, "limit": 3}]
    )
    assert pipeline.stage_config("ppo").prompt_dataset == pipeline.preference_dataset
    inference: InferenceConfig = pipeline.stage_config("inference")
    assert inference.eval_dataset == [SourceEntry(path="a", limit=3)]


# --- Rows from Python

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{row}", "chosen": "a", "rejected": "b", "margin": row / 2} for row in range(150)
]


@pytest.mark.parametrize("kind", ["list", "dataset", "selected", "stream"])
def test_rows_from_python_are_read_like_files(tmp_path: Path, kind: str) -> None:
    rows: Any = {
        "list": lambda: ROWS,
        "dataset": lambda: Dataset.from_list(ROWS),
        "selected": lambda: Dataset.from_list(ROWS[::-1]).select(range(149, -1, -1)),
        "stream": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    }[kind]()
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plain = load_preferences(str(path), renderer=RENDERER)
    given = config(rows)
    data = load_preferences(given.preference_dataset, renderer=RENDERER)
    assert data.fingerprint == plain.fingerprint
    assert (data[149].source, data[149].margin) == ("preference_dataset:150", 74.5)
    assert given.resolved()["preference_dataset"].endswith("given from Python)")
    mixed = load_preferences([str(path), {"path": rows, "weight": 2}], renderer=RENDERER)
    assert mixed[150].source == "preference_dataset[1]:1"
    assert load_preferences({"path": rows, "limit": 5}, renderer=RENDERER)[:] == data[:5]
    pipeline = PipelineConfig(base_model="m", output_dir="o", preference_dataset=rows)
    assert pipeline.stage_config("ppo").prompt_dataset.rows is rows


def test_bad_rows_from_python_are_named() -> None:
    rows: list[Any] = [ROWS[0], {**ROWS[1], "prompt": 3}, {**ROWS[2], "prompt": "half \ud83d"}]
    with pytest.raises(InputError) as caught:
        load_preferences(rows, renderer=RENDERER)
    assert caught.value.problems[0].startswith("preference_dataset:2: input_text") or (
        caught.value.problems[0].startswith("preference_dataset:2: prompt: is the number 3")
    )
    data = load_preferences(rows, renderer=RENDERER, on_bad_rows="skip")
    assert data[1].prompt.text == "half \ufffd"
    assert data.report.mended == 1

    def broken() -> Any:
        yield ROWS[0]
        raise RuntimeError("no more")

    with pytest.raises(InputError, match=r"^preference_dataset:2: raised RuntimeError: no more"):
        load_preferences(IterableDataset.from_generator(broken), renderer=RENDERER)


def test_an_object_is_read_once_for_all_stages() -> None:
    rows = [dict(row) for row in ROWS]
    with read_once():
        first = load_prompts(rows, renderer=RENDERER, name="rows")
        assert load_preferences(rows, renderer=RENDERER, name="rows").table is first.table
        assert load_prompts(list(rows), renderer=RENDERER, name="rows").table is not first.table
