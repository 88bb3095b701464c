"""Our reward model's training step."""

from pathlib import Path
from typing import Any

import flops
from rlhf.config import RewardModelConfig
from rlhf.reward_model import RewardModelTrainer
from shapes import MODELS
from worker import Session
from workers.common import flops_lora, training_fields


def main(spec: dict[str, Any], session: Session) -> None:
    """Run steps of a `RewardModelTrainer`."""
    folder, lengths = Path(spec["folder"]), spec["lengths"]
    config = RewardModelConfig(
        preference_dataset=str(folder / "pairs.jsonl"),
        eval_dataset=str(folder / "held_out.jsonl"),
        output_dir=str(folder / f"reward-{spec['side']}"),
        **training_fields(spec),
    )
    trainer = RewardModelTrainer(config)
    responses = [lengths["response"]] * 2
    lora = flops_lora(config.lora)
    pair = flops.pass_over(MODELS[spec["model"]], lengths["prompt"], responses, lora, head=False)
    facts = {"dtype": config.dtype, "flops": {"update": spec["batch"] * pair.training}}
    while True:
        metrics = trainer.step()
        session.round_done({"update": metrics["time/update"]}, facts)
