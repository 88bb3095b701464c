"""What a family of models knows about its models before any weights are loaded."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.config import LoRAConfig, StageConfig
from rlhf.data.prompt_codec import PromptLayout


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that memory estimates need.

    Attributes:
        encoder_layers: Layers that read only the prompt; 0 without an encoder.
        decoder_layers: Layers that read responses.
        kept_matrices: Attention matrices that a layer keeps for the backward pass.
        cached: Numbers in the cache per token.
        encoder_keys: Maps the length of a prompt to how many keys an attention matrix of the
            encoder has for each of its tokens.
        shares_prompts: Whether the cache keeps a prompt once, whatever the number of its responses.
    """

    encoder_layers: int
    decoder_layers: int
    kept_matrices: int
    cached: int
    encoder_keys: Callable[[int], int] = lambda prompt: prompt
    shares_prompts: bool = True


class Family(ABC):
    """A family of models; answers questions about checkpoints and configurations.

    Attributes:
        name: Its usual name.
        task_type: peft's name for the task of its models.
        auto_class: The transformers class that loads its models.
        adapter_modules: Names of the linear layers that adapters sit on by default.
        is_generic: Whether transformers' own forward computes the models, for want of a family that
            defines their layers.
        has_sequence_classifier: Whether transformers' `…ForSequenceClassification` reads a prompt
            and a response as our reward model does.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    auto_class: ClassVar[Any]
    adapter_modules: ClassVar[tuple[str, ...]]
    has_sequence_classifier: ClassVar[bool]
    is_generic: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        """Return what surrounds prompts and responses of this family.

        Args:
            tokenizer: The model's tokenizer, with an EOS token.
            extra_eos: More ids that end a response, from the generation config.
        """

    @classmethod
    @abstractmethod
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        """Return peft's target_modules: layers of these names in the part that `where` names.

        Raises:
            InputError: The family has no such part.
        """

    @classmethod
    def default_targets(cls, module: nn.Module) -> list[str]:  # noqa: ARG003
        """Return the names of the linear layers of a model that adapters sit on by default."""
        return list(cls.adapter_modules)

    @classmethod
    def peft_config(cls, lora: LoRAConfig, module: nn.Module) -> LoraConfig:
        """Return peft's configuration of an adapter.

        Args:
            lora: The user's configuration.
            module: The model, which needs no storage and may have other adapters.

        Raises:
            InputError: The family has no part that `lora.where` names.
        """
        names = lora.target_modules or cls.default_targets(module)
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.effective_alpha,
            lora_dropout=lora.dropout,
            target_modules=cls.targets(names, lora.where),
            use_rslora=lora.use_rslora,
        )

    @classmethod
    @abstractmethod
    def shape(cls, config: PretrainedConfig) -> Shape:
        """Return the sizes of the model that a config.json describes."""

    @classmethod
    @abstractmethod
    def position_limit(cls, config: PretrainedConfig) -> int | None:
        """Return the most tokens of prompt and response together; None if there is no limit."""

    @classmethod
    def limit_problems(cls, config: PretrainedConfig, prompt: int, response: int) -> list[str]:
        """Return what is wrong with the most tokens of prompts and of responses."""
        limit = cls.position_limit(config)
        if limit is None or prompt + response <= limit:
            return []
        positions = f"the {limit} positions of the model"
        if limit < getattr(config, "max_position_embeddings", limit):
            positions = f"the first {limit} positions, up to which the model rotates by one table"
        return [
            f"prompt_sequence_length {prompt} + target_sequence_length {response} exceed "
            f"{positions}; lower one of them"
        ]

    @classmethod
    def config_problems(cls, config: PretrainedConfig) -> list[str]:  # noqa: ARG003
        """Return the fields of a config.json that contradict each other, though each is valid."""
        return []

    @classmethod
    def stage_problems(cls, config: StageConfig, model_config: PretrainedConfig) -> list[str]:  # noqa: ARG003
        """Return what a stage's configuration asks for that models of this family cannot do."""
        return []

    @classmethod
    def head_is_tied(cls, config: PretrainedConfig) -> bool:
        """Return whether the LM head is the embedding, judging by config.json."""
        return bool(config.tie_word_embeddings)

    @classmethod
    def saved_fields(cls, config: PretrainedConfig) -> dict[str, Any]:  # noqa: ARG003
        """Return the fields of config.json that transformers itself would write wrongly."""
        return {}


def eos_ids(eos: int, extra: int | list[int] | None) -> frozenset[int]:
    """Return the ids that end a response: the tokenizer's and those of the generation config."""
    return frozenset(
        [eos, *([] if extra is None else [extra] if isinstance(extra, int) else extra)]
    )


def one_table_limit(config: PretrainedConfig) -> int | None:
    """Return the tokens up to which a model rotates by its first table; None if it has one only.

    In longer rows, `longrope` has other frequencies for all tokens, the cached ones too.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    long = [table for table in tables if table.get("rope_type") == "longrope"]
    return min((int(table["original_max_position_embeddings"]) for table in long), default=None)
