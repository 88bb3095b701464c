"""Our decoding of a batch."""

import itertools
import time
from pathlib import Path
from typing import Any

import flops
from rlhf import ppo_trainer
from rlhf.config import LoRAConfig, StageConfig
from rlhf.data.batching import TokenBatch
from rlhf.models import generation
from rlhf.models.loading import load_language_model
from shapes import MODELS
from worker import Session, synchronize
from workers.common import read_batches
from workers.ours_ppo import force_lengths


def main(spec: dict[str, Any], session: Session) -> None:
    """Decode the same prompts again and again, with different random numbers."""
    folder, options, limit = Path(spec["folder"]), spec["options"], spec["lengths"]["response"]
    config = StageConfig(
        base_model=str(folder / "model"),
        output_dir="none",
        device=spec["device"],
        dtype=options["dtype"],
    )
    lm = load_language_model(config, trainable=False)
    adapter = "policy" if options["lora"] else None
    if adapter is not None:
        lm.add_adapter(adapter, LoRAConfig(**options["lora"]))
    force_lengths(None, lm.layout.eos_id)
    prompts = TokenBatch.from_lists(read_batches(folder)[0]["prompts"]).to(lm.device)

    def decode(draw: int, tokens: int) -> float:
        start = time.perf_counter()
        uniforms = ppo_trainer.rollout_uniforms(0, draw, range(len(prompts)), tokens)
        with lm.using(adapter):
            result = generation.generate(lm, prompts, max_new_tokens=tokens, uniforms=uniforms)
        synchronize()
        assert result.responses.ids.shape[1] == tokens
        return time.perf_counter() - start

    facts = {"dtype": options["dtype"], **costs(spec)}
    # Time to read the prompts, so that the rest is decoding; measured before the rounds, because a
    # shorter run between them would disturb their caches.
    prefill = min(decode(draw, 1) for draw in range(3)) if options.get("prefill") else None
    for draw in itertools.count():
        seconds = decode(draw, limit)
        parts = {} if prefill is None else {"prefill": prefill, "decode": seconds - prefill}
        session.round_done(parts or {"rollout": seconds}, facts, seconds)


def costs(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the FLOPs of the phases, and the bytes that decoding has to read."""
    model, lengths, options = MODELS[spec["model"]], spec["lengths"], spec["options"]
    prompt, response = lengths["prompt"], lengths["response"]
    lora = options["lora"] or {"rank": 0, "target_modules": ()}
    adapter = flops.Lora(lora["rank"], tuple(lora["target_modules"]))
    whole = flops.pass_over(model, prompt, [response], adapter, decoding=True).forward
    first = flops.pass_over(model, prompt, [1], adapter, decoding=True).forward
    width = {"float32": 4, "bfloat16": 2}[options["dtype"]]
    rows, batch = [(prompt, response)] * spec["batch"], spec["batch"]
    parts = {"prefill": first, "decode": whole - first}
    named = parts if options.get("prefill") else {"rollout": whole}
    return {
        "flops": {name: batch * one for name, one in named.items()},
        "decode_bytes": flops.decode_bytes(model, rows, width),
    }
