"""A rollout of TRL 1.16.0's RLOOTrainer with all its updates; transformers generates.

The policy has LoRA (without it, the same weights are the reference), and the reward model is a
second copy; there is no value model. Settings are the fastest that fit: whole batches, no gradient
checkpointing.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RLOOConfig, RLOOTrainer

from worker import Session

EPOCHS = 4  # updates on each rollout, as many as our default


class Rounds(TrainerCallback):
    """Report every rollout to the driver, and wait."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """End a round after the last update on a rollout."""
        if state.global_step % EPOCHS == 0:
            self._session.round_done()


def main(spec: dict[str, Any], session: Session) -> None:
    """Train until the driver ends it."""
    folder, batch, lengths = Path(spec["folder"]), spec["batch"], spec["lengths"]
    assert not lengths["real"], "lengths that differ are not forced here"
    base = str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    config = RLOOConfig(
        output_dir=str(folder / "trl_rloo"),
        per_device_train_batch_size=batch,
        num_generations=spec["responses_per_prompt"],
        num_iterations=EPOCHS,
        max_steps=1000 * EPOCHS,
        max_completion_length=lengths["response"],
        generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},
        beta=0.1,
        learning_rate=1e-4,
        shuffle_dataset=False,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        use_cpu=spec["device"] == "cpu",
        disable_tqdm=True,
    )
    batches = json.loads((folder / "batches.json").read_text())
    trainer = RLOOTrainer(
        model=policy,
        args=config,
        processing_class=tokenizer,
        reward_funcs=reward,
        reward_processing_classes=tokenizer,
        train_dataset=Dataset.from_dict(
            {"prompt": [text for one in batches for text in one["texts"]]}
        ),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
        callbacks=[Rounds(session)],
    )
    check_rollouts(trainer, [one["prompts"] for one in batches], lengths["response"])
    trainer.train()


def check_rollouts(trainer: Any, prompts: list[list[list[int]]], limit: int) -> None:
    """Check that each rollout reads a step's prompts, and that nothing ends before the limit."""
    generate, number = trainer._generate, 0

    def checked(texts: list[str]) -> Any:
        nonlocal number
        output = generate(texts)
        wanted, repeats = prompts[number % len(prompts)], trainer.num_generations
        assert output[0] == [ids for ids in wanted for _ in range(repeats)]
        assert {len(ids) for ids in output[1]} == {limit}
        number += 1
        return output

    trainer._generate = checked
