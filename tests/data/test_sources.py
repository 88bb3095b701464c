"""The same rows from files of every format, and what is said about files that are broken."""

import bz2
import contextlib
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, load_prompts
from rlhf.data.sources import json_text, record, tables
from rlhf.data.sources.formats import read_stream
from rlhf.data.sources.reading import find_sources, read_records
from rlhf.data.sources.record import BrokenSourceError, Record
from rlhf.errors import InputError

RENDERER = PromptRenderer()
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 'ho\n, "é"'}]
PAIRS = [
    {"prompt": f'post {number}, "said"\n☃', "chosen": f" a\t{number}", "rejected": "b\r\nb"}
    for number in range(70)
]
CHATS = [{"messages": [*TURNS, TURNS[0]], "candidates": ["x", "y", "z"], "ranking": [1, 0, 2]}] * 3


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def separated(rows: list[Any], **dialect: Any) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **dialect)
    writer.writeheader()
    for row in rows:
        as_text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
        writer.writerow(as_text)
    return file.getvalue().encode()


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=16)
    return sink.getvalue()


def arrow(rows: list[Any], new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return sink.getvalue()


# By the end of the file's name; each writes the rows in its format, independently of the readers.
WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": lines,
    "jsonl.gz": lambda rows: gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:])),
    "jsonl.zst": lambda rows: zstandard(lines(rows)),
    "jsonl.bz2": lambda rows: bz2.compress(lines(rows)),
    "json.xz": lambda rows: lzma.compress(lines(rows)),
    "json": lambda rows: json.dumps(rows, indent=2).encode(),
    "json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "csv": separated,
    "csv.zst": lambda rows: zstandard(separated(rows)),
    "tsv": lambda rows: separated(rows, delimiter="\t"),
    "parquet": parquet,
    "arrow": arrow,
    "feather": lambda rows: arrow(rows, pa.ipc.new_stream),
    "no-suffix": lambda rows: gzip.compress(lines(rows)),
    "no-suffix-either": parquet,
}  # fmt: skip


def write(folder: Path, end: str, rows: list[Any]) -> str:
    path = folder / f"rows.{end}"
    path.write_bytes(WRITERS[end](rows))
    return str(path)


def read(*paths: Any) -> list[Record]:
    return list(read_records(find_sources(list(paths), "dataset")))


def problem(path: Any) -> str:
    [*_, last] = read(path)
    assert last.problem
    where = str(path) if not last.line else f"{path}:{last.line}"
    return f"{where}: {last.problem}"


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "chats"])
@pytest.mark.parametrize("end", WRITERS)
def test_the_same_rows_in_every_format(tmp_path: Path, end: str, rows: list[Any]) -> None:
    path = write(tmp_path, end, rows)
    found = read(path)
    assert [one.value for one in found] == rows
    assert not any(one.problem or one.mended for one in found)
    data, plain = (
        load_preferences(one, renderer=RENDERER) for one in (path, write(tmp_path, "jsonl", rows))
    )
    assert data.fingerprint == plain.fingerprint
    first = 2 if "sv" in end else 1  # after the header
    assert data[0].source == f"{path}:{first}"
    if "sv" not in end and not (end == "json" and rows is CHATS):
        assert data[-1].source == f"{path}:{len(rows)}"


def test_rows_of_a_csv_file_are_found_by_the_line_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbf,input_text,choice,note\r\n'
        b'0,"one\r\ntwo",1,\r\n\r\n'
        b"1,three,0,x\r\n"
        b"2,four\r\n"
        b"3,f\xffve,0,\n"
        b'4,"six\r",0,"a ""b"""'
    )  # fmt: skip
    found = read(str(path))
    assert [(one.line, one.value) for one in found if not one.problem] == [
        (2, {"input_text": "one\r\ntwo", "choice": "1"}),
        (5, {"input_text": "three", "choice": "0", "note": "x"}),
        (8, {"input_text": "six\r", "choice": "0", "note": 'a "b"'}),
    ]
    assert [(one.line, one.problem) for one in found if one.problem] == [
        (6, "has 2 cells, expected the 4 of the header"),
        (7, "is not UTF-8, expected UTF-8"),
    ]


