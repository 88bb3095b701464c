"""The reward model: an adapter on a base, a head, and the normalization of its scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config import StageConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.groups import consecutive, group_batches, select_group_rows
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.data.special_tokens import save_tokenizer
from rlhf.data.turn_ends import with_recorded_turn_end
from rlhf.errors import InputError
from rlhf.files.disk import settle
from rlhf.files.local_copy import local_folder, recorded_base
from rlhf.hardware import pick_device, pick_dtype
from rlhf.models.classifier_files import classifier_label
from rlhf.models.classifiers import Limits, SequenceClassifier
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model
from rlhf.models.plain_lora import read_adapter_config
from rlhf.models.reward_record import RewardRecord, read_record
from rlhf.models.saving import load_adapter, save_adapter, save_merged
from rlhf.models.scorers import Scorer
from rlhf.signals import stop_point

HEAD_FILE = "head.safetensors"


class RewardModel:
    """Scores responses with a language model's adapter (or all its weights) and a linear head.

    Args:
        lm: The language model.
        adapter: Name of its adapter; None if the whole model was trained.
        head: Reads the state that has seen the whole response.
        record: How it was trained and how its scores are normalized.
        shares_base: Whether it runs on the policy's own base.
    """

    def __init__(
        self,
        lm: LanguageModel,
        adapter: str | None,
        head: ScalarHead,
        record: RewardRecord,
        shares_base: bool = False,
    ) -> None:
        self.lm = lm
        self.adapter = adapter
        self.head = head
        self.record = record
        self.shares_base = shares_base
        self.codec = PromptCodec(
            lm.tokenizer,
            with_recorded_turn_end(lm.layout, lm.tokenizer, record.turn_end),
            record.prompt_sequence_length,
            record.target_sequence_length,
            truncation_side=record.truncation_side,
        )

    def reads_ids_of(self, lm: LanguageModel) -> bool:
        """Return whether `lm`'s ids mean the same to this model, whatever its weights."""
        return type(lm) is type(self.lm) and tokenizer_fingerprint(
            lm.tokenizer
        ) == tokenizer_fingerprint(self.lm.tokenizer)

    def normalize(self, shift: float, scale: float) -> None:
        """Set the constants of the normalized score, (raw − shift) / scale."""
        self.record = replace(self.record, shift=shift, scale=scale)

    def raw_scores(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        """Return scores before normalization, with gradients: (B,) fp32.

        Backward must run inside `lm.using(adapter)`, so training wraps both passes in it.

        Args:
            prompts: G prompts, each read once.
            responses: B responses.
            groups: (B,) index of each response's prompt; None for one response to each.
        """
        with self.lm.using(self.adapter):
            return self.head(self.lm.final_states(prompts, responses, groups))

    @torch.no_grad()
    def scores(
        self, prompts: TokenBatch, responses: TokenBatch, groups: Tensor | None = None
    ) -> Tensor:
        """Return the normalized scores of one batch: (B,) fp32, on the batch's device."""
        with self.lm.inference():
            raw = self.raw_scores(prompts, responses, groups)
        return (raw - self.record.shift) / self.record.scale

    def score_tokens(
        self,
        prompts: TokenBatch,
        responses: TokenBatch,
        batch_size: int = 32,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Score token ids unchanged, in batches of similar length.

        Args:
            prompts: G prompts in this model's ids, each read once.
            responses: N responses, with EOS if they ended.
            batch_size: Responses per batch; does not affect scores.
            groups: (N,) index of each response's prompt; None for one response to each.

        Returns:
            (N,) fp32 on the CPU, in the given order.
        """
        scores, device = torch.empty(len(responses)), self.lm.device
        if groups is None:
            groups = torch.arange(len(prompts))
        no_limit = 2**62
        for rows in group_batches(prompts.lengths, responses.lengths, groups, batch_size, no_limit):
            stop_point()
            some, members = select_group_rows(prompts, groups, rows)
            batch = some.to(device), responses.select_rows(rows).to(device), members
            scores[list(rows)] = self.scores(*batch).cpu()
        return scores

    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,
        *,
        finished: Sequence[bool] | None = None,
        read: TokenBatch | None = None,
    ) -> Tensor:
        """Tokenize and score texts: (N,) fp32 on the CPU, in the given order.

        All scored ids are made here, even if a policy with the same tokenizer sampled the
        responses: its ids may spell a text differently, and a text must have one score.

        Args:
            prompts: N prompts.
            responses: N responses to them.
            batch_size: Rows per batch; does not affect scores.
            finished: See `Scorer.score`.
            read: The prompts as read by another model with the same base, those of consecutive
                responses once; its encoder states are reused if the ids match.
        """
        different, groups = consecutive(prompts)
        ids = self.codec.prompts(different)
        if read is not None and read.tolists() == ids.tolists():
            ids = read
        answers = self.codec.responses(list(responses), finished, prompts).to(ids.ids.device)
        return self.score_tokens(ids, answers, batch_size, groups)

    def save(self, folder: Path) -> None:
        """Write adapter/ (merged/ if all weights were trained), head, tokenizer and record."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            save_merged(self.lm, None, folder / "merged")
        else:
            save_adapter(self.lm, self.adapter, folder / "adapter")
        save_tokenizer(
            self.lm.tokenizer, self.lm.layout.prefix_ids, self.lm.layout.suffix_ids, folder
        )
        save_file({"weight": self.head.weight.detach().cpu()}, folder / HEAD_FILE)
        self.record.write(folder)
        settle(folder / HEAD_FILE)


def load_reward_model(
    path: str,
    *,
    device: torch.device | str = "auto",
    dtype: str = "auto",
    policy_lm: LanguageModel | None = None,
    base_model: str | None = None,
    name: str = "reward",
    label: int | str | None = None,
) -> Scorer:
    """Load a scorer: a folder of `rlhf reward-model`, a sequence classifier, or an adapter of one.

    Args:
        path: Folder (local or remote) or Hub id.
        device: Where the scorer runs if it has its own model.
        dtype: Storage type of its own model: auto, float32 or bfloat16.
        policy_lm: A language model whose base stays frozen. If its weights and vocabulary are those
            the reward adapter was trained with, the adapter is put on it instead of on a second
            model.
        base_model: Where the reward model's base is now, if it was moved.
        name: Name of the adapter on the base.
        label: Index or name of the classifier's label whose logit is the score, if it has several.

    Raises:
        InputError: It cannot be loaded, or belongs to another base.
    """
    record = read_record(path)
    folder = local_folder(path)
    device = pick_device(str(device))
    if record is None or (folder / "config.json").is_file():
        limits = None
        if record is not None:  # written by rlhf as a plain transformers checkpoint
            limits = Limits(
                record.prompt_sequence_length,
                record.target_sequence_length,
                record.truncation_side,
                record.turn_end,
            )
        return SequenceClassifier(
            path, device, pick_dtype(dtype, device), limits=limits, label=label
        )
    full = not (folder / "adapter").is_dir()
    shares = not full and policy_lm is not None and _same_base(policy_lm, record)
    if shares and policy_lm is not None:
        lm = policy_lm
    else:
        # If all weights were trained, they are the base.
        base = str(folder / "merged") if full else base_model
        config = StageConfig(output_dir=path, device=str(device), dtype=dtype)
        lm = _load_base(config, record, base)
    if not full:
        load_adapter(lm, folder / "adapter", name, trainable=False)
    head = _load_head(folder / HEAD_FILE, lm.hidden_size).to(lm.device)
    return RewardModel(lm, None if full else name, head, record, shares_base=shares)


def value_from_reward(reward: RewardModel, name: str = "value", weight: float = 1.0) -> ScalarHead:
    """Initialize a critic as a copy of the reward model, its normalization folded into the head.

    Args:
        reward: The reward model; its adapter is copied to adapter `name` of the same base.
        name: Name of the new, trainable adapter.
        weight: Factor of its score in what the critic predicts.

    Returns:
        A trainable head that, on the last state, gives the normalized score times `weight`.
    """
    assert reward.adapter is not None
    reward.lm.adapters.duplicate(reward.adapter, name, trainable=True)
    return head_from_reward(reward, weight)


def head_from_reward(reward: RewardModel, weight: float = 1.0) -> ScalarHead:
    """Return a trainable copy of the head, with normalization and `weight` folded in."""
    shift, scale = reward.record.shift, reward.record.scale
    head = ScalarHead(reward.lm.hidden_size, init_std=0.0).to(reward.head.weight.device)
    with torch.no_grad():
        head.weight.copy_(reward.head.weight * (weight / scale))
        head.offset.copy_((reward.head.offset - shift) * (weight / scale))
    return head


def check_reward_model(
    path: str,
    renderer: PromptRenderer,
    conversations: bool = True,
    label: int | str | None = None,
) -> None:
    """Refuse a reward model that is missing or was trained on differently written prompts.

    Args:
        path: Folder or Hub id of the reward model; its weights are not read.
        renderer: Renders the policy's prompts.
        conversations: Whether the policy's rows have `messages`; otherwise no template is used.
        label: Label of a classifier whose logit is the score.

    Raises:
        InputError: It is missing, or its instruction or template differ from the policy's, or it
            is a classifier without that label.
    """
    record = read_record(path)
    if record is None:
        classifier_label(path, label)
        return
    folder = local_folder(path, weights=False)
    if label is not None and not (folder / "config.json").is_file():
        raise InputError(
            "reward_model_path: a reward model of rlhf has no labels; leave out "
            "`reward_model_label`"
        )
    if (folder / "adapter").is_dir():
        read_adapter_config(folder / "adapter")
    if record.instruction != renderer.instruction:
        difference = (
            f"with instruction {record.instruction!r}, but instruction is {renderer.instruction!r}"
        )
    elif conversations and record.chat_template_options != renderer.options:
        difference = (
            f"with chat_template_options {record.chat_template_options}, but they are "
            f"{renderer.options}"
        )
    elif conversations and record.prompting != renderer.identity:
        difference = "with another chat template than that of base_model"
    else:
        return
    raise InputError(
        f"reward_model_path: the reward model was trained {difference}; its scores would mean "
        "something else. Use the same, or train a reward model with these"
    )


def limit_lines(path: str | None, config: StageConfig) -> list[str]:
    """Report limits of a reward model that differ from the stage's; it scores with its own.

    Args:
        path: Folder or Hub id of the reward model, if there is one.
        config: Configuration of the stage that needs scores.
    """
    record = read_record(path) if path is not None else None
    names = ("prompt_sequence_length", "target_sequence_length", "truncation_side")
    different = [
        f"{name} {getattr(record, name)} (here {getattr(config, name)})"
        for name in names
        if record is not None and getattr(record, name) != getattr(config, name)
    ]
    if not different:
        return []
    return [f"reward_model_path: scores with the limits of its training: {', '.join(different)}"]


def _same_base(lm: LanguageModel, record: RewardRecord) -> bool:
    return (
        not lm.trainable
        and lm.fingerprint == record.fingerprint
        and tokenizer_fingerprint(lm.tokenizer) == record.tokenizer
    )


def _load_base(config: StageConfig, record: RewardRecord, base: str | None) -> LanguageModel:
    """Load `base`; if it is None, load the base named in the record."""
    where = f"reward_model_path: {config.output_dir}"
    if not (base or record.base_model):
        raise InputError(
            f"{where} was trained on a model given as an object, so its base cannot be found; "
            "train it on a saved model"
        )
    revision = None
    if not base:
        base, revision = recorded_base(record.base_model, where, record.revision)
    try:
        lm = load_language_model(config, trainable=False, base_model=base, revision=revision)
    except InputError as error:
        problems = [f"{where}: its {problem}" for problem in error.problems]
        raise InputError(problems) from error
    if tokenizer_fingerprint(lm.tokenizer) != record.tokenizer:
        raise InputError(
            f"{where} was trained with a different tokenizer from the one now in {lm.base_name}"
        )
    return lm


def _load_head(path: Path, hidden_size: int) -> ScalarHead:
    head = ScalarHead(hidden_size, init_std=0.0)
    try:
        weight = load_file(path)["weight"]
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: not a reward head: {error}") from error
    if weight.shape != head.weight.shape:
        raise InputError(f"{path}: has shape {tuple(weight.shape)}, expected (1, {hidden_size})")
    head.weight.data.copy_(weight)
    if not torch.isfinite(weight).all():
        raise InputError(f"{path}: holds NaN or infinite weights")
    return head.requires_grad_(False)
