"""Where a trainer's processes would meet: each decision takes what `reduce` gives, not its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.numerics import assert_same_gradients
from support.ppo import make_trainer
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from support.toy_trainer import ToyTrainer, lines, toy_config
from torch import Tensor

from rlhf import objectives
from rlhf.config import RewardModelConfig, SFTConfig
from rlhf.data.pairs import Pairs
from rlhf.errors import StoppedBySignal
from rlhf.ppo.update import Minibatch
from rlhf.reward_model import RewardModelTrainer
from rlhf.sft import SFTTrainer
from rlhf.training.processes import Processes


def twice(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
    """As if a second process had the same values."""
    return values * 2 if how == "sum" else values


def gradients(trainer: Any, batch: Any) -> dict[str, Tensor]:
    trainer.optimizer.zero_grad()
    trainer.accumulate_gradients(batch)
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def experience_of(trainer: Any) -> Any:
    rollout = trainer.rollout(trainer.next_prompts())
    return trainer.make_experience(rollout, trainer.score(rollout))[0]


# --- counts that losses are divided by -----------------------------------------------------------


def assert_halved(
    trainer: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, losses: Callable[[], Any]
) -> None:
    """Each of two processes with the same rows adds half of the mean's gradient."""
    whole, loss = gradients(trainer, batch), losses()
    monkeypatch.setattr(Processes, "reduce", twice)
    half = gradients(trainer, batch)
    assert any(gradient.any() for gradient in half.values())
    assert_same_gradients({name: 2 * gradient for name, gradient in half.items()}, whole)
    assert losses() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_ppo_divides_by_the_tokens_or_responses_of_all(
    arch: str, average: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(arch, tmp_path, loss_average=average)
    experience = experience_of(trainer)
    losses = lambda: trainer.accumulate_gradients(experience).policy_loss  # noqa: E731
    assert_halved(trainer, experience, monkeypatch, losses)


def test_sft_divides_by_the_tokens_of_all(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_text": "the cat", "output_text": "a dog"}\n')
    config = SFTConfig(
        base_model="tiny", dataset=str(rows), output_dir=str(tmp_path / "out"), log_with=[],
        batch_size=2, dtype="float32", prompt_sequence_length=24, target_sequence_length=6,
    )  # fmt: skip
    trainer = SFTTrainer(config, model=tiny_model(arch), tokenizer=make_tokenizer(arch))
    batch = trainer.next_batch()
    losses = lambda: trainer.accumulate_gradients(batch)  # noqa: E731
    assert_halved(trainer, batch, monkeypatch, losses)


def test_the_reward_model_divides_by_the_pairs_of_all(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "pairs.jsonl"
    texts = ("the cat", " a dog", " ran"), ("x", " the", " sat to"), ("a dog", " and", " to")
    rows.write_text(
        "".join(
            json.dumps({"input_text": a, "candidate_0": b, "candidate_1": c, "choice": 0}) + "\n"
            for a, b, c in texts
        )
    )
    config = RewardModelConfig(
        base_model="tiny", preference_dataset=str(rows), eval_dataset=str(rows), dtype="float32",
        output_dir=str(tmp_path / "out"), batch_size=3, log_with=[], prompt_sequence_length=24,
        target_sequence_length=6,
    )  # fmt: skip
    trainer = RewardModelTrainer(config, model=tiny_model(arch), tokenizer=make_tokenizer(arch))
    batch = Pairs.from_rows(list(trainer.inputs.train), trainer.reward.codec)
    losses = lambda: trainer.accumulate_gradients(batch)["reward_model/loss"]  # noqa: E731
    assert_halved(trainer, batch, monkeypatch, losses)


# --- moments -------------------------------------------------------------------------------------


def test_whitening_takes_the_moments_of_all() -> None:
    values = torch.tensor([[1.0, 5.0, 0.0], [-2.0, 3.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    both = objectives.whiten(torch.cat([values, values]), torch.cat([mask, mask]))
    own = objectives.whiten(values, mask, reduce=lambda local: local * 2)
    torch.testing.assert_close(own, both[:2])
    assert not torch.allclose(own, objectives.whiten(values, mask))


def test_ppo_whitens_with_the_moments_of_all(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(arch, tmp_path, whiten_rewards=True)
    rollout = trainer.rollout(trainer.next_prompts())
    scores, mask = trainer.score(rollout), rollout.responses.mask
    seen: list[Tensor] = []
    whole = objectives.whiten

    def spy(values: Tensor, mask: Tensor, **options: Any) -> Tensor:
        seen.append(whole(torch.cat([values] * 2), torch.cat([mask] * 2), **{
            name: option for name, option in options.items() if name != "reduce"
        })[: len(values)])  # fmt: skip
        result = whole(values, mask, **options)
        torch.testing.assert_close(result, seen[-1])
        return result

    monkeypatch.setattr(objectives, "whiten", spy)
    monkeypatch.setattr(Processes, "reduce", twice)
    experience, _ = trainer.make_experience(rollout, scores)
    assert len(seen) == 2  # rewards, then advantages
    torch.testing.assert_close(experience.advantages[mask], seen[1][mask])


# --- what stops, skips and adapts ----------------------------------------------------------------


def test_statistics_of_a_minibatch_add_up() -> None:
    local = Minibatch(10, 1.0, 2.0, 3.0, 0.25, 0.5, 0.125, 4.0, 0.75)

    def reduce(values: Tensor, how: str = "sum") -> Tensor:
        return {"sum": values * 2, "max": values + 5}[how]

    assert local.reduced(reduce) == Minibatch(10, 2.0, 4.0, 6.0, 0.5, 1.0, 0.25, 8.0, 5.75)


@pytest.mark.parametrize("together", [False, True])
def test_epochs_end_by_the_kl_of_all(
    together: bool, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(arch, tmp_path, ppo_epochs=1)
    experience = experience_of(trainer)
    randomize_lora(trainer.policy.lm, "policy", 20, std=0.12)
    trainer.config.target_kl = trainer.accumulate_gradients(experience).kl  # stops at 1.5 times it
    assert trainer.config.target_kl > 0

    def others_moved_further(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
        return values * 3 if values.is_floating_point() and how == "sum" else values

    if together:
        monkeypatch.setattr(Processes, "reduce", others_moved_further)
    assert trainer.optimize(experience)["ppo/stopped_early"] == float(together)


def test_a_ratio_of_all_that_exploded_is_skipped_by_all(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(arch, tmp_path)
    experience = experience_of(trainer)

    def others_exploded(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
        return values * 100 if values.is_floating_point() and how == "sum" else values

    monkeypatch.setattr(Processes, "reduce", others_exploded)
    trainer.optimize(experience)
    assert trainer.skipped_updates == trainer.config.ppo_epochs


def test_kl_coefficient_follows_the_kl_of_all(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduce(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
        return values + 1000 if how == "mean" else twice(_, values, how)

    trainer = make_trainer(arch, tmp_path, kl_target=500.0, kl_horizon=32)
    monkeypatch.setattr(Processes, "reduce", reduce)
    trainer.step()  # alone: -20 % for 8 episodes of 32
    assert trainer.kl_controller.value == pytest.approx(0.1 * (1 + 0.2 * 16 / 32))


def test_a_gradient_that_is_broken_anywhere_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_elsewhere(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
        return torch.ones_like(values) if how == "max" and values.ndim else values

    trainer = ToyTrainer(toy_config(tmp_path))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    monkeypatch.setattr(Processes, "reduce", broken_elsewhere)
    metrics = trainer.step()
    assert metrics["train/skipped_updates"] == 1
    assert "train/grad_norm_first" not in metrics
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_a_signal_to_any_stops_all_after_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signaled_elsewhere(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
        return torch.ones_like(values) if how == "max" and not values.ndim else values

    monkeypatch.setattr(Processes, "reduce", signaled_elsewhere)
    trainer = ToyTrainer(toy_config(tmp_path / "run"))
    with pytest.raises(StoppedBySignal, match="after step 1"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints").is_dir()
    monkeypatch.undo()
    again = ToyTrainer(toy_config(tmp_path / "run"))
    again.train()
    assert again.seen == 8 * 5


# --- what is reported ----------------------------------------------------------------------------


def test_metrics_are_those_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ToyTrainer(toy_config(tmp_path / "alone")).train()

    def means_are_doubled(_: Processes, values: Tensor, how: str = "sum") -> Tensor:
        return values * 2 if how in ("mean", "sum") else values

    monkeypatch.setattr(Processes, "reduce", means_are_doubled)
    ToyTrainer(toy_config(tmp_path / "of-all")).train()
    for alone, of_all in zip(lines(tmp_path / "alone"), lines(tmp_path / "of-all"), strict=True):
        for name in ("toy/loss", "toy/seen", "train/grad_norm_first"):
            assert of_all[name] == 2 * alone[name]
        assert ("eval/loss" in alone) == ("eval/loss" in of_all)
        assert of_all.get("eval/loss", 0) == 2 * alone.get("eval/loss", 0)
        tokens = of_all["perf/tokens_per_second"] * of_all["time/step"]
        assert tokens == pytest.approx(2 * 5, rel=1e-6)


def test_only_the_main_process_writes_and_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[int] = []
    monkeypatch.setattr(Processes, "is_main", False)
    other = ToyTrainer(
        toy_config(tmp_path / "run", log_with=["tensorboard"]),
        callbacks=[lambda trainer, step, metrics, samples: called.append(step)],
    )
    other.train()
    assert other.step_index == other.total_steps
    assert not [*tmp_path.rglob("*")]
    assert not called
    assert capsys.readouterr() == ("", "")
    monkeypatch.undo()
    ToyTrainer(toy_config(tmp_path / "run")).train()
    assert (tmp_path / "run" / "metrics.json").is_file()
