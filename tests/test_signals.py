"""SIGTERM and Ctrl-C at any moment: the end comes at once, and nothing is lost or changed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cases import Case
from support.ppo import count_letters
from support.tiny import make_tokenizer, tiny_model

import rlhf.inference.stage
import rlhf.pipeline
from rlhf import ppo_trainer, reward_model, score, sft
from rlhf.cli import main
from rlhf.config import PPOConfig, RewardModelConfig, SFTConfig
from rlhf.errors import StoppedBySignal
from rlhf.models import generation
from rlhf.models.language_model import LanguageModel
from rlhf.models.reward_model import RewardModel
from rlhf.ppo.roles import Critic
from rlhf.ppo_trainer import PPOTrainer
from rlhf.reward_model import RewardModelTrainer
from rlhf.sft import SFTTrainer
from rlhf.training import optimizer as optimization

COMMON: dict[str, Any] = {
    "batch_size": 4, "micro_batch_size": 2, "train_steps": 4, "learning_rate": 3e-3,
    "prompt_sequence_length": 24, "target_sequence_length": 6, "lora": {"rank": 4},
    "log_with": [], "dtype": "float32", "device": "cpu", "save_every": 3, "eval_every": 2,
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PAIRS = [
    {"input_text": f"the cat {n}", "candidate_0": " a cat", "candidate_1": f" {n}", "choice": n % 2}
    for n in range(6)
]
PROMPTS = [{"input_text": f"the dog {n}", "output_text": f"a dog {n}"} for n in range(6)]


class Stage:
    """A stage on six rows, with evaluations, as a function of the output folder."""

    def __init__(self, name: str, arch: str, folder: Path, **fields: Any) -> None:
        self.name, self.arch, self.fields = name, arch, fields
        self.pairs = write(folder / "pairs.jsonl", PAIRS)
        self.prompts = write(folder / "prompts.jsonl", PROMPTS)

    def __call__(self, output: Path) -> Any:
        fields = {**COMMON, **self.fields, "base_model": "tiny", "output_dir": str(output)}
        given = {"model": tiny_model(self.arch), "tokenizer": make_tokenizer(self.arch)}
        if self.name == "sft":
            config = SFTConfig(dataset=self.prompts, eval_dataset=self.prompts, **fields)
            return SFTTrainer(config, **given).train()
        if self.name == "reward_model":
            data = {"preference_dataset": self.pairs, "eval_dataset": self.pairs}
            return RewardModelTrainer(RewardModelConfig(**data, **fields), **given).train()
        data = {"prompt_dataset": self.prompts, "eval_dataset": self.prompts}
        fields["micro_batch_size"] = 1
        config = PPOConfig(
            **data, **fields, num_minibatches=2, ppo_epochs=2, kl_target=0.5, kl_horizon=50
        )
        return PPOTrainer(config, reward_fn=count_letters, **given).train()


def send_in(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *signals: int
) -> list[int]:
    """Sends signals to this process inside a function's `call`th call; counts the calls."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            for number in signals or (signal.SIGTERM,):
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, with_signal)
    return calls


