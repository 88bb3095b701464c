"""Train the small models that the quickstart starts from.

    python -m rlhf.quickstart.make_checkpoints t5 OUTPUT_DIR

A randomly initialized model, with a tokenizer made from the grammar, learns the demonstrations of
`rlhf.quickstart.corpus` with the project's own SFT. `rlhf/quickstart/assets` contains the resulting
`merged/` folder, with its weights rounded to bfloat16.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.config import LoRAConfig, SFTConfig
from rlhf.files.text import to_json, write_text
from rlhf.quickstart import corpus
from rlhf.quickstart.toy_models import Arch, make_toy_model
from rlhf.sft import train_sft

# Posts differ from the quickstart's; held-out posts are the same for every seed, by their hash.
CORPUS_SEED = 1000
PROMPT_LENGTH = 96
RESPONSE_LENGTH = 32
BATCH_SIZE = 64
STEPS = 1000
LEARNING_RATE = 2e-3

_SPECIAL = {"t5": ("<pad>", "</s>", "<unk>"), "llama": ("<unk>", "<s>", "</s>", "<pad>")}


def make_tokenizer(arch: Arch) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the corpus's words, and of ASCII characters for everything else.

    A unigram model in which words cost less than characters: every word of the grammar is one token
    (`▁Rome`), other ASCII text is spelled out, the rest is `<unk>`. Like real ones, T5's adds a
    space before the text and EOS after it; LLaMA's adds BOS before it and keeps spaces unchanged.
    """
    pieces = [word if word in ".,:?" else f"▁{word}" for word in corpus.vocabulary()]
    characters = ["▁", "\n", *map(chr, range(ord("!"), ord("~") + 1))]
    vocabulary = [(token, 0.0) for token in _SPECIAL[arch]] + [(piece, -1.0) for piece in pieces]
    vocabulary += [(character, -20.0) for character in characters if character not in pieces]
    tokens = [token for token, _ in vocabulary]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=tokens.index("<unk>")))
    spacing: Literal["always", "never"] = "always" if arch == "t5" else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spacing)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=spacing)
    added = "</s>" if arch == "t5" else "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if arch == "t5" else "<s> $A",
        special_tokens=[(added, tokens.index(added))],
    )
    roles = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    if arch == "llama":
        roles["bos"] = "<s>"
    names = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_checkpoint(
    arch: Arch,
    output_dir: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    start_from: str | Path | None = None,
) -> Path:
    """Train a checkpoint.

    Args:
        arch: "t5" or "llama".
        output_dir: Folder of the SFT stage; the corpus is written next to it, to `NAME-data`.
        steps: Training steps of 64 demonstrations each; no demonstration is repeated.
        seed: Seed of weights and order.
        start_from: A checkpoint to train further, instead of random weights.

    Returns:
        The folder of the finished checkpoint.
    """
    steps = steps or STEPS
    output = Path(output_dir)
    data = output.with_name(f"{output.name}-data")
    corpus_seed = CORPUS_SEED + (start_from is not None)
    corpus.write_corpus(data, corpus_seed, corpus.CorpusSizes(steps * BATCH_SIZE, 0, 0, 512))
    begin = data / "start"
    if start_from is None:
        tokenizer = make_tokenizer(arch)
        make_toy_model(arch, tokenizer, seed).save_pretrained(begin)
        tokenizer.save_pretrained(begin)
    else:
        begin = Path(start_from)
    train_sft(
        SFTConfig(
            base_model=str(begin),
            output_dir=str(output),
            dataset=str(data / "sft.jsonl"),
            batch_size=BATCH_SIZE,
            micro_batch_size=BATCH_SIZE,
            train_steps=steps,
            learning_rate=LEARNING_RATE,
            warmup_steps=min(100, steps // 10),
            weight_decay=0.01,
            lora=LoRAConfig(rank=0),
            prompt_sequence_length=PROMPT_LENGTH,
            target_sequence_length=RESPONSE_LENGTH,
            seed=seed,
            dtype="float32",
            log_every=10,
        )
    )
    return output / "merged"


def ship(checkpoint: str | Path, folder: str | Path) -> None:
    """Copy a checkpoint with bfloat16 weights, which halves the package size."""
    checkpoint, folder = Path(checkpoint), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    config = json.loads((checkpoint / "config.json").read_text()) | {"dtype": "bfloat16"}
    write_text(folder / "config.json", to_json(config))
    weights = load_file(checkpoint / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one of the shipped checkpoints."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.quickstart.make_checkpoints", description=main.__doc__
    )
    parser.add_argument("arch", choices=("t5", "llama"))
    parser.add_argument("output_dir")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start_from", help="checkpoint to train further")
    parser.add_argument("--ship", help="folder for a copy with bfloat16 weights")
    options = parser.parse_args(arguments)
    made = make_checkpoint(
        options.arch,
        options.output_dir,
        steps=options.steps,
        seed=options.seed,
        start_from=options.start_from,
    )
    if options.ship:
        ship(made, options.ship)


if __name__ == "__main__":
    main()
