"""`chat_template_options` from YAML, flags, Python, the pipeline's sections and Vertex."""

from typing import Any

import pytest

import rlhf
from rlhf.cli import main
from rlhf.config import (
    InferenceConfig,
    PipelineConfig,
    PPOConfig,
    ScoreConfig,
    config_to_yaml,
    load_config,
    result_fields,
)
from rlhf.errors import InputError
from rlhf.vertex.conversion import to_config, to_parameters

PPO = {"base_model": "base", "output_dir": "out", "prompt_dataset": "p", "reward_model_path": "r"}
RUN = {"base_model": "org/b", "output_dir": "gs://bkt/runs/one", "preference_dataset": "gs://bkt/p"}
NAME = "chat_template_options"


def given_by(arguments: str, monkeypatch: pytest.MonkeyPatch, command: str = "ppo") -> Any:
    """Return the configuration that a command line makes."""
    found: list[Any] = []
    for function in ("train_ppo", "run_pipeline"):
        monkeypatch.setitem(vars(rlhf), function, lambda config, **_: found.append(config))
    least = PPO if command == "ppo" else RUN
    flags = [word for name, value in least.items() for word in (f"--{name}", value)]
    return found[0] if main([command, *flags, *arguments.split()]) == 0 else None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ('--chat_template_options {"enable_thinking":false,"effort":"low"}',
         {"enable_thinking": False, "effort": "low"}),
        ("--chat_template_options.enable_thinking false --chat-template-options.date=1 "
         "--seed 3 --chat_template_options.effort low",
         {"enable_thinking": False, "date": 1, "effort": "low"}),
        ('--chat_template_options.effort low --chat_template_options={"date":"x"}',
         {"effort": "low", "date": "x"}),
    ],
)  # fmt: skip
def test_flags(arguments: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = given_by(arguments, monkeypatch)
    assert config.chat_template_options == expected
    assert [*map(type, config.chat_template_options.values())] == [*map(type, expected.values())]
    assert config.seed == (3 if "--seed" in arguments else 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--chat_template_options.enable_thinking", "expected --chat_template_options.NAME VALUE"),
        ("--chat_template_options.a.b 1", "expected --chat_template_options.NAME VALUE"),
        ("--chat_template_options. 1", "expected --chat_template_options.NAME VALUE"),
        ("--chat_template_options no", "chat_template_options: expected JSON such as"),
        ("--chat_template_options [1]", "expected a mapping of names to values"),
        ("--chat_template_options.x [1]", "chat_template_options.x: expected text, a number, true"),
        ("--chat_template_option.x 1", "--chat_template_option.x: unknown flag"),
    ],
)
def test_wrong_flags(
    arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert given_by(arguments, monkeypatch) is None
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_files_flags_and_identity(tmp_path: Any) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("chat_template_options: {enable_thinking: false, note: 'https://u:p@x'}\n")
    config = load_config(PPOConfig, str(path), PPO | {f"{NAME}.depth": 2})
    options = {"enable_thinking": False, "note": "https://u:p@x", "depth": 2}
    assert config.chat_template_options == options
    assert result_fields(config)[NAME] == options
    assert result_fields(PPOConfig(**PPO))[NAME] == {}
    path.write_text(config_to_yaml(config))
    assert load_config(PPOConfig, str(path)).chat_template_options == options
    score = ScoreConfig(reward_model_path="r", dataset="d", output="o", **{NAME: options})
    assert result_fields(score)[NAME] == options


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": {}}, {"a": "\0"}, 3, {"\ud800": 1}])
def test_values_that_are_none(value: Any) -> None:
    with pytest.raises(InputError, match=NAME):
        load_config(PPOConfig, None, PPO | {NAME: value})


def test_the_pipeline_hands_them_to_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--chat_template_options.a 1 --ppo.chat_template_options.b true --vertex.labels.team 7"
    config = given_by(flags, monkeypatch, "run")
    assert config.stage_config("reward_model").chat_template_options == {"a": 1}
    assert config.stage_config("ppo").chat_template_options == {"a": 1, "b": True}
    assert config.vertex.labels == {"team": "7"}


def test_vertex_hands_them_to_all_stages() -> None:
    config = PipelineConfig(
        **RUN, chat_template_options={"a": False, "b": 2}, eval_dataset="gs://bkt/e"
    )
    again = to_config(to_parameters(config))
    for stage in ("reward_model", "ppo", "inference"):
        options = again.stage_config(stage).chat_template_options
        assert options == {"a": False, "b": 2}
        assert [*map(type, options.values())] == [bool, int]
    assert isinstance(again.stage_config("inference"), InferenceConfig)
