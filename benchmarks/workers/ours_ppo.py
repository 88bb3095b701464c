"""Our PPO iteration."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flops
from rlhf import ppo_trainer
from rlhf.config import PPOConfig
from rlhf.models import generation
from rlhf.models.families import FAMILIES
from rlhf.models.heads import ScalarHead
from rlhf.models.reward_model import RewardModel
from rlhf.training.optimizer import GroupedAdamW
from shapes import MODELS
from worker import Session
from workers.common import flops_lora, read_batches, training_fields
from workers.watching import seconds_inside

READS = ("with_states", "response_states", "final_states", "token_logprobs")
DECODES = ("prefill", "decode", "policy_logits")
END = 2.0  # replaces a uniform number: EOS goes here
BELOW_ONE = 1 - 2**-24


def main(spec: dict[str, Any], session: Session) -> None:
    """Run steps of a `PPOTrainer`."""
    folder, lengths = Path(spec["folder"]), spec["lengths"]
    scorer = folder / f"reward-{spec['side']}"
    config = PPOConfig(
        prompt_dataset=str(folder / "prompts.jsonl"),
        output_dir=str(folder / f"policy-{spec['side']}"),
        reward_model_path=str(scorer) if scorer.is_dir() else None,
        **training_fields(spec),
    )
    batches = read_batches(folder)
    trainer = ppo_trainer.PPOTrainer(config, reward_fn=None if scorer.is_dir() else count_words)
    ids = trainer.codec.prompts([row.prompt for row in trainer.next_prompts()]).tolists()
    assert ids == batches[0]["prompts"]  # those that the peer reads, once per group
    eos = trainer.policy.lm.layout.eos_id
    force_lengths([batch["lengths"] for batch in batches] if lengths["real"] else None, eos)
    facts = {
        "dtype": str(trainer.policy.lm.dtype).removeprefix("torch."),
        "flops": iteration_flops(trainer, spec["model"], batches),
        "outside_model_calls": share_outside_model_calls(trainer),
    }
    for batch in itertools.cycle(batches):
        metrics = trainer.step()
        told = statistics.mean(batch["lengths"])
        assert abs(metrics["ppo/response_length"] - told) < 1e-3, metrics["ppo/response_length"]
        named = {name: value for name, value in metrics.items() if name.startswith("time/")}
        phases = {name.removeprefix("time/"): value for name, value in named.items()}
        phases.pop("step")
        session.round_done(phases, facts)


def share_outside_model_calls(trainer: ppo_trainer.PPOTrainer) -> float:
    """Return the share of an iteration spent outside forward, backward and optimizer.

    That is sampling, rewards, advantages, batches, texts and Python between the calls, and merging
    the adapter into the weights for the rollout. Serves as another warm-up, of the first step.
    """
    methods = [(lm, name) for lm in FAMILIES.values() for name in (*READS, *DECODES)]
    methods += [(ScalarHead, "forward"), (torch.Tensor, "backward")]
    methods += [(GroupedAdamW, name) for name in ("grad_norms", "update")]
    trainer.make_step()  # the very first calls are slower
    seconds, inside = seconds_inside(trainer.make_step, methods)
    return 1 - inside / seconds


def count_words(_: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return a reward that costs nothing to compute."""
    return [float(len(response.split()) % 7) for response in responses]


def force_lengths(lengths: Sequence[Sequence[int]] | None, eos: int) -> None:
    """Make rollouts end at given lengths or, with None, at the limit; nowhere else.

    Args:
        lengths: Per step the lengths of the responses, in row order.
        eos: The id that ends a response.
    """
    uniforms, sample = ppo_trainer.rollout_uniforms, generation.sample

    def forced_uniforms(
        seed: int, iteration: int, rows: range, limit: int, purpose: str = "rollout"
    ) -> Tensor:
        drawn = uniforms(seed, iteration, rows, limit, purpose)
        if lengths is not None:
            ends = torch.tensor(lengths[iteration % len(lengths)])
            drawn[torch.arange(len(rows)), ends[list(rows)] - 1] = END
        return drawn

    def forced_sample(logits: Tensor, drawn: Tensor) -> Tensor:
        tokens = sample(logits, drawn.clamp(max=BELOW_ONE))
        tokens = torch.where(tokens == eos, eos + 1, tokens)
        return torch.where(drawn >= END, eos, tokens)

    ppo_trainer.rollout_uniforms, generation.sample = forced_uniforms, forced_sample


def iteration_flops(
    trainer: ppo_trainer.PPOTrainer, model: str, batches: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Return the FLOPs of the phases, averaged over the batches; the first is the warm-up's."""
    config, measured = trainer.config, batches[1:] or batches
    per_prompt = config.effective_responses_per_prompt
    groups = [
        (len(prompt), batch["lengths"][number * per_prompt : (number + 1) * per_prompt])
        for batch in measured
        for number, prompt in enumerate(batch["prompts"])
    ]
    lora = flops_lora(config.lora)
    scorers = trainer.rewards.scorers.values()
    phases = flops.ppo_phases(
        MODELS[model],
        groups,
        lora,
        critic=None if trainer.critic is None else config.critic,
        scorer=lora if any(isinstance(one, RewardModel) for one in scorers) else None,
        reference=config.kl_coeff > 0,
        epochs=config.ppo_epochs,
    )
    return {name: total / len(measured) for name, total in phases.items()}
