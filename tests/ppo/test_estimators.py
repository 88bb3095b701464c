"""Estimators and options as a user of PPO meets them, on both families."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.numerics import assert_same_gradients
from support.ppo import count_letters, make_config, make_trainer
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch import Tensor

from rlhf import objectives
from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.memory import memory_per_role
from rlhf.ppo.experience import Experience, Rollout, RolloutStats
from rlhf.ppo_trainer import PPOTrainer, train_ppo

WITHOUT_CRITIC = [name for name, entry in objectives.ADVANTAGES.items() if not entry.needs_critic]
# Every option away from its default.
OPTIONS: dict[str, Any] = {
    "advantage": "rloo", "responses_per_prompt": 4, "kl_placement": "loss", "kl_estimator": "k2",
    "kl_coeff": 0.3, "clip_range_high": 0.4, "loss_average": "sequence", "entropy_coef": 0.05,
}  # fmt: skip


def gather(trainer: PPOTrainer) -> tuple[Rollout, Tensor, Experience, RolloutStats]:
    """A rollout of two prompts with four responses each, and what is made of it."""
    rollout = trainer.rollout(trainer.next_prompts())
    scores = trainer.score(rollout)
    return rollout, scores, *trainer.make_experience(rollout, scores)


def moved(trainer: PPOTrainer) -> Experience:
    """Experience of a policy that has moved since, so that ratios are not 1."""
    experience = gather(trainer)[2]
    randomize_lora(trainer.policy.lm, "policy", 20, std=0.12)
    return experience


def gradients(trainer: PPOTrainer, experience: Experience) -> dict[str, Tensor]:
    trainer.optimizer.zero_grad()
    trainer.accumulate_gradients(experience)
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


# --- what reaches the update ---------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_rewards_carry_the_kl_that_is_charged_there(
    arch: str, placement: str, estimator: str, tmp_path: Path
) -> None:
    """REINFORCE++ shows token rewards: its advantages are what is still to come, whitened."""
    if (placement, estimator) == ("loss", "k1"):
        return
    trainer = make_trainer(
        arch, tmp_path, advantage="reinforce_pp", responses_per_prompt=4, temperature=1.5,
        kl_coeff=0.3, kl_placement=placement, kl_estimator=estimator,
    )  # fmt: skip
    rollout, scores, experience, stats = gather(trainer)
    assert experience.ref_logprobs is not None
    returns: list[list[float]] = []
    for i, length in enumerate(rollout.responses.lengths.tolist()):
        rewards = []
        for t in range(length):
            log_ratio = float(experience.logprobs[i, t].double() - experience.ref_logprobs[i, t])
            kl = {
                "k1": log_ratio,
                "k2": log_ratio**2 / 2,
                "k3": math.exp(-log_ratio) - 1 + log_ratio,
            }
            rewards.append(-0.3 * kl[estimator] if placement == "reward" else 0.0)
            assert float(stats.kl[i, t]) == pytest.approx(kl["k1"], abs=1e-5)
            assert float(stats.kl_k3[i, t]) == pytest.approx(kl["k3"], abs=1e-5)
        rewards[-1] += float(scores[i])
        returns.append([sum(rewards[t:]) for t in range(length)])
    flat = torch.tensor([value for row in returns for value in row], dtype=torch.float64)
    expected = (flat - flat.mean()) / flat.std()
    actual = experience.advantages[rollout.responses.mask].double()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert not experience.advantages[~rollout.responses.mask].any()


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce_pp_baseline"])
def test_a_response_is_compared_with_its_own_group(arch: str, name: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        arch, tmp_path, advantage=name, responses_per_prompt=4, kl_coeff=0.0, temperature=1.5
    )
    rollout, scores, experience, _ = gather(trainer)
    assert experience.values is None
    rows = []
    for group in scores.double().tolist()[:4], scores.double().tolist()[4:]:
        mean = sum(group) / 4
        std = (sum((s - mean) ** 2 for s in group) / 3) ** 0.5
        rows += {
            "rloo": [s - (sum(group) - s) / 3 for s in group],
            "grpo": [(s - mean) / (std + 1e-4) for s in group],
            "reinforce_pp_baseline": [s - mean for s in group],
        }[name]
    lengths = rollout.responses.lengths.tolist()
    flat = [row for row, length in zip(rows, lengths, strict=True) for _ in range(length)]
    expected = torch.tensor(flat, dtype=torch.float64)
    if name == "reinforce_pp_baseline":
        expected = (expected - expected.mean()) / expected.std()
    actual = experience.advantages[rollout.responses.mask].double()
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


# --- losses and gradients ------------------------------------------------------------------------


def new_logprobs(trainer: PPOTrainer, arch: str, prompt: list[int], response: list[int]) -> Any:
    """(R,) log-probabilities and entropies from transformers' own forward pass, with gradients."""
    module = trainer.policy.lm.module
    if arch == "t5":
        decoder = torch.tensor([[0, *response]])
        logits = module(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0, :-1]
    else:
        logits = module(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        logits = logits[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    chosen = logprobs[torch.arange(len(response)), torch.tensor(response)]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_losses_and_gradients_are_those_of_a_slow_loop(
    arch: str, average: str, estimator: str, tmp_path: Path
) -> None:
    options = OPTIONS | {"loss_average": average, "kl_estimator": estimator}
    trainer = make_trainer(arch, tmp_path, **options)
    experience = moved(trainer)
    actual = gradients(trainer, experience)
    minibatch = trainer.accumulate_gradients(experience)
    trainer.optimizer.zero_grad()
    groups = experience.groups.tolist()
    prompts = experience.prompts.tolists()
    policy_rows, kl_rows, entropy_rows = [], [], []
    with trainer.policy.active():
        for i, response in enumerate(experience.responses.tolists()):
            prompt = prompts[groups[i] if len(prompts) == 2 else i]
            new, entropy = new_logprobs(trainer, arch, prompt, response)
            n = len(response)
            ratio = (new - experience.logprobs[i, :n]).exp()
            advantage = experience.advantages[i, :n]
            bounded = torch.where(ratio > 1.4, 1.4, torch.where(ratio < 0.8, 0.8, ratio))
            policy_rows.append(-torch.minimum(ratio * advantage, bounded * advantage))
            log_ratio = new - experience.ref_logprobs[i, :n]
            k2, k3 = log_ratio**2 / 2, (-log_ratio).exp() - 1 + log_ratio
            kl_rows.append(ratio.detach() * (k2 if estimator == "k2" else k3))
            entropy_rows.append(entropy)

        def mean(rows: list[Tensor]) -> Tensor:
            if average == "token":
                return torch.cat(rows).mean()
            if average == "sequence":
                return torch.stack([row.mean() for row in rows]).mean()
            return torch.cat(rows).sum() / (8 * trainer.config.target_sequence_length)

        loss = mean(policy_rows) + 0.3 * mean(kl_rows) - 0.05 * mean(entropy_rows)
        loss.backward()
    assert minibatch.policy_loss == pytest.approx(mean(policy_rows).item(), rel=1e-3, abs=1e-5)
    assert minibatch.kl_loss == pytest.approx(mean(kl_rows).item(), rel=1e-3, abs=1e-5)
    assert minibatch.kl_loss > 1e-3
    expected = {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("average", ["sequence", "constant"])
def test_micro_batches_and_order_change_no_gradient(
    arch: str, average: str, tmp_path: Path
) -> None:
    trainer = make_trainer(arch, tmp_path, **OPTIONS | {"loss_average": average})
    experience = moved(trainer)
    lengths = torch.minimum(torch.arange(8) % 6 + 1, experience.responses.lengths)
    responses = TokenBatch(experience.responses.ids, lengths)  # of mixed lengths whatever was drawn
    experience = dataclasses.replace(experience, responses=responses)
    expected = gradients(trainer, experience)
    for size, tokens in ((1, 4096), (4, 4096), (8, 30)):
        trainer.config.micro_batch_size = size
        trainer.config.max_tokens_per_micro_batch = tokens
        shuffled = experience.select_rows([5, 2, 7, 0, 1, 6, 3, 4])
        assert_same_gradients(gradients(trainer, shuffled), expected)


def test_the_adapted_coefficient_weighs_the_loss(arch: str, tmp_path: Path) -> None:
    options = OPTIONS | {"kl_target": 1e-3, "kl_horizon": 8, "entropy_coef": 0.0}
    trainer = make_trainer(arch, tmp_path, **options)
    experience = moved(trainer)
    experience = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    before = gradients(trainer, experience)
    trainer.kl_controller.value *= 1.5
    after = gradients(trainer, experience)
    assert any(gradient.any() for gradient in before.values())
    assert_same_gradients(after, {name: 1.5 * gradient for name, gradient in before.items()})
    trainer.kl_controller.value = 0.3
    metrics = trainer.step()
    assert metrics["ppo/kl_coeff"] == 0.3
    kl = metrics["ppo/kl"]
    assert trainer.kl_controller.value == pytest.approx(0.36 if kl > 1.2e-3 else 0.24)


def test_scores_are_shaped(arch: str, tmp_path: Path) -> None:
    plain = make_trainer(arch, tmp_path)
    rollout = plain.rollout(plain.next_prompts())
    raw = plain.score(rollout)
    plain.config.reward_clip = 0.5
    plain.config.length_penalty = 0.25
    plain.config.length_penalty_start = 2
    for i, length in enumerate(rollout.responses.lengths.tolist()):
        expected = min(max(float(raw[i]), -0.5), 0.5) - 0.25 * max(length - 2, 0)
        assert float(plain.score(rollout)[i]) == pytest.approx(expected)


# --- runs ----------------------------------------------------------------------------------------


def run(arch: str, folder: Path, callbacks: Sequence[Callable[..., None]] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    config = make_config(
        folder, train_steps=3, num_minibatches=2, save_every=3, kl_target=2.0, kl_horizon=20,
        eval_dataset=str(folder / "prompts.jsonl"), eval_every=2, critic_learning_rate=None,
        reward_clip=3.0, length_penalty=0.1, length_penalty_start=3, **OPTIONS,
    )  # fmt: skip
    train_ppo(
        config, reward_fn=count_letters, model=tiny_model(arch), tokenizer=make_tokenizer(arch),
        callbacks=callbacks,
    )  # fmt: skip
    return folder / "ppo"


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_resumed_run_is_the_uninterrupted_one(arch: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def stop(trainer: PPOTrainer, step: int, metrics: object, samples: object) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run(arch, tmp_path / "whole")
    with pytest.raises(StoppedBySignal):
        run(arch, tmp_path / "stopped", [stop])
    resumed = run(arch, tmp_path / "stopped")
    assert logged(resumed) == logged(whole)
    assert "ppo/kl_loss" in logged(whole)[0]
    name = "adapter/adapter_model.safetensors"
    one, other = load_file(whole / name), load_file(resumed / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    text = (whole / "config.yaml").read_text()
    for name in ("kl_placement: loss", "kl_estimator: k2", "loss_average: sequence"):
        assert name in text


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_there_is_no_critic_anywhere(arch: str, name: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, advantage=name, responses_per_prompt=4)
    assert trainer.critic is None
    assert all(parameter.startswith("policy.") for parameter in trainer.parameters)
    assert trainer.optimize(gather(trainer)[2])["train/grad_norm_policy"] > 0
    metrics = trainer.step()
    assert metrics["ppo/ratio_first"] < 1e-4
    assert not [metric for metric in metrics if "value" in metric or "critic" in metric]
    assert "ppo/kl_loss" not in metrics
    model_config = tiny_model(arch).config
    gae = memory_per_role(model_config, make_config(tmp_path, responses_per_prompt=4))
    own = memory_per_role(model_config, make_config(tmp_path, advantage=name))
    assert gae.pop("critic") > 0
    assert own == gae


def test_evaluation_runs_no_critic(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = str(tmp_path / "prompts.jsonl")
    trainer = make_trainer(arch, tmp_path, eval_dataset=prompts)
    assert trainer.critic is not None
    expected = trainer.evaluate()
    monkeypatch.setattr(type(trainer.critic), "values", None)
    assert trainer.evaluate() == expected


def test_a_metric_of_the_kl_loss_is_explained(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    metrics = make_trainer("llama", tmp_path, **OPTIONS).step()
    assert metrics["ppo/kl_loss"] >= 0
    assert not [name for name in metrics if name.startswith("ppo/") and f"`{name}`" not in text]


def test_unknown_names_list_all(tmp_path: Path) -> None:
    config = make_config(tmp_path, advantage="rlo")
    with pytest.raises(InputError) as caught:
        train_ppo(config, reward_fn=count_letters)
    message = str(caught.value)
    assert "did you mean `rloo`" in message
    assert "gae, rloo, grpo, reinforce_pp, reinforce_pp_baseline" in message
    config = make_config(tmp_path, kl_estimator="k4")
    with pytest.raises(InputError, match=r"kl_estimator: unknown estimator 'k4'.*k1, k2, k3"):
        train_ppo(config, reward_fn=count_letters)
