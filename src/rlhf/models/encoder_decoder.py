"""Encoder-decoder models: the prompt goes to the encoder, the response to the decoder."""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from rlhf.data.batching import TokenBatch, chunks
from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.special_tokens import added_ids
from rlhf.models.attention import padding_bias, split_heads
from rlhf.models.decoding import (
    DecodeState,
    read_t5_token,
)
from rlhf.models.language_model import LanguageModel, eos_ids
from rlhf.signals import stop_point


class EncoderDecoderModel(LanguageModel):
    """T5: the prompt goes to the encoder, the response to the decoder."""

    task_type = "SEQ_2_SEQ_LM"
    adapter_modules = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")

    @classmethod
    @override
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        prefix, suffix = added_ids(tokenizer)
        eos = tokenizer.eos_token_id
        suffix = suffix if suffix[-1:] == (eos,) else (*suffix, eos)
        return PromptLayout(prefix, suffix, False, eos, eos_ids(eos, extra_eos))

    @property
    def start_id(self) -> int:
        """What the decoder reads first."""
        start = getattr(self.config, "decoder_start_token_id", None)
        return int(self.config.pad_token_id if start is None else start)

    @property
    @override
    def max_length(self) -> int | None:
        """None: relative positions have no limit."""
        return None

    @classmethod
    @override
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        names = "|".join(map(re.escape, suffixes))
        return suffixes if where == "all" else rf"(?={where}\.)(?:.*\.)?(?:{names})"

    @classmethod
    @override
    def head_is_tied(cls, config: PretrainedConfig) -> bool:
        # transformers 5 sets tie_word_embeddings always, and unties what a checkpoint has twice:
        # v1.1 and Flan, whose outputs are not scaled.
        return bool(config.scale_decoder_outputs)

    @override
    def scale_for_head(self, states: Tensor) -> Tensor:
        # T5 v1.0 scales before its tied head; v1.1 and Flan do not. transformers 5 keeps that in
        # scale_decoder_outputs, because it forces tie_word_embeddings to True.
        return states * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else states

    @override
    def response_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        return self._read(self._encode(prompts), prompts.mask, responses)

    @override
    def paired_final_states(
        self, prompts: TokenBatch, first: TokenBatch, second: TokenBatch
    ) -> tuple[Tensor, Tensor]:
        both = TokenBatch.concat([first, second])
        encoded, mask = self._encode(prompts), prompts.mask
        states = self._read(encoded.repeat(2, 1, 1), mask.repeat(2, 1), both)
        ends = states[torch.arange(len(both), device=states.device), both.lengths]
        return ends[: len(prompts)], ends[len(prompts) :]

    @override
    def read_prompts(self, prompts: TokenBatch, max_new_tokens: int) -> tuple[DecodeState, Tensor]:
        blocks, size = self.module.decoder.block, self.config.d_kv
        encoded = self._encode(prompts)
        with self.autocast():
            pairs = [
                (split_heads(cross.k(encoded), size), split_heads(cross.v(encoded), size))
                for cross in (block.layer[1].EncDecAttention for block in blocks)
            ]
        prompt_keys, prompt_values = (
            tuple(layer.contiguous() for layer in layers) for layers in zip(*pairs, strict=True)
        )
        shape = (*prompt_keys[0].shape[:2], max_new_tokens, size)
        keys, values = (tuple(key.new_zeros(shape) for key in prompt_keys) for _ in range(2))
        bias = padding_bias(prompts.mask, keys[0].dtype)
        column = torch.zeros(1, dtype=torch.long, device=encoded.device)
        state = DecodeState(
            keys, values, bias, prompts.lengths, column, 0, prompt_keys, prompt_values
        )
        return state, self.decode(state, prompts.ids.new_full((len(prompts),), self.start_id))

    @override
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        with self.autocast():
            return read_t5_token(self.module.decoder, state, tokens, width)

    @override
    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:
        if self._encoder_changes():
            return prompts
        width = prompts.ids.shape[1]
        parts = []
        with self.inference():
            for rows in chunks(range(len(prompts)), batch_size):
                stop_point()
                encoded = self._encode(prompts.select_rows(rows))
                parts.append(nn.functional.pad(encoded, (0, 0, 0, width - encoded.shape[1])))
        return replace(prompts, states=torch.cat(parts))

    def _encoder_changes(self) -> bool:
        """Whether training changes what the encoder makes of a prompt in the active role."""
        return self.trainable or self.adapters.active_reaches("encoder.")

    def _encode(self, prompts: TokenBatch) -> Tensor:
        """(B, P, D) states of the encoder."""
        if prompts.states is not None and not self._encoder_changes():
            return prompts.states
        with self.autocast():
            return self.module.encoder(
                input_ids=prompts.ids, attention_mask=prompts.mask
            ).last_hidden_state

    def _read(self, encoded: Tensor, mask: Tensor, responses: TokenBatch) -> Tensor:
        """(B, R+1, D) states of the decoder."""
        start = responses.ids.new_full((len(responses), 1), self.start_id)
        with self.autocast():
            return self.module.decoder(
                input_ids=torch.cat([start, responses.ids], dim=1),
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
