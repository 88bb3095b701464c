"""Write a reward model as a sequence classifier that plain transformers (or a server) loads."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf.data.special_tokens import save_tokenizer
from rlhf.data.turn_ends import turn_end_text
from rlhf.files.disk import settle
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.merging import Weight, plain_weights, write_weights
from rlhf.models.saving import write_config


def save_sequence_classifier(
    lm: LanguageModel, adapter: str | None, head: ScalarHead, folder: Path
) -> bool:
    """Write weights, with the adapter folded in, and head as a `…ForSequenceClassification` model.

    The class reads the last token that is not PAD, which is the EOS after prompt and response; the
    saved tokenizer adds that EOS, and whatever the model reads before a prompt. The format has no
    bias, so it gives the raw score without normalization. If the family's class of that name reads
    prompt and response differently from us, nothing is written.

    Args:
        lm: The language model.
        adapter: Its reward adapter; None if all weights were trained.
        head: The reward head.
        folder: Where to write it.

    Returns:
        Whether the family has a suitable class and the folder was written.
    """
    if not lm.has_sequence_classifier:
        return False
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer, turn_end_text(lm.layout, tokenizer))
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    weights = plain_weights(lm, adapter)
    lm_head = lm.module.get_output_embeddings()
    unread = next(name for name, part in lm.module.named_modules() if part is lm_head)
    weights = {name: part for name, part in weights.items() if not name.startswith(f"{unread}.")}
    score = head.weight.detach().float().cpu()
    weights["score.weight"] = Weight(score.shape, score.dtype, lambda: score)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    # The class returns scores in the dtype it is loaded in, which config.json names: bfloat16
    # scores have two or three digits. bfloat16 weights lose nothing as float32.
    write_config(type(lm), model.config, type(model).__name__, torch.float32, folder)
    save_tokenizer(tokenizer, lm.layout.prefix_ids, (lm.layout.eos_id,), folder)
    settle(folder)
    return True


def _pad_token(tokenizer: PreTrainedTokenizerBase, turn_end: str) -> str | None:
    """Return a PAD that never ends a response, since the class would then read the token before."""
    taken = {tokenizer.eos_token, tokenizer.unk_token, turn_end, None}
    for token in (tokenizer.pad_token, tokenizer.bos_token):
        if token not in taken:
            return str(token)
    return (
        str(tokenizer.unk_token) if tokenizer.unk_token not in (None, tokenizer.eos_token) else None
    )
