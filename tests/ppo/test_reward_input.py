"""Rewards that a configuration or a caller gets wrong, and what a configuration may run."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.classifiers import save_classifier
from support.ppo import count_letters
from support.rewards import config_of, four_rewards, near_target, save_reward

from rlhf import Reward, ppo_trainer
from rlhf.cli import main
from rlhf.config import PPOConfig
from rlhf.errors import InputError
from rlhf.ppo_trainer import PPOTrainer, train_ppo

# --- functions that a configuration names --------------------------------------------------------


def test_a_configuration_runs_only_code_that_the_command_line_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "own_rules.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "def brief(prompts, responses, target): return [-float(len(r)) for r in responses]\n"
        "def calm(prompts, responses): return [float('!' not in r) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    rewards = [{"function": "own_rules:brief", "weight": 0.5, "name": "length"}]
    config = config_of("t5", tmp_path, rewards=rewards, train_steps=1)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = ["ppo", "--config", str(tmp_path / "run.yaml"), "--device", "cpu"]
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines() == [
        "rlhf: rewards.0.function: a configuration alone runs no code; allow it with the flag "
        "--reward_fn own_rules:brief, or in Python pass the function as reward_fn"
    ]
    assert not marker.exists()
    allowed = ["--reward_fn", "own_rules:brief", "--reward_fn", "own_rules:calm"]
    assert main([*command, *allowed]) == 0
    metrics = json.loads((tmp_path / "ppo" / "metrics.json").read_text())
    total = 0.5 * metrics["ppo/reward_length"] + metrics["ppo/reward_calm"]
    assert metrics["ppo/score"] == pytest.approx(total, abs=1e-5)


def test_python_binds_a_named_function_by_its_address(tmp_path: Path) -> None:
    address = f"{near_target.__module__}:near_target"
    rewards = [{"function": address, "weight": 3.0, "name": "near"}]
    config = config_of("t5", tmp_path, rewards=rewards)
    for given_fn in (near_target, [near_target], {address: near_target}):
        trainer = PPOTrainer(config, reward_fn=given_fn)
        assert trainer.rewards.weights == {"near": 3.0}


# --- bad input -----------------------------------------------------------------------------------


def refused(config: PPOConfig, monkeypatch: pytest.MonkeyPatch, reward_fn: Any = None) -> list[str]:
    """Return what is said before any weights are loaded."""
    monkeypatch.delattr(ppo_trainer, "load_bases")
    with pytest.raises(InputError) as caught:
        train_ppo(config, reward_fn=reward_fn)
    return caught.value.problems


def test_a_missing_column_is_named_before_any_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(prompts: Any, responses: Any, answer: Any, tags: Any) -> list[float]:
        return []

    config = config_of("t5", tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"input_text": "a", "answer": 1}\n')
    config.eval_dataset = str(held_out)
    assert refused(config, monkeypatch, judge) == [
        "reward_fn judge: needs the column 'answer', which no row of prompt_dataset has; there are "
        "input_text, target, tags, prompt_tokens, response_tokens, finished",
        "reward_fn judge: needs the column 'tags', which no row of eval_dataset has; there are "
        "input_text, answer, prompt_tokens, response_tokens, finished",
    ]


def test_every_reward_that_cannot_be_used_is_named_by_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = save_classifier("t5", tmp_path)
    rewards = [
        {"path": str(tmp_path / "nothing")},
        {"path": str(classifier)},
        {"path": save_reward("t5", tmp_path, "a", 4), "label": 1},
        {"path": str(classifier), "label": "kind", "name": "kind"},
    ]
    config = config_of("t5", tmp_path, rewards=rewards, reward_model_path=str(classifier))
    labels = "0 (nothate), 1 (hate), 2 (other)"
    assert refused(config, monkeypatch) == [
        f"reward_model_path: {classifier}: has 3 labels; choose the one whose logit is the score "
        f"with `label` in an entry of `rewards`: {labels}",
        f"rewards.0.path: there is no folder {tmp_path / 'nothing'}",
        f"rewards.1.path: {classifier}: has 3 labels; choose the one whose logit is the score "
        f"with `label`: {labels}",
        "rewards.2.path: a reward model of rlhf has no labels; leave out `label`",
        f"rewards.3.path: {classifier}: has no label 'kind'; expected one of {labels}",
    ]


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ([count_letters, count_letters], "rewards: several are called count_letters; give each"),
        ([Reward(count_letters, name="a b")], "reward_fn a b: a name has letters, digits, - and _"),
        ([Reward(count_letters, weight=float("nan"))], "expected a finite number as weight"),
        ([Reward(count_letters, weight="1")], "expected a finite number as weight, got '1'"),  # type: ignore[arg-type]
        ([3], "reward_fn: expected a callable, got int"),
        ([], "reward_model_path: give it, or rewards, or a reward_fn"),
    ],
)
def test_functions_that_cannot_be_used(
    functions: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = refused(config_of("t5", tmp_path), monkeypatch, functions)
    assert said in problem


def test_lambdas_have_names_that_metrics_can_have(tmp_path: Path) -> None:
    trainer = PPOTrainer(config_of("t5", tmp_path), reward_fn=lambda p, r: [0.0] * len(r))
    assert list(trainer.rewards.scorers) == ["lambda"]


def test_a_dry_run_lists_the_rewards_and_their_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, functions = four_rewards("t5", tmp_path, dry_run=True)
    train_ppo(config, reward_fn=functions)
    said = capsys.readouterr().out
    for line in (
        f"reward reward_model: weight 1, {config.reward_model_path}",
        f"reward second: weight -0.5, {config.rewards[0].path}",
        f"reward toxicity: weight 0.25, {config.rewards[1].path}, label hate",
        "reward near_target: weight 2, a function",
        "reward length: weight 0, a function",
    ):
        assert line in said.splitlines()
    assert "fields not used: tags" in said
    assert "target" not in said.split("fields not used:")[1].splitlines()[0]
