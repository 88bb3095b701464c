"""Training a reward model, seen from the files it reads and writes."""

import json
import os
import random
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.numerics import assert_same_gradients
from support.tiny import make_tokenizer, randomize_lora, tiny_model

from rlhf.config import LoRAConfig, RewardModelConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.pairs import Pairs
from rlhf.data.schema import PreferenceRow, PromptText
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.reward_model import RewardModel, load_reward_model
from rlhf.reward_model import RewardModelTrainer, train_reward_model

WORDS = ["cat", "dog", "sat", "ran", "the", "a", "post"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs in which the candidate with a 9 is preferred; every tenth other one is blank."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        bad = rng.choices(WORDS, k=rng.randint(1, 5))
        good = rng.choices(WORDS, k=rng.randint(0, 4))
        good.insert(rng.randint(0, len(good)), "9")
        texts = [" " + " ".join(good), "" if number % 10 == 0 else " " + " ".join(bad)]
        choice = rng.randint(0, 1)
        rows.append(
            {
                "input_text": f"{number} {rng.choice(WORDS)}",
                "candidate_0": texts[choice],
                "candidate_1": texts[1 - choice],
                "choice": choice,
            }
        )
    return rows


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        base_model=str(tiny_checkpoint),
        preference_dataset=write_rows(tmp_path / "pairs.jsonl", preferences(200)),
        output_dir=str(tmp_path / "out"),
        device="cpu",
        batch_size=16,
        train_steps=6,
        learning_rate=1e-2,
        prompt_sequence_length=24,
        target_sequence_length=16,
        lora=LoRAConfig(rank=4),
        log_with=[],
        eval_every=3,
        save_every=2,
    )


def with_random_adapter(config: RewardModelConfig) -> RewardModelTrainer:
    trainer = RewardModelTrainer(config)
    if trainer.reward.adapter is not None:
        randomize_lora(trainer.reward.lm, trainer.reward.adapter)
    return trainer


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not re.match(r"time/|perf/", k)}
        for line in lines
    ]


def scores_of(folder: Path) -> torch.Tensor:
    scorer = load_reward_model(str(folder), device="cpu")
    texts = ["the cat sat", "9"]
    return scorer.score([PromptText(text, ((0, len(text)),)) for text in texts], [" 9 dog", ""])


def test_learns_a_preference(config: RewardModelConfig) -> None:
    config = config.model_copy(update={"train_steps": 40, "eval_every": 20})
    result = train_reward_model(config)
    assert result.metrics["eval/accuracy"] > 0.9
    assert result.metrics["eval/log_loss"] < 0.3
    assert result.metrics["eval/pairs"] == 10
    assert result.metrics["reward_model/loss"] < 0.3
    folder = Path(result.output_dir)
    scorer = load_reward_model(result.output_dir, device="cpu")
    held = preferences(60, seed=5)
    prompts = [PromptText(r["input_text"], ((0, len(r["input_text"])),)) for r in held]
    chosen = scorer.score(prompts, [row[f"candidate_{row['choice']}"] for row in held])
    rejected = scorer.score(prompts, [row[f"candidate_{1 - row['choice']}"] for row in held])
    assert (chosen > rejected).float().mean() > 0.9
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["chosen_score"] > samples[-1]["rejected_score"]
    card = (folder / "README.md").read_text()
    assert "| eval/accuracy |" in card
    code = card.split("```python\n")[1].split("```")[0]
    exec(
        code.replace("path/to/this/folder", result.output_dir).replace("print(", "scores = list("),
        names := {},
    )
    expected = scorer.score([PromptText("your prompt", ((0, 11),))], ["a response"])
    assert names["scores"] == expected.tolist()


def test_gradients_are_those_of_the_mean_over_pairs(config: RewardModelConfig) -> None:
    config = config.model_copy(update={"centering_coeff": 0.05})
    rng = random.Random(1)
    texts = [" 9 cat", "", " the dog sat and ran", " x", " a", " post the 9 9"]
    rows = [
        PreferenceRow(
            PromptText(
                word := " ".join(rng.choices(WORDS, k=rng.randint(1, 6))), ((0, len(word)),)
            ),
            tuple(rng.sample(texts, 2)),
            tuple(rng.sample(range(2), 2)),
            margin,
            "file:1",
        )
        for margin in (None, 0.5, 1.5, None, 0.2, -0.3, 0.0)
    ]
    found = []
    for micro in (1, 3, 16):
        trainer = with_random_adapter(config.model_copy(update={"micro_batch_size": micro}))
        metrics = trainer.accumulate_gradients(Pairs.from_rows(rows, trainer.reward.codec))
        grads = {name: p.grad.clone() for name, p in trainer.parameters.items()}
        found.append((metrics, grads))
    reference_loss, reference = slow_gradients(trainer, rows)
    assert found[0][0]["reward_model/loss"] == pytest.approx(reference_loss, rel=1e-5)
    for metrics, grads in found:
        assert metrics == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
        assert_same_gradients(grads, reference)
        assert all(grad.any() for grad in grads.values())


