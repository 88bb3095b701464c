"""Estimate how much memory a stage takes, from config.json alone.

Weights, adapters and optimizer state are counted exactly, on a model without storage. Activations
and caches are estimates for judging whether a run fits, good to a factor of about two: the rest
depends on kernels, fragmentation and the length of real rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from rlhf.config import (
    DPOConfig,
    InferenceConfig,
    LoRAConfig,
    PPOConfig,
    RewardModelConfig,
    StageConfig,
    TrainingConfig,
)
from rlhf.hardware import pick_device, pick_dtype
from rlhf.models.families import family_of
from rlhf.models.loading import without_storage
from rlhf.models.logprobs import LOGITS_PER_CHUNK, LOGITS_PER_CHUNK_CPU
from rlhf.models.lora import MERGED_AT_ONCE
from rlhf.models.merging import SHARD_BYTES
from rlhf.models.targets import adapted_layers
from rlhf.objectives import find_estimator

# fp32 weight, its gradient and AdamW's two moments.
TRAINED_BYTES = 16
# Numbers kept per token, layer and hidden unit for the backward pass: the 34 bytes of 16-bit
# activations of Korthikanti et al. 2022 (arXiv 2205.05198, eq. 2), without attention matrices.
KEPT_PER_HIDDEN = 17


@dataclass(frozen=True)
class Counts:
    """Sizes of a model, in numbers rather than bytes.

    Attributes:
        base: Parameters of the base, shared ones counted once.
        adapter: Parameters of one LoRA adapter; 0 without one.
        head: Parameters of a reward or value head.
        largest: Parameters of the largest layer that has an adapter; 0 without one.
    """

    base: int
    adapter: int
    head: int
    largest: int = 0


def count_parameters(config: PretrainedConfig, lora: LoRAConfig | None = None) -> Counts:
    """Count the parameters of a model and of an adapter on it, without creating either.

    Args:
        config: The model's config.json.
        lora: Shape of the adapter; None for no adapter.
    """
    model = without_storage(config)
    base = sum(parameter.numel() for parameter in model.parameters())
    adapter = largest = 0
    if lora is not None and lora.rank:
        layers = adapted_layers(model, family_of(config).peft_config(lora, model))
        adapter = sum(lora.rank * sum(layer.weight.shape) for layer in layers.values())
        largest = max(layer.weight.numel() for layer in layers.values())
    return Counts(base, adapter, int(config.hidden_size), largest)


def memory_per_role(
    model_config: PretrainedConfig,
    config: StageConfig,
    reward_configs: Sequence[PretrainedConfig] = (),
) -> dict[str, int]:
    """Return the bytes that each role of a stage holds.

    Args:
        model_config: config.json of the base model.
        config: The stage's configuration.
        reward_configs: config.json of the reward models' bases that differ from the policy's.

    Returns:
        Role to bytes, in order of creation. `activations`, `cache` and `export` are estimates and
        are never held at the same time, except for the cache that compiled decoding keeps.
    """
    lora = config.lora if isinstance(config, TrainingConfig) else LoRAConfig()
    counts = count_parameters(model_config, lora)
    width = pick_dtype(config.dtype, pick_device(config.device)).itemsize
    roles = _weights(config, counts, width)
    if isinstance(config, PPOConfig) and not find_estimator(config.advantage).needs_critic:
        del roles["critic"]
    if reward_configs:
        sizes = [count_parameters(reward).base * width for reward in reward_configs]
        roles["reward model's base" if len(sizes) == 1 else "reward models' bases"] = sum(sizes)
    if isinstance(config, TrainingConfig):
        roles["activations"] = _activations(model_config, config, width)
    if isinstance(config, PPOConfig):
        name = "cache, kept" if config.compile_decode else "cache"
        roles[name] = _cache(model_config, config, config.effective_rollout_batch_size, width)
    if isinstance(config, InferenceConfig):
        roles["cache"] = _cache(model_config, config, config.batch_size, width)
    if isinstance(config, TrainingConfig):
        roles["export"] = _export(model_config, config, counts, width)
    return roles


def _weights(config: StageConfig, counts: Counts, width: int) -> dict[str, int]:
    """Return bytes of weights, gradients and optimizer state; a frozen number takes `width`."""
    frozen = {"frozen base": counts.base * width}
    adapter, head = counts.adapter * TRAINED_BYTES, counts.head * TRAINED_BYTES
    if not isinstance(config, TrainingConfig):
        return frozen | {"policy adapter": counts.adapter * 4}
    if config.lora.rank == 0:
        trained = {"trained weights": counts.base * TRAINED_BYTES}
        if isinstance(config, RewardModelConfig):
            return trained | {"reward head": head}
        if isinstance(config, DPOConfig):  # the second, frozen copy is the reference
            return frozen | trained
        if not isinstance(config, PPOConfig):
            return trained
        own = counts.base * TRAINED_BYTES if config.critic == "adapter" else 0
        # The second, frozen copy is both the reference and the reward model's base.
        needed = config.kl_coeff > 0 or bool(config.reward_models)
        return (frozen if needed else {}) | {
            "policy": trained["trained weights"],
            "critic": own + head,
        }
    if isinstance(config, PPOConfig):
        own = adapter if config.critic == "adapter" else 0
        scorer = (counts.adapter * 4 + counts.head * 4) * len(config.reward_models)
        return frozen | {
            "policy adapter": adapter,
            "critic": own + head,
            "reward adapter": scorer,
        }
    if isinstance(config, RewardModelConfig):
        return frozen | {"reward adapter": adapter, "reward head": head}
    if isinstance(config, DPOConfig):  # the reference is the base without the adapter
        return frozen | {"policy adapter": adapter}
    return frozen | {"adapter": adapter}


def _export(config: PretrainedConfig, stage: TrainingConfig, counts: Counts, width: int) -> int:
    """Return the bytes that merging and writing take on the device; see `rlhf.models.merging`."""
    total = 0
    if counts.adapter and not isinstance(stage, RewardModelConfig):  # the KL of merging
        wanted = stage.effective_micro_batch_size * stage.target_sequence_length
        total += 3 * 4 * min(wanted * int(config.vocab_size), LOGITS_PER_CHUNK_CPU)
        total += counts.largest * width + 3 * 4 * min(counts.largest, MERGED_AT_ONCE)
    if pick_device(stage.device).type == "cpu":  # where files are assembled
        total += 2 * min(SHARD_BYTES, counts.base * width)
    return total


def _activations(config: PretrainedConfig, stage: TrainingConfig, width: int) -> int:
    """Return the bytes kept for the backward pass of one micro-batch of the longest rows."""
    prompt, response = stage.prompt_sequence_length, stage.target_sequence_length
    shape = family_of(config).shape(config)
    encoder, decoder = shape.encoder_layers, shape.decoder_layers
    rows, tokens = stage.micro_batch_limits
    shared = _responses_per_prompt(stage) if shape.shares_prompts else 1
    pair = isinstance(stage, RewardModelConfig | DPOConfig)
    # A row is a prompt with all of its responses.
    read = shared * response + (0 if encoder else prompt)
    rows = max(1, min(rows if pair else rows // shared, tokens // (prompt + shared * response)))
    hidden = int(config.hidden_size)
    in_encoder = prompt * (
        KEPT_PER_HIDDEN * hidden + shape.kept_matrices * shape.encoder_keys(prompt)
    )
    in_decoder = read * (KEPT_PER_HIDDEN * hidden + shape.kept_matrices * (prompt + read))
    if stage.gradient_checkpointing:  # the input of each layer, and all of the recomputed one
        kept = (encoder * prompt + decoder * read) * hidden
        kept += max(in_encoder if encoder else 0, in_decoder)
    else:
        kept = encoder * in_encoder + decoder * in_decoder
    logits = 0
    if not isinstance(stage, RewardModelConfig):
        wanted = rows * shared * response * int(config.vocab_size)
        logits = 3 * 4 * min(wanted, LOGITS_PER_CHUNK)  # logits, log-softmax and gradient
    return rows * kept * width + logits


def _cache(config: PretrainedConfig, stage: StageConfig, rows: int, width: int) -> int:
    """Return the bytes of keys and values while `rows` responses are generated."""
    shape = family_of(config).shape(config)
    shared = min(rows, _responses_per_prompt(stage)) if shape.shares_prompts else 1
    tokens = rows * stage.target_sequence_length + -(-rows // shared) * stage.prompt_sequence_length
    return shape.cached * tokens * width


def _responses_per_prompt(stage: StageConfig) -> int:
    """Return how many responses share a prompt."""
    if isinstance(stage, PPOConfig) and not stage.compile_decode:
        return stage.effective_responses_per_prompt
    return 2 if isinstance(stage, RewardModelConfig | DPOConfig) else 1


def total_memory(roles: dict[str, int]) -> int:
    """Return the peak: everything that is held throughout, plus the largest temporary role."""
    passing = ("activations", "cache", "export")
    weights = sum(size for role, size in roles.items() if role not in passing)
    return weights + max(roles.get(role, 0) for role in passing)
