"""Sequence classifiers of transformers as scorers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.batching import chunks
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptText
from rlhf.data.special_tokens import added_ids
from rlhf.data.turn_ends import with_recorded_turn_end
from rlhf.errors import InputError
from rlhf.models.checkpoint_files import check_checkpoint, count_stored
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
        source: Folder or Hub id.
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
        self.model, self.tokenizer = _load_classifier(source, dtype, revision)
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


def classifier_label(source: str, label: int | str | None, revision: str | None = None) -> int:
    """Return the index of the label whose logit is the score; reads no weights.

    Args:
        source: Folder or Hub id of a sequence classifier.
        label: Index or name; None if there is only one label.
        revision: Hub revision.

    Raises:
        InputError: It is no sequence classifier, or has no such label.
    """
    config = _read_config(source, revision)
    where, count = f"reward_model_path: {source}", config.num_labels
    names = {index: str(name) for index, name in (config.id2label or {}).items()}
    shown = ", ".join(f"{index} ({names.get(index, index)})" for index in range(min(count, 20)))
    shown += ", …" if count > 20 else ""
    if label is None:
        if count != 1:
            raise InputError(
                f"{where}: has {count} labels; choose the one whose logit is the score with "
                f"`reward_model_label`: {shown}"
            )
        return 0
    found = [index for index in range(count) if label in (index, names.get(index))]
    if not found:  # flags are text
        found = [index for index in range(count) if label == str(index)]
    if len(found) != 1:
        raise InputError(f"{where}: has no label {label!r}; expected one of {shown}")
    return found[0]


def _read_config(source: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    where, folder = f"reward_model_path: {source}", Path(source)
    if source.count("/") > 1 and not folder.exists():
        raise InputError(f"{where}: there is no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{where}: holds neither reward_model.json (has its training finished?) nor config.json"
        )
    check_checkpoint(source, where, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # of transformers and the Hub's client
        reason = _first_line(error)
        raise InputError(f"{where}: not a sequence classifier that loads: {reason}") from error
    architectures = config.architectures or ()
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise InputError(
            f"{where}: expected a folder of `rlhf reward-model` or a sequence classifier, got "
            f"{'/'.join(architectures) or 'no architecture'}"
        )
    return config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _load_classifier(source: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": False}
    where = f"reward_model_path: {source}"
    if Path(source).is_dir():
        count_stored(Path(source), where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors, tokenizers and transformers raise their own types
        reason = _first_line(error)
        raise InputError(f"{where}: not a sequence classifier that loads: {reason}") from error
    wrong = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise InputError(f"{where}: the checkpoint lacks weights: {', '.join(wrong[:5])}")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{where}: the tokenizer has ids up to {largest}, the model only {rows} embeddings: "
            "they do not belong together"
        )
    return model, tokenizer
