"""Any encoder-decoder model without a family of its own, computed by transformers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from typing_extensions import override

from rlhf.data.batching import TokenBatch
from rlhf.models.compat import supports_sdpa
from rlhf.models.encoders import ModelWithEncoder
from rlhf.models.family import Shape
from rlhf.models.generic import CacheState, GenericModel


@dataclass
class EncoderState(CacheState):
    """A batch in the middle of decoding.

    Attributes:
        encoded: (B, P, D), the encoder's states of each row's prompt.
    """

    encoded: Tensor = field(kw_only=True)

    @override
    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.encoded = self.encoded[rows]


class GenericEncoderDecoder(GenericModel, ModelWithEncoder):
    """An encoder-decoder model of transformers, whatever its layers compute.

    The encoder reads a prompt once for all of its responses; each response then has a copy of the
    prompt's keys and values.
    """

    name = "generic encoder-decoder model"
    classes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    group_note = "each response of a group caches its prompt"

    @property
    @override
    def start_ids(self) -> tuple[int, ...]:
        # Models that learned responses after a token which generation forces, such as BART's BOS or
        # the language of mBART-50, read that token here too: it is not part of the response.
        forced = getattr(self.module.generation_config, "forced_bos_token_id", None)
        start = (int(self.config.decoder_start_token_id),)
        return start if forced is None else (*start, int(forced))

    @classmethod
    @override
    def config_problems(cls, config: PretrainedConfig) -> list[str]:
        if getattr(config, "decoder_start_token_id", None) is not None:
            return []
        return [
            "decoder_start_token_id is missing; set it to the id that the decoder reads first, "
            "which for a translation model may be the language to write"
        ]

    @classmethod
    @override
    def limit_problems(cls, config: PretrainedConfig, prompt: int, response: int) -> list[str]:
        both = getattr(config, "max_position_embeddings", None)
        limit = getattr(config, "max_encoder_position_embeddings", both)
        problems = []
        if limit and prompt > limit:
            problems.append(
                f"prompt_sequence_length {prompt} exceeds the {limit} positions of the model's "
                "encoder; lower it"
            )
        limit = getattr(config, "max_decoder_position_embeddings", both)
        if limit and response + 2 > limit:
            problems.append(
                f"target_sequence_length {response} exceeds the {limit} positions of the model's "
                "decoder, of which up to 2 are needed before a response; lower it"
            )
        return problems

    @classmethod
    @override
    def shape(cls, config: PretrainedConfig) -> Shape:
        encoder = _first(config, "encoder_layers", "num_encoder_layers", "num_hidden_layers")
        decoder = _first(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers")
        heads = _first(config, "decoder_attention_heads", "num_attention_heads")
        # Without a fused kernel, autograd keeps the scores and their softmax.
        kept = 0 if supports_sdpa(cls.classes[type(config)]) else 2 * heads
        cached = 2 * decoder * int(config.hidden_size)
        return Shape(encoder, decoder, kept, cached, shares_prompts=False)

    @override
    def response_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        encoded, mask = self.encoded(prompts), prompts.mask
        if groups is not None:
            encoded, mask = (part[groups.to(part.device)] for part in (encoded, mask))
        with self.autocast():
            # Padding on the right sees all before it, and nothing sees the padding.
            output = self._run(self.decoder_ids(responses), encoded, mask, use_cache=False)
        states: Tensor = output.last_hidden_state[:, len(self.start_ids) - 1 :]
        return states

    @override
    def read_prompts(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[EncoderState, Tensor]:
        encoded = self.encoded(prompts)
        index = torch.arange(len(prompts), device=encoded.device)
        index = index if groups is None else groups.to(index.device)
        encoded, mask, lengths = encoded[index], prompts.mask[index], prompts.lengths[index]
        start = prompts.ids.new_tensor(self.start_ids).expand(len(index), -1)
        with self.autocast():
            output = self._run(start, encoded, mask, use_cache=True)
        state = EncoderState(output.past_key_values, mask, lengths, encoded=encoded)
        return state, output.last_hidden_state[:, -1]

    @override
    def read_token(self, state: EncoderState, tokens: Tensor, width: int) -> Tensor:
        told = {"use_cache": True, "past_key_values": state.cache}
        with self.autocast():
            output = self._run(tokens[:, None], state.encoded, state.mask, **told)
        states: Tensor = output.last_hidden_state[:, -1]
        return states

    def _run(self, ids: Tensor, encoded: Tensor, mask: Tensor, **options: Any) -> Any:
        """Run the decoder on (B, L) ids with the encoder's states (B, P, D) and their mask."""
        return self.body(
            input_ids=ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask.long(),
            **options,
        )

    @override
    def _logits_of(self, ids: Tensor) -> Tensor:
        encoded = torch.zeros(1, 1, self.hidden_size, device=ids.device)
        output = self.module(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            decoder_input_ids=ids,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits


def _first(config: PretrainedConfig, *names: str) -> int:
    """Return the first of these fields that a configuration has."""
    return next(int(getattr(config, name)) for name in names if hasattr(config, name))
