"""Several rewards: their sum, their metrics, the critic that starts from them, their runs."""

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.ppo import INPUTS, count_letters
from support.rewards import ROWS, config_of, four_rewards, near_target, save_reward
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import Reward
from rlhf.config import PPOConfig
from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.reward_model import RewardModel, load_reward_model
from rlhf.ppo.experience import Rollout
from rlhf.ppo_trainer import PPOTrainer, train_ppo


def rollout_of(trainer: PPOTrainer) -> Rollout:
    """Responses of mixed lengths to rows in another order than the file's."""
    eos = trainer.policy.lm.layout.eos_id
    responses = TokenBatch.from_lists(
        [[20, 21, 22, eos], [eos], [23, 24], [30, 31, 32, 33, 34, 35], [40, eos], [50, 51, 52, eos]]
    )
    rows = [trainer.prompts[number] for number in (3, 0, 1, 2, 4, 0)]
    return Rollout(
        rows,
        trainer.codec.prompts([row.prompt for row in rows]),
        responses,
        torch.tensor([eos in row for row in responses.tolists()]),
        trainer.codec.decode_rows(responses.tolists()),
        torch.arange(len(rows)),
    )


def expected_parts(config: PPOConfig, rollout: Rollout) -> dict[str, torch.Tensor]:
    """Each reward computed on its own, without a policy that it could share anything with."""
    prompts = rollout.prompt_texts
    texts, finished = list(rollout.texts), rollout.finished.tolist()
    parts = {}
    for name, path in (
        ("reward_model", config.reward_model_path), ("second", config.rewards[0].path)
    ):  # fmt: skip
        alone = load_reward_model(str(path), device="cpu", dtype="float32")
        assert not alone.shares_base
        parts[name] = alone.score(prompts, texts, finished=finished)
    folder = config.rewards[1].path
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = []
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            row = tokenizer(prompt.text + text, return_tensors="pt")
            logits.append(model(**row).logits[0, 1])
    parts["toxicity"] = torch.stack(logits)
    targets = [ROWS[row.row].get("target") or 0 for row in rollout.response_rows]
    parts["near_target"] = torch.tensor(
        [-0.1 * abs(len(text) - target) for text, target in zip(texts, targets, strict=True)]
    )
    lengths = rollout.responses.lengths.tolist()
    parts["length"] = torch.tensor(
        [float(ended) - 0.5 * n for n, ended in zip(lengths, finished, strict=True)]
    )
    return parts


WEIGHTS = {"reward_model": 1, "second": -0.5, "toxicity": 0.25, "near_target": 2, "length": 0}


# --- the sum -------------------------------------------------------------------------------------


def test_the_score_is_the_weighted_sum_of_all_rewards(arch: str, tmp_path: Path) -> None:
    config, functions = four_rewards(arch, tmp_path)
    trainer = PPOTrainer(config, reward_fn=functions)
    rollout = rollout_of(trainer)
    expected = expected_parts(config, rollout)
    found = trainer.reward_scores(rollout)
    assert list(found) == list(WEIGHTS)
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=1e-4, atol=1e-5)
    total = sum(WEIGHTS[name] * scores for name, scores in expected.items())
    torch.testing.assert_close(trainer.score(rollout), total, rtol=1e-4, atol=1e-5)
    metrics = trainer.step()
    assert {name for name in metrics if name.startswith("ppo/reward_")} == {
        f"ppo/reward_{name}" for name in WEIGHTS
    }
    weighted = sum(WEIGHTS[name] * metrics[f"ppo/reward_{name}"] for name in WEIGHTS)
    assert metrics["ppo/score"] == pytest.approx(weighted, abs=1e-4)
    samples: list[Any] = []
    trainer.log_samples = samples.extend  # type: ignore[method-assign]
    trainer.step()
    for sample in samples:
        total = sum(WEIGHTS[name] * score for name, score in sample["rewards"].items())
        assert sample["score"] == pytest.approx(total, abs=1e-4)
    assert samples


@pytest.mark.parametrize("per_prompt", [2, 4])
def test_responses_to_one_prompt_are_scored_as_if_each_were_alone(
    arch: str, per_prompt: int, tmp_path: Path
) -> None:
    config, functions = four_rewards(
        arch, tmp_path, responses_per_prompt=per_prompt, advantage="rloo"
    )
    trainer = PPOTrainer(config, reward_fn=functions)
    rollout = trainer.rollout(trainer.next_prompts())
    assert len(rollout.texts) == per_prompt * len(rollout.rows) == 8
    found = trainer.reward_scores(rollout)
    for name, scores in expected_parts(config, rollout).items():
        torch.testing.assert_close(found[name], scores, rtol=1e-4, atol=1e-5)


def test_reward_models_share_the_base_under_names_of_their_own(arch: str, tmp_path: Path) -> None:
    config, functions = four_rewards(arch, tmp_path)
    trainer = PPOTrainer(config, reward_fn=functions)
    models = [trainer.rewards.scorers[name] for name in ("reward_model", "second")]
    assert all(isinstance(one, RewardModel) and one.shares_base for one in models)
    assert [one.adapter for one in models] == ["reward", "reward_2"]
    assert {one.lm for one in models} == {trainer.policy.lm}
    adapters = ("reward", "reward_2")
    before = {
        f"{adapter} {name}": weight.detach().clone()
        for adapter in adapters
        for name, weight in trainer.policy.lm.named_trainable(adapter)
    }
    trainer.step()
    for adapter in adapters:
        for name, weight in trainer.policy.lm.named_trainable(adapter):
            assert torch.equal(weight, before[f"{adapter} {name}"])


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PPOTrainer]:
    made = {}
    for arch in ("t5", "llama"):
        config, functions = four_rewards(arch, tmp_path_factory.mktemp(arch))
        made[arch] = PPOTrainer(config, reward_fn=functions)
    return made


@pytest.mark.parametrize("arch", ["t5", "llama"])
@given(order=st.permutations(range(6)), size=st.integers(1, 7))
@settings(max_examples=8)
def test_order_and_batch_size_do_not_matter(
    arch: str, trainers: dict[str, PPOTrainer], order: list[int], size: int
) -> None:
    trainer = trainers[arch]
    rollout = rollout_of(trainer)
    expected = trainer.rewards.scores(rollout, 32)
    mixed = Rollout(
        [rollout.rows[row] for row in order],
        rollout.prompts.select_rows(order),
        rollout.responses.select_rows(order),
        rollout.finished[order],
        [rollout.texts[row] for row in order],
        rollout.groups,
    )
    for name, scores in trainer.rewards.scores(mixed, size).items():
        torch.testing.assert_close(scores, expected[name][order], rtol=1e-4, atol=1e-5)


def test_several_responses_to_a_prompt_get_their_own_row(arch: str, tmp_path: Path) -> None:
    """Responses name their prompt by `groups`, in any order."""
    seen: dict[str, Any] = {}

    def record(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, responses=responses)
        return [0.0] * len(responses)

    trainer = PPOTrainer(config_of(arch, tmp_path), reward_fn=record)
    rows = [trainer.prompts[3], trainer.prompts[1]]
    eos = trainer.policy.lm.layout.eos_id
    responses = TokenBatch.from_lists([[20, eos], [21, 22, 23], [eos]])
    prompts = trainer.codec.prompts([row.prompt for row in rows])
    finished = torch.tensor([True, False, True])
    groups = torch.tensor([1, 0, 1])
    rollout = Rollout(rows, prompts, responses, finished, ["a", "b", ""], groups)
    trainer.rewards.scores(rollout, 8)
    lengths = prompts.lengths.tolist()
    assert seen == {
        "prompts": [INPUTS[1], INPUTS[3], INPUTS[1]],
        "responses": ["a", "b", ""],
        "input_text": [INPUTS[1], INPUTS[3], INPUTS[1]],
        "target": [None, 3, None],
        "tags": [["t1"], ["t3"], ["t1"]],
        "prompt_tokens": [lengths[1], lengths[0], lengths[1]],
        "response_tokens": [2, 3, 1],
        "finished": [True, False, True],
    }


