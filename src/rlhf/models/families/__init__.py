"""The families of models, by the `model_type` of their configuration.

A family is one class in one file that defines how a layer computes; training, prefill and decoding
follow from it. Register your own from outside, before loading its first checkpoint:

    FAMILIES["my_type"] = MyFamily

Loading compares it with transformers' own forward (`rlhf.models.agreement`).
"""

from rlhf.models.families.llama import Llama
from rlhf.models.families.t5 import T5
from rlhf.models.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {"llama": Llama, "t5": T5}
