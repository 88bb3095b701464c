"""What can stand in for our own reward model: a sequence classifier, or a Python callable."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.data.batching import chunks
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.files import check_files, count_stored
from rlhf.signals import stop_point

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class Scorer(Protocol):
    """Anything that scores texts; the higher the better.

    Attributes:
        shares_base: True when it runs on the policy's own base and tokenizer, so that sampled ids
            can be scored as they are (`score_tokens` of `rlhf.models.roles.RewardModel`).
    """

    shares_base: bool

    def score(
        self, prompts: Sequence[PromptText], responses: Sequence[str], batch_size: int = 32
    ) -> Tensor:
        """Scores responses to prompts: (N,) fp32 on the CPU, in the order given."""
        ...


class RewardFn:
    """A Python callable on texts as a scorer.

    Args:
        function: Called with a list of prompts and a list of responses of the same length;
            returns one finite number for each.
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
        except ValueError:  # written in C, without a signature
            pass

    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,  # noqa: ARG002 (the callable gets all at once)
    ) -> Tensor:
        """Scores all texts in one call: (N,) fp32 on the CPU.

        Raises:
            InputError: If the callable answers with anything but one finite number per response.
        """
        answers = self.function([prompt.text for prompt in prompts], list(responses))
        try:
            scores = [float(answer) for answer in answers]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"reward_fn {self.name}: expected a list of numbers, got "
                f"{type(answers).__name__} ({error})"
            ) from error
        if len(scores) != len(responses):
            raise InputError(
                f"reward_fn {self.name}: returned {len(scores)} scores for {len(responses)} "
                "responses; expected one per response"
            )
        for index, score in enumerate(scores):
            if not math.isfinite(score):
                raise InputError(
                    f"reward_fn {self.name}: returned {score} for response {index}, "
                    f"{responses[index]!r:.80}; expected a finite number"
                )
        return torch.tensor(scores, dtype=torch.float32)


class SequenceClassifier:
    """A Hugging Face sequence classifier with one label, read with the pooling of its own class.

    It sees the prompt's text followed directly by the response's, with the special tokens its
    tokenizer adds. Text beyond its limit loses its beginning, so that the response stays.

    Args:
        source: Folder or Hub id.
        device: Where it runs.
        dtype: Its weights' type.
        revision: Hub revision.
    """

    shares_base = False

    def __init__(
        self,
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model, self.tokenizer = _load_classifier(source, dtype, revision)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer.truncation_side = "left"
        # Left padding would shift the position ids that most classes count from the left edge.
        self.tokenizer.padding_side = "right"
        limits = (
            self.tokenizer.model_max_length,
            getattr(self.model.config, "max_position_embeddings", None),
        )
        # Tokenizers without a limit say 10**30.
        self.limit = min((limit for limit in limits if limit and limit < 10**9), default=None)
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        # Classes find the last token by comparing with the configured PAD, so a padded batch is
        # safe only where model and tokenizer agree on it.
        self.can_pad = pad is not None and pad == self.tokenizer.pad_token_id

    @torch.no_grad()
    def score(
        self, prompts: Sequence[PromptText], responses: Sequence[str], batch_size: int = 32
    ) -> Tensor:
        """Scores texts in batches of similar length: (N,) fp32 on the CPU, in the order given."""
        texts = [
            prompt.text + response for prompt, response in zip(prompts, responses, strict=True)
        ]
        encoded = [self._encode(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]["input_ids"]))
        scores = torch.empty(len(texts))
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

    def _encode(self, text: str) -> dict[str, list[int]]:
        encoded = self.tokenizer(text, truncation=self.limit is not None, max_length=self.limit)
        return {key: list(value) for key, value in encoded.items()}


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
    check_files(source, where, revision)
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
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{where}: not a sequence classifier that loads: {reason}") from error
    wrong = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise InputError(f"{where}: the checkpoint lacks weights: {', '.join(wrong[:5])}")
    return model, tokenizer