def test_async_functions_run_while_the_models_score(arch: str, tmp_path: Path) -> None:
    """The function waits for the model's score: called after or before it, neither would end."""
    scored = threading.Event()

    async def waits(prompts: Any, responses: Any) -> list[float]:
        await asyncio.to_thread(scored.wait)
        return [1.0] * len(responses)

    path = save_reward(arch, tmp_path, "model", 4)
    trainer = PPOTrainer(config_of(arch, tmp_path, rewards=[path]), reward_fn=waits)
    model = trainer.rewards.scorers["model"]
    score = model.score

    def score_and_tell(*texts: Any, **options: Any) -> torch.Tensor:
        found = score(*texts, **options)
        scored.set()
        return found

    model.score = score_and_tell  # type: ignore[method-assign]
    found = trainer.reward_scores(rollout_of(trainer))
    assert found["waits"].tolist() == [1.0] * 6


def test_a_single_reward_is_the_score_and_has_no_metric_of_its_own(
    arch: str, tmp_path: Path
) -> None:
    config = config_of(arch, tmp_path)
    trainer = PPOTrainer(config, reward_fn=count_letters)
    assert not any("reward_" in name for name in trainer.step())
    halved = config.model_copy(update={"output_dir": str(tmp_path / "halved")})
    weighted = PPOTrainer(halved, reward_fn=Reward(count_letters, weight=0.5))
    metrics = weighted.step()
    assert metrics["ppo/score"] == pytest.approx(0.5 * metrics["ppo/reward_count_letters"])


def test_evaluation_uses_the_same_rewards(arch: str, tmp_path: Path) -> None:
    config, functions = four_rewards(arch, tmp_path)
    config.eval_dataset = config.prompt_dataset
    metrics = PPOTrainer(config, reward_fn=functions).evaluate()
    weighted = sum(WEIGHTS[name] * metrics[f"eval/reward_{name}"] for name in WEIGHTS)
    assert metrics["eval/score"] == pytest.approx(weighted, abs=1e-4)


# --- the critic ----------------------------------------------------------------------------------


def test_the_critic_starts_as_the_heaviest_reward_model_times_its_weight(
    arch: str, tmp_path: Path
) -> None:
    light, heavy = (save_reward(arch, tmp_path, name, seed) for name, seed in (("a", 4), ("b", 5)))
    rewards = [{"path": light, "weight": 1.0}, {"path": heavy, "weight": -3.0}]
    config = config_of(arch, tmp_path, rewards=rewards)
    trainer = PPOTrainer(config, reward_fn=Reward(count_letters, weight=9.0))
    rollout = rollout_of(trainer)
    responses = trainer.codec.responses(rollout.texts, rollout.finished.tolist())
    assert trainer.critic is not None
    with trainer.critic.role.active() as lm, torch.no_grad():
        states = lm.response_states(rollout.prompts, responses)
    last = states[torch.arange(len(states)), responses.lengths]
    expected = -3.0 * trainer.reward_scores(rollout)["b"]
    assert expected.std() > 0.01
    torch.testing.assert_close(trainer.critic.head(last).detach(), expected, rtol=1e-4, atol=1e-4)


def test_under_full_fine_tuning_the_critic_starts_with_the_weight_too(
    arch: str, tmp_path: Path
) -> None:
    path = save_reward(arch, tmp_path, "a", 4)
    config = config_of(
        arch, tmp_path, rewards=[{"path": path, "weight": 0.5}], lora={"rank": 0},
        learning_rate=1e-3,
    )  # fmt: skip
    trainer = PPOTrainer(config, reward_fn=count_letters)
    rollout = rollout_of(trainer)
    responses = trainer.codec.responses(rollout.texts, rollout.finished.tolist())
    assert trainer.critic is not None
    with trainer.critic.role.active() as lm, torch.no_grad():
        states = lm.response_states(rollout.prompts, responses)
    last = states[torch.arange(len(states)), responses.lengths]
    expected = 0.5 * trainer.reward_scores(rollout)["a"]
    torch.testing.assert_close(trainer.critic.head(last).detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_reward_that_is_only_logged_gives_the_critic_no_start(arch: str, tmp_path: Path) -> None:
    path = save_reward(arch, tmp_path, "a", 4)
    config = config_of(arch, tmp_path, rewards=[{"path": path, "weight": 0}])
    trainer = PPOTrainer(config, reward_fn=count_letters)
    assert trainer.critic is not None
    assert not trainer.critic.head.weight.any()
    rollout = rollout_of(trainer)
    expected = count_letters([row.prompt.text for row in rollout.rows], rollout.texts)
    assert trainer.score(rollout).tolist() == pytest.approx(expected)


# --- runs ----------------------------------------------------------------------------------------


def lines_without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]


