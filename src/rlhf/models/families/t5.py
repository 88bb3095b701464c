"""T5 (Raffel et al. 2020), also v1.1 and Flan: relative positions, and no scale on the scores."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from rlhf.models.attention import Attend, split_heads
from rlhf.models.encoder_decoder import AttendPrompt, EncoderDecoderModel
from rlhf.models.family import Shape


class T5(EncoderDecoderModel):
    """T5 v1.0, v1.1 and Flan."""

    name = "T5"
    adapter_modules = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")

    @property
    @override
    def layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.module.decoder.block
        return layers

    @override
    def embed(self, ids: Tensor) -> Tensor:
        return self.module.decoder.embed_tokens(ids)

    @override
    def position_biases(self, length: int, columns: int, first: int | Tensor) -> list[Tensor]:
        attention = self.layers[0].layer[0].SelfAttention  # all layers use the first one's bias
        return [attention.compute_bias(length, columns, past_seen_tokens=first)]

    @override
    def prompt_attention(self, layer: Any) -> Any:
        return layer.layer[1].EncDecAttention

    @override
    def prompt_keys_values(self, attention: Any, encoded: Tensor) -> tuple[Tensor, Tensor]:
        size = attention.key_value_proj_dim
        return split_heads(attention.k(encoded), size), split_heads(attention.v(encoded), size)

    @override
    def layer(self, layer: Any, x: Tensor, attend: Attend, attend_prompt: AttendPrompt) -> Tensor:
        own, cross, feed_forward = layer.layer
        attention, h = own.SelfAttention, own.layer_norm(x)
        size = attention.key_value_proj_dim
        parts = (split_heads(part(h), size) for part in (attention.q, attention.k, attention.v))
        x = x + attention.o(attend(attention, *parts))
        attention, h = cross.EncDecAttention, cross.layer_norm(x)
        x = x + attention.o(attend_prompt(attention, split_heads(attention.q(h), size)))
        return feed_forward(x)

    @override
    def final_norm(self, x: Tensor) -> Tensor:
        return self.module.decoder.final_layer_norm(x)

    @override
    def scale_for_head(self, states: Tensor) -> Tensor:
        # T5 v1.0 scales before its tied head; v1.1 and Flan do not. transformers 5 keeps that in
        # scale_decoder_outputs, because it forces tie_word_embeddings to True.
        return states * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else states

    @classmethod
    @override
    def head_is_tied(cls, config: PretrainedConfig) -> bool:
        # transformers 5 always sets tie_word_embeddings, and unties what a checkpoint stores twice:
        # v1.1 and Flan, whose outputs are not scaled.
        return bool(config.scale_decoder_outputs)

    @classmethod
    @override
    def saved_fields(cls, config: PretrainedConfig) -> dict[str, Any]:
        # T5Config derives scale_decoder_outputs from tie_word_embeddings when it is read, but
        # transformers 5 always writes tie_word_embeddings=true: a v1.1 or Flan model saved that way
        # would load with scaled outputs.
        return {} if config.scale_decoder_outputs else {"tie_word_embeddings": False}

    @classmethod
    @override
    def shape(cls, config: PretrainedConfig) -> Shape:
        encoder, heads = int(config.num_layers), int(config.num_heads)
        decoder = int(config.num_decoder_layers or encoder)
        # The position bias keeps both the input and the output of the softmax (measured).
        cached = 2 * decoder * heads * int(config.d_kv)
        return Shape(encoder, decoder, kept_matrices=2 * heads, cached=cached)
