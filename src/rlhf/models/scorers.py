"""Scorers other than our own reward model: a sequence classifier or a Python callable."""

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.data.batching import chunks
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptText
from rlhf.data.special_tokens import added_ids
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.checkpoint_files import check_checkpoint, count_stored
from rlhf.models.families import FAMILIES
from rlhf.signals import stop_point

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]

_LARGEST = torch.finfo(torch.float32).max


class Scorer(Protocol):
    """Anything that scores texts; higher is better.

    Attributes:
        shares_base: True if it runs on the policy's own base and tokenizer, so that it can reuse
            what the policy computed from the prompts (`read` of `RewardModel.score`).
    """

    shares_base: bool

    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,
        *,
        finished: Sequence[bool] | None = None,
    ) -> Tensor:
        """Score responses to prompts: (N,) fp32 on the CPU, in the given order.

        Args:
            prompts: N prompts.
            responses: N responses to them.
            batch_size: Rows per batch; does not affect scores.
            finished: Whether each response ended on its own and so is read with the scorer's EOS; a
                response cut by the limit gets no EOS. By default all ended.
        """
        ...


class RewardFn:
    """A Python callable on texts, used as a scorer.

    Args:
        function: Called with a list of prompts and a list of as many responses; returns one
            finite number per response.
    """

    shares_base = False

    def __init__(self, function: RewardFunction) -> None:
        if not callable(function):
            raise InputError(f"reward_fn: expected a callable, got {type(function).__name__}")
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        try:
            inspect.signature(function).bind([], [])
        except TypeError as error:
            raise InputError(
                f"reward_fn {self.name}: cannot be called with prompts and responses: {error}"
            ) from error
        except ValueError:  # implemented in C, without a signature
            pass

    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,  # noqa: ARG002 (the callable gets all at once)
        *,
        finished: Sequence[bool] | None = None,  # noqa: ARG002 (it gets texts)
    ) -> Tensor:
        """Score all texts in one call: (N,) fp32 on the CPU.

        Raises:
            InputError: The callable fails (its exception is then the cause), or returns anything
                other than one finite number per response.
        """
        try:
            answers = self.function([prompt.text for prompt in prompts], list(responses))
            found = self._listed(answers, len(responses) + 1)
        except (InputError, StoppedBySignal):
            raise
        except Exception as error:
            raise InputError(f"reward_fn {self.name}: raised {_described(error)}") from error
        if len(found) != len(responses):
            returned = len(found) if len(found) <= len(responses) else "more"
            raise InputError(
                f"reward_fn {self.name}: returned {returned} scores for {len(responses)} "
                "responses; expected one per response"
            )
        numbers = zip(found, responses, strict=True)
        scores = [self._number(index, *both) for index, both in enumerate(numbers)]
        return torch.tensor(scores, dtype=torch.float32)

    def _listed(self, answers: Any, most: int) -> list[Any]:
        """Return the answers as a list, at most `most` of them: a generator may never end."""
        unfit = (str, bytes, Mapping, Set)
        if isinstance(answers, unfit) or not (
            isinstance(answers, Iterable) or hasattr(answers, "__getitem__")
        ):
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got {type(answers).__name__}"
            )
        if getattr(answers, "ndim", 1) == 0:
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got a single one of type "
                f"{type(answers).__name__}"
            )
        return list(islice(answers.detach() if isinstance(answers, Tensor) else answers, most))

    def _number(self, index: int, answer: Any, response: str) -> float:
        where = f"response {index}, {response!r:.80}"
        try:
            if isinstance(answer, str | bytes):
                raise TypeError("text")
            score = float(answer)
        except OverflowError as error:
            raise InputError(
                f"reward_fn {self.name}: returned a number of hundreds of digits for {where}; "
                "expected one that fits float32"
            ) from error
        except Exception as error:  # an object's own __float__ may raise anything
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got "
                f"{type(answer).__name__} for {where}"
            ) from error
        if not math.isfinite(score) or abs(score) > _LARGEST:
            raise InputError(
                f"reward_fn {self.name}: returned {score:g} for {where}; expected a finite number "
                "that fits float32"
            )
        return score


def _described(error: Exception) -> str:
    """Return an exception as one line, with its location in the user's code."""
    text = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
    return f"{said} (line {frame.lineno} of {frame.filename}, in {frame.name})"


@dataclass(frozen=True)
class Limits:
    """Token limits of a classifier that rlhf wrote, as in its training.

    Attributes:
        prompt: Maximum tokens of a prompt.
        response: Maximum tokens of a response.
        truncation_side: Side on which an overlong prompt is cut.
    """

    prompt: int
    response: int
    truncation_side: str


class SequenceClassifier:
    """A Hugging Face sequence classifier with one label, using the pooling of its own class.

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
    """

    shares_base = False

    def __init__(
        self,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.device = torch.device(device)
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
            layout = FAMILIES[self.model.config.model_type].prompt_layout(self.tokenizer)
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
            scores[list(rows)] = self.model(**inputs).logits[:, 0].float().cpu()
        return scores

    def _encode(
        self, prompts: Sequence[PromptText], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[dict[str, list[int]]]:
        if self._codec is not None:
            before = self._codec.prompt_rows(prompts)
            after = self._codec.response_rows(responses, finished)
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
    """Make the layer that gives the score compute in float32.

    bfloat16 is too coarse: near 4, its scores are multiples of 1/32, and many responses would tie.
    """
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.out_features == 1:
            part.float()
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


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


def _load_classifier(source: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": False}
    where = f"reward_model_path: {source}"
    folder = Path(source)
    if source.count("/") > 1 and not folder.exists():
        raise InputError(f"{where}: there is no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{where}: holds neither reward_model.json (has its training finished?) nor config.json"
        )
    check_checkpoint(source, where, revision)
    if folder.is_dir():
        count_stored(folder, where)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.num_labels != 1 or not any(
            name.endswith("ForSequenceClassification") for name in config.architectures or ()
        ):
            raise InputError(
                f"{where}: expected a folder of `rlhf reward-model` or a sequence classifier with "
                f"one label, got {'/'.join(config.architectures or ['no architecture'])} with "
                f"{config.num_labels} labels"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except InputError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers raise their own types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
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
