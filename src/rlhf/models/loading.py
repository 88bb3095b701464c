"""Load a `LanguageModel` from a Hub id or a folder (local, /gcs/, gs://), with clear errors."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config import RewardModelConfig, StageConfig, TrainingConfig
from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.turn_ends import with_turn_end
from rlhf.errors import InputError
from rlhf.hardware import pick_device, pick_dtype
from rlhf.models.agreement import check_agreement
from rlhf.models.attention import SDPA_FLOAT32
from rlhf.models.bases import Base, check_adapters, find_base, merge_adapters
from rlhf.models.checkpoint_files import check_checkpoint, check_config, count_stored
from rlhf.models.compat import attention_kind, has_adapters, set_attention_kind
from rlhf.models.content import check_written
from rlhf.models.families import family_of
from rlhf.models.heap import keep_freed_memory
from rlhf.models.language_model import LanguageModel
from rlhf.models.special_ids import special_id_problems
from rlhf.models.targets import target_problems
from rlhf.models.weights import cast_weights, quiet_transformers


def read_model_config(base_model: str, revision: str | None = None) -> PretrainedConfig:
    """Return the checkpoint's config.json, without loading its weights; of an adapter, its base's.

    Raises:
        InputError: There is no such checkpoint, no family computes such models, or it is an adapter
            that does not fit its base.
    """
    base = find_base(base_model, revision)
    where = f"base_model: {base_model}"
    check_checkpoint(base.folder, where)
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    except Exception as error:  # each of transformers' checks raises its own type
        reason = _reason(error)
        if "custom code" in reason:
            reason = "auto_map: custom code is never run; only classes of transformers are used"
        raise InputError(f"{where}: config.json: {reason}") from error
    config.name_or_path = base_model
    check_config(config, family_of(config, where), where)
    generation = _generation(base.folder, where)
    sources = [("config.json", config), ("generation_config.json", generation)]
    problems = special_id_problems(sources, config.vocab_size)
    if problems:
        raise InputError([f"{where}: {problem}" for problem in problems])
    if base.adapters:
        check_adapters(base, without_storage(config))
    return config


def _generation(folder: Path, where: str) -> GenerationConfig | None:
    """Return the checkpoint's generation_config.json, if it has one."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
    except Exception as error:  # its checks may raise anything
        raise InputError(f"{where}: generation_config.json: {_reason(error)}") from error


def given_config(model: Any) -> PretrainedConfig:
    """Return the configuration of a model given as an object.

    Raises:
        InputError: It is no language model, or one that no family computes.
    """
    config, kind = getattr(model, "config", None), type(model).__name__
    if not isinstance(config, PretrainedConfig):
        raise InputError(f"model: expected a language model of transformers, got a {kind}")
    family = family_of(config, "model")
    if not hasattr(model, "generation_config") or model.get_output_embeddings() is None:
        raise InputError(
            f"model: a {kind} has no language-model head; give a model that "
            f"{family.auto_class.__name__} loads"
        )
    problems = family.config_problems(config)
    if (attention := attention_kind(config)) not in (None, "eager", "sdpa", SDPA_FLOAT32):
        problems.append(f"attn_implementation: expected eager or sdpa, got {attention!r:.80}")
    if problems:
        raise InputError([f"model: config: {problem}" for problem in problems])
    return config


