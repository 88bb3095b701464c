"""The families of models, by the `model_type` of their configuration."""

from rlhf.models.decoder_only import DecoderOnlyModel
from rlhf.models.encoder_decoder import EncoderDecoderModel
from rlhf.models.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {"llama": DecoderOnlyModel, "t5": EncoderDecoderModel}
