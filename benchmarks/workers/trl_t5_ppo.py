"""A PPO iteration of TRL 0.11.4, the last release whose PPO supports T5.

The value head sits on the policy's trunk; the reference is the policy without its adapter.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

from worker import Session
from workers.forcing import ForcedLengths, repeated


def main(spec: dict[str, Any], session: Session) -> None:
    """Generate and run PPO steps until the driver ends it."""
    folder, batch = Path(spec["folder"]), spec["batch"]
    base = folder / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        str(base), peft_config=LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=["q", "v"])
    )
    config = PPOConfig(
        batch_size=batch,
        mini_batch_size=batch,
        ppo_epochs=4,
        learning_rate=1e-4,
        init_kl_coef=0.1,
        adap_kl_ctrl=False,
        max_grad_norm=1.0,
        accelerator_kwargs={"cpu": spec["device"] == "cpu"},
    )
    trainer = PPOTrainer(config, model, None, tokenizer)
    steps = json.loads((folder / "batches.json").read_text())
    processor = ForcedLengths(None, 1, tokenizer.eos_token_id)
    settings = {
        "max_new_tokens": spec["lengths"]["response"],
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "logits_processor": LogitsProcessorList([processor]),
    }
    number = 0
    while True:
        prompts = steps[number % len(steps)]["prompts"]
        queries = [torch.tensor(ids) for ids in repeated(prompts, spec["responses_per_prompt"])]
        number += 1
        responses = trainer.generate(queries, batch_size=batch, **settings)
        # Decoding starts from one token, which TRL counts as part of the response.
        assert {len(ids) for ids in responses} == {spec["lengths"]["response"] + 1}
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        trainer.step(queries, responses, [torch.tensor(score(text)) for text in texts])
        session.round_done()


def score(text: str) -> float:
    """Return a reward that costs nothing to compute."""
    return float(len(text.split()) % 7)
