"""Language models for tests, ragged batches, and slow reference implementations."""

import torch
from support.tiny import make_tokenizer, tiny_model
from torch import Tensor

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.models.families import FAMILIES
from rlhf.models.language_model import LanguageModel

EOS = {"t5": 1, "llama": 2}


PAD = 0


LORA = LoRAConfig(rank=4)


def make_lm(arch: str, *, untied: bool = False) -> LanguageModel:
    return FAMILIES[arch](tiny_model(arch, untied=untied), make_tokenizer(arch), base_name="tiny")


def ragged(arch: str) -> tuple[TokenBatch, TokenBatch]:
    """Return rows with mixed lengths, EOS first, a sampled PAD, a PAD in a prompt, and a cut."""
    eos = EOS[arch]
    prompts = [[5, 6, 7, 8, 9, 10], [11], [PAD, 12, PAD, 13], [14, 15]]
    responses = [[20, 21, PAD, 22, eos], [eos], [23, PAD], [PAD, PAD, eos]]
    return TokenBatch.from_lists(prompts), TokenBatch.from_lists(responses)


def plain_logits(
    arch: str, model: torch.nn.Module, prompt: list[int], response: list[int]
) -> Tensor:
    """Return (R+1, V) logits before and after each response token, from the model's own forward."""
    with torch.no_grad():
        if arch == "t5":
            decoder = torch.tensor([[0, *response]])
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
        ids = torch.tensor([[*prompt, *response]])
        return model(input_ids=ids).logits[0, len(prompt) - 1 :]