def slow_gradients(
    trainer: RewardModelTrainer, rows: list[PreferenceRow]
) -> tuple[float, dict[str, torch.Tensor]]:
    """One row and one candidate at a time, the formula written out."""
    trainer.optimizer.zero_grad()
    reward, codec = trainer.reward, trainer.reward.codec
    with reward.lm.using(reward.adapter):
        total = torch.zeros(())
        for row in rows:
            prompt = TokenBatch.from_lists([codec.prompt_ids(row.prompt)])
            chosen, rejected = (
                reward.raw_scores(prompt, TokenBatch.from_lists([codec.response_ids(text)]))
                for text in (row.chosen, row.rejected)
            )
            z = chosen - rejected - (row.margin or 0.0)
            total = total + (torch.log1p(torch.exp(-z)) + 0.05 * (chosen + rejected) ** 2)[0]
        (total / len(rows)).backward()
    return float(total.detach()) / len(rows), {
        n: p.grad.clone() for n, p in trainer.parameters.items()
    }


def test_only_adapter_and_head_change(config: RewardModelConfig) -> None:
    trainer = with_random_adapter(config)
    lm = trainer.reward.lm
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    head = trainer.reward.head.weight.detach().clone()
    trainer.step()
    trainer.step()
    for name, tensor in lm.module.state_dict().items():
        assert torch.equal(tensor, before[name]) != (".reward." in name), name
    assert not torch.equal(trainer.reward.head.weight, head)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stopped_and_resumed_run_equals_one_that_was_not(
    config: RewardModelConfig, tmp_path: Path, dropout: float
) -> None:
    config = config.model_copy(update={"lora": LoRAConfig(rank=4, dropout=dropout)})
    whole = train_reward_model(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))

    def stop(trainer: Any, step: int, metrics: Mapping[str, float], samples: Any) -> None:
        if step in (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    for step in (1, 4):
        with pytest.raises(StoppedBySignal, match=f"step {step}"):
            train_reward_model(config, callbacks=[stop])
    resumed = train_reward_model(config)
    assert metric_lines(tmp_path / "out") == metric_lines(tmp_path / "whole")
    for file in ("head.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / folder / file) for folder in ("out", "whole"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.metrics["reward_model/shift"] == whole.metrics["reward_model/shift"]
    again = train_reward_model(config)
    assert again.metrics == resumed.metrics


@pytest.mark.parametrize("kind", ["mean", "mean_std", "none"])
def test_scores_are_normalized_on_demonstrations(
    config: RewardModelConfig, tmp_path: Path, kind: str
) -> None:
    rows = [{"input_text": f"post {n}", "output_text": f" {'cat ' * (n % 4)}9"} for n in range(40)]
    demonstrations = write_rows(tmp_path / "demonstrations.jsonl", rows)
    update = {"normalization": kind, "normalization_dataset": demonstrations}
    train_reward_model(config.model_copy(update=update))
    scorer = load_reward_model(config.output_dir, device="cpu")
    assert isinstance(scorer, RewardModel)
    prompts = [PromptText(row["input_text"], ((0, len(row["input_text"])),)) for row in rows]
    scores = scorer.score(prompts, [row["output_text"] for row in rows])
    if kind == "none":
        assert (scorer.record.shift, scorer.record.scale) == (0.0, 1.0)
        return
    assert scorer.record.shift != 0
    assert abs(scores.mean()) < 1e-4
    assert (abs(scores.std(correction=0) - 1) < 1e-4) == (kind == "mean_std")


@pytest.mark.parametrize("normalization", ["mean", "mean_std"])
def test_normalizing_again_changes_nothing(config: RewardModelConfig, normalization: str) -> None:
    config.normalization = normalization
    trainer = RewardModelTrainer(config)
    trainer.step()
    trainer.normalize()
    once = trainer.reward.record
    scores = trainer._reference_scores()
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert once.shift != 0
    trainer.normalize()
    assert trainer.reward.record == once


def test_scores_are_normalized_on_candidates_by_default(config: RewardModelConfig) -> None:
    train_reward_model(config)
    scorer = load_reward_model(config.output_dir, device="cpu")
    rows = preferences(200)
    prompts = [PromptText(r["input_text"], ((0, len(r["input_text"])),)) for r in rows]
    scores = [scorer.score(prompts, [row[f"candidate_{n}"] for row in rows]) for n in (0, 1)]
    assert abs(torch.cat(scores).mean()) < 0.1  # the held-out twentieth was not among them


def test_eval_dataset_is_held_out_instead(config: RewardModelConfig, tmp_path: Path) -> None:
    mixed = [*preferences(7, seed=3), {"input_text": "no candidates"}]
    given = config.model_copy(update={"eval_dataset": write_rows(tmp_path / "eval.jsonl", mixed)})
    trainer = RewardModelTrainer(given)
    assert (len(trainer.inputs.train), len(trainer.inputs.held_out)) == (200, 7)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"input_text": "no candidates"}])
    trainer = RewardModelTrainer(config.model_copy(update={"eval_dataset": prompts}))
    assert (len(trainer.inputs.train), len(trainer.inputs.held_out)) == (190, 10)


