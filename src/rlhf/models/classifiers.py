"""Sequence classifiers of transformers as scorers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.batching import chunks
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptText
from rlhf.data.special_tokens import added_ids
from rlhf.data.turn_ends import with_recorded_turn_end
from rlhf.models.classifier_files import classifier_label, load_classifier
from rlhf.models.families import family_of
from rlhf.signals import stop_point


@dataclass(frozen=True)
class Limits:
    """Token limits of a classifier that rlhf wrote, as in its training.

    Attributes:
        prompt: Maximum tokens of a prompt.
        response: Maximum tokens of a response.
        truncation_side: Side on which an overlong prompt is cut.
        turn_end: Token that ended responses in a chat; "" for EOS.
    """

    prompt: int
    response: int
    truncation_side: str
    turn_end: str = ""


class SequenceClassifier:
    """A Hugging Face sequence classifier, using the pooling of its own class.

    The score is the raw logit of one label: it orders responses like the label's log-odds against
    the others, and unlike a log-probability it does not saturate where the classifier is sure.

    It sees the prompt's text followed directly by the response's, with the special tokens its
    tokenizer adds. A text beyond its limit is cut at the beginning, so that the response stays. A
    response that was cut does not get the EOS that the tokenizer adds at the end, unless that EOS
    is also the separator or the class needs it (as an encoder-decoder does); then every text has
    it.

    A classifier that `rlhf reward-model` wrote reads the same ids as the reward model itself.

    Args:
        source: Folder or Hub id of a classifier, or of an adapter with a classifier's head.
        device: Where it runs.
        dtype: Type of its weights.
        revision: Hub revision.
        limits: Limits of the reward model that it was written from; None for other classifiers.
        label: Index or name of the label whose logit is the score; None if there is only one.
    """

    shares_base = False

    def __init__(
        self,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        limits: Limits | None = None,
        label: int | str | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.label = classifier_label(source, label, revision)
        self.model, self.tokenizer = load_classifier(source, dtype, revision)
        self.model.to(self.device).eval().requires_grad_(False)
        _score_in_float32(self.model)
        self.tokenizer.truncation_side = "left"
        # Left padding would shift the position ids that most classes count from the left edge.
        self.tokenizer.padding_side = "right"
        self.limit = _longest(self.model, self.tokenizer)
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        # Classes find the last token by comparing with the configured PAD, so padding a batch is
        # safe only if model and tokenizer agree on it.
        self.can_pad = pad is not None and pad == self.tokenizer.pad_token_id
        self._ends_in_eos = _ends_in_eos(self.model, self.tokenizer)
        self._codec = None
        if limits is not None:
            layout = family_of(self.model.config).prompt_layout(self.tokenizer)
            layout = with_recorded_turn_end(layout, self.tokenizer, limits.turn_end)
            self._codec = PromptCodec(
                self.tokenizer, layout, limits.prompt, limits.response, limits.truncation_side
            )

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,
        *,
        finished: Sequence[bool] | None = None,
    ) -> Tensor:
        """Score texts in batches of similar length: (N,) fp32 on the CPU, in the given order."""
        encoded = self._encode(prompts, responses, finished or [True] * len(responses))
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
        scores = torch.empty(len(encoded))
        for rows in chunks(order, batch_size if self.can_pad else 1):
            stop_point()
            batch = [encoded[row] for row in rows]
            inputs = (
                self.tokenizer.pad(batch, return_tensors="pt")
                if len(batch) > 1
                else {key: torch.tensor([value]) for key, value in batch[0].items()}
            )
            inputs = {key: value.to(self.device) for key, value in inputs.items()}
            scores[list(rows)] = self.model(**inputs).logits[:, self.label].float().cpu()
        return scores

    def _encode(
        self, prompts: Sequence[PromptText], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[dict[str, list[int]]]:
        if self._codec is not None:
            before = self._codec.prompt_rows(prompts)
            after = self._codec.response_rows(responses, finished, prompts)
            rows = [first + second for first, second in zip(before, after, strict=True)]
            return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        encoded = []
        for prompt, response, ended in zip(prompts, responses, finished, strict=True):
            text = prompt.text + response
            row = self.tokenizer(text, truncation=self.limit is not None, max_length=self.limit)
            end = -1 if self._ends_in_eos and not ended else None
            encoded.append({key: list(value)[:end] for key, value in row.items()})
        return encoded


def _score_in_float32(model: Any) -> None:
    """Make the layer that gives the scores, the last one of their number, compute in float32.

    bfloat16 is too coarse: near 4, its scores are multiples of 1/32, and many responses would tie.
    """
    labels = model.config.num_labels
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    for layer in layers[-1:]:
        layer.float()
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _ends_in_eos(model: Any, tokenizer: Any) -> bool:
    """Return whether the tokenizer ends texts in an EOS that is nothing else and can be dropped."""
    eos = tokenizer.eos_token_id
    if eos is None or eos in (tokenizer.sep_token_id, tokenizer.cls_token_id):
        return False
    return added_ids(tokenizer)[1] == (eos,) and not model.config.is_encoder_decoder


def _longest(model: Any, tokenizer: Any) -> int | None:
    """Return the most tokens a classifier can read; None if there is no limit."""
    limits = [
        tokenizer.model_max_length,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    ]
    for name, part in model.named_modules():
        # Classes that count positions from PAD + 1 (RoBERTa's, MPNet's, ESM's) give their position
        # table a padding row; no token uses the rows up to and including it.
        padding, rows = (getattr(part, field, None) for field in ("padding_idx", "num_embeddings"))
        if "position" in name and padding is not None and rows is not None:
            limits.append(rows - padding - 1)
    # Tokenizers without a limit say 10**30; models with relative positions say -1.
    return min((limit for limit in limits if limit and 0 < limit < 10**9), default=None)
