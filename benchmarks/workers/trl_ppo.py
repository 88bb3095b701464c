"""A PPO iteration of TRL 1.12.0, the last release that has PPO.

Three copies of the model: the policy with LoRA (without it, the same weights are the reference), a
fully trained value model, and a reward model; TRL has no other way. Settings are the fastest that
fit: whole batches, no gradient checkpointing.
"""

import itertools
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
    LogitsProcessorList,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from worker import Session
from workers.forcing import ForcedLengths, repeated


class Rounds(TrainerCallback):
    """Report every step to the driver, and wait."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a round after a PPO iteration."""
        self._session.round_done()


class Batches:
    """The comparison's batches in order, left-padded, in place of TRL's loader.

    Args:
        batches: Prompts of each step.
        repeats: Responses per prompt; the prompt is repeated for each, since TRL's PPO has no
            groups.
        tokenizer: Pads.
    """

    def __init__(self, batches: list[dict[str, Any]], repeats: int, tokenizer: Any) -> None:
        self._batches = batches
        self._repeats = repeats
        self._tokenizer = tokenizer

    def __iter__(self) -> Any:
        for batch in self._batches:
            ids = repeated(batch["prompts"], self._repeats)
            yield self._tokenizer.pad({"input_ids": ids}, return_tensors="pt")


def main(spec: dict[str, Any], session: Session) -> None:
    """Train until the driver ends it."""
    folder, batch, lengths = Path(spec["folder"]), spec["batch"], spec["lengths"]
    base, device = str(folder / "model"), spec["device"]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    batches = json.loads((folder / "batches.json").read_text())
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    config = PPOConfig(
        output_dir=str(folder / "trl_ppo"),
        per_device_train_batch_size=batch,
        local_rollout_forward_batch_size=batch,
        gradient_accumulation_steps=1,
        num_ppo_epochs=4,
        num_mini_batches=1,
        total_episodes=1000 * batch,
        response_length=lengths["response"],
        stop_token="eos" if lengths["real"] else None,
        temperature=1.0,
        kl_coef=0.1,
        learning_rate=1e-4,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        use_cpu=device == "cpu",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": batches[0]["prompts"]}),
        eval_dataset=Dataset.from_dict({"input_ids": batches[0]["prompts"]}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
        callbacks=[Rounds(session)],
    )
    trainer.dataloader = Batches(batches, spec["responses_per_prompt"], tokenizer)
    told = [batch["lengths"] for batch in batches]
    if lengths["real"]:
        force_lengths(trainer.policy_model, told, tokenizer)
    else:
        check_lengths(trainer.policy_model, lengths["response"])
    trainer.train()


def check_lengths(policy: Any, limit: int) -> None:
    """Check that nothing ends before the limit."""
    generate = policy.generate

    def checked(**inputs: Any) -> Any:
        output = generate(**inputs)
        assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + limit
        return output

    policy.generate = checked


def force_lengths(policy: Any, lengths: list[list[int]], tokenizer: Any) -> None:
    """Make the responses of each iteration as long as `lengths` says, and check it."""
    generate, coming = policy.generate, itertools.cycle(lengths)

    def forced(**inputs: Any) -> Any:
        width = inputs["input_ids"].shape[1]
        told = next(coming)
        processor = ForcedLengths(told, width, tokenizer.eos_token_id)
        output = generate(**inputs, logits_processor=LogitsProcessorList([processor]))
        ended = output.sequences[:, width:] == tokenizer.eos_token_id
        assert (ended.int().argmax(1) + 1).tolist() == told
        return output

    policy.generate = forced
