"""What every model can do, whatever its family: read, decode, and hold adapters.

Callers pass prompts and responses as `TokenBatch`es and get states and logits. All families
always pad on the right: a causal model never attends to what follows, so padding cannot affect a
real token, no query is ever fully masked, and the fast causal kernels apply. Masks come from
lengths; whether an id equals PAD means nothing.

Shape letters: G prompts, B responses (as many, unless told which answer the same prompt), P prompt
tokens, R response tokens, V vocabulary, D hidden.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.turn_ends import with_turn_end
from rlhf.models.adapters import AdapterSet
from rlhf.models.decoding import CompiledDecoding, DecodeState, Decoding
from rlhf.models.family import Family
from rlhf.models.logprobs import token_stats
from rlhf.models.norms import use_faster_norms
from rlhf.models.weights import loaded_fingerprint, switch_off_dropout

# Finite, so that 0 * log 0 stays 0 in the entropy.
FORBIDDEN_LOGIT = -1e30


@dataclass(frozen=True)
class TokenStats:
    """What the policy says about each response token.

    Attributes:
        logprobs: (B, R) fp32, log-probability of the token; 0 past the response's end.
        entropy: (B, R) fp32, entropy of the distribution in nats; 0 past the end, and everywhere
            if not requested.
    """

    logprobs: Tensor
    entropy: Tensor


class LanguageModel(Family):
    """A language model with LoRA adapters, the same for every family.

    Args:
        module: The Hugging Face model. Its dropout is switched off (every p set to 0) and it is put
            in training mode, which Hugging Face's gradient checkpointing needs.
        tokenizer: Its tokenizer.
        trainable: True for full fine-tuning; otherwise the base is frozen.
        dtype: Compute type; a trainable model keeps fp32 weights and computes under autocast.
        base_name: Where the base came from; recorded with adapters.
        revision: Hub revision, or None.
    """

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
        self.fingerprint = loaded_fingerprint(module)
        extra_eos = getattr(module.generation_config, "eos_token_id", None)
        self.layout = with_turn_end(self.prompt_layout(tokenizer, extra_eos), tokenizer)
        self.adapters = AdapterSet(module, self.task_type)
        self._compiled: CompiledDecoding | None = None
        switch_off_dropout(module)
        use_faster_norms(module)
        # An Embedding drops the gradient of its padding_idx, but PAD may be a real token here.
        embedding: Any = module.get_input_embeddings()
        for part in module.modules():  # BART's encoder and decoder have embeddings of their own
            if isinstance(part, nn.Embedding) and part.weight.shape == embedding.weight.shape:
                part.padding_idx = None
        module.requires_grad_(trainable)
        module.train()

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.module.device

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, the number of logits of the LM head (may exceed the tokenizer's size)."""
        head: Any = self.module.get_output_embeddings()
        return int(head.weight.shape[0])

    def generation_ids(self) -> dict[str, int]:
        """Return the ids, EOS apart, that transformers' generation needs, by their fields."""
        own = self.module.generation_config
        found = {name: getattr(own, name, None) for name in ("bos_token_id", "pad_token_id")}
        # Old configurations use -1 for none.
        return {name: id_ for name, id_ in found.items() if id_ not in (None, -1)}

    def with_states(self, prompts: TokenBatch, batch_size: int) -> TokenBatch:  # noqa: ARG002
        """Return the prompts, with anything that all roles would compute from them alike.

        Args:
            prompts: B prompts.
            batch_size: Rows to read at once.
        """
        return prompts

    @abstractmethod
    def response_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states at and after every response token.

        A prompt is read once for all of its responses, with the same result as in separate rows.

        Args:
            prompts: G prompts, each with at least one token.
            responses: B responses, possibly empty, up to R tokens.
            groups: (B,) index of each response's prompt; None for one response to each.

        Returns:
            (B, R+1, D) post-norm, unscaled. States 0…R−1 predict response tokens 0…R−1 (and carry
            their values); the state at index `length` has read the whole response (the reward's).
            States past that index are meaningless.
        """

    @abstractmethod
    def transformers_logits(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        """Compute logits of B prompts and responses with transformers' own forward.

        Returns:
            (B, R+1, V) fp32, at the positions of `response_states`.
        """

    def final_states(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        """Return (B, D): the states of `response_states` at index `length`, for rewards."""
        states = self.response_states(prompts, responses, groups)
        return states[torch.arange(len(states), device=states.device), responses.lengths]

    def compile_decoding(self, rows: int, prompt_width: int, **options: Any) -> None:
        """Decode with one compiled graph from now on, in batches of one size.

        On a GPU, replacing a step's many small kernels with one CUDA graph may be worth the memory
        that the graph keeps. This has not been measured yet, so it is off by default.

        Args:
            rows: Rows of a batch; smaller batches are padded, larger ones compiled anew.
            prompt_width: Tokens of the longest prompt; likewise.
            options: For `torch.compile`; without any, those that make CUDA graphs are used.
        """
        options = options or {"mode": "reduce-overhead"}
        self._compiled = CompiledDecoding(self.read_token, rows, prompt_width, **options)

    def prefill(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[Decoding, Tensor]:
        """Read the prompts.

        Args:
            prompts: G prompts.
            max_new_tokens: `decode` can read one token fewer than this.
            groups: (B,) index of each response's prompt; None for one response to each.

        Returns:
            The state, and (B, D) that predicts the first token of each response.
        """
        if self._compiled is None:
            return self.read_prompts(prompts, max_new_tokens, groups)
        # A compiled step has a fixed number of rows, each with a prompt of its own.
        every = prompts if groups is None else prompts.select_rows(groups)
        state, last = self.read_prompts(self._compiled.fill_up(every), max_new_tokens)
        assert isinstance(state, DecodeState)
        return self._compiled.hold(state), last[: len(every)]

    def decode(self, state: Decoding, tokens: Tensor) -> Tensor:
        """Read one more token (B,) of each row; return (B, D) that predicts the next."""
        if self._compiled is None or not state.fixed:
            states = self.read_token(state, tokens, state.used + 1)
        else:
            assert isinstance(state, DecodeState)
            states = self._compiled.read(state, tokens)
        state.advance()
        return states

    @abstractmethod
    def read_prompts(
        self, prompts: TokenBatch, max_new_tokens: int, groups: Tensor | None = None
    ) -> tuple[Decoding, Tensor]:
        """Do the work of `prefill`, for the prompts as they are."""

    @abstractmethod
    def read_token(self, state: Any, tokens: Tensor, width: int) -> Tensor:
        """Do the work of `decode` on the first `width` columns, without advancing the state."""

    def scale_for_head(self, states: Tensor) -> Tensor:
        """Scale the states between the final norm and the LM head; most families do not."""
        return states

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Change the LM head's fp32 output, such as by a cap; most families do not."""
        return logits

    def logits(self, states: Tensor) -> Tensor:
        """Apply the LM head: (..., D) states to (..., V) fp32 logits."""
        head: Any = self.module.get_output_embeddings()
        with self.autocast():
            logits = head(self.scale_for_head(states).to(head.weight.dtype)).float()
        return self.finish_logits(logits)

    def policy_logits(
        self, states: Tensor, positions: Tensor, temperature: float, min_response_length: int
    ) -> Tensor:
        """Return the logits of the one distribution that is sampled, scored and trained.

        Args:
            states: (N, D).
            positions: (N,) index of the response token that each state predicts.
            temperature: Divides all logits.
            min_response_length: EOS has probability 0 before this many tokens.

        Returns:
            (N, V) fp32.
        """
        logits = self.logits(states)
        if temperature != 1.0:  # saves a pass over the logits
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
        """Return log-probabilities and entropies of response tokens, computing only real tokens.

        Args:
            states: (B, R+1, D) from `response_states`.
            responses: The responses those states belong to.
            temperature: Sampling temperature.
            min_response_length: The constraint that applied in sampling.
            entropy: Whether to compute entropies, which takes more passes over the logits.
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
        """Add a LoRA adapter, which changes nothing yet because B is zero.

        Args:
            name: Role: "policy", "value", "reward" or "sft".
            lora: Rank and other settings.
            trainable: Whether its tensors get gradients.
            seed: Seed of A's initialization.

        Raises:
            InputError: `lora.target_modules` or `lora.where` do not fit the model.
        """
        config, names = self.peft_config(lora, self.module), lora.target_modules or ()
        self.adapters.add(name, config, trainable=trainable, seed=seed, asked_for=names)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Disable gradients, LoRA dropout and checkpointing (which would drop the KV cache)."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Activate one adapter (None: the base alone), and restore the previous one afterwards.

        Backward and checkpointed recomputation must run inside, so that they see the same adapter.
        """
        with self.adapters.using(adapter):
            yield

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Decode without overhead from the active adapter; bf16 weights stay as they are.

        Folding in bf16 would round away most of an early adapter's small effect, so there its
        matrices are only cast, once for all tokens. A compiled step leaves the adapter as it is,
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
        """Return what training a role changes: its adapter, or (None) all weights if trained."""
        if adapter is not None:
            return self.adapters.named_parameters(adapter)
        return list(self.module.named_parameters()) if self.trainable else []

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the compute type during full fine-tuning, whose weights stay fp32."""
        enabled = self.trainable and self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield
