"""Files are read once for all stages, by a short way where rows are plain, with the same result."""

import dataclasses
import json
import tracemalloc
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from rlhf import pipeline
from rlhf.config import PipelineConfig
from rlhf.data import reading, row_table
from rlhf.data.counting import TokenCounter
from rlhf.data.encoding import TextEncoder
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts, read_once
from rlhf.data.row_reader import RowReader
from rlhf.data.schema import PromptText
from rlhf.data.sources import files as source_files
from rlhf.data.sources import reading as source_reading
from rlhf.errors import InputError
from rlhf.models.loading import prompt_layout
from rlhf.reports.data_check import check_files
from rlhf.stages import STAGES

RENDERER = PromptRenderer()
PAIR = {"input_text": "a post", "candidate_0": " one", "candidate_1": " two", "choice": 1}

TEXT = st.text(max_size=8)
VALUE = st.one_of(
    TEXT,
    st.sampled_from([0, 1, 2, "0", "1", True, None, 0.5, [], ["a"], {}, " \n", "a\0b"]),
    st.lists(TEXT, min_size=2, max_size=4),
    st.permutations([0, 1, 2]),
)
NAMES = (
    "input_text prompt messages context output_text candidate_0 candidate_1 choice chosen rejected "
    "margin system id candidates ranking"
).split()
PLAIN = st.fixed_dictionaries(
    {
        "input_text": TEXT,
        "candidate_0": TEXT,
        "candidate_1": TEXT,
        "choice": st.sampled_from([0, 1]),
    }
)
RANKED = st.integers(2, 5).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            "input_text": TEXT,
            "candidates": st.lists(TEXT, min_size=count, max_size=count),
            "ranking": st.permutations(list(range(count))),
        }
    )
)
ROW = st.one_of(RANKED, st.dictionaries(st.sampled_from(NAMES), VALUE), PLAIN, st.builds(
    lambda plain, change: plain | change, PLAIN, st.dictionaries(st.sampled_from(NAMES), VALUE)
))  # fmt: skip