def test_line_ends_of_old_macs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'input_text\tx\rone\t1\r"two\rlines"\t2\rthree\t3')
    found = read(str(tmp_path / "a.tsv"))
    assert [(one.line, one.value["input_text"]) for one in found] == [
        (2, "one"), (3, "two\rlines"), (5, "three")
    ]  # fmt: skip


def test_what_columns_hold_becomes_json(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None]).dictionary_encode(),
            "large": pa.array(["b", "c"], pa.large_string()),
            "small": pa.array([1, 2], pa.int8()),
            "half": pa.array([0.5, None], pa.float32()),
            "yes": [True, False],
            "day": [datetime.date(2024, 1, 2), None],
            "time": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5), None]),
            "cost": pa.array([Decimal("1.50"), Decimal("2.00")]),
            "picture": pa.array([b"\xff\xd8", b"text"]),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "turns": [[{"role": "user", "content": "x", "name": None}], []],
            "none": pa.nulls(2),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    expected = [
        {
            "text": "a", "large": "b", "small": 1, "half": 0.5, "yes": True, "day": "2024-01-02",
            "time": "2024-01-02T03:04:05", "cost": 1.5, "picture": None, "map": [["k", 1]],
            "turns": [{"role": "user", "content": "x", "name": None}],
        },
        {"large": "c", "small": 2, "yes": False, "cost": 2, "picture": "text", "map": [],
         "turns": []},
    ]  # fmt: skip
    found = read(str(tmp_path / "a.parquet"))
    assert [one.value for one in found] == expected
    assert type(found[1].value["cost"]) is int
    json.dumps([one.value for one in found])


def broken() -> Iterator[tuple[str, bytes, str]]:
    whole = {end: writer(PAIRS) for end, writer in WRITERS.items()}
    for end in ("jsonl.gz", "jsonl.zst", "jsonl.bz2", "json.xz"):
        yield end, whole[end][:-6], "is cut off or damaged"
        yield end, b"", "is empty, expected "
        yield end, b'{"input_text": "a"}\n', "is something else, expected "
    yield "jsonl.gz", whole["jsonl.zst"], "is Zstandard, expected gzip as its name ends in .gz"
    yield "jsonl.gz", whole["jsonl.gz"] + b"junk", "is cut off or damaged (gzip"
    middle = len(whole["parquet"]) // 2
    for end in ("parquet", "arrow", "feather"):
        yield end, whole[end][:middle], "is cut off or damaged"
        yield end, b"", "is no" if end != "feather" else "is not Arrow"
        yield end, b'{"input_text": "a"}\n', "or is damaged" if end == "parquet" else "is not Arrow"
    yield "parquet", whole["parquet"][:-9] + b"\xff" * 5 + b"PAR1", "is cut off or damaged"
    yield "parquet", b"PAR1PAR1", "is cut off or damaged"
    yield "csv", whole["parquet"], "is parquet, expected CSV as its name says"
    yield "jsonl", whole["arrow"], "is Arrow, expected JSON Lines as its name says"
    yield "parquet.gz", gzip.compress(whole["parquet"]), "is parquet and gzip at once"
    yield "zip", b"PK\x03\x04" + bytes(100), "is a zip archive"
    yield "feather", b"FEA1" + bytes(100), "is Feather version 1"
    yield "csv", b"", "is empty, expected a header line"
    yield "csv", b"a,b,a\n", ":1: has two columns called a"
    yield "csv", b"input_text;choice\na;1\n", ":1: has a header of one column, expected commas"
    yield "tsv", b"input_text,choice\na,1\n", ":1: has a header of one column, expected tabs"
    yield "csv", b'input_text\n"a"b\n', ":2: is not CSV ("
    yield "csv", b'input_text\na\n"b\nc\n', ":3: is not CSV (unexpected end of data)"
    yield "csv", "input_text\n".encode("utf-16"), "is UTF-16, expected UTF-8"
    yield "json", b'[{"a": 1}, {"a": 2', ":2: is not JSON ("
    yield "json", b'[{"a": 1} {"a": 2}]', ":1: is not one JSON array ({ follows)"
    yield "json", b'[{"a": 1}, ]', ":2: is not JSON ("
    yield "json", b'[{"a": 1}]\n[{"a": 1}]', "has more text after its JSON array"
    yield "json", b'[{"a": 1}, {"a": "\xff"}]', "is not UTF-8 (byte 0xff)"
    yield "json", b'[{"a": ' + b"[" * 100_000, ":1: is nested too deeply"
    yield "json", b'[{"a": 1' + b"0" * 5000 + b"}]", ":1: has a number of thousands of digits"