def load_tokenizer(base_model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the checkpoint's fast tokenizer; of an adapter, its own or its base's.

    Raises:
        InputError: There is none, or it has no EOS token.
    """
    base = find_base(base_model, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.tokenizer, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise InputError(f"base_model: {base_model}: tokenizer: {_reason(error)}") from error
    _check_tokenizer(tokenizer, base_model)
    return tokenizer


def load_language_model(
    config: StageConfig,
    *,
    trainable: bool,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load the base model of a stage.

    Args:
        config: Device, dtype, attention, checkpointing, limits, and the base unless `base_model`
            is given.
        trainable: For full fine-tuning: fp32 weights, all of them trained.
        model: A transformers model to use instead of loading one; it is changed in place.
        tokenizer: Its tokenizer; required with `model`.
        base_model: Base to use instead of the config's.
        revision: Hub revision of `base_model`.

    Raises:
        InputError: Something is wrong with the checkpoint, or rlhf computes the model differently
            from transformers.
    """
    name = str(base_model or config.base_model or getattr(model, "name_or_path", ""))
    revision = revision if base_model else config.revision
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    storage = torch.float32 if trainable else dtype
    if model is None:
        base = find_base(name, revision, weights=True)
        revision = base.revision
        model = _load_weights(base, storage, config.attn_implementation)
        tokenizer = tokenizer or load_tokenizer(name, revision)
    if tokenizer is None:
        raise InputError("tokenizer: a model given as an object needs its tokenizer too")
    family = family_of(given_config(model), "model")
    _check_tokenizer(tokenizer, name)
    _check_vocabulary(model, tokenizer, name)
    if has_adapters(model):
        raise InputError("model: has an adapter of peft already; give it after merge_and_unload()")
    cast_weights(model, storage)
    # Classes that we do not run layer by layer may compare the name of their attention.
    sdpa = attention_kind(model.config) == "sdpa" and not family.is_generic
    if sdpa and device.type == "cpu" and model.dtype == torch.bfloat16:
        for part in model.modules():  # T5's encoder and decoder have their own configurations
            if isinstance(part, PreTrainedModel):
                set_attention_kind(part.config, SDPA_FLOAT32)
    lm = family(
        model.to(device),
        tokenizer,
        trainable=trainable,
        dtype=dtype,
        base_name=name,
        revision=revision,
    )
    check_agreement(lm)
    if getattr(config, "gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def prompt_layout(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PromptLayout:
    """Return what the model wants around prompts; this does not need its weights."""
    return with_turn_end(family_of(config).prompt_layout(tokenizer), tokenizer)


def check_stage(config: StageConfig, model_config: PretrainedConfig) -> list[str]:
    """Return what a stage's configuration asks for that its base cannot do."""
    family = family_of(model_config)
    limits = (config.prompt_sequence_length, config.target_sequence_length)
    return family.stage_problems(config, model_config) + check_limits(model_config, *limits)


def check_limits(config: PretrainedConfig, prompt_limit: int, response_limit: int) -> list[str]:
    """Return what is wrong with the sequence limits for this model; empty if it has no limit."""
    return family_of(config).limit_problems(config, prompt_limit, response_limit)


def without_storage(config: PretrainedConfig) -> Any:
    """Build the model that a config.json describes without storage: names and shapes only.

    Raises:
        InputError: It describes no valid model.
    """
    family = family_of(config)
    try:
        with torch.device("meta"):
            model: Any = family.auto_class.from_config(config)
            head = model.get_output_embeddings()
            if not family.head_is_tied(config):
                head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    except Exception as error:  # torch gets the values of config.json unchecked
        where = f"base_model: {config.name_or_path}: config.json"
        raise InputError(f"{where}: does not describe a valid model: {_reason(error)}") from error
    return model


def check_adapter(config: StageConfig, model_config: PretrainedConfig, model: Any) -> list[str]:
    """Return what is wrong with a stage's `lora`, before any weights are loaded.

    Args:
        config: The stage's configuration.
        model_config: config.json of its base.
        model: The base if it was given as an object, else None.
    """
    lora = config.lora if isinstance(config, TrainingConfig) else None
    if not lora or not lora.rank or not (lora.target_modules or lora.where != "all"):
        return []
    module = without_storage(model_config) if model is None else model
    head = module.get_output_embeddings().weight
    unread = head if isinstance(config, RewardModelConfig) else None
    try:
        targets = family_of(model_config).peft_config(lora, module)
    except InputError as error:
        return error.problems
    problems = target_problems(module, targets, lora.target_modules or (), unread=unread)
    return [f"lora.target_modules: {problem}" for problem in problems]


def _load_weights(base: Base, dtype: torch.dtype, attention: str) -> Any:
    """Load a base's weights in `dtype`, with its adapters merged in float32."""
    where = f"base_model: {base.name}"
    config = read_model_config(base.name, base.revision)
    _check_size(config, base.folder, where)
    check_written(base.folder)
    exact = torch.float32 if base.adapters and config.dtype != dtype else dtype
    try:
        with quiet_transformers():
            model, info = family_of(config).auto_class.from_pretrained(
                base.folder,
                dtype=exact,
                attn_implementation=None if attention == "auto" else attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, torch and transformers each raise their own types
        raise InputError(f"{where}: {_reason(error)}{_hint(base.folder)}") from error
    model.name_or_path = model.config.name_or_path = base.name
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise InputError(
            f"{where} is incomplete: {len(missing)} tensors are missing or differ "
            f"in shape from what config.json says, such as {missing[0]}"
        )
    for tensor_name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{where}: tensor {tensor_name} holds NaN or infinite numbers; "
                "the checkpoint is broken; download it again"
            )
    merge_adapters(base, model)
    return model


def _check_size(config: PretrainedConfig, folder: Path, where: str) -> None:
    """Refuse a model much larger than its stored weights, before allocating any memory."""
    stored = count_stored(folder, where)
    if stored is None:  # no safetensors files
        return
    wanted = sum(parameter.numel() for parameter in without_storage(config).parameters())
    if stored < wanted / 2:
        raise InputError(
            f"{where} is incomplete: config.json describes {wanted:,} parameters, but its files "
            f"hold {stored:,}"
        )


def _hint(folder: Path) -> str:
    if list(folder.glob("*.safetensors")):
        return ""
    return (
        "; there is no *.safetensors file, and other formats are not loaded because they can run "
        "code: save the model again with save_pretrained"
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.is_fast:
        raise InputError(f"base_model: {name} has no fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"base_model: the tokenizer of {name} has no EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise InputError(
            f"base_model: the tokenizer of {name} has ids up to {largest}, the model only {rows} "
            "embeddings: they do not belong together"
        )
    sources = [("config", model.config), ("generation_config", model.generation_config)]
    problems = special_id_problems(sources, rows)
    if problems:
        raise InputError([f"base_model: {name}: {problem}" for problem in problems])


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # a heading
        lines = [" ".join(lines[:2])]
    return f"{lines[0]:.300}" if lines else type(error).__name__
