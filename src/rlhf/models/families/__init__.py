"""The families of models, by the `model_type` of their configuration.

A family is one class in one file that defines how a layer computes; training, prefill and decoding
follow from it. Register your own from outside, before loading its first checkpoint:

    FAMILIES["my_type"] = MyFamily

Loading compares it with transformers' own forward (`rlhf.models.agreement`). Any other causal or
encoder-decoder model is computed by that forward itself, which is slower (`rlhf.models.generic`).
"""

from transformers import PretrainedConfig

from rlhf.errors import InputError
from rlhf.models.families.gemma2 import Gemma2
from rlhf.models.families.gemma3 import Gemma3
from rlhf.models.families.generic_causal import GenericCausal
from rlhf.models.families.generic_encoder_decoder import GenericEncoderDecoder
from rlhf.models.families.gpt2 import GPT2
from rlhf.models.families.gpt_neox import GPTNeoX
from rlhf.models.families.llama import Llama
from rlhf.models.families.longt5 import LongT5
from rlhf.models.families.mistral import Mistral
from rlhf.models.families.mt5 import MT5
from rlhf.models.families.phi3 import Phi3
from rlhf.models.families.qwen2 import Qwen2
from rlhf.models.families.qwen3 import Qwen3
from rlhf.models.families.smollm3 import SmolLM3
from rlhf.models.families.t5 import T5
from rlhf.models.families.umt5 import UMT5
from rlhf.models.families.unsupported import reason_against
from rlhf.models.generic import GenericModel
from rlhf.models.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "gpt2": GPT2,
    "gpt_neox": GPTNeoX,
    "llama": Llama,
    "longt5": LongT5,
    "mistral": Mistral,
    "mt5": MT5,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "smollm3": SmolLM3,
    "t5": T5,
    "umt5": UMT5,
}
# For models without their own, by whether they have an encoder.
_GENERIC: dict[bool, type[GenericModel]] = {False: GenericCausal, True: GenericEncoderDecoder}


def family_of(config: PretrainedConfig, where: str = "base_model") -> type[LanguageModel]:
    """Return the family that computes the models of a config.json.

    Args:
        config: The model's configuration.
        where: The setting that names the model, for messages.

    Raises:
        InputError: No family computes such models.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    family = _GENERIC[bool(config.is_encoder_decoder)]
    reason: str | None = "transformers has no text model of this type"
    if type(config) in family.classes:
        reason = reason_against(config, family.classes[type(config)])
        if reason is None:
            return family
    known = ", ".join(sorted(FAMILIES))
    raise InputError(
        f"{where}: a {kind!r} model cannot be trained: {reason}; rlhf trains {known}, and other "
        "dense language models of transformers"
    )


def family_notes(config: PretrainedConfig) -> list[str]:
    """Return what a user should know of the way in which a model is computed, line by line."""
    family = family_of(config)
    if not issubclass(family, GenericModel):
        return []
    return [
        f"model: no own family for {config.model_type!r}: transformers' own forward computes it, "
        f"which is slower; {family.group_note}"
    ]