def untimed(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert untimed(one / "metrics.jsonl") == untimed(other / "metrics.jsonl")
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for path in one.rglob("*.safetensors"):
        first, second = load_file(path), load_file(other / path.relative_to(one))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Folders of runs that nothing disturbed."""
    done: dict[tuple[str, str], Path] = {}

    def find(name: str, arch: str) -> Path:
        if (name, arch) not in done:
            folder = tmp_path_factory.mktemp(f"{name}-{arch}")
            Stage(name, arch, folder)(folder / "out")
            done[name, arch] = folder / "out"
        return done[name, arch]

    return find


# A step of PPO has 8 backward passes of micro-batches, two before each of its 4 updates.
MOMENTS = [
    ("ppo", LanguageModel, "policy_logits", 3, 0),  # the third token
    ("ppo", Critic, "values", 2, 0),  # the second micro-batch of the first experience
    ("ppo", ppo_trainer, "add_gradients", 1, 0),  # before the first update
    ("ppo", ppo_trainer, "add_gradients", 7, 0),  # three updates are made
    ("ppo", ppo_trainer, "add_gradients", 8, 1),  # nothing but the last update is left
    ("ppo", ppo_trainer, "add_gradients", 9, 1),
    ("ppo", ppo_trainer, "add_gradients", 11, 1),  # one update of the second step is made
    ("ppo", ppo_trainer, "add_gradients", 31, 3),
    ("reward_model", RewardModelTrainer, "_backward", 1, 0),
    ("reward_model", RewardModelTrainer, "_backward", 5, 2),
    ("reward_model", RewardModel, "raw_scores", 5, 2),  # in the first evaluation
    ("sft", SFTTrainer, "negative_log_likelihood", 1, 0),
    ("sft", SFTTrainer, "negative_log_likelihood", 5, 2),  # in the first evaluation
    ("sft", generation, "stop_point", 2, 2),  # the second token of its samples
]


@pytest.mark.parametrize(("name", "owner", "method", "call", "done"), MOMENTS)
def test_stopped_within_a_step_and_resumed_equals_never_stopped(
    name: str, owner: Any, method: str, call: int, done: int, arch: str, tmp_path: Path,
    whole: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stage = Stage(name, arch, tmp_path)
    with monkeypatch.context() as patch:
        calls = send_in(patch, owner, method, call)
        with pytest.raises(StoppedBySignal) as stopped:
            stage(tmp_path / "out")
    assert calls == [call]  # not one further micro-batch or token
    assert stopped.value.step == done
    assert (tmp_path / "out" / "checkpoints").exists() == (done > 0)
    stage(tmp_path / "out")
    assert_same_run(whole(name, arch), tmp_path / "out")


@pytest.mark.parametrize("call", [1, 2, 5])
def test_stopped_in_a_ppo_evaluation_it_is_made_again(
    call: int, arch: str, tmp_path: Path, whole: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Twice in a row, and the step before it is not made again."""
    stage, calls = Stage("ppo", arch, tmp_path), [0]
    original = PPOTrainer.rollout

    def in_evaluation(self: PPOTrainer, rows: Any, *, evaluation: bool = False) -> Any:
        if not evaluation:
            return original(self, rows)
        with monkeypatch.context() as patch:
            calls[:] = send_in(patch, type(self.policy.lm), "policy_logits", call)
            return original(self, rows, evaluation=True)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "rollout", in_evaluation)
        for _ in range(2):
            with pytest.raises(StoppedBySignal, match="after step 2"):
                stage(tmp_path / "out")
            assert [row["step"] for row in untimed(tmp_path / "out" / "metrics.jsonl")] == [1]
    stage(tmp_path / "out")
    assert_same_run(whole("ppo", arch), tmp_path / "out")


