"""Models that transformers could compute, but that cannot be trained here, and why.

Told from config.json alone, before any weights are loaded.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from rlhf.models.compat import is_stateful
from rlhf.models.generic import takes

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL_SIZES = ("head_dim", "intermediate_size", "num_key_value_heads")
# Parts of a config.json that group fields of one model.
_GROUPS = frozenset({"attn_config", "ffn_config"})
_SENSES = ("vision", "image", "audio", "speech", "vq_")
# Kinds of layers that cache keys and values alone, of all tokens or of the last ones.
_CACHED = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Encoder-decoder models, by `model_type`.
_SKIPS_PAD = "its decoder gives PAD no position, so decoding differs from reading a response"
_NAMED = {
    "bigbird_pegasus": "the states of a prompt depend on its padding",
    "fsmt": "its decoder is not called as others are",
    "led": "it needs to be told which tokens have global attention",
    "m2m_100": _SKIPS_PAD,
    "prophetnet": "its decoder predicts several tokens at once",
    "seamless_m4t": _SKIPS_PAD,
    "seamless_m4t_v2": _SKIPS_PAD,
}


def reason_against(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> str | None:
    """Return why a model without a family of its own cannot be trained; None if it can.

    Args:
        config: Its configuration.
        model_class: The class that transformers would load it with.
    """
    if config.model_type in _NAMED:
        return _NAMED[config.model_type]
    if experts := sorted(set(_expert_fields(config.to_dict()))):
        return f"it is a mixture of experts ({', '.join(experts[:3])})"
    parts = sorted(set(config.sub_configs) - _GROUPS)
    if any(sense in part for part in parts for sense in _SENSES):
        return f"it reads images or sound ({', '.join(parts)})"
    if parts:
        return f"it is made of several models ({', '.join(parts)})"
    kinds = set(getattr(config, "layer_types", None) or ()) - _CACHED
    if kinds or is_stateful(model_class):
        named = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"some of its layers keep a state that is no key-value cache{named}"
    if not takes(model_class, "past_key_values"):
        return "transformers has no key-value cache for it"
    required = all(_is_one(config, name, int) for name in _SIZES)
    if not required or not all(_is_one(config, name, int | None) for name in _OPTIONAL_SIZES):
        return "its layers differ in size"
    # Old files may have the field without a meaning; GPT-NeoX has it, but is always causal.
    may_be_encoder = getattr(type(config), "is_decoder", None) is False
    if config.is_encoder_decoder:
        return None
    if may_be_encoder and not config.is_decoder and not config.model_type.startswith("gpt_neox"):
        return "it reads a text in both directions (is_decoder is false)"
    return None


def _expert_fields(values: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the names of fields that count experts, wherever they are."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _expert_fields(value)
        elif "expert" in str(name) and type(value) is int and value > 0:
            yield str(name)


def _is_one(config: PretrainedConfig, name: str, kind: Any) -> bool:
    try:
        return isinstance(getattr(config, name, None), kind)
    except RuntimeError:  # layers have sizes of their own
        return False