def test_stopped_and_resumed_with_several_rewards_is_never_stopped(tmp_path: Path) -> None:
    config, functions = four_rewards("llama", tmp_path, train_steps=3, save_every=3)
    train_ppo(config, reward_fn=functions)

    def stop(trainer: Any, step: int, metrics: object, samples: object) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = config.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    with pytest.raises(StoppedBySignal):
        train_ppo(stopped, reward_fn=functions, callbacks=[stop])
    train_ppo(stopped, reward_fn=functions)
    whole, resumed = Path(config.output_dir), Path(stopped.output_dir)
    assert lines_without_times(whole / "metrics.jsonl") == lines_without_times(
        resumed / "metrics.jsonl"
    )
    name = "adapter/adapter_model.safetensors"
    one, other = load_file(whole / name), load_file(resumed / name)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_with_other_rewards_is_another_run(tmp_path: Path) -> None:
    config, functions = four_rewards("t5", tmp_path, train_steps=1)
    result = train_ppo(config, reward_fn=functions)
    again = train_ppo(config, reward_fn=functions)
    assert again.metrics["ppo/score"] == result.metrics["ppo/score"]

    def refused(functions: Any = functions, **fields: Any) -> None:
        entries = [entry.model_dump() | fields for entry in config.rewards[:1]]
        entries += [entry.model_dump() for entry in config.rewards[1:]]
        changed = PPOConfig(**config.model_dump() | {"rewards": entries})
        with pytest.raises(InputError, match=r"(?s)rewards.*changed from .*holds a run made with"):
            train_ppo(changed, reward_fn=functions)

    refused(weight=-0.4)
    refused(name="renamed")
    refused([Reward(near_target, weight=2.5), functions[1]])
    refused([Reward(near_target, weight=2.0, name="other"), functions[1]])
    refused(functions[:1])
    head = Path(str(config.rewards[0].path)) / "head.safetensors"
    moved = tmp_path / "moved"
    Path(str(config.rewards[0].path)).rename(moved)
    entries = [{**config.rewards[0].model_dump(), "path": str(moved), "name": "second"}]
    entries += [entry.model_dump() for entry in config.rewards[1:]]
    elsewhere = PPOConfig(**config.model_dump() | {"rewards": entries})
    assert (
        train_ppo(elsewhere, reward_fn=functions).metrics["ppo/score"]
        == (result.metrics["ppo/score"])
    )
    content = (moved / head.name).read_bytes()
    (moved / head.name).write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match=r"rewards \(content\): changed"):
        train_ppo(elsewhere, reward_fn=functions)


def test_columns_belong_to_the_run_only_if_they_are_read(tmp_path: Path) -> None:
    def of_texts(prompts: Any, responses: Any) -> list[float]:
        return [0.0] * len(responses)

    config = config_of("t5", tmp_path, train_steps=1)
    reading = config.model_copy(update={"output_dir": str(tmp_path / "reading")})
    train_ppo(config, reward_fn=of_texts)
    train_ppo(reading, reward_fn=near_target)
    rows = [row | {"tags": ["changed"]} for row in ROWS]
    Path(str(config.prompt_dataset)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_ppo(config, reward_fn=of_texts)  # already finished
    with pytest.raises(InputError, match=r"prompt_dataset \(content\): changed"):
        train_ppo(reading, reward_fn=near_target)
