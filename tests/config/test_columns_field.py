"""`columns` and `ties` in configurations: YAML, flags, sections."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.config import (
    DPOConfig,
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    ScoreConfig,
    load_config,
)
from rlhf.config.columns import COLUMN_TARGETS
from rlhf.errors import InputError

RUN = {"base_model": "b", "preference_dataset": "p", "output_dir": "o"}
PPO = {
    "base_model": "b",
    "prompt_dataset": "p",
    "reward_model_path": "r",
    "output_dir": "o",
}
SCORE = {"reward_model_path": "r", "dataset": "d", "output": "o"}


def problems(cls: Any, fields: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_config(cls, None, fields)
    return caught.value.problems


@pytest.mark.parametrize(
    ("cls", "fields"),
    [(PipelineConfig, RUN), (RewardModelConfig, RUN), (PPOConfig, PPO), (ScoreConfig, SCORE)],
)
def test_columns_are_a_mapping_or_its_json(cls: Any, fields: dict[str, Any]) -> None:
    mapping = {"prompt": "question", "chosen": "answers.best"}
    for given in (mapping, '{"prompt": "question", "chosen": "answers.best"}'):
        assert load_config(cls, None, fields | {"columns": given}).columns == mapping
    assert load_config(cls, None, fields).columns == {}


def test_columns_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("columns: {prompt: question}\nties: keep\n")
    config = load_config(RewardModelConfig, str(path), RUN)
    assert (config.columns, config.ties) == ({"prompt": "question"}, "keep")


def test_a_section_adds_its_own_columns() -> None:
    fields = RUN | {
        "columns": {"prompt": "question"},
        "ties": "keep",
        "reward_model": {"columns": {"chosen": "best"}},
        "dpo": {"ties": "drop"},
    }
    config = load_config(PipelineConfig, None, fields)
    reward_model = config.stage_config("reward_model")
    assert reward_model.columns == {"prompt": "question", "chosen": "best"}
    assert reward_model.ties == "keep"
    assert config.stage_config("dpo").ties == "drop"
    assert config.stage_config("ppo").columns == {"prompt": "question"}
    assert load_config(DPOConfig, None, RUN).ties == "drop"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"promt": "q"}, "columns.promt: unknown field; did you mean `prompt`?; expected one of"),
        ({"prompt": ""}, "columns.prompt: expected the name of a column, got ''"),
        ({"prompt": "\ud800"}, "columns.prompt: expected the name of a column, got a text with"),
        ({"prompt": 3}, "columns"),
        ("prompt: q", 'columns: expected JSON such as {"prompt": "question"}, got'),
        ([1], "columns: expected"),
    ],
)
def test_wrong_columns(columns: Any, expected: str) -> None:
    (found,) = problems(RewardModelConfig, RUN | {"columns": columns})
    assert found.startswith(expected)
    (found,) = problems(PipelineConfig, RUN | {"reward_model": {"columns": columns}})
    assert found.startswith(f"reward_model.{expected}")


def test_targets_are_listed_once() -> None:
    assert len(set(COLUMN_TARGETS)) == len(COLUMN_TARGETS)
