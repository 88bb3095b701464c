"""Random weights, texts and reward models of a comparison, shared by all of its sides.

    python assets.py FOLDER SPEC        SPEC: JSON, see `rounds.make_assets`

FOLDER gets model/ (which both transformers 4.44 and 5 can load), prompts.jsonl and pairs.jsonl for
us, batches.json and pairs.json with the same as token ids for peers (each prompt once, responses
to the same prompt next to each other), and reward-SIDE/ for each of
our sides that needs a reward model.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

import rlhf
from rlhf.config import RewardModelConfig
from rlhf.data.batching import rows_for_step
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.models.families import FAMILIES
from rlhf.models.heads import ScalarHead
from rlhf.models.loading import load_language_model
from rlhf.models.reward_model import RewardModel
from rlhf.quickstart.corpus import vocabulary
from rlhf.reward_model import ADAPTER, make_record
from shapes import MODELS, Lengths, Llama, Model

SEED = 0
PAIR_STEPS = 8  # training steps before pairs repeat
HELD_OUT_PAIRS = 16


def make_model(model: Model, tokenizer: PreTrainedTokenizerBase, device: str) -> PreTrainedModel:
    """Return a randomly initialized model whose vocabulary may exceed the tokenizer's."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(SEED)
    with torch.device(device):
        if isinstance(model, Llama):
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=model.vocab,
                    hidden_size=model.hidden,
                    intermediate_size=model.ffn,
                    num_hidden_layers=model.layers,
                    num_attention_heads=model.heads,
                    num_key_value_heads=model.kv_heads,
                    max_position_embeddings=2048,
                    tie_word_embeddings=model.tied,
                    bos_token_id=tokenizer.bos_token_id,
                    **special,
                )
            )
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=model.vocab,
                d_model=model.hidden,
                d_kv=model.head_width,
                d_ff=model.ffn,
                num_layers=model.layers,
                num_heads=model.heads,
                dropout_rate=0.0,
                decoder_start_token_id=tokenizer.pad_token_id,
                **special,
            )
        )


def save_model(model: Model, folder: Path, device: str) -> PreTrainedTokenizerBase:
    """Write weights (bfloat16 on a GPU, where fp32 would be too large) and a toy tokenizer."""
    shipped = Path(rlhf.__file__).parent / "quickstart" / "assets" / f"toy_{model.arch}"
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    make_model(model, tokenizer, device).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)
    return tokenizer


class Texts:
    """Texts with any given number of tokens.

    Args:
        codec: The model's codec.
    """

    def __init__(self, codec: PromptCodec) -> None:
        self.codec = codec
        self._words = [word for word in vocabulary() if len(codec.response_ids(f" {word}")) == 2]
        self._source = random.Random(SEED)

    def of(self, tokens: int) -> str:
        """Return words of one token each."""
        return "".join(f" {word}" for word in self._source.choices(self._words, k=tokens))

    def prompt(self, tokens: int) -> str:
        """Return a prompt; BOS (or T5's EOS) counts as one of its tokens."""
        text = self.of(tokens - 1)
        assert len(self.prompt_ids(text)) == tokens
        return text

    def response(self, tokens: int) -> str:
        """Return a response; its EOS counts as one of its tokens."""
        text = self.of(tokens - 1)
        assert len(self.codec.response_ids(text)) == tokens
        return text

    def prompt_ids(self, text: str) -> list[int]:
        """Return ids as our side reads them."""
        return self.codec.prompt_ids(PromptText(text, ((0, len(text)),)))


def write_batches(
    folder: Path, texts: Texts, lengths: Lengths, prompts: int, per_prompt: int, steps: int
) -> None:
    """Write prompts, in the order of our trainer's steps, and the lengths of their responses.

    Args:
        folder: Where to write.
        texts: Source of texts.
        lengths: Lengths of prompts and responses.
        prompts: Prompts of a step.
        per_prompt: Responses to each of them.
        steps: Steps until they repeat.
    """
    drawn = lengths.draw(steps * prompts * per_prompt, SEED)
    groups = [drawn[start : start + per_prompt] for start in range(0, len(drawn), per_prompt)]
    rendered = [texts.prompt(group[0][0]) for group in groups]
    _write_rows(folder / "prompts.jsonl", [{"input_text": text} for text in rendered])
    order = [rows_for_step(len(groups), prompts, step, SEED) for step in range(steps)]
    batches = [
        {
            "texts": [rendered[row] for row in rows],
            "prompts": [texts.prompt_ids(rendered[row]) for row in rows],
            "lengths": [response for row in rows for _, response in groups[row]],
        }
        for rows in order
    ]
    (folder / "batches.json").write_text(json.dumps(batches))


def write_pairs(folder: Path, texts: Texts, lengths: Lengths, batch: int) -> None:
    """Write preference pairs for us, and their ids for a peer."""
    rows, ids = [], []
    for number in range(PAIR_STEPS * batch + HELD_OUT_PAIRS):
        prompt = texts.prompt(lengths.prompt)
        pair = [texts.response(lengths.response) for _ in range(2)]
        row = {"input_text": prompt, "candidate_0": pair[0], "candidate_1": pair[1], "choice": 0}
        rows.append(row)
        if number < PAIR_STEPS * batch:
            chosen, rejected = (texts.codec.response_ids(text) for text in pair)
            prompt_ids = texts.prompt_ids(prompt)
            both = {"chosen_ids": prompt_ids + chosen, "rejected_ids": prompt_ids + rejected}
            ids.append(both)
    _write_rows(folder / "pairs.jsonl", rows[: PAIR_STEPS * batch])
    _write_rows(folder / "held_out.jsonl", rows[PAIR_STEPS * batch :])
    (folder / "pairs.json").write_text(json.dumps(ids))


def save_reward_model(
    folder: Path, name: str, lora: dict[str, Any] | None, lengths: Lengths, device: str
) -> None:
    """Write reward-NAME/: an untrained adapter and head on the base, in our format."""
    config = RewardModelConfig(
        base_model=str(folder / "model"),
        preference_dataset="none",
        output_dir="none",
        device=device,
        dtype="float32" if device == "cpu" else "bfloat16",
        prompt_sequence_length=lengths.prompt,
        target_sequence_length=lengths.response,
        lora=lora or {},
    )
    lm = load_language_model(config, trainable=False)
    lm.add_adapter(ADAPTER, config.lora, seed=SEED)
    head = ScalarHead(lm.hidden_size, seed=SEED).to(lm.device)
    record = make_record(config, lm, PromptRenderer.for_tokenizer(lm.tokenizer))
    RewardModel(lm, ADAPTER, head, record).save(folder / f"reward-{name}")


def main(folder: Path, spec: dict[str, Any]) -> None:
    """Write everything."""
    model, lengths = MODELS[spec["model"]], Lengths(**spec["lengths"])
    tokenizer = save_model(model, folder / "model", spec["device"])
    layout = FAMILIES[model.arch].prompt_layout(tokenizer)
    texts = Texts(PromptCodec(tokenizer, layout, lengths.prompt, lengths.response))
    per_prompt = spec["responses_per_prompt"]
    prompts = spec["batch"] // per_prompt
    write_batches(folder, texts, lengths, prompts, per_prompt, spec["steps"])
    if spec["pairs"]:
        write_pairs(folder, texts, lengths, spec["batch"])
    for name, lora in spec["reward_models"].items():
        save_reward_model(folder, name, lora, lengths, spec["device"])


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
