"""The special tokens that a tokenizer puts around a text.

Having a BOS or EOS does not imply adding it: SmolLM2, Qwen and Yi name one but add none.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.files.text import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "1", ".")
# Flags that make other tokenizer classes add their own tokens around a text after loading.
_FLAGS = ("add_bos_token", "add_eos_token")


def added_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that `tokenizer(text)` puts before and after a text, found by trying."""
    for probe in _PROBES:
        encoded = tokenizer(probe, return_special_tokens_mask=True, verbose=False)
        ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        if 0 in added:
            end = len(added) - added[::-1].index(0)
            return tuple(ids[: added.index(0)]), tuple(ids[end:])
    return (), ()


def save_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    prefix_ids: tuple[int, ...],
    suffix_ids: tuple[int, ...],
    folder: Path,
) -> None:
    """Save a tokenizer so that `tokenizer(text)` puts exactly these ids around a text.

    A tokenizer that already does so is saved unchanged.
    """
    if added_ids(tokenizer) == (prefix_ids, suffix_ids):
        tokenizer.save_pretrained(folder)
        return
    changed: Any = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = _template(tokenizer, prefix_ids, suffix_ids)
    changed.save_pretrained(folder)
    # The classes of some families follow their flags, not tokenizer.json.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in _FLAGS}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def _template(
    tokenizer: "PreTrainedTokenizerBase", prefix_ids: tuple[int, ...], suffix_ids: tuple[int, ...]
) -> Any:
    from tokenizers import processors

    names = {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in (*prefix_ids, *suffix_ids)}
    before, after = ([names[id_] for id_ in ids] for ids in (prefix_ids, suffix_ids))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", "$B", *after],
        special_tokens=[(name, id_) for id_, name in names.items()],
    )