@pytest.mark.parametrize(("end", "content", "expected"), [*broken()])
def test_broken_files_are_one_clear_problem(
    tmp_path: Path, end: str, content: bytes, expected: str
) -> None:
    path = tmp_path / f"rows.{end}"
    path.write_bytes(content)
    assert expected in problem(str(path)).removeprefix(str(path))
    with pytest.raises(InputError) as caught:
        load_prompts(str(path), renderer=RENDERER, on_bad_rows="skip")
    assert all(str(path) in one for one in caught.value.problems if "no valid row" not in one)


@pytest.mark.parametrize("end", WRITERS)
def test_damage_of_any_kind_is_a_problem_and_no_traceback(end: str) -> None:
    content, draw = WRITERS[end](PAIRS[:8]), random.Random(end)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            place, size = draw.randrange(len(damaged)), draw.randrange(1, 9)
            damaged[place : place + draw.choice((0, size))] = draw.choice(
                (b"", b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", draw.randbytes(size))
            )
        stream = io.BufferedReader(io.BytesIO(bytes(damaged)))  # type: ignore[arg-type]
        with contextlib.suppress(BrokenSourceError):
            for one in read_stream(f"rows.{end}", stream, 0):
                assert one.problem or isinstance(one.value, dict) or "json" in end
                json.dumps(one.value)


def test_two_columns_of_one_name_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["x", "x"]), path)
    assert "has two columns called x" in problem(str(path))
    bad = pa.array([b"a", b"\xe9", b"c"]).view(pa.string())
    pq.write_table(pa.table({"input_text": bad}), path)
    assert [(one.line, one.problem[:32]) for one in read(str(path))] == [
        (1, ""), (2, "is not UTF-8 (byte 0xe9), expect"), (3, "")
    ]  # fmt: skip
    times = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"time": times}), path)
    assert [one.problem[:34] for one in read(str(path))] == [
        "",
        "holds a value that cannot be read ",
    ]


@pytest.mark.parametrize("end", WRITERS)
def test_rows_over_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 5000)
    monkeypatch.setattr(json_text, "_CHUNK", 512)
    rows = [{"input_text": text} for text in ("a" * 4900, "b" * 5100, "c")]
    found = read(write(tmp_path, end, rows))
    assert found[0].value == rows[0]
    assert found[1].problem.startswith("is longer than 0 MiB")
    assert found[1].line == (3 if "sv" in end else 2)
    if not found[1].whole_file:
        assert found[2].value == rows[2]


def test_a_decompressed_line_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"input_text": "')
        for _ in range(60):
            file.write(bytes(2**20).replace(b"\0", b"a"))
        file.write(b'"}\n{"input_text": "b"}\n')
    tracemalloc.start()
    found = read(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.problem[:21] for one in found] == ["is longer than 16 MiB", ""]
    assert peak < 56 * 2**20


