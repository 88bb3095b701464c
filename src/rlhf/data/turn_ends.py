"""The token with which a chat template ends a turn of the assistant."""

from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.prompts import PromptRenderer
from rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def turn_end_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the special token that the chat template writes right after an answer.

    Spaces and line breaks before it do not count. It must follow every answer, the last one and
    one before another turn, so that the beginning of the next turn is not taken for an end.

    Returns:
        Its id; None if there is no template, or it ends turns with other text or with nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    special = {
        str(token.content): id_
        for id_, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    by_length = sorted(special, key=len, reverse=True)
    found = {
        next((special[text] for text in by_length if after.lstrip().startswith(text)), None)
        for after in PromptRenderer.for_tokenizer(tokenizer).after_answers()
    }
    return found.pop() if len(found) == 1 else None


def with_turn_end(layout: PromptLayout, tokenizer: "PreTrainedTokenizerBase") -> PromptLayout:
    """Return a layout in which responses also end as the tokenizer's chat template ends a turn."""
    end = turn_end_id(tokenizer)
    if end is None or end == layout.eos_id:
        return layout
    return replace(layout, eos_ids=layout.eos_ids | {end}, turn_end_id=end)


def turn_end_text(layout: PromptLayout, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the token that ends responses in a chat, for a record; "" if that is EOS."""
    end = layout.turn_end_id
    return "" if end is None else str(tokenizer.convert_ids_to_tokens(end))


def with_recorded_turn_end(
    layout: PromptLayout, tokenizer: "PreTrainedTokenizerBase", text: str
) -> PromptLayout:
    """Return a layout in which responses in a chat end as they did in a recorded training.

    Args:
        layout: The layout.
        tokenizer: The model's tokenizer.
        text: What `turn_end_text` returned then.

    Raises:
        InputError: The tokenizer has no such token.
    """
    end = tokenizer.get_vocab().get(text) if text else None
    if text and end is None:
        raise InputError(f"reward_model.json: turn_end: the tokenizer has no token {text!r}")
    return replace(layout, turn_end_id=end)
