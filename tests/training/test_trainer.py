"""The shared loop: resuming, skipping, clipping, schedules and folders, seen from outside."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.toy_trainer import (
    LastTrainer,
    ToyTrainer,
    lines,
    stop_at,
    toy_config,
    without_timing,
)
from torch import nn

from rlhf.data.batching import micro_batches, seeded_generator
from rlhf.errors import InputError, StoppedBySignal
from rlhf.files.run_folder import prepare_output
from rlhf.training.optimizer import GroupedAdamW, ParameterGroup, learning_rate_factor
from rlhf.training.trainer import Trainer, TrainingDiverged


def assert_same_run(one: Path, other: Path) -> None:
    assert [*map(without_timing, lines(one))] == [*map(without_timing, lines(other))]
    assert lines(one, "samples.jsonl") == lines(other, "samples.jsonl")
    finals = [without_timing(json.loads((f / "metrics.json").read_text())) for f in (one, other)]
    assert finals[0] == finals[1]
    weights = [torch.load(folder / "w.pt") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    LastTrainer(toy_config(tmp_path / "whole")).train()
    return tmp_path / "whole"


@pytest.mark.parametrize("step", range(1, 9))
def test_stopped_by_a_signal_and_resumed_equals_never_stopped(
    tmp_path: Path, whole: Path, step: int
) -> None:
    config = toy_config(tmp_path / "stopped")
    with pytest.raises(StoppedBySignal) as stopped:
        LastTrainer(config, callbacks=[stop_at(step)]).train()
    assert stopped.value.step == step
    LastTrainer(config).train()
    assert_same_run(whole, tmp_path / "stopped")


@pytest.mark.parametrize("step", [2, 3, 5, 8])
def test_killed_between_saves_and_resumed_equals_never_stopped(
    tmp_path: Path, whole: Path, step: int
) -> None:
    class Killed(BaseException):
        pass

    def kill(_: Trainer, now: int, __: Any, ___: Any) -> None:
        if now == step:
            raise Killed

    config = toy_config(tmp_path / "killed")
    with pytest.raises(Killed):
        LastTrainer(config, callbacks=[kill]).train()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "torn')
    LastTrainer(config).train()
    assert_same_run(whole, tmp_path / "killed")


def test_many_stops_in_one_run(tmp_path: Path, whole: Path) -> None:
    config = toy_config(tmp_path / "stopped")
    for step in range(1, 9):
        with pytest.raises(StoppedBySignal):
            LastTrainer(config, callbacks=[stop_at(step)]).train()
    LastTrainer(config).train()
    assert_same_run(whole, tmp_path / "stopped")


def test_sigint_saves_too_and_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    config = toy_config(tmp_path / "run")
    with pytest.raises(StoppedBySignal):
        ToyTrainer(config, callbacks=[stop_at(4, signal.SIGINT)]).train()
    assert (tmp_path / "run" / "checkpoints" / "step-000004" / "manifest.json").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stopped_while_exporting_exports_on_resume(tmp_path: Path, whole: Path) -> None:
    class Stopped(LastTrainer):
        def export(self) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().export()

    config = toy_config(tmp_path / "stopped")
    with pytest.raises(StoppedBySignal):
        Stopped(config).train()
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    LastTrainer(config).train()
    assert_same_run(whole, tmp_path / "stopped")


def test_finished_run_returns_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path / "run")
    result = ToyTrainer(config).train()
    assert result["finished"] is True
    assert result["steps"] == 8

    class MustNotStep(ToyTrainer):
        def make_step(self) -> dict[str, float]:
            raise AssertionError

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = MustNotStep(toy_config(tmp_path / "run", log_every=4, save_every=2)).train()
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "already finished" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_changed_config_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(StoppedBySignal):
        ToyTrainer(toy_config(folder), callbacks=[stop_at(4)]).train()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changed = toy_config(folder, batch_size=6, lora={"rank": 2})
    with pytest.raises(InputError) as refused:
        ToyTrainer(changed).train()
    text = "\n".join(refused.value.problems)
    assert "batch_size: changed from 5 to 6" in text
    assert "lora.rank: changed from 8 to 2" in text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(InputError, match="dataset"):
        prepare_output(toy_config(folder), {"dataset": "another"}, stage="toy")
    with pytest.raises(InputError, match="run of toy, not of sft"):
        prepare_output(toy_config(folder), {}, stage="sft")
    with pytest.raises(InputError, match="resume is never"):
        prepare_output(toy_config(folder, resume="never"), {}, stage="toy")


def test_a_run_that_failed_before_saving_does_not_block_the_corrected_one(tmp_path: Path) -> None:
    class Fails(ToyTrainer):
        def save(self) -> None:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        Fails(toy_config(tmp_path / "run", learning_rate=1.0)).train()
    assert (tmp_path / "run" / "best").exists()
    ToyTrainer(toy_config(tmp_path / "run")).train()
    ToyTrainer(toy_config(tmp_path / "clean")).train()
    assert_same_run(tmp_path / "clean", tmp_path / "run")


def test_foreign_files_are_refused_but_a_log_is_not(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("2> of the shell")
    (tmp_path / ".hidden").write_text("")
    prepare_output(toy_config(tmp_path), {}, stage="toy")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        prepare_output(toy_config(tmp_path), {}, stage="toy")
    with pytest.raises(InputError, match="is a file"):
        prepare_output(toy_config(tmp_path / "thesis.tex"), {}, stage="toy")


def test_random_numbers_differ_from_step_to_step_and_seed_to_seed(tmp_path: Path) -> None:
    drawn = []

    class Draws(ToyTrainer):
        def make_step(self) -> dict[str, float]:
            drawn.append(torch.rand(1).item())
            return super().make_step()

    for seed in (0, 1):
        trainer = Draws(toy_config(tmp_path / "run", seed=seed))
        for _ in range(3):
            trainer.step()
    assert len(set(drawn)) == 6


def test_non_finite_gradient_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = ToyTrainer(toy_config(tmp_path / "run"))
    trainer.broken_steps = {1, 3}
    before: dict[str, torch.Tensor] = {}
    for index in range(5):
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        metrics = trainer.step()
        same = [torch.equal(before[name], p) for name, p in trainer.parameters.items()]
        assert all(same) if index in {1, 3} else not any(same)
        assert ("train/grad_norm_first" in metrics) == (index not in {1, 3})
        assert all(p.grad is None for p in trainer.parameters.values())
    assert metrics["train/skipped_updates"] == 2


def test_only_one_broken_group_stops_all(tmp_path: Path) -> None:
    trainer = ToyTrainer(toy_config(tmp_path / "run"))
    for parameter in trainer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    trainer.second.weight.grad = torch.full_like(trainer.second.weight, float("inf"))
    before = trainer.first.weight.detach().clone()
    assert trainer.apply_gradients() == {}
    assert torch.equal(trainer.first.weight, before)


def test_five_skips_in_a_row_end_the_run_also_across_a_stop(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")

    def broken(**options: Any) -> ToyTrainer:
        trainer = ToyTrainer(config, **options)
        trainer.broken_steps = {2, 3, 4, 5, 6}
        return trainer

    with pytest.raises(StoppedBySignal):
        broken(callbacks=[stop_at(5)]).train()
    with pytest.raises(TrainingDiverged, match=r"step 7 because the gradient of first and second"):
        broken().train()


def test_each_group_is_clipped_to_its_own_norm() -> None:
    generator = seeded_generator("test", 3)
    weights = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(3)]
    grads = [torch.randn(3, 2, generator=generator) * 10 for _ in weights]
    groups = [
        ParameterGroup("a", [("a.0", weights[0]), ("a.1", weights[1])], 0.1, 1.0),
        ParameterGroup("b", [("b.0", weights[2])], 0.1, 1e6),
    ]
    expected = []
    norm_a = math.sqrt(sum(float(g.double().square().sum()) for g in grads[:2]))
    for weight, grad, factor in zip(weights, grads, [1 / norm_a, 1 / norm_a, 1.0], strict=True):
        # The first step of Adam, by hand: both moments start at 0 and are debiased; eps is large
        # so that the size of the gradient shows.
        g = grad.double() * factor
        expected.append(weight.detach().double() - 0.1 * g / (g.abs() + 0.5))
    optimizer = GroupedAdamW(groups, betas=(0.9, 0.99), eps=0.5, weight_decay=0.0)
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad.clone()
    norms = optimizer.grad_norms()
    assert float(norms["a"]) == pytest.approx(norm_a, rel=1e-6)
    optimizer.update(norms)
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_vectors() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    group = ParameterGroup("all", [("matrix", matrix), ("vector", vector)], 0.1, 1.0)
    optimizer = GroupedAdamW([group], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.update(optimizer.grad_norms())
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(vector, torch.ones(2))


def test_groups_must_not_share_tensors() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    groups = [ParameterGroup(name, [(name, weight)], 0.1, 1.0) for name in ("a", "b")]
    with pytest.raises(ValueError, match="share"):
        GroupedAdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize(("warmup", "rise"), [(0, []), (2, [0.5, 1.0])])
def test_learning_rate_schedules(
    schedule: Any, after: list[float], warmup: int, rise: list[float]
) -> None:
    total = warmup + 4
    factors = [learning_rate_factor(step, total, warmup, schedule) for step in range(total)]
    assert factors == pytest.approx(rise + after)


def test_learning_rate_is_the_schedule_times_each_groups_peak(tmp_path: Path) -> None:
    ToyTrainer(toy_config(tmp_path / "run")).train()
    rates = [line["train/lr"] for line in lines(tmp_path / "run")]
    factors = [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([0.05 * factor for factor in factors])


def test_best_weights_are_exported(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0])
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Scripted(ToyTrainer):
        def evaluate(self) -> dict[str, float]:
            return {"eval/loss": next(values), "eval/other": float(self.step_index)}

    def remember(trainer: Trainer, step: int, _: Any, __: Any) -> None:
        seen[step] = {name: p.detach().clone() for name, p in trainer.parameters.items()}

    result = Scripted(toy_config(tmp_path / "run"), callbacks=[remember]).train()
    exported = torch.load(tmp_path / "run" / "w.pt")
    assert all(torch.equal(exported[name], seen[6][name]) for name in exported)
    assert (result["best_step"], result["best"], result["eval/other"]) == (6, 1.0, 6.0)


def test_logs_callbacks_and_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    config = toy_config(tmp_path / "run", log_every=2, eval_every=5, log_with=["tensorboard"])
    ToyTrainer(config, callbacks=[lambda *call: calls.append(call[1:])]).train()
    assert [step for step, _, _ in calls] == list(range(1, 9))
    assert all(len(samples) == 1 and "toy/loss" in metrics for _, metrics, samples in calls)
    # Every second step, and those that were evaluated.
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8]
    assert [row["step"] for row in rows if "eval/loss" in row] == [5, 8]
    for name in ("time/forward", "time/step", "perf/tokens_per_second", "perf/peak_memory_mb"):
        assert rows[0][name] > 0
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    told = capsys.readouterr().err
    assert "8 steps of 5 rows = 1.67 epochs of 24 rows" in told
    assert "toy 8/8" in told


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kill(_: Trainer, now: int, __: Any, ___: Any) -> None:
        if now == 5:
            raise KeyboardInterrupt

    config = toy_config(tmp_path / "run", log_with=["tensorboard"])
    with pytest.raises(KeyboardInterrupt):
        ToyTrainer(config, callbacks=[kill]).train()
    ToyTrainer(config).train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "rlhf"))
    events.Reload()
    assert [event.step for event in events.Scalars("toy/loss")] == list(range(1, 9))


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="comet_ml"):
        ToyTrainer(toy_config(tmp_path / "run", log_with=["comet_ml"]))
    assert not (tmp_path / "run").exists()


def test_metrics_that_are_not_numbers_stay_valid_json(tmp_path: Path) -> None:
    trainer = ToyTrainer(toy_config(tmp_path / "run"))
    trainer.broken_steps = {1}
    trainer.train()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert rows[1]["toy/loss"] is None


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    size=st.integers(1, 8),
    budget=st.integers(1, 120),
)
def test_micro_batches_hold_every_row_once_within_their_limits(
    lengths: list[int], size: int, budget: int
) -> None:
    pieces = list(micro_batches(torch.tensor(lengths), size, budget))
    assert sorted(row for piece in pieces for row in piece) == list(range(len(lengths)))
    for piece in pieces:
        assert len(piece) <= size
        assert len(piece) == 1 or len(piece) * max(lengths[row] for row in piece) <= budget
    visited = [lengths[row] for piece in pieces for row in piece]
    assert visited == sorted(lengths)
