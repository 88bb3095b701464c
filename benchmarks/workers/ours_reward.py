"""A training step of our reward model."""

from pathlib import Path
from typing import Any

import flops
from rlhf.config import RewardModelConfig
from rlhf.reward_model import RewardModelTrainer
from shapes import MODELS
from worker import Session
from workers.common import flops_lora


def main(spec: dict[str, Any], session: Session) -> None:
    """Makes steps of a `RewardModelTrainer`."""
    folder, lengths = Path(spec["folder"]), spec["lengths"]
    config = RewardModelConfig(
        base_model=str(folder / "model"),
        preference_dataset=str(folder / "pairs.jsonl"),
        eval_dataset=str(folder / "held_out.jsonl"),
        output_dir=str(folder / f"reward-{spec['side']}"),
        device=spec["device"],
        batch_size=spec["batch"],
        prompt_sequence_length=lengths["prompt"],
        target_sequence_length=lengths["response"],
        train_steps=1000,
        **spec["options"]["config"],
    )
    trainer = RewardModelTrainer(config)
    responses = [lengths["response"]] * 2
    lora = flops_lora(config.lora)
    pair = flops.pass_over(MODELS[spec["model"]], lengths["prompt"], responses, lora, head=False)
    facts = {"dtype": config.dtype, "flops": {"update": spec["batch"] * pair.training}}
    while True:
        metrics = trainer.step()
        session.round_done({"update": metrics["time/update"]}, facts)
