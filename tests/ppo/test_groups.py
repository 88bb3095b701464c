"""Several responses per prompt in PPO: each prompt is read once, and nothing else changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.numerics import assert_same_gradients
from support.ppo import count_letters, make_config, make_trainer
from support.tiny import make_tokenizer, tiny_model
from torch import Tensor

from rlhf.errors import InputError
from rlhf.ppo.experience import Experience
from rlhf.ppo_trainer import PPOTrainer, train_ppo


def repeated(experience: Experience) -> Experience:
    """The same rows with a prompt for each."""
    prompts = experience.prompts.select_rows(experience.groups)
    return replace(experience, prompts=prompts, groups=torch.arange(len(experience)))


def gradients(trainer: PPOTrainer, experience: Experience) -> dict[str, Tensor]:
    trainer.optimizer.zero_grad()
    trainer.accumulate_gradients(experience)
    return {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_experience_and_gradients_are_those_of_repeated_prompts(
    arch: str, critic: str, micro_batch_size: int, tmp_path: Path
) -> None:
    fields = {"responses_per_prompt": 4, "critic": critic, "temperature": 1.5}
    trainer = make_trainer(arch, tmp_path, **fields, micro_batch_size=micro_batch_size)
    rollout = trainer.rollout(trainer.next_prompts())
    scores = trainer.score(rollout)
    grouped, _ = trainer.make_experience(rollout, scores)
    assert len(grouped.prompts) == 2
    assert grouped.groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    alone = replace(
        rollout, rows=[rollout.rows[g] for g in rollout.groups.tolist()],
        prompts=rollout.prompts.select_rows(rollout.groups), groups=torch.arange(8),
    )  # fmt: skip
    separate, _ = trainer.make_experience(alone, scores)
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        one, other = getattr(grouped, name), getattr(separate, name)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    expected = gradients(trainer, repeated(grouped))
    assert_same_gradients(gradients(trainer, grouped), expected)


def test_minibatches_hold_whole_groups(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        arch, tmp_path, responses_per_prompt=2, num_minibatches=2, ppo_epochs=3, train_steps=1
    )
    seen: list[list[int]] = []
    original = trainer.accumulate_gradients

    def watched(minibatch: Experience) -> Any:
        seen.append(torch.bincount(minibatch.groups).tolist())
        return original(minibatch)

    trainer.accumulate_gradients = watched  # type: ignore[method-assign]
    trainer.step()
    assert seen == [[2, 2]] * 6


def test_batch_size_counts_responses(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, responses_per_prompt=4)
    assert trainer.config.batch_size == 8
    rollout = trainer.rollout(trainer.next_prompts())
    assert (len(rollout.rows), len(rollout.prompts), len(rollout.responses)) == (2, 2, 8)
    assert len(rollout.prompt_texts) == 8
    assert rollout.prompt_texts[3] == rollout.rows[0].prompt
    assert len(set(rollout.texts)) > 2  # each with its own random numbers
    assert len(trainer.rollout(rollout.rows, evaluation=True).responses) == 2
    assert "8 episodes (2 prompts, 4 responses each)" in trainer.describe()[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"responses_per_prompt": 3}, "responses_per_prompt: 3 does not divide batch_size 8"),
        (
            {"responses_per_prompt": 4, "num_minibatches": 4},
            "num_minibatches: 4 does not divide batch_size 8 / responses_per_prompt 4",
        ),
    ],
)
def test_what_does_not_divide_is_named(
    fields: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **fields)


def test_the_number_of_responses_belongs_to_the_run(arch: str, tmp_path: Path) -> None:
    def run(n: int) -> None:
        train_ppo(
            make_config(tmp_path, responses_per_prompt=n, train_steps=1),
            reward_fn=count_letters, model=tiny_model(arch), tokenizer=make_tokenizer(arch),
        )  # fmt: skip

    run(2)
    with pytest.raises(InputError, match="responses_per_prompt"):
        run(4)
