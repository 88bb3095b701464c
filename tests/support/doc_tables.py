"""The tables in docs/vertex.md that are generated from the code.

`python tests/support/doc_tables.py` rewrites them.

Each is between `<!-- NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from transformers import LlamaConfig, PreTrainedConfig, T5Config

from rlhf.config import PipelineConfig
from rlhf.config.common import BASE_LEARNING_RATES
from rlhf.errors import InputError
from rlhf.vertex import machines
from rlhf.vertex.base_models import HUB_NAMES
from rlhf.vertex.parameters import PARAMETERS, REQUIRED, Parameter, description

PAGE = Path(__file__).parents[2] / "docs" / "vertex.md"
# What the compiled pipeline fills in itself, in words.
AT_RUN_TIME = {
    "project": "the pipeline's",
    "location": "the pipeline's",
    "image": "see there",
    "output_directory": "the pipeline root",
    "run_name": "the pipeline job's name and the step's number",
}


def flan_t5(d_model: int, d_ff: int, layers: int, heads: int) -> T5Config:
    return T5Config(
        d_model=d_model, d_ff=d_ff, num_layers=layers, num_decoder_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


# Shapes of the checkpoints behind Google's names, from their config.json.
SHAPES: dict[str, PreTrainedConfig] = {
    "t5-small": flan_t5(512, 1024, 8, 6),
    "t5-large": flan_t5(1024, 2816, 24, 16),
    "t5-xl": flan_t5(2048, 5120, 24, 32),
    "t5-xxl": flan_t5(4096, 10240, 24, 64),
    "llama-2-7b": LlamaConfig(),
    "llama-2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return "**required**"
    if parameter.name in AT_RUN_TIME:
        return AT_RUN_TIME[parameter.name]
    if parameter.default in ("", {}):
        return ""
    return f"`{json.dumps(parameter.default)}`".replace('"', "")


def parameters() -> str:
    """List every parameter, its meaning, its default, and the YAML field that it sets."""
    fields = {
        "output_directory": "`output_dir`, all but its last part",
        "run_name": "`output_dir`, last part",
        "reward_model_config": "`reward_model.*`",
        "ppo_config": "`ppo.*`",
        "inference_config": "`inference.*`",
    }
    rows = [
        (
            f"`{parameter.name}`",
            description(parameter).replace("|", "\\|"),
            default(parameter),
            fields.get(parameter.name, f"`{parameter.field}`"),
        )
        for parameter in PARAMETERS.values()
    ]
    return table(("parameter", "meaning", "default", "field of the YAML"), rows)


def machine_types() -> str:
    """List the machines that are chosen automatically, cheapest first."""
    rows = [
        (
            f"`{m.machine_type}`",
            f"{m.accelerator_count} x `{m.accelerator_type}`",
            f"{m.memory} GiB",
        )
        for m in machines.TABLE
    ]
    return table(("machine", "accelerator", "its memory"), rows)


def chosen(shape: PreTrainedConfig, *, checkpointing: bool) -> str:
    """Return the machine that a model gets with default settings."""
    config = PipelineConfig(
        base_model="a/b",
        preference_dataset="gs://bucket/rows.jsonl",
        output_dir="gs://bucket/runs/one",
        gradient_checkpointing=checkpointing,
    )
    with patch.object(machines, "read_model_config", lambda *_: shape):
        try:
            return f"`{machines.choose_machine(config)[0].machine_type}`"
        except InputError:
            return "none is large enough"


def models() -> str:
    """List the machines of Google's models with default settings."""
    rows = [
        (
            f"`{name}`",
            f"`{HUB_NAMES[name]}`",
            chosen(shape, checkpointing=False),
            chosen(shape, checkpointing=True),
        )
        for name, shape in SHAPES.items()
    ]
    head = ("name", "model", "machine", "with `gradient_checkpointing`")
    return table(head, rows)


def learning_rates() -> str:
    """List the rates at multiplier 1.0, ours and those of Google's public runs."""
    google = {"reward_model": "1e-4 with rank 4", "ppo": "5e-4 with rank 1", "critic": "unknown"}
    rows = [
        (name, f"{rates['lora']:g}", f"{rates['full']:g}", google[name])
        for name, rates in BASE_LEARNING_RATES.items()
        if name in google
    ]
    head = ("at multiplier 1.0", "ours, LoRA", "ours, full", "Google's public TL;DR runs")
    return table(head, rows)


TABLES = {
    "parameters": parameters,
    "machines": machine_types,
    "models": models,
    "learning rates": learning_rates,
}


def with_tables(text: str) -> str:
    """Return a page with its tables regenerated from the code."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        pattern = f"(?<={re.escape(start)}).*?(?={re.escape(end)})"
        parts = re.split(pattern, text, maxsplit=1, flags=re.S)
        assert len(parts) == 2, f"{PAGE.name} has no table {name!r}"
        text = make().join(parts)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