def test_weights_too_large_to_copy_continue_from_the_newest_checkpoint(
    arch: str, tmp_path: Path, whole: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stage = Stage("ppo", arch, tmp_path, save_every=1)
    monkeypatch.setattr(optimization, "LARGEST_COPY", 0)
    for call, done in ((11, 1), (9, 2)):  # after an update of step 2; then before one of step 3
        with monkeypatch.context() as patch:
            calls = send_in(patch, ppo_trainer, "add_gradients", call)
            with pytest.raises(StoppedBySignal) as stopped:
                stage(tmp_path / "out")
        assert (calls, stopped.value.step) == ([call], done)
        assert ("too large" in capsys.readouterr().err) == (done == 1)
    stage(tmp_path / "out")
    assert_same_run(whole("ppo", arch), tmp_path / "out")


def test_a_second_ctrl_c_ends_without_saving(tmp_path: Path, monkeypatch: Any) -> None:
    stage = Stage("sft", "t5", tmp_path)
    send_in(monkeypatch, SFTTrainer, "negative_log_likelihood", 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


# The command, where no stage has begun its loop or has left it


def command(name: str, case: Case, folder: Path) -> list[str]:
    pairs, prompts = write(folder / "pairs.jsonl", PAIRS), write(folder / "prompts.jsonl", PROMPTS)
    limits = ["--prompt_sequence_length", "24", "--target_sequence_length", "8"]
    training = ["--base_model", str(case.base), "--output_dir", str(folder / "out"), *limits]
    training += ["--train_steps", "1", "--batch_size", "2", "--log_with", "none"]
    judged = ["--reward_model_path", str(case.reward)]
    output = ["--output_dir", str(folder / "out"), *judged]
    flags = {
        "sft": [*training, "--dataset", prompts],
        "reward-model": [*training, "--preference_dataset", pairs],
        "ppo": [*training, "--prompt_dataset", prompts, *judged],
        "infer": [*output, "--policy_path", str(case.policy), "--eval_dataset", str(case.data)],
        "score": [*judged, "--dataset", pairs, "--output", str(folder / "scores.jsonl")],
        "run": [*training, "--preference_dataset", pairs],
    }
    return [name, *flags[name], "--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("sft", sft, "load_language_model"),
        ("reward-model", reward_model, "load_language_model"),
        ("reward-model", reward_model, "save_sequence_classifier"),  # in the export
        ("ppo", ppo_trainer, "load_bases"),
        ("ppo", ppo_trainer, "save_policy"),
        ("infer", rlhf.inference.stage, "load_models"),
        ("infer", rlhf.inference.stage, "samples_markdown"),  # all is predicted
        ("score", score, "load_reward_model"),
        ("score", RewardModel, "scores"),
        ("run", rlhf.pipeline, "free_memory"),  # between two stages
        ("run", rlhf.pipeline, "check_inputs"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_the_loops_ends_the_command_at_once(
    name: str, owner: Any, function: str, number: int, cases: dict[str, Case], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = command(name, cases["llama"], tmp_path)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    original = getattr(owner, function)

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        try:  # as libraries do while they load
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("the signal was taken for an error")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, with_signal)
        assert main(arguments) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rlhf: stopped by a signal")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not list(tmp_path.glob(".*.partial"))
    if name != "run":  # which takes its time
        assert main(arguments) == 0


def test_interrupted_twice_is_one_line_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    cases: dict[str, Case],
) -> None:  # fmt: skip
    send_in(monkeypatch, SFTTrainer, "negative_log_likelihood", 1, signal.SIGINT, signal.SIGINT)
    assert main(command("sft", cases["t5"], tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "rlhf: interrupted"


def test_a_run_that_diverges_is_one_line_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    cases: dict[str, Case],
) -> None:  # fmt: skip
    def broken(self: SFTTrainer, batch: Any) -> float:
        for parameter in self.parameters.values():
            parameter.grad = torch.full_like(parameter, float("nan"))
        return float("nan")

    monkeypatch.setattr(SFTTrainer, "accumulate_gradients", broken)
    assert main([*command("sft", cases["t5"], tmp_path), "--train_steps", "9"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("rlhf: sft diverged: 5 updates in a row were skipped")
    assert "Traceback" not in said
    assert len(untimed(tmp_path / "out" / "metrics.jsonl")) == 4


IMPORTING = """
import os, runpy, sys

find, number = sys.argv[1], int(sys.argv[2])
sys.argv = ["rlhf", "score", "--config", "missing.yaml"]

class Sender:
    def find_spec(self, name, *_):
        if name == find:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Sender())
runpy.run_module("rlhf", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["rlhf.cli", "click", "pydantic", "rlhf.config.loading"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_command_starts_is_one_line(
    module: str, number: int, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", IMPORTING, module, str(int(number))]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (75, "rlhf: stopped by a signal\n")
    assert ended.stdout == ""
