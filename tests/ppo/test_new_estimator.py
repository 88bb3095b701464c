"""Another advantage estimator, from outside the package: one function and one line of config."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo import count_letters, make_config, make_trainer
from support.tiny import make_tokenizer, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlhf import objectives
from rlhf.config import PipelineConfig, PPOConfig
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.memory import memory_per_role
from rlhf.objectives import ADVANTAGES, Estimator
from rlhf.pipeline import run_pipeline
from rlhf.ppo_trainer import PPOTrainer, train_ppo

NAME = "batch_mean"
OPTIONS: dict[str, Any] = {"advantage": NAME, "responses_per_prompt": 1}


def batch_mean(
    rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    """REINFORCE: the rewards still to come, less the batch's mean return."""
    assert values is None
    assert groups.tolist() == list(range(len(rewards)))
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    return (to_come - to_come[:, 0].mean()) * mask, None


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ADVANTAGES, NAME, Estimator(batch_mean, needs_critic=False, whitened=False))
    return


def run(arch: str, folder: Path, callbacks: Sequence[Callable[..., None]] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    config = make_config(
        folder, **OPTIONS, train_steps=3, num_minibatches=2, save_every=3,
        eval_dataset=str(folder / "prompts.jsonl"), eval_every=2, critic_learning_rate=None,
    )  # fmt: skip
    train_ppo(
        config, reward_fn=count_letters, model=tiny_model(arch), tokenizer=make_tokenizer(arch),
        callbacks=callbacks,
    )  # fmt: skip
    return folder / "ppo"


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.mark.parametrize("rank", [4, 0])
def test_no_critic_is_made(arch: str, rank: int, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, **OPTIONS, lora={"rank": rank})
    assert trainer.critic is None
    assert trainer.policy.lm.adapters.names == (["policy"] if rank else [])
    assert [group.name for group in trainer.parameter_groups()] == ["policy"]
    assert all(name.startswith("policy.") for name in trainer.parameters)
    metrics = trainer.step()
    assert metrics["ppo/ratio_first"] < 1e-4
    assert metrics["train/grad_norm_policy"] > 0
    of_a_critic = [name for name in metrics if "value" in name or "critic" in name]
    assert not of_a_critic
    assert "ppo/explained_variance" not in metrics


def test_memory_has_no_critic(arch: str, tmp_path: Path) -> None:
    model_config = tiny_model(arch).config
    gae, ours = (
        memory_per_role(model_config, make_config(tmp_path, advantage=name, responses_per_prompt=1))
        for name in ("gae", NAME)
    )
    assert gae.pop("critic") > 0
    assert ours == gae


def test_advantages_are_those_of_a_slow_loop(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, **OPTIONS, kl_coeff=0.3, temperature=1.5)
    rollout = trainer.rollout(trainer.next_prompts())
    scores = trainer.score(rollout)
    experience, stats = trainer.make_experience(rollout, scores)
    assert experience.values is None
    assert experience.returns is None
    assert experience.ref_logprobs is not None
    assert experience.groups.tolist() == list(range(8))
    returns = []
    for i, length in enumerate(rollout.responses.lengths.tolist()):
        rewards = [
            -0.3 * float(experience.logprobs[i, t].double() - experience.ref_logprobs[i, t])
            for t in range(length)
        ]
        rewards[-1] += float(scores[i])
        returns.append([sum(rewards[t:]) for t in range(length)])
        assert float(stats.kl[i].sum()) != 0
    baseline = sum(row[0] for row in returns) / len(returns)
    for i, row in enumerate(returns):
        expected = torch.tensor([value - baseline for value in row], dtype=torch.float64)
        actual = experience.advantages[i, : len(row)].double()
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert not experience.advantages[i, len(row) :].any()


def test_what_is_to_be_whitened_is_whitened(arch: str, tmp_path: Path) -> None:
    ADVANTAGES[NAME] = Estimator(batch_mean, needs_critic=False, whitened=True)
    trainer = make_trainer(arch, tmp_path, **OPTIONS, temperature=1.5)
    rollout = trainer.rollout(trainer.next_prompts())
    experience, _ = trainer.make_experience(rollout, trainer.score(rollout))
    advantages = experience.advantages[rollout.responses.mask].double()
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.std()) == pytest.approx(1, abs=1e-4)


def test_rows_keep_their_groups_and_reference(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, temperature=1.5)
    rollout = trainer.rollout(trainer.next_prompts())
    experience, _ = trainer.make_experience(rollout, trainer.score(rollout))
    some = experience.select_rows([5, 2])
    assert some.groups.tolist() == [1, 0]
    assert some.prompts.tolists() == [experience.prompts.tolists()[i] for i in (2, 5)]
    assert experience.ref_logprobs is not None
    assert some.ref_logprobs is not None
    width = some.responses.ids.shape[1]
    assert torch.equal(some.ref_logprobs, experience.ref_logprobs[[5, 2], :width])
    free = make_trainer(arch, tmp_path, kl_coeff=0.0)
    experience, _ = free.make_experience(rollout, free.score(rollout))
    assert experience.ref_logprobs is None
    assert experience.select_rows([1]).ref_logprobs is None


def test_a_run_is_exported_and_resumed(arch: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def stop(trainer: PPOTrainer, step: int, metrics: object, samples: object) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run(arch, tmp_path / "whole")
    with pytest.raises(StoppedBySignal):
        run(arch, tmp_path / "stopped", [stop])
    saved = list((tmp_path / "stopped" / "ppo" / "checkpoints").rglob("*.safetensors"))
    names = [name for path in saved for name in load_file(path)]
    assert names
    assert all(name.startswith("policy.") for name in names)
    resumed = run(arch, tmp_path / "stopped")
    assert logged(resumed) == logged(whole)
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        one, other = load_file(whole / name), load_file(resumed / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    auto = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}[arch]
    auto.from_pretrained(whole / "merged")
    AutoConfig.from_pretrained(whole / "merged")
    assert f"advantage: {NAME}" in (whole / "config.yaml").read_text()


def test_an_unknown_estimator_is_named_before_weights_are_loaded(tmp_path: Path) -> None:
    config = make_config(tmp_path, advantage="gea")
    with pytest.raises(InputError, match=r"advantage: unknown estimator 'gea'; did you mean `gae`"):
        train_ppo(config, reward_fn=count_letters)


def test_a_pipeline_names_it_before_its_first_stage(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = {"input_text": "the cat", "candidate_0": " a dog", "candidate_1": " ran", "choice": 0}
    pairs.write_text(json.dumps(row) + "\n")
    config = PipelineConfig(
        base_model=str(checkpoints["t5"]), preference_dataset=str(pairs),
        output_dir=str(tmp_path / "out"), ppo={"advantage": "gea"},
    )  # fmt: skip
    with pytest.raises(InputError, match="advantage: unknown estimator 'gea'"):
        run_pipeline(config)
    assert not (tmp_path / "out").exists()


def test_the_registries_hold_what_training_uses() -> None:
    a, b = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert torch.equal(objectives.KL["k1"](a, b), a - b)
    expected = torch.tensor([[0.106531, 0.718282]])  # exp(-0.5) - 1 + 0.5; exp(1) - 1 - 1
    torch.testing.assert_close(objectives.KL["k3"](a, b), expected, atol=1e-5, rtol=1e-5)
