"""The families of models, by the `model_type` of their configuration.

A family is one class in one file that defines how a layer computes; training, prefill and decoding
follow from it. Register your own from outside, before loading its first checkpoint:

    FAMILIES["my_type"] = MyFamily

Loading compares it with transformers' own forward (`rlhf.models.agreement`).
"""

from transformers import PretrainedConfig

from rlhf.errors import InputError
from rlhf.models.families.gemma2 import Gemma2
from rlhf.models.families.gemma3 import Gemma3
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
from rlhf.models.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
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


def family_of(config: PretrainedConfig, where: str = "base_model") -> type[LanguageModel]:
    """Return the family that computes the models of a config.json.

    Args:
        config: The model's configuration.
        where: The setting that names the model, for messages.

    Raises:
        InputError: No family computes such models.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise InputError(f"{where}: a {kind!r} model; rlhf trains {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]
