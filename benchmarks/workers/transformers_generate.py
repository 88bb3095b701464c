"""Decoding of a batch by transformers' `generate()`."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from worker import Session


def main(spec: dict[str, Any], session: Session) -> None:
    """Sample from the same prompts again and again."""
    folder, options = Path(spec["folder"]), spec["options"]
    model = load(folder / "model", options).to(spec["device"]).eval()
    batch = json.loads((folder / "batches.json").read_text())[0]["prompts"]
    prompts = torch.tensor(batch, device=spec["device"])
    config = model.config
    model.generation_config.eos_token_id = None  # nothing ends early, so nothing is checked
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=spec["lengths"]["response"],
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    mask = torch.ones_like(prompts)
    start = 1 if config.is_encoder_decoder else prompts.shape[1]
    while True:
        with torch.inference_mode():
            ids = model.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)
        assert ids.shape[1] == start + spec["lengths"]["response"]
        session.round_done()


def load(folder: Path, options: dict[str, Any]) -> Any:
    """Return the model, with an adapter if the options include one."""
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=getattr(torch, options["dtype"]))
    if options["lora"] is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = {"r": options["lora"]["rank"], "target_modules": options["lora"]["target_modules"]}
    return get_peft_model(model, LoraConfig(lora_alpha=16, **lora))
