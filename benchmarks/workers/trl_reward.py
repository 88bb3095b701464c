"""A training step of TRL 1.16.0's RewardTrainer."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

from worker import Session


class Rounds(TrainerCallback):
    """Report every step to the driver, and wait."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a round after a training step."""
        self._session.round_done()


def main(spec: dict[str, Any], session: Session) -> None:
    """Train until the driver ends it."""
    folder, base = Path(spec["folder"]), str(Path(spec["folder"]) / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
    )
    config = RewardConfig(
        output_dir=str(folder / "trl_reward"),
        per_device_train_batch_size=spec["batch"],
        max_steps=1000,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        use_cpu=spec["device"] == "cpu",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
        peft_config=lora,
        callbacks=[Rounds(session)],
    )
    trainer.train()
