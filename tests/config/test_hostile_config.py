"""Configurations that nobody wrote in good faith: one clear line each, little time and memory."""

import contextlib
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.fuzzing import mutations

from rlhf.cli import main
from rlhf.config import (
    InferenceConfig,
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    Schema,
    ScoreConfig,
    SFTConfig,
    VertexConfig,
    config_to_yaml,
    load_config,
    result_fields,
)
from rlhf.config.describe import leaf_fields, type_name
from rlhf.config.loading import parse_yaml, to_yaml
from rlhf.errors import InputError
from rlhf.models.reward_functions import RewardFn
from rlhf.untrusted import read_json

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CLASSES = (
    PipelineConfig, PPOConfig, SFTConfig, RewardModelConfig, InferenceConfig, ScoreConfig,
)  # fmt: skip
TOKENS = [
    b"? [a, b]", b"!!int zzz", b"!!float x", b"!!bool maybe", b"!!timestamp x", b"!!map [1]",
    b"!!python/name:os.system", b"!!binary x", b"!!set {a}", b"! x", b"2024-13-45", b"2024-01-02",
    b"9" * 5000, b"1e999", b"-1", b"0", b".nan", b"-.inf", b"1_000", b"0x10", b"010", b"1:30",
    b"yes", b"null", b"~", b"true", b"'", b'"', b"[", b"]", b"{", b"}", b": ", b"- ", b"&a ",
    b"*a", b"<<: *a", b"\n", b"\t", b"\x00", b"\x1b[2J", b'"\\ud800"', b'"\\0"', b'"\\UFFFFFFFF"',
    b"\xff", b"\xef\xbb\xbf", b"---\n", b"...\n", b"%YAML 9.9\n", b"%TAG ! x\n", b"|\n", b">\n",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[", b"{a: {a: {a: {a: ", b"{}", b"[]", b"''", b"# ", b"=", b"1.5",
    "\u202e".encode(), "\u2028".encode(), b"10000000000000000000000000000000", b"1e300", b"1e-320",
]  # fmt: skip


def problems_of(content: bytes) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_yaml(content, "F")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\n? [a, b]\n: 1", 2, "a list or a mapping"),
        ("seed: !!int zzz", 1, "tag"),
        ("a:\n- !!float x", 2, "tag"),
        ("a: !!bool x", 1, "tag"),
        ("a: !!timestamp x", 1, "tag"),
        ("a: !!map [1]", 1, "tag"),
        ("a: ! 5", 1, "tag"),
        ("!thing {a: 1}", 1, "tag"),
        (f"a: {'9' * 5000}", 1, "5000 digits"),
        ("a: &a [*a]", 1, "alias"),
        ("a: {<<: [1]}", 1, "<<"),
        ("a: 1\nb: 2\na: 3", 3, "'a' is given twice"),
        ("a: 1\n3: x", 2, "'3'"),
        ("null: x", 1, "'null'"),
        ('a: "\\ud800"', 1, "half a character"),
        ('a: "\\0"', 1, "NUL"),
        ('a: "\\UFFFFFFFF"', 1, ""),
        ("a: 1\nb: \x1b[2J", 2, "U+001B"),
        (f"%YAML {'9' * 5000}.1\n---\na: 1", 1, ""),
        ("a: 1\n---\nb: 1", 2, "another document"),
        ("a:\n" + "[" * 100_000, 2, ""),
        ("- " * 50_000, 1, "20 levels"),
        ("a: " + "{a: " * 30, 1, "20 levels"),
        ("just text", 1, "mapping"),
    ],
)
def test_what_is_not_plain_yaml_is_one_line_that_says_where(
    text: str, line: int, said: str
) -> None:
    [problem] = problems_of(text.encode())
    assert problem.startswith(f"F:{line}: ")
    assert said in problem
    assert len(problem) < 500


def test_too_large_a_file_is_not_read(tmp_path: Path) -> None:
    [problem] = problems_of(b"a" * 300_000)
    assert "larger than 256 KiB" in problem
    with pytest.raises(InputError, match="larger than 256 KiB"):
        load_config(PPOConfig, "/dev/zero" if Path("/dev/zero").exists() else str(tmp_path), {})


def test_a_bomb_of_aliases_takes_no_memory() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    tracemalloc.start()
    [problem] = problems_of(bomb.encode())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "10000 values" in problem
    assert peak < 50e6


def test_values_are_what_everybody_reads_them_as() -> None:
    text = (
        "a: on\nb: 010\nc: 0x10\nd: 1:30\ne: 2024-01-02\nf: 2024-13-45\ng: -7\nh: 1.5e+2\n"
        "i: ~\nj: True\nk: 'true'\nl: {x: [1, two]}\nm: =\nn: .inf\no: 1_000\np: 12\n"
    )
    assert parse_yaml(text.encode(), "F") == {
        "a": "on", "b": "010", "c": "0x10", "d": "1:30", "e": "2024-01-02", "f": "2024-13-45",
        "g": -7, "h": 150.0, "i": None, "j": True, "k": "true", "l": {"x": [1, "two"]}, "m": "=",
        "n": float("inf"), "o": "1_000", "p": 12,
    }  # fmt: skip


def test_a_few_anchors_and_merge_keys_are_read() -> None:
    text = "x: &x {p: 1, q: 2}\ny: {<<: *x, q: 3}\nz: {<<: [*x, {p: 5, r: 6}]}\n"
    assert parse_yaml(text.encode(), "F") == yaml.safe_load(text)


TEXTS = ["on", "010", "1:30", "2024-01-02", "1e5", "0x1f", "~", "", "=", "<<", ".5", "a: b", "é\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_is_read_back(text: str) -> None:
    data = {"text": text, "list": [text, 1, 0.1, 1e-05, 1e300, None, True], "map": {text or "k": 1}}
    assert parse_yaml(to_yaml(data).encode(), "F") == data


def check_whole_way(content: bytes, path: Path) -> None:
    """Load a file as every kind of configuration: a good one comes out whole, or InputError."""
    path.write_bytes(content)
    for cls in CLASSES:
        with contextlib.suppress(InputError):
            use(load_config(cls, str(path), {}))


def use(config: Schema) -> None:
    parse_yaml(config_to_yaml(config).encode(), "F")
    json.dumps(result_fields(config))
    if isinstance(config, PipelineConfig):
        for stage in config.stages():
            use(config.stage_config(stage))
    elif hasattr(config, "total_steps"):
        steps = config.total_steps(10**6)
        assert 0 < config.eval_interval(steps) < 2**63
        assert steps * config.batch_size < 2**63


def test_no_damage_to_a_configuration_ends_in_a_traceback(tmp_path: Path) -> None:
    originals = [path.read_bytes() for path in CONFIGS]
    for content in mutations(originals, TOKENS):
        check_whole_way(content, tmp_path / "config.yaml")


HUGE = [10**30, -(10**30), 10**400, 1e300, -1e300, 1e-320, "9" * 5000, "1e400", "\0", "\ud800"]
REQUIRED: dict[str, Any] = {
    "base_model": "b", "output_dir": "o", "prompt_dataset": "p", "preference_dataset": "p",
    "dataset": "d", "policy_path": "p", "eval_dataset": "e", "reward_model_path": "r",
    "output": "o",
}  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
def test_no_field_takes_a_value_without_bounds(cls: type[Schema]) -> None:
    given = {name: value for name, value in REQUIRED.items() if name in cls.model_fields}
    for name, field in leaf_fields(cls):
        if name.startswith("vertex."):
            continue
        for value in HUGE:
            problems, config = loaded(cls, given | {name: value})
            assert all(name in problem for problem in problems), (name, value)
            assert all(len(problem) < 1000 for problem in problems)
            if config is not None:
                use(config)
            if type_name(field) == "integer" or (type_name(field) == "number" and value != 1e-320):
                assert config is None, (name, value)


def loaded(cls: type[Schema], fields: dict[str, Any]) -> tuple[list[str], Schema | None]:
    try:
        return [], load_config(cls, None, fields)
    except InputError as error:
        return error.problems, None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate_multiplier", "1e300"),
        ("--learning_rate_multiplier", "1e-320"),
        ("--missing_eos_score", "1e300"),
        ("--num_epochs", "1e300"),
        ("--batch_size", str(10**30)),
        ("--train_steps", "9" * 5000),
        ("--kl_coeff", "1e300"),
        ("--instruction", "\ud800"),
        ("--base_model", "a\0b"),
        ("--config", "a\0b"),
        ("--output_dir", "\udcff"),
        ("--reward_fn", "../x:f"),
        ("--reward_fn", ".x:f"),
        ("--reward_fn", "a..b:f"),
        ("--reward_fn", "x:"),
        ("--reward_fn", ":f"),
        ("--reward_fn", "json:no_such"),
        ("--reward_fn", "json:__name__"),
        ("--reward_fn", "os.nothing:f"),
        ("--reward_fn", "reward_that_raises:f"),
        ("--reward_fn", "reward_that_exits:f"),
        ("--reward_fn", "reward_that_needs:f"),
        ("--reward_fn", "reward_that_cannot_be_read:f"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(
    flag: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "reward_that_raises.py").write_text("raise OSError('no')\n")
    (tmp_path / "reward_that_exits.py").write_text("import sys; sys.exit(0)\n")
    (tmp_path / "reward_that_needs.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "reward_that_cannot_be_read.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_text": "a"}\n')
    given = {"--base_model": "none", "--output_dir": "o", "--prompt_dataset": str(rows)}
    if flag != "--reward_fn":
        given["--reward_model_path"] = "r"
    arguments = [part for pair in (given | {flag: value}).items() for part in pair]
    assert main(["ppo", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert flag.strip("-") in said[0]


@pytest.mark.parametrize("labels", [{"team": "\ud800"}, {"\ud800": "x"}, '{"team": "\\ud800"}'])
def test_half_a_character_in_labels_is_refused(labels: Any) -> None:
    with pytest.raises(ValidationError, match="half a character"):
        VertexConfig(labels=labels)


def test_a_reward_function_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be called with prompts and responses"):
        RewardFn(lambda prompts: [])  # type: ignore[arg-type, misc]
    RewardFn(lambda *texts: [])
    RewardFn(lambda prompts, responses, **columns: [])


def test_json_nested_too_deeply_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert read_json(tmp_path / "run.json") is None
    problems, _ = loaded(PipelineConfig, {"vertex.labels": "[" * 100_000})
    assert any(problem.startswith("vertex.labels: expected JSON") for problem in problems)
