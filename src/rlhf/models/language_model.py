"""The one place that knows T5 (encoder-decoder) from LLaMA (decoder-only).

Everything else sees prompts and responses as `TokenBatch`es and gets states and logits. Both
families pad on the right, always: a causal model never attends to what follows, so padding cannot
reach a real token, no query is ever fully masked, and the fast causal kernels apply. Masks come
from lengths; whether an id equals PAD says nothing.

Shape letters: B batch, P prompt tokens, R response tokens, V vocabulary, D hidden.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch, chunks, join
from rlhf.data.special_tokens import added_ids
from rlhf.data.tokenising import PromptLayout
from rlhf.errors import InputError
from rlhf.models.adapters import AdapterSet
from rlhf.models.attention import grouped_attention, padding_bias, rotate, split_heads
from rlhf.models.decoding import (
    CompiledDecoding,
    DecodeState,
    read_llama_token,
    read_t5_token,
)
from rlhf.models.logprobs import token_stats
from rlhf.models.norms import use_faster_norms
from rlhf.models.weights import fingerprint, switch_off_dropout
from rlhf.signals import stop_point

# Finite, so that 0 * log 0 stays 0 in the entropy.
FORBIDDEN_LOGIT = -1e30


@dataclass(frozen=True)
class TokenStats:
    """What the policy says of each response token.

    Attributes:
        logprobs: (B, R) fp32, log-probability of the token; 0 past the response's end.
        entropy: (B, R) fp32, entropy of the distribution in nats; 0 past the end, and everywhere
            if it was not asked for.
    """

    logprobs: Tensor
    entropy: Tensor


class LanguageModel(ABC):
    """A language model with LoRA adapters, the same for T5 and LLaMA.

    Args:
        module: The Hugging Face model; its dropout is switched off (every p set to 0) and it is
            put in training mode, because Hugging Face's gradient checkpointing needs that mode.
        tokenizer: Its tokenizer.
        trainable: True for full fine-tuning; else the base is frozen.
        dtype: Compute type; a trainable model keeps fp32 weights and computes under autocast.
        base_name: Where the base came from (recorded with adapters).
        revision: Hub revision, or None.
    """

    task_type: str
    adapter_modules: tuple[str, ...]

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        trainable: bool = False,
        dtype: torch.dtype = torch.float32,
        base_name: str = "",
        revision: str | None = None,
    ) -> None:
        self.module: Any = module
        self.tokenizer = tokenizer
        self.trainable = trainable
        self.dtype = dtype
        self.base_name = base_name
        self.revision = revision
        self.config = module.config
        self.fingerprint = fingerprint(module)
        extra_eos = getattr(module.generation_config, "eos_token_id", None)
        self.layout = self.prompt_layout(tokenizer, extra_eos)
        self.adapters = AdapterSet(module, self.task_type)
        self._compiled: CompiledDecoding | None = None
        switch_off_dropout(module)
        use_faster_norms(module)
        # An Embedding drops the gradient of its padding_idx, but PAD may be a real token here.
        embedding: Any = module.get_input_embeddings()
        embedding.padding_idx = None
        module.requires_grad_(trainable)
        module.train()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, as many logits as the LM head has (may exceed the tokenizer's size)."""
        head: Any = self.module.get_output_embeddings()
        return int(head.weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """Most tokens of prompt and response together, None where there is no such limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @classmethod
    @abstractmethod
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        """What surrounds prompts and responses of this family; needs no weights.

        Args:
            tokenizer: The model's tokenizer, with an EOS token.
            extra_eos: Further ids that end a response, from the generation config.
        """

    @abstractmethod
    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:
        """The same prompts, for T5 with the encoder's states if the active adapter leaves it alone.

        All roles that leave the encoder alone then read these instead of running it again.

        Args:
            prompts: B prompts.
            batch_size: Rows that the encoder reads at once.
        """

    @abstractmethod
    def response_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        """Hidden states at and after every response token.

        Args:
            prompts: B prompts, each with at least one token.
            responses: B responses, possibly empty, up to R tokens.

        Returns:
            (B, R+1, D) post-norm, unscaled. States 0…R−1 predict response tokens 0…R−1 (and carry
            their values); the state at index `length` has read the whole response (the reward's).
            States past that index mean nothing.
        """

    def final_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        """(B, D): the states of `response_states` at index `length`, for rewards."""
        states = self.response_states(prompts, responses)
        return states[torch.arange(len(states), device=states.device), responses.lengths]

    @abstractmethod
    def paired_final_states(
        self, prompts: TokenBatch, first: TokenBatch, second: TokenBatch
    ) -> tuple[Tensor, Tensor]:
        """`final_states` of two responses to each prompt, which is read only once.

        Args:
            prompts: B prompts.
            first: B responses.
            second: B other responses to the same prompts.

        Returns:
            (B, D) and (B, D).
        """

    def compile_decoding(self, rows: int, prompt_width: int, **options: Any) -> None:
        """From now on one compiled graph decodes, in batches of one size.

        Args:
            rows: Rows of a batch; smaller ones are filled up, larger ones compiled anew.
            prompt_width: Tokens of the longest prompt; likewise.
            options: For `torch.compile`; none are those that make CUDA graphs.
        """
        options = options or {"mode": "reduce-overhead"}
        self._compiled = CompiledDecoding(self.read_token, rows, prompt_width, **options)

    def prefill(self, prompts: TokenBatch, max_new_tokens: int) -> tuple[DecodeState, Tensor]:
        """Reads the prompts.

        Args:
            prompts: B prompts.
            max_new_tokens: `decode` can read one token less than this.

        Returns:
            The state, and (B, D) that predicts the first token.
        """
        if self._compiled is None:
            return self.read_prompts(prompts, max_new_tokens)
        state, last = self.read_prompts(self._compiled.fill_up(prompts), max_new_tokens)
        return self._compiled.hold(state), last[: len(prompts)]

    def decode(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Reads one more token (B,) of each row. Returns (B, D) that predicts the next."""
        if self._compiled is None or not state.fixed:
            states = self.read_token(state, tokens, state.used + 1)
        else:
            states = self._compiled.read(state, tokens)
        state.advance()
        return states

    @abstractmethod
    def read_prompts(self, prompts: TokenBatch, max_new_tokens: int) -> tuple[DecodeState, Tensor]:
        """`prefill` of these prompts as they are."""

    @abstractmethod
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        """`decode` with the first `width` columns of the state, which it does not advance."""

    @classmethod
    @abstractmethod
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        """What peft calls target_modules: layers of these names in the part that `where` names."""

    @classmethod
    def peft_config(cls, lora: LoRAConfig) -> LoraConfig:
        """What peft makes an adapter of.

        Raises:
            InputError: The family has no such part as `lora.where`.
        """
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.effective_alpha,
            lora_dropout=lora.dropout,
            target_modules=cls.targets(
                lora.target_modules or list(cls.adapter_modules), lora.where
            ),
            use_rslora=lora.use_rslora,
        )

    @classmethod
    def head_is_tied(cls, config: PretrainedConfig) -> bool:
        """Whether the LM head is the embedding, as far as config.json tells."""
        return bool(config.tie_word_embeddings)

    def scale_for_head(self, states: Tensor) -> Tensor:
        """What happens to states between the final norm and the LM head: nothing, mostly."""
        return states

    def logits(self, states: Tensor) -> Tensor:
        """LM head. (..., D) states to (..., V) fp32 logits."""
        head: Any = self.module.get_output_embeddings()
        with self.autocast():
            return head(self.scale_for_head(states).to(head.weight.dtype)).float()

    def policy_logits(
        self, states: Tensor, positions: Tensor, temperature: float, min_response_length: int
    ) -> Tensor:
        """Logits of the distribution that is sampled, scored and trained: one and the same.

        Args:
            states: (N, D).
            positions: (N,) index of the response token that each state predicts.
            temperature: Divides all logits.
            min_response_length: EOS is impossible before this many tokens.

        Returns:
            (N, V) fp32.
        """
        logits = self.logits(states)
        if temperature != 1.0:  # a pass over the logits
            logits = logits / temperature
        if min_response_length > 0:
            eos = torch.tensor(sorted(self.layout.eos_ids), device=logits.device)
            too_early = positions < min_response_length
            logits[:, eos] = torch.where(too_early[:, None], FORBIDDEN_LOGIT, logits[:, eos])
        return logits

    def token_logprobs(
        self,
        states: Tensor,
        responses: TokenBatch,
        temperature: float = 1.0,
        min_response_length: int = 0,
        *,
        entropy: bool = False,
    ) -> TokenStats:
        """Log-probabilities and entropies of response tokens, computed for real tokens only.

        Args:
            states: (B, R+1, D) from `response_states`.
            responses: The responses those states belong to.
            temperature: Sampling temperature.
            min_response_length: The constraint that sampling had.
            entropy: Whether to compute the entropies, which costs more passes over the logits.
        """
        mask = responses.mask
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]
        head: Any = self.module.get_output_embeddings()

        def logits(states: Tensor, positions: Tensor) -> Tensor:
            return self.policy_logits(states, positions, temperature, min_response_length)

        parts = token_stats(
            logits,
            states[:, :-1][mask],
            responses.ids[mask],
            positions,
            self.vocab_size,
            entropy=entropy,
            head_is_trained=any(weight.requires_grad for weight in head.parameters()),
        )
        zeros = torch.zeros(mask.shape, device=mask.device)
        return TokenStats(*(zeros.masked_scatter(mask, part) for part in parts))

    def add_adapter(
        self, name: str, lora: LoRAConfig, *, trainable: bool = True, seed: int = 0
    ) -> None:
        """Adds a LoRA adapter (B zero, so that it changes nothing yet).

        Args:
            name: Role: "policy", "value", "reward" or "sft".
            lora: Rank and so on.
            trainable: Whether its tensors get gradients.
            seed: Of A's initialisation.

        Raises:
            InputError: `lora.target_modules` or `lora.where` do not fit the model.
        """
        config, names = self.peft_config(lora), lora.target_modules or ()
        self.adapters.add(name, config, trainable=trainable, seed=seed, asked_for=names)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, no LoRA dropout, no checkpointing (which would drop the KV cache)."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Makes one adapter active (None: the base alone), and restores the one before.

        Backward and checkpointed recomputation must happen inside, where the same adapter acts.
        """
        with self.adapters.using(adapter):
            yield

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Decoding inside pays nothing for the active adapter; weights in bf16 stay as they are.

        In bf16 a fold loses small updates: most of an early adapter's effect would round away, so
        its matrices are only cast once for all tokens. A compiled step keeps the adapter as it is,
        because what it reads must not move.
        """
        if self._compiled is not None:
            yield
        elif self.module.dtype == torch.float32:
            with self.adapters.folded():
                yield
        else:
            with self.adapters.prepared():
                yield

    def named_trainable(self, adapter: str | None) -> list[tuple[str, nn.Parameter]]:
        """What training a role changes: its adapter, or (None) all weights if they are trained."""
        if adapter is not None:
            return self.adapters.named_parameters(adapter)
        return list(self.module.named_parameters()) if self.trainable else []

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute type of full fine-tuning, whose weights stay fp32."""
        enabled = self.trainable and self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield


class DecoderOnlyModel(LanguageModel):
    """LLaMA: the response continues the prompt in one causal sequence."""

    task_type = "CAUSAL_LM"
    adapter_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @classmethod
    @override
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        # An EOS that the tokenizer puts after a text would end the response before it began.
        prefix, _ = added_ids(tokenizer)
        eos = tokenizer.eos_token_id
        return PromptLayout(prefix, (), True, eos, _eos_ids(eos, extra_eos))

    @classmethod
    @override
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        if where == "encoder":
            raise InputError("lora.where: a LLaMA has no encoder; use all or decoder")
        return suffixes

    @override
    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:
        return prompts

    @override
    def response_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        ids = join(prompts, responses)
        # The prompt's last token predicts response token 0.
        offsets = torch.arange(responses.ids.shape[1] + 1, device=ids.device)
        index = (prompts.lengths[:, None] - 1 + offsets).clamp(max=ids.shape[1] - 1)
        return self._states_at(index, ids)

    @override
    def final_states(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        index = (prompts.lengths + responses.lengths - 1)[:, None]
        return self._states_at(index, join(prompts, responses))[:, 0]

    @override
    def paired_final_states(
        self, prompts: TokenBatch, first: TokenBatch, second: TokenBatch
    ) -> tuple[Tensor, Tensor]:
        # One row: prompt, first, second. The second sees prompt and itself only, and its
        # positions go on from the prompt's end as if the first were not there.
        middle = prompts.lengths + first.lengths
        ids = join(TokenBatch(join(prompts, first), middle), second)
        column = torch.arange(ids.shape[1], device=ids.device)
        in_first = (column >= prompts.lengths[:, None]) & (column < middle[:, None])
        in_second = column >= middle[:, None]
        hidden = in_second[:, :, None] & in_first[:, None, :]
        visible = (column[:, None] >= column) & ~hidden
        positions = column - in_second * first.lengths[:, None]
        # An empty response ends where its prompt does.
        last = torch.where(second.lengths > 0, middle + second.lengths, prompts.lengths) - 1
        states = self._states_at(torch.stack([middle - 1, last], 1), ids, positions, visible)
        return states[:, 0], states[:, 1]

    def _states_at(
        self,
        index: Tensor,
        ids: Tensor,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """States of some columns; the last layer works for these only.

        Args:
            index: (B, N) columns wanted.
            ids: (B, L).
            positions: (B, L) of the tokens; None for 0, 1, 2 and so on.
            visible: (B, L, L) bool, whether row i sees column j; None for causal attention.

        Returns:
            (B, N, D).
        """
        model, length = self.module.model, ids.shape[1]
        columns = torch.arange(length, device=ids.device)
        wanted = index[:, :, None]
        seen = columns <= wanted if visible is None else visible.take_along_dim(wanted, 1)
        mask = None if visible is None else visible[:, None]
        if self.config._attn_implementation == "eager":  # SDPA is causal without being told
            mask = columns[:, None] >= columns if mask is None else mask
            mask = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, FORBIDDEN_LOGIT)
        with self.autocast():
            x = model.embed_tokens(ids)
            rotary = model.rotary_emb(x, columns[None] if positions is None else positions)
            for layer in model.layers[:-1]:
                x = layer(x, attention_mask=mask, position_embeddings=rotary)
            layer = model.layers[-1]
            attention, h = layer.self_attn, layer.input_layernorm(x)
            cos, sin = rotary
            keys = rotate(split_heads(attention.k_proj(h), attention.head_dim), cos, sin)
            values = split_heads(attention.v_proj(h), attention.head_dim)
            cos, sin = (part.expand(len(x), -1, -1).take_along_dim(wanted, 1) for part in rotary)
            queries = split_heads(attention.q_proj(h.take_along_dim(wanted, 1)), attention.head_dim)
            heads = grouped_attention(rotate(queries, cos, sin), keys, values, seen[:, None])
            x = x.take_along_dim(wanted, 1) + attention.o_proj(heads)
            return model.norm(x + layer.mlp(layer.post_attention_layernorm(x)))

    @override
    def read_prompts(self, prompts: TokenBatch, max_new_tokens: int) -> tuple[DecodeState, Tensor]:
        cache = DynamicCache(config=self.config)
        with self.autocast():
            states = self.module.model(
                input_ids=prompts.ids, past_key_values=cache, use_cache=True
            ).last_hidden_state
        last = states[torch.arange(len(prompts), device=states.device), prompts.lengths - 1]
        keys, values = (
            tuple(nn.functional.pad(layer, (0, 0, 0, max_new_tokens)) for layer in layers)
            for layers in zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
        )
        bias, width = padding_bias(prompts.mask, keys[0].dtype), prompts.ids.shape[1]
        column = torch.tensor([width], device=last.device)
        return DecodeState(keys, values, bias, prompts.lengths, column, width), last

    @override
    def read_token(self, state: DecodeState, tokens: Tensor, width: int) -> Tensor:
        with self.autocast():
            return read_llama_token(self.module.model, state, tokens, width)


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
        return PromptLayout(prefix, suffix, False, eos, _eos_ids(eos, extra_eos))

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
                encoded = self._encode(prompts.select(rows))
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


FAMILIES: dict[str, type[LanguageModel]] = {"llama": DecoderOnlyModel, "t5": EncoderDecoderModel}


def _eos_ids(eos: int, extra: int | list[int] | None) -> frozenset[int]:
    return frozenset(
        [eos, *([] if extra is None else [extra] if isinstance(extra, int) else extra)]
    )