def test_the_best_weights_are_exported(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [0.7, 0.4, 0.2, 0.2, 0.6, 0.3]  # the third is the best; an equal one comes too late
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(trainer: RewardModelTrainer) -> dict[str, float]:
        return {"eval/log_loss": losses[trainer.step_index - 1]}

    def remember(trainer: Any, step: int, metrics: Mapping[str, float], samples: Any) -> None:
        seen.append({name: tensor.detach().clone() for name, tensor in trainer.parameters.items()})

    monkeypatch.setattr(RewardModelTrainer, "evaluate", evaluate)
    update = {"eval_every": 1, "train_steps": 6, "normalization": "none"}
    metrics = train_reward_model(config.model_copy(update=update), callbacks=[remember]).metrics
    assert (metrics["best_step"], metrics["best"], metrics["eval/log_loss"]) == (3, 0.2, 0.2)
    scorer = load_reward_model(config.output_dir, device="cpu", dtype="float32")
    assert isinstance(scorer, RewardModel)
    exported = dict(scorer.lm.named_trainable("reward")) | {"head.weight": scorer.head.weight}
    assert exported.keys() == seen[2].keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, seen[2][name]), name
    assert not torch.equal(seen[2]["head.weight"], seen[5]["head.weight"])


def test_full_fine_tuning(config: RewardModelConfig) -> None:
    update = {"lora": LoRAConfig(rank=0), "learning_rate": 1e-3}
    train_reward_model(config.model_copy(update=update))
    folder = Path(config.output_dir)
    assert (folder / "merged" / "model.safetensors").is_file()
    assert not (folder / "adapter").exists()
    assert scores_of(folder).isfinite().all()


def test_a_model_given_as_object(config: RewardModelConfig, arch: str, tmp_path: Path) -> None:
    by_name = train_reward_model(config)
    config = config.model_copy(update={"output_dir": str(tmp_path / "object")})
    by_object = train_reward_model(config, model=tiny_model(arch), tokenizer=make_tokenizer(arch))
    for name in ("reward_model/loss", "reward_model/shift", "eval/log_loss"):
        assert by_object.metrics[name] == by_name.metrics[name]
    assert torch.equal(scores_of(Path(by_object.output_dir)), scores_of(Path(by_name.output_dir)))


def test_what_is_wrong_is_said_before_anything_is_written(
    config: RewardModelConfig, tmp_path: Path
) -> None:
    rows = preferences(3)
    rows[1]["choice"] = 2
    bad = config.model_copy(update={"preference_dataset": write_rows(tmp_path / "bad.jsonl", rows)})
    with pytest.raises(InputError, match=r"bad\.jsonl:2: choice"):
        train_reward_model(bad)
    tight = config.model_copy(update={"instruction": "the cat sat " * 20})
    with pytest.raises(InputError, match="prompt_sequence_length"):
        train_reward_model(tight)
    assert not Path(config.output_dir).exists()


def test_dry_run_writes_nothing(
    config: RewardModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_reward_model(config.model_copy(update={"dry_run": True}))
    assert result.metrics == {}
    assert "6" in capsys.readouterr().out
    assert not Path(config.output_dir).exists()


def test_llama_is_exported_as_classifier_too(config: RewardModelConfig, arch: str) -> None:
    train_reward_model(config)
    assert (Path(config.output_dir) / "sequence_classifier").exists() == (arch == "llama")