def test_rows_that_share_a_huge_text_are_refused_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 2**19)
    monkeypatch.setattr(tables, "_MEMORY", 2**23)
    path = str(tmp_path / "a.parquet")
    places = pa.array([0] * 500 + [1], pa.int32())
    huge = pa.DictionaryArray.from_arrays(places, ["a" * 2**20, "b"])
    pq.write_table(pa.table({"input_text": huge}), path, store_schema=False)
    assert os.path.getsize(path) < 2**17
    metadata = pq.ParquetFile(path).metadata
    assert 1 < tables._rows_at_once(metadata) <= 8
    found = read(path)
    assert [one.problem[:14] for one in found] == ["is longer than"] * 500 + [""]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.one_of(st.integers(), st.text(max_size=8), st.floats(allow_nan=False), st.none()),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=6,
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_arrays_survive_the_borders_of_chunks(
    rows: list[Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_CHUNK", chunk)
        stream = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
        found = list(json_text.read_json_text(stream, 0))
    assert [one.value for one in found] == rows
    assert [one.line for one in found] == [*range(1, len(rows) + 1)]


def test_half_characters_in_arrays_are_mended(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '[{"input_text": "a\\ud83d"}, {"input_text": "\\ud83d\\ude00"}]'
    )
    found = read(str(tmp_path / "a.json"))
    assert [(one.value["input_text"], one.mended) for one in found] == [
        ("a\ufffd", True), ("\U0001f600", False)
    ]  # fmt: skip


def test_a_folder_is_all_its_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "c.json", ".hidden.jsonl", "_metadata.json"):
        rows = lines([{"input_text": name}])
        (folder / name).write_bytes(gzip.compress(rows) if name.endswith("gz") else rows)
    (folder / "README.md").write_text("About")
    (folder / "dataset_infos.json").write_text("{}")
    assert [one.value["input_text"] for one in read(f"{folder}/")] == [
        "a.jsonl.gz", "b.jsonl", "c.json"
    ]  # fmt: skip
    data = load_prompts([str(folder), f"{folder}/b.jsonl"], renderer=RENDERER)
    assert [row.source for row in data][-1] == f"{folder}/b.jsonl:1"
    (folder / "d.csv").write_text("input_text\na\n")
    with pytest.raises(InputError, match=r"several formats \(CSV, JSON Lines\), expected one"):
        read(str(folder))


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=rf"without data files .*; perhaps in {tmp_path}/data"):
        read(str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / f"data/{split}-00000.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"several splits \(test, train\).*data/test\*"):
        read(str(tmp_path / "data"))


def test_what_datasets_saves_to_disk(tmp_path: Path) -> None:
    train = Dataset.from_list(PAIRS)
    folder = str(tmp_path / "saved")
    train.filter(lambda row: not row["prompt"].startswith("post 1")).save_to_disk(
        folder, max_shard_size="1KB"
    )
    assert len([name for name in os.listdir(folder) if name.endswith(".arrow")]) > 1
    expected = [row for row in PAIRS if not row["prompt"].startswith("post 1")]
    assert [one.value for one in read(folder)] == expected
    splits = str(tmp_path / "splits")
    DatasetDict({"train": train, "test": train}).save_to_disk(splits)
    with pytest.raises(InputError, match=r"holds the splits test, train; give one.*splits/test"):
        read(splits)
    assert [one.value for one in read(f"{splits}/train")] == PAIRS
    state = tmp_path / "saved/state.json"
    state.write_text(state.read_text().replace("data-00001", "data-00009"))
    with pytest.raises(InputError, match=r"data-00009.* is missing; save the data set again"):
        read(folder)
    state.write_text("[")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        read(folder)


def test_stores_hold_every_format_too() -> None:
    memory = fsspec.filesystem("memory")
    for end in ("parquet", "arrow", "csv.zst", "json"):
        memory.pipe(f"/rlhf-sources/{end}/rows.{end}", WRITERS[end](PAIRS))
        for path in (f"rlhf-sources/{end}/rows.{end}", f"rlhf-sources/{end}"):
            assert [one.value for one in read(f"memory://{path}")] == PAIRS
    data = load_prompts("memory://rlhf-sources/parquet", renderer=RENDERER)
    assert data[69].source == "memory:///rlhf-sources/parquet/rows.parquet:70"


def test_web_servers_need_not_send_parts_of_files() -> None:
    large = {"large.parquet": [{"prompt": os.urandom(4000).hex()} for _ in range(800)]}
    contents = {f"/rows.{end}": writer(PAIRS) for end, writer in WRITERS.items()}
    contents |= {f"/{name}": parquet(rows) for name, rows in large.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = contents.get(self.path.partition("?")[0])
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("rows.jsonl?download=true", "rows.csv.zst", "rows.parquet", "rows.arrow"):
            found = read(f"{url}/{name}")
            assert [one.value for one in found] == PAIRS
        assert [one.value for one in read(f"{url}/large.parquet")] == large["large.parquet"]
        assert find_sources(f"{url}/rows.csv", "dataset")[0].name == f"{url}/rows.csv"
        with pytest.raises(InputError, match=r"^dataset: .*none.jsonl matches no file"):
            read(f"{url}/none.jsonl")
        server.shutdown()


def test_the_package_that_a_store_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"^dataset: s3://bucket/a.jsonl cannot be read: .*s3fs"):
        read("s3://bucket/a.jsonl")
