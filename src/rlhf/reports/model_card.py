"""README.md of a stage's folder: its contents, how to load them, and measured results."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from rlhf.config import TrainingConfig
from rlhf.errors import InputError, StorageError
from rlhf.files.text import write_text
from rlhf.models.bases import find_base
from rlhf.models.families import family_of
from rlhf.stages import STAGES, Card, Stage
from rlhf.untrusted import as_code, as_markdown, without_secrets


def write_card(
    folder: Path,
    stage: str,
    config: TrainingConfig,
    metrics: Mapping[str, Any],
    data: Sequence[str] = (),
) -> None:
    """Write the model card of a finished stage.

    Args:
        folder: The stage's folder, with its artifacts in place.
        stage: Name of a stage whose record has a card.
        config: The stage's configuration.
        metrics: Final metrics; only numbers are listed.
        data: Lines about the data that was read, such as those of a data report.
    """
    record = STAGES[stage]
    assert record.card is not None
    base = as_code(config.base_model) if config.base_model else "a model given as an object"
    sections = [
        _front_matter(folder, record, config),
        f"# {record.card.title}",
        f"Trained with [rlhf](https://pypi.org/project/rlhf-ppo/) from {base}"
        + (f" at revision {as_code(config.revision)}" if config.revision else "")
        + ". All settings are in `config.yaml`, the course of training in `metrics.jsonl`.",
        "## Use\n\n" + _usage(folder, record.card, config),
        "## Training\n\n" + _table(_settings(config), ("setting", "value")),
    ]
    if data:
        sections.append("## Data\n\n" + "\n".join(f"- {as_markdown(line)}" for line in data))
    numbers = {name: value for name, value in metrics.items() if _is_number(value)}
    if numbers:
        rows = {name: f"{value:.4g}" for name, value in numbers.items()}
        sections.append("## Results\n\n" + _table(rows, ("metric", "value")))
    sections.append(
        f"## Limits\n\n{record.card.limits} Made for research; it was not checked for harmful, "
        "false or biased output. The licenses of the base model and of the data apply to it."
    )
    write_text(folder / "README.md", "\n\n".join(sections) + "\n")


def _front_matter(folder: Path, stage: Stage, config: TrainingConfig) -> str:
    lora = (folder / "adapter").is_dir()
    facts: dict[str, Any] = {
        "library_name": "peft" if lora else "transformers",
        "tags": ["rlhf", stage.command, *(["lora"] if lora else [])],
    }
    base = without_secrets(config.base_model or "")
    # The Hub accepts only its own ids here, and a folder's name would be useless to a reader.
    if (
        base
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
        and base[0] not in "/.~"
        and not Path(base).exists()
    ):
        facts = {"base_model": base, **facts}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _usage(folder: Path, card: Card, config: TrainingConfig) -> str:
    if card.holds == "reward model":
        return _reward_model_usage(folder)
    model_class = _auto_class(folder / "merged")
    code = f"""```python
from transformers import AutoTokenizer, {model_class}
tokenizer = AutoTokenizer.from_pretrained("merged")
model = {model_class}.from_pretrained("merged")
inputs = tokenizer("your prompt", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```"""
    if (folder / "merged" / "chat_template.jinja").is_file():
        code += f"\n\n{_chat_usage(config)}"
    if not (folder / "adapter").is_dir():
        return code
    code += "\n\n`adapter/` is the same as a LoRA adapter for plain peft on the base model"
    if not _is_adapter(config):
        return f"{code}."
    return code + (
        ", which is an adapter itself: rlhf merges that one when it loads this one; for plain "
        "peft, merge it first (`merge_and_unload`), or take `merged/`."
    )


def _chat_usage(config: TrainingConfig) -> str:
    options = ""
    if config.chat_template_options:
        options = ", with `chat_template_options` of `config.yaml` as further arguments"
    return f"""For a conversation, get `inputs` from the chat template{options}:

```python
turns = [{{"role": "user", "content": "your prompt"}}]
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
```"""


def _is_adapter(config: TrainingConfig) -> bool:
    """Return whether the base of a finished stage is an adapter, merged on loading."""
    try:
        return bool(config.base_model and find_base(config.base_model, config.revision).adapters)
    except (InputError, StorageError):  # it was there; the card is no reason to fail now
        return False


def _reward_model_usage(folder: Path) -> str:
    text = """```python
from rlhf.data.schema import PromptText
from rlhf.models.reward_model import load_reward_model
reward_model = load_reward_model("path/to/this/folder")
prompt = "your prompt"  # all of it may be shortened to fit
print(reward_model.score([PromptText(prompt, ((0, len(prompt)),))], ["a response"]))
```

A score is (raw - shift) / scale with the constants in `reward_model.json`."""
    if not (folder / "sequence_classifier").is_dir():
        return text
    return (
        text + " `sequence_classifier/` is the same model for `AutoModelForSequenceClassification`"
        "; that format has no place for the shift, so it gives the *raw* score. Feed it BOS, the "
        "prompt's ids, the response's ids and EOS (in a chat, `turn_end` of `reward_model.json` if "
        "it names one)."
    )


def _auto_class(merged: Path) -> str:
    try:
        config = AutoConfig.from_pretrained(merged, trust_remote_code=False)
        auto_class = family_of(config).auto_class
    except (OSError, ValueError, InputError):  # a model of a user's own class
        return "AutoModelForCausalLM"
    return str(auto_class.__name__)


def _settings(config: TrainingConfig) -> dict[str, Any]:
    lora = config.lora
    trained = f"LoRA, rank {lora.rank}, alpha {lora.effective_alpha:g}" if lora.rank else "all"
    return {
        "trained weights": trained,
        "learning rate": f"{config.effective_learning_rate:g}, {config.lr_scheduler}",
        "rows per step": config.batch_size,
        "prompt / response tokens": (
            f"{config.prompt_sequence_length} / {config.target_sequence_length}"
        ),
        "instruction": json.dumps(config.instruction, ensure_ascii=False),
        "seed": config.seed,
    }


def _table(rows: Mapping[str, Any], header: tuple[str, str]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    lines += [
        f"| {as_markdown(name)} | {as_markdown(str(value))} |" for name, value in rows.items()
    ]
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
