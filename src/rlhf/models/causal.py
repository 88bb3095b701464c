"""Causal models: the response continues the prompt in one sequence."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from typing_extensions import override

from rlhf.data.batching import TokenBatch, join_rows
from rlhf.data.prompt_codec import PromptLayout
from rlhf.data.special_tokens import added_ids
from rlhf.errors import InputError
from rlhf.models.family import eos_ids
from rlhf.models.language_model import LanguageModel


class CausalModel(LanguageModel):
    """What all causal models have in common, however their layers are computed."""

    task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    @classmethod
    @override
    def prompt_layout(
        cls, tokenizer: PreTrainedTokenizerBase, extra_eos: int | list[int] | None = None
    ) -> PromptLayout:
        # An EOS that the tokenizer adds after a text would end the response before it began.
        prefix, _ = added_ids(tokenizer)
        eos = tokenizer.eos_token_id
        return PromptLayout(prefix, (), True, eos, eos_ids(eos, extra_eos))

    @classmethod
    @override
    def targets(cls, suffixes: list[str], where: str) -> list[str] | str:
        if where == "encoder":
            raise InputError(f"lora.where: a {cls.name} has no encoder; use all or decoder")
        return suffixes

    @override
    def transformers_logits(self, prompts: TokenBatch, responses: TokenBatch) -> Tensor:
        columns, rows = joined_rows(prompts, responses)
        with self.autocast():
            logits = self.module(
                input_ids=rows.ids, attention_mask=rows.mask.long(), use_cache=False
            ).logits
        return logits.float().take_along_dim(columns[:, :, None], 1)


def joined_rows(prompts: TokenBatch, responses: TokenBatch) -> tuple[Tensor, TokenBatch]:
    """Return (B, R+1) columns of the states that predict responses, and the rows to read."""
    ids = join_rows(prompts, responses)
    # The prompt's last token predicts response token 0.
    offsets = torch.arange(responses.ids.shape[1] + 1, device=ids.device)
    columns = (prompts.lengths[:, None] - 1 + offsets).clamp(max=ids.shape[1] - 1)
    return columns, TokenBatch(ids, prompts.lengths + responses.lengths)
