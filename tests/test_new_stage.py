"""A stage from outside the package: one record gives it a command, a section and a turn to run."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from rlhf.cli import main
from rlhf.config import PipelineConfig, StageConfig, config_to_yaml
from rlhf.config.common import option
from rlhf.config.sources import Sources
from rlhf.errors import InputError
from rlhf.pipeline import run_pipeline
from rlhf.stages import STAGES, Reads, RunResult, Stage, register, unregister


class CountConfig(StageConfig):
    """Counting of words."""

    stage: ClassVar[str] = "count"
    folder: ClassVar[str] = "counts"
    set_by_pipeline: ClassVar[frozenset[str]] = frozenset({"output_dir", "dataset"})

    dataset: Sources = option(..., "Rows with prompts.")
    weight: float = option(1.0, "Value of a word.", gt=0)

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        return {"dataset": pipeline.eval_dataset}


def count_words(config: CountConfig) -> RunResult:
    lines = Path(str(config.dataset)).read_text(encoding="utf-8").splitlines()
    words = sum(len(json.loads(line)["input_text"].split()) for line in lines)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    (folder / "count.txt").write_text(str(words))
    return RunResult(config.output_dir, {"words": words * config.weight})


STAGE = Stage(
    config=CountConfig,
    command="count",
    help="Count words.",
    run=count_words,
    reads=(Reads("dataset", "prompt"),),
)


@pytest.fixture
def registered() -> Iterator[None]:
    register(STAGE, before="inference")
    yield
    unregister("count")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = ["the cat sat", "a dog ran to a post"]
    path.write_text("".join(json.dumps({"input_text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def values(checkpoints: dict[str, Path], tmp_path: Path, rows: Path) -> dict[str, Any]:
    pairs = tmp_path / "pairs.jsonl"
    pair = {"input_text": "the cat", "candidate_0": " sat", "candidate_1": " ran", "choice": 1}
    pairs.write_text(json.dumps(pair) + "\n")
    return {
        "base_model": str(checkpoints["t5"]),
        "output_dir": str(tmp_path / "out"),
        "preference_dataset": str(pairs),
        "eval_dataset": str(rows),
        "prompt_sequence_length": 48,
        "target_sequence_length": 8,
    }


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the package's own stages by ones that only note their turn."""
    ran: list[str] = []
    for name, stage in STAGES.items():

        def run(config: StageConfig, _name: str = name) -> RunResult:
            ran.append(_name)
            return RunResult(config.output_dir, {})

        monkeypatch.setitem(STAGES, name, dataclasses.replace(stage, run=run))
    return ran


def test_it_has_a_command_with_flags_and_help(
    registered: None, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    assert "Count words." in capsys.readouterr().out
    assert main(["count", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--weight NUMBER Value of a word. [default: 1.0]" in text
    assert "--seed INTEGER" in text
    output = tmp_path / "out"
    flags = ["count", "--dataset", str(rows), "--output-dir", str(output)]
    assert main([*flags, "--weigth=2"]) == 2
    assert "did you mean `--weight`?" in capsys.readouterr().err
    assert main([*flags, "--weight=2"]) == 0
    assert (output / "count.txt").read_text() == "9"


def test_its_flags_and_its_section_are_those_of_the_pipeline(
    registered: None, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--help"]) == 0
    assert "--count.FIELD" in capsys.readouterr().out
    config = PipelineConfig.model_validate(values | {"count": {"weight": "0.5"}, "seed": 3})
    assert config.stages() == ["reward_model", "ppo", "count", "inference"]
    own = config.stage_config("count")
    assert (own.weight, own.seed) == (0.5, 3)
    assert own.output_dir == f"{values['output_dir']}/counts"
    again = PipelineConfig.model_validate(yaml.safe_load(config_to_yaml(config)))
    assert again.section("count") == {"weight": "0.5"}
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    assert main(["run", *flags, "--count.weight=-1", "--count.dataset=x"]) == 2
    said = capsys.readouterr().err
    assert "count.weight: " in said
    assert "count.dataset: is set by the pipeline" in said


def test_it_runs_in_the_pipeline_at_its_turn(
    order: list[str], registered: None, values: dict[str, Any]
) -> None:
    # `order` first: the stage itself is not replaced.
    result = run_pipeline(PipelineConfig.model_validate(values | {"count": {"weight": 2}}))
    assert order == ["reward_model", "ppo", "inference"]
    out = Path(values["output_dir"])
    assert (out / "counts" / "count.txt").read_text() == "9"
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["reward_model", "ppo", "count", "inference", "seconds"]
    assert metrics["count"] == {"words": 18}
    assert result.metrics == metrics
    assert yaml.safe_load((out / "config.yaml").read_text())["count"] == {"weight": 2}


def test_its_files_are_checked_before_any_stage_runs(
    order: list[str], registered: None, values: dict[str, Any], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input_text": 3}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:1: "):
        run_pipeline(
            PipelineConfig.model_validate(
                values
                | {
                    "eval_dataset": str(bad),
                    "reward_model": {"eval_dataset": values["preference_dataset"]},
                    "inference": {"eval_dataset": values["eval_dataset"]},
                    "ppo": {"eval_dataset": values["eval_dataset"]},
                }
            )
        )
    assert order == []


def test_its_own_check_comes_before_its_files(order: list[str], values: dict[str, Any]) -> None:
    def refuse(config: CountConfig) -> None:
        raise InputError(f"weight: {config.weight:g} is refused")

    register(dataclasses.replace(STAGE, check=refuse))
    try:
        with pytest.raises(InputError, match="weight: 1 is refused"):
            run_pipeline(PipelineConfig.model_validate(values))
    finally:
        unregister("count")
    assert order == []


def test_a_dry_run_says_where_it_would_write(
    registered: None, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(PipelineConfig.model_validate(values | {"dry_run": True}))
    said = capsys.readouterr().out
    assert "\ndataset: 2 rows" in said
    assert f"count: into {values['output_dir']}/counts\n" in said
    assert not Path(values["output_dir"]).exists()


def test_a_name_or_command_is_given_once(registered: None) -> None:
    with pytest.raises(ValueError, match="count"):
        register(STAGE)
    with pytest.raises(ValueError, match="count"):
        register(dataclasses.replace(STAGE, command="other"))

    class SeedConfig(CountConfig):
        stage: ClassVar[str] = "seed"

    with pytest.raises(ValueError, match="seed"):
        register(Stage(config=SeedConfig, command="seed", help="", run=count_words))
    assert list(STAGES)[-1] == "count"


def test_nothing_is_left_of_a_stage_that_was_taken_back(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(PipelineConfig.model_fields), list(STAGES)
    register(STAGE)
    assert list(PipelineConfig.model_fields) != before[0]
    assert PipelineConfig.model_validate(values).stages()[-1] == "count"
    unregister("count")
    assert (list(PipelineConfig.model_fields), list(STAGES)) == before
    assert main(["count", "--help"]) == 2
    capsys.readouterr()
    with pytest.raises(ValueError, match="count"):
        PipelineConfig.model_validate(values | {"count": {}})


def test_stages_are_known_without_torch() -> None:
    code = "import sys, rlhf.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
