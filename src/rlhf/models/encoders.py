"""What all encoder-decoder models share: the encoder reads a prompt, once for all of its responses.

How the decoder computes is up to `rlhf.models.encoder_decoder` and the generic family.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedTokenizerBase
from typing_extensions import override

from rlhf.data.batching import TokenBatch, chunks
from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.special_tokens import added_ids
from rlhf.models.family import eos_ids
from rlhf.models.language_model import LanguageModel
from rlhf.signals import stop_point


@dataclass(frozen=True)
class EncodedPrompts(TokenBatch):
    """Prompts with the states that a frozen encoder computed from them.

    Attributes:
        states: (B, L, D).
    """

    states: Tensor

    @override
    def select_rows(self, rows: Tensor | Sequence[int]) -> "EncodedPrompts":
        plain = super().select_rows(rows)
        index = torch.as_tensor(rows, dtype=torch.long, device=self.states.device)
        states = self.states[index, : plain.ids.shape[1]]
        return EncodedPrompts(plain.ids, plain.lengths, states)

    @override
    def to(self, device: torch.device | str) -> "EncodedPrompts":
        plain = super().to(device)
        return EncodedPrompts(plain.ids, plain.lengths, self.states.to(device))

    @override
    def fill_up(self, rows: int, width: int) -> "EncodedPrompts":
        plain = super().fill_up(rows, width)
        more, wider = len(plain) - len(self), plain.ids.shape[1] - self.ids.shape[1]
        states = nn.functional.pad(self.states, (0, 0, 0, wider, 0, more))
        return EncodedPrompts(plain.ids, plain.lengths, states)


class ModelWithEncoder(LanguageModel):
    """A model of an encoder and a decoder."""

    task_type = "SEQ_2_SEQ_LM"
    auto_class = AutoModelForSeq2SeqLM
    # transformers' class of that name feeds one text to both encoder and decoder.
    has_sequence_classifier = False

    @classmethod
    @override
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        prefix, suffix = added_ids(tokenizer)
        eos = tokenizer.eos_token_id
        suffix = suffix if eos in suffix else (*suffix, eos)
        return PromptLayout(prefix, suffix, False, eos, eos_ids(eos, extra_eos))

    @classmethod
    @override
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        names = "|".join(map(re.escape, suffixes))
        # The encoder and the decoder are parts of the model itself, or of one around both.
        return suffixes if where == "all" else rf"(?=(?:\w+\.)?{where}\.)(?:.*\.)?(?:{names})"

    @classmethod
    @override
    def position_limit(cls, config: PretrainedConfig) -> int | None:
        return None  # of prompt and response together

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The ids that the decoder reads before a response."""
        start = getattr(self.config, "decoder_start_token_id", None)
        return (int(self.config.pad_token_id if start is None else start),)

    @override
    def generation_ids(self) -> dict[str, int]:
        names = ("decoder_start_token_id", "forced_bos_token_id")
        return super().generation_ids() | dict(zip(names, self.start_ids, strict=False))

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the encoder on (B, P) ids and their mask: (B, P, D)."""
        # As integers, as tokenizers return it: LongT5 computes with the mask.
        output = self.module.get_encoder()(input_ids=ids, attention_mask=mask.long())
        states: Tensor = output.last_hidden_state
        return states

    def encoded(self, prompts: TokenBatch) -> Tensor:
        """Return the encoder's states (B, P, D), computing them only if they are not known yet."""
        if isinstance(prompts, EncodedPrompts) and not self._encoder_changes():
            return prompts.states
        with self.autocast():
            return self.encode(prompts.ids, prompts.mask)

    def decoder_ids(self, responses: TokenBatch) -> Tensor:
        """Return the (B, S + R) ids that the decoder reads: S `start_ids`, and the response."""
        start = responses.ids.new_tensor(self.start_ids).expand(len(responses), -1)
        return torch.cat([start, responses.ids], dim=1)

    @override
    def transformers_logits(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        with self.autocast():
            output = self.module(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                decoder_input_ids=self.decoder_ids(responses),
                use_cache=False,
            )
        return output.logits[:, len(self.start_ids) - 1 :].float()

    @override
    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:
        """Return the prompts, with the encoder's states if the active adapter leaves it alone.

        All roles that leave the encoder alone then reuse these states instead of running it again.

        Args:
            prompts: B prompts.
            batch_size: Rows that the encoder reads at once.
        """
        if self._encoder_changes():
            return prompts
        width = prompts.ids.shape[1]
        parts = []
        with self.inference():
            for rows in chunks(range(len(prompts)), batch_size):
                stop_point()
                encoded = self.encoded(prompts.select_rows(rows))
                parts.append(nn.functional.pad(encoded, (0, 0, 0, width - encoded.shape[1])))
        return EncodedPrompts(prompts.ids, prompts.lengths, torch.cat(parts))

    def _encoder_changes(self) -> bool:
        """Return whether the active role has its own encoder states, by training or an adapter."""
        encoder = self.module.get_encoder()
        name = next(name for name, part in self.module.named_modules() if part is encoder)
        return self.trainable or self.adapters.active_reaches(f"{name}.")
