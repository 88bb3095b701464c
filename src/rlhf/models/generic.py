"""Models without a family of their own: transformers' own forward computes them, with its cache.

Everything works as in a family that defines its layers, only slower: a causal model reads a prompt
once for each of its responses, padding is computed too, and decoding copies the cache for every
token.

Shape letters: as in `language_model`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from typing_extensions import override

from rlhf.config import StageConfig
from rlhf.errors import InputError
from rlhf.models.language_model import LanguageModel
from rlhf.models.targets import free_linear_layers

_NOT_COMPILED = (
    "compile_decode: cannot be used with {!r} models, which have no family of their own; "
    "set it to false"
)


@dataclass
class CacheState:
    """A batch in the middle of decoding with a cache of transformers, one row per response.

    Attributes:
        cache: Keys and values of all rows.
        mask: (B, P) bool, the columns of the cache that hold tokens of prompts.
        lengths: (B,) tokens of each row's prompt.
        used: Tokens of responses read so far.
        fixed: Whether shapes and addresses must not change: never.
    """

    cache: Cache
    mask: Tensor
    lengths: Tensor
    used: int = 0
    fixed: bool = False

    def seen(self) -> Tensor:
        """Return the (B, P + used + 1) int64 mask of what the next token sees, itself included."""
        return nn.functional.pad(self.mask, (0, self.used + 1), value=True).long()

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, (B,) bool."""
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def advance(self) -> None:
        """Count one more token of each response."""
        self.used += 1


class GenericModel(LanguageModel):
    """A model that transformers computes.

    Whatever its class does between the last hidden state and the logits, such as a cap, is done by
    the class itself: its forward is run with a body that returns the states at hand.

    Attributes:
        classes: Transformers' classes of such models, by the class of their configuration.
        group_note: What happens to a prompt that several responses answer.
    """

    classes: ClassVar[Any]
    group_note: ClassVar[str]

    adapter_modules = ()
    has_sequence_classifier = False
    is_generic = True

    @property
    def hidden_size(self) -> int:
        """D, of the states that the LM head reads."""
        head: Any = self.module.get_output_embeddings()
        return int(head.weight.shape[1])

    @property
    def body(self) -> Any:
        """The part of the model that returns what the LM head reads."""
        found = self.module.get_decoder()
        # ModernBERT's class calls its LM head "decoder".
        return self.module.base_model if found is self.module.get_output_embeddings() else found

    @classmethod
    @override
    def head_is_tied(cls, config: PretrainedConfig) -> bool:
        return bool(getattr(config, "tie_word_embeddings", True))

    @classmethod
    @override
    def default_targets(cls, module: nn.Module) -> list[str]:
        return free_linear_layers(module)

    @classmethod
    @override
    def stage_problems(cls, config: StageConfig, model_config: PretrainedConfig) -> list[str]:
        kind = model_config.model_type
        problems = []
        if getattr(config, "compile_decode", False):
            problems.append(_NOT_COMPILED.format(kind))
        able = cls.classes[type(model_config)].supports_gradient_checkpointing
        if getattr(config, "gradient_checkpointing", False) and not able:
            problems.append(
                f"gradient_checkpointing: transformers' class of {kind!r} models cannot do it; "
                "set it to false"
            )
        return problems

    @override
    def compile_decoding(self, rows: int, prompt_width: int, **options: Any) -> NoReturn:
        raise InputError(_NOT_COMPILED.format(self.config.model_type))

    @override
    def logits(self, states: Tensor) -> Tensor:
        head: Any = self.module.get_output_embeddings()
        flat = states.reshape(1, -1, states.shape[-1]).to(head.weight.dtype)
        with self.autocast(), _returning(self.body, flat):
            logits: Tensor = self._logits_of(torch.zeros_like(flat[..., 0], dtype=torch.long))
        return logits.float().view(*states.shape[:-1], -1)

    def _logits_of(self, ids: Tensor) -> Tensor:
        """Run the whole model on (B, L) ids, without padding or cache."""
        logits: Tensor = self.module(input_ids=ids, use_cache=False).logits
        return logits


def takes(module_class: type[nn.Module], argument: str) -> bool:
    """Return whether the forward of a class of modules has an argument of that name."""
    return argument in _arguments(module_class.forward)


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@contextmanager
def _returning(module: nn.Module, states: Tensor) -> Iterator[None]:
    """Let a module return the given states, whatever it is called with."""
    own = module.__dict__.get("forward")  # accelerate sets one
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