def write(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that are opened to read rows, in order."""
    paths: list[str] = []
    original = source_files.open_file

    def counted(path: str) -> Any:
        paths.append(path)
        return original(path)

    monkeypatch.setattr(source_reading, "open_file", counted)
    return paths


@settings(max_examples=300, deadline=None)
@given(ROW, st.sampled_from(["", "Sum up:"]))
def test_the_short_way_reads_what_the_long_way_reads(row: dict[str, Any], instruction: str) -> None:
    short, long = (RowReader(PromptRenderer(instruction)) for _ in range(2))
    plain = short.read_plain(row)
    if plain is not None:
        assert plain == long.read(row)
        assert short.unused == long.unused


def test_plain_rows_take_the_short_way() -> None:
    reader = RowReader(RENDERER)
    chosen = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for row in (PAIR, chosen, {"input_text": "a"}, {"input_text": "a", "output_text": "b"}):
        assert reader.read_plain(row | {"id": 3}) is not None
    for change in ({"choice": "1"}, {"margin": 1}, {"input_text": " "}, {"context": "c"}):
        assert reader.read_plain(PAIR | change) is None


# Lines of every kind, broken ones too.
LINE = st.one_of(
    ROW.map(json.dumps),
    st.sampled_from(
        ["", " ", "{", "3", "[1]", '{"a": 1} x', "nul", '{"input_text": "\\ud83d"}', "{]"]
    ),
)


def outcome(load: Any, path: str, **options: Any) -> Any:
    """All that a caller can see."""
    try:
        data = load(path, renderer=RENDERER, **options)
    except InputError as error:
        return error.problems
    return list(data), data.fingerprint, data.report.lines(), len(data)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(LINE, max_size=12), st.sampled_from(["error", "skip"]), st.integers(1, 4))
def test_neither_batches_nor_sharing_nor_the_short_way_change_a_result(
    tmp_path: Path, lines: list[str], on_bad_rows: str, batch: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    loads = [
        (load_prompts, {}),
        (load_prompts, {"require_output": True}),
        (load_preferences, {}),
        (load_preferences, {"candidates_optional": True}),
    ]
    expected = [outcome(load, str(path), on_bad_rows=on_bad_rows, **kw) for load, kw in loads]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_table, "_BATCH_ROWS", batch)
        patch.setattr(RowReader, "read_plain", lambda self, row: None)
        with read_once(keep_lines=True):
            for _ in range(2):
                for (load, kw), result in zip(loads, expected, strict=True):
                    assert outcome(load, str(path), on_bad_rows=on_bad_rows, **kw) == result


def test_many_bad_rows_of_every_kind_give_the_first_twenty_and_a_count(tmp_path: Path) -> None:
    bad = [{"input_text": 3}, {**PAIR, "choice": 9, "margin": "x"}, 7, {"input_text": "fine"}]
    path = write(tmp_path / "a.jsonl", *(bad * 30))
    found = outcome(load_preferences, path)
    each = {  # by hand: what is wrong with one row of each kind
        0: ["candidate_0", "candidate_1", "choice", "input_text"],
        1: ["margin", "choice"],
        2: ["is the number 7"],
        3: ["candidate_0", "candidate_1", "choice"],
    }
    expected = [(line, what) for line in range(120) for what in each[line % 4]]
    assert len(found) == 21
    for text, (line, what) in zip(found[:20], expected, strict=False):
        assert text.startswith(f"{path}:{line + 1}: {what}")
    assert found[-1] == f"… and {len(expected) - 20} more problems"
    optional = outcome(load_preferences, path, candidates_optional=True)
    assert [text.split(": ")[1] for text in optional[:6]] == [
        "margin", "choice", "is the number 7, expected a JSON object"
    ] * 2  # fmt: skip
    assert optional[-1] == f"… and {30 * 3 - 20} more problems"


def test_inside_read_once_a_file_is_opened_once(tmp_path: Path, opened: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, {"input_text": "x", "output_text": "y"})
    with read_once():
        for _ in range(2):
            load_prompts(path, renderer=RENDERER)
            load_preferences(path, renderer=PromptRenderer(), candidates_optional=True)
            check_files(path)
    assert opened == [path]
    load_prompts(path, renderer=RENDERER)
    assert opened == [path, path]


def test_another_renderer_or_a_changed_file_is_read_anew(tmp_path: Path, opened: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", {"input_text": "x"})
    with read_once():
        assert load_prompts(path, renderer=RENDERER)[0].prompt.text == "x"
        assert load_prompts(path, renderer=PromptRenderer("I"))[0].prompt.text == "I\n\nx"
        write(tmp_path / "a.jsonl", {"input_text": "another"})
        assert load_prompts(path, renderer=RENDERER)[0].prompt.text == "another"
    assert len(opened) == 3


def test_remote_files_are_read_once_too(opened: list[str]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/rlhf-once/a.jsonl", b'{"input_text": "x"}')
    with read_once():
        for _ in range(2):
            assert load_prompts("memory://rlhf-once/a.jsonl", renderer=RENDERER)
        assert len(opened) == 1
        memory.pipe("/rlhf-once/a.jsonl", b'{"input_text": "another"}')
        assert load_prompts("memory://rlhf-once/a.jsonl", renderer=RENDERER)[0].input_text != "x"


def test_shared_files_go_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write(tmp_path / "a.jsonl", PAIR)
    with read_once():
        data = load_prompts(path, renderer=RENDERER)
        for number in range(20):
            load_prompts(path, renderer=PromptRenderer(str(number)))
        assert reading._scans is not None
        assert len(reading._scans._scans) == 8
    assert reading._scans is None
    assert data[0].input_text == "a post"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_lines_themselves_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{ "input_text":"a\\u00e9", "id": 1}',
        '{"input_text": "b"}',
        '{"input_text": "\\ud83d"}',
    ]
    path.write_text("\ufeff" + " \r\n".join(lines), encoding="utf-8")
    with read_once(keep_lines=True):
        data = load_prompts(str(path), renderer=RENDERER)
    kept = [line.decode() for line in data.raw_lines()]
    assert kept[:2] == lines[:2]
    assert json.loads(kept[2]) == {"input_text": "\ufffd"}
    assert list(data.select_rows([1]).raw_lines()) == [b'{"input_text": "b"}']


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, request: Any) -> PipelineConfig:
    pairs = [{**PAIR, "input_text": f"{number} the cat sat", "id": number} for number in range(30)]
    return PipelineConfig.model_validate(
        {
            "base_model": str(checkpoints[request.param]),
            "output_dir": str(tmp_path / "out"),
            "preference_dataset": write(tmp_path / "preferences.jsonl", *pairs),
            "prompt_sequence_length": 48,
            "target_sequence_length": 8,
            "train_steps": 1,
            "batch_size": 4,
            "log_with": "none",
        }
    )


@pytest.mark.parametrize("config", ["t5", "llama"], indirect=True)
def test_a_dry_run_opens_and_tokenizes_the_preferences_once(
    config: PipelineConfig, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    original = TokenCounter.prompts

    def prompts(self: TokenCounter, texts: Any) -> list[int]:
        counted.extend(text.text for text in texts)
        return original(self, texts)

    monkeypatch.setattr(TokenCounter, "prompts", prompts)
    config = config.model_copy(update={"dry_run": True, "prompt_sequence_length": 20})
    pipeline.run_pipeline(config)
    assert opened == [config.preference_dataset]
    assert len(counted) == len(set(counted)) == 30


@pytest.mark.parametrize("config", ["t5", "llama"], indirect=True)
def test_a_run_opens_the_preferences_once_before_its_stages(
    config: PipelineConfig, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        metrics: dict[str, Any] = {}  # noqa: RUF012

    for name, stage in STAGES.items():
        done = dataclasses.replace(stage, run=lambda _: Done())
        monkeypatch.setitem(STAGES, name, done)
    pipeline.run_pipeline(config)
    assert opened == [config.preference_dataset]
    folder = Path(config.output_dir) / "data"
    written = [
        line for name in ("held_out", "preferences")
        for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]  # fmt: skip
    assert sorted(written) == sorted(Path(str(config.preference_dataset)).read_text().splitlines())


AROUND = st.sampled_from(
    ["", "<", "</s>", "<pad>", "<unk>", "\u2581", " ", "\n", "\u00e9", "the cat"]
)


@pytest.mark.parametrize("arch", ["t5", "llama"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_counts_are_the_lengths_of_what_is_encoded(
    checkpoints: dict[str, Path], arch: str, data: Any
) -> None:
    path = checkpoints[arch]
    tokenizer = AutoTokenizer.from_pretrained(path)
    layout = prompt_layout(AutoConfig.from_pretrained(path), tokenizer)
    codec = PromptCodec(tokenizer, layout, 20, 8)
    pieces = st.lists(st.one_of(AROUND, st.text(max_size=4)), max_size=6).map("".join)
    texts = data.draw(st.lists(pieces, max_size=5))
    encoder = TextEncoder(tokenizer)
    prompts = [PromptText("<s> " + text, ((4, 4 + len(text)),)) for text in texts]
    counter = TokenCounter(tokenizer, encoder)
    assert counter.prompts(prompts) == [len(piece.ids) for piece in encoder.prompts(prompts)]
    assert counter.literal(texts) == [len(piece.ids) for piece in encoder.literal(texts)]
    assert counter.continuations(texts) == list(map(len, encoder.continuations(texts)))
    whole = PromptCodec(tokenizer, layout, 20, 10**6).response_rows(texts)
    assert codec.count_responses(texts).tolist() == list(map(len, whole))


@pytest.mark.parametrize("arch", ["t5", "llama"])
def test_limits_are_checked_as_if_every_prompt_were_tokenized(
    checkpoints: dict[str, Path], arch: str, tmp_path: Path
) -> None:
    path = checkpoints[arch]
    tokenizer = AutoTokenizer.from_pretrained(path)
    layout = prompt_layout(AutoConfig.from_pretrained(path), tokenizer)
    renderer = PromptRenderer("the dog")
    words = ["the cat sat", "\u00e9\u4e2d\U0001f600", "</s>", "a"]
    texts = [f"{word} " * count for word in words for count in (1, 2, 5, 9, 20, 40)]
    prompts = load_prompts(
        write(tmp_path / "a.jsonl", *({"input_text": text} for text in texts)), renderer=renderer
    )
    for limit in (16, 20, 24, 40, 64):
        codec = PromptCodec(tokenizer, layout, limit, 8)
        lengths = codec.prompt_lengths([row.prompt for row in prompts])
        assert codec.count_prompts(prompts).tolist() == lengths
        for part in (prompts, prompts.select_rows([7, 2, 3])):
            found = codec.check_prompts(part)
            all_of_them = codec.prompt_lengths([row.prompt for row in part])
            assert found.count == len(part)
            assert found.shortened == sum(length > limit for length in all_of_them)
            if found.shortened:
                assert found.longest == max(all_of_them)


@pytest.mark.parametrize("instruction", ["the dog " * 30, "\u4e2d" * 30])
@pytest.mark.parametrize("arch", ["t5", "llama"])
def test_an_instruction_that_does_not_fit_is_found_in_every_row(
    checkpoints: dict[str, Path], arch: str, tmp_path: Path, instruction: str
) -> None:
    path = checkpoints[arch]
    tokenizer = AutoTokenizer.from_pretrained(path)
    layout = prompt_layout(AutoConfig.from_pretrained(path), tokenizer)
    file = write(tmp_path / "a.jsonl", *({"input_text": "the cat " * n} for n in range(1, 40)))
    prompts = load_prompts(file, renderer=PromptRenderer(instruction))
    limits = range(1, 400)
    place = bisect_left(
        limits, True, key=lambda limit: fits(PromptCodec(tokenizer, layout, limit, 8), prompts)
    )
    needed = limits[place]
    assert PromptCodec(tokenizer, layout, needed, 8).check_prompts(prompts).count == 39
    with pytest.raises(InputError) as caught:
        PromptCodec(tokenizer, layout, needed - 1, 8).check_prompts(prompts)
    assert caught.value.problems[0].startswith(f"{file}:")


def fits(codec: PromptCodec, prompts: Any) -> bool:
    """Whether all can be shortened, by tokenizing each of them."""
    try:
        codec.prompt_rows([row.prompt for row in prompts])
    except InputError:
        return False
    return True


def test_what_is_not_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(300):
            file.write(json.dumps({"input_text": str(number), "more": "a" * 200_000}) + "\n")
    with read_once(keep_lines=True):
        load_prompts(write(tmp_path / "b.jsonl", PAIR), renderer=RENDERER)  # imports
        tracemalloc.start()
        load_prompts(str(path), renderer=RENDERER)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30 * 2**20  # the file has 60 MB


def test_rows_in_another_order_keep_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"input_text": str(number)} for number in range(9)))
    data = load_prompts(path, renderer=RENDERER).select_rows([5, 1, 8])
    batches = [batch.column("text").to_pylist() for batch in data.batches(("text",))]
    assert [text for batch in batches for text in batch] == ["5", "1", "8"]
    assert [row.input_text for row in data] == ["5", "1", "8"]
    assert np.array_equal(data.stored, [5, 1, 8])
