"""The families of models, by the `model_type` of their configuration.

A family is one class in one file, which says how a layer computes; training, prefill and decoding
follow. One of your own is registered from outside, before its first checkpoint is loaded:

    FAMILIES["my_type"] = MyFamily

Loading compares it with transformers' own forward (`rlhf.models.agreement`).
"""

from rlhf.models.families.llama import Llama
from rlhf.models.families.t5 import T5
from rlhf.models.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {"llama": Llama, "t5": T5}
