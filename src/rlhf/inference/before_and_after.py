"""The tuned and the untuned model side by side: loaded once, answering the same prompts.

Where the policy is an adapter, the untuned model is the same one with the adapter off. A merged or
fully fine-tuned policy has no adapter to switch off, so its base is loaded as a second model.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config import InferenceConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptRow
from rlhf.errors import InputError
from rlhf.inference.predictions import FinishReason, Prediction
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.generation import Generation, Generator, generate, rollout_uniforms
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model
from rlhf.models.policy_folder import PolicySource
from rlhf.models.reward_model import load_reward_model
from rlhf.models.saving import load_adapter
from rlhf.models.scorers import Scorer
from rlhf.objectives import kl_k1, kl_k3

Answer = tuple[str, FinishReason]  # a response's text and how it ended


@dataclass(frozen=True)
class Models:
    """Everything that is loaded.

    Attributes:
        tuned: The tuned model.
        adapter: Its adapter; None for a full model.
        base: The untuned model, the same object as `tuned` where there is an adapter.
        codec: Texts to ids and back, for both.
        scorer: The reward model, if there is one.
        generator: What decodes.
    """

    tuned: LanguageModel
    adapter: str | None
    base: LanguageModel
    codec: PromptCodec
    scorer: Scorer | None
    generator: Generator


def load_models(
    config: InferenceConfig, source: PolicySource, generator: Generator | None = None
) -> Models:
    """Load the policy, its base and the reward model as few models as possible.

    Args:
        config: With `base_model` filled in.
        source: What `policy_path` holds.
        generator: What decodes; our own engine by default.

    Raises:
        InputError: Checkpoints that are broken or do not belong together.
    """
    base = load_language_model(config, trainable=False)
    adapter = None
    if source.kind == "adapter":
        adapter, tuned = "policy", base
        load_adapter(base, source.folder, adapter)
    else:
        tuned = load_language_model(config, trainable=False, base_model=str(source.folder))
        _check_same_language(tuned, base)
    if config.compile_decode:
        for lm in {tuned, base}:
            lm.compile_decoding(config.batch_size, config.prompt_sequence_length)
    scorer = None
    if config.reward_model_path:
        scorer = load_reward_model(
            config.reward_model_path,
            device=config.device,
            dtype=config.dtype,
            policy_lm=base,
            label=config.reward_model_label,
        )
    codec = PromptCodec(
        tuned.tokenizer,
        tuned.layout,
        config.prompt_sequence_length,
        config.target_sequence_length,
        truncation_side=config.truncation_side,
    )
    return Models(tuned, adapter, base, codec, scorer, generator or generate)


def _check_same_language(tuned: LanguageModel, base: LanguageModel) -> None:
    same = tokenizer_fingerprint(tuned.tokenizer) == tokenizer_fingerprint(base.tokenizer)
    if type(tuned) is not type(base) or not same:
        raise InputError(
            f"base_model: {base.base_name} has another architecture or vocabulary than "
            f"{tuned.base_name}, so it is not what that was tuned from"
        )


@torch.no_grad()
def predict_rows(
    models: Models, config: InferenceConfig, rows: Sequence[PromptRow], start: int
) -> list[Prediction]:
    """Responses, KL and rewards of one batch of rows.

    Args:
        models: What is loaded.
        config: Sampling and limits.
        rows: Rows that go through the models together.
        start: Number of the first of them: sampling depends on it, not on the batch.
    """
    sampling = config.sampling_strategy == "temperature_sampling"
    temperature = config.temperature if sampling else 1.0
    limit = config.target_sequence_length
    numbers = range(start, start + len(rows))
    uniforms = rollout_uniforms(config.seed, 0, numbers, limit, "inference") if sampling else None
    prompts = models.codec.prompts([row.prompt for row in rows]).to(models.tuned.device)

    def respond(lm: LanguageModel, adapter: str | None) -> Generation:
        with lm.using(adapter):
            return models.generator(
                lm,
                prompts,
                max_new_tokens=limit,
                temperature=temperature if sampling else 0.0,
                uniforms=uniforms,
                min_response_length=config.min_response_length,
            )

    def logprobs(lm: LanguageModel, adapter: str | None, responses: TokenBatch) -> Tensor:
        with lm.using(adapter):
            states = lm.response_states(prompts, responses)
            stats = lm.token_logprobs(states, responses, temperature, config.min_response_length)
        return stats.logprobs.double()

    with ExitStack() as stack:
        for lm in {id(lm): lm for lm in (models.tuned, models.base)}.values():
            stack.enter_context(lm.inference())  # an adapter may bring its own
        after, before = respond(models.tuned, models.adapter), respond(models.base, None)
        own = logprobs(models.tuned, models.adapter, after.responses)
        reference = logprobs(models.base, None, after.responses)
    kl = kl_k1(own, reference).sum(1).tolist()
    k3 = kl_k3(own, reference).sum(1).tolist()
    texts, baselines = _texts(models, after), _texts(models, before)
    ends, old_ends = finish_reasons(after), finish_reasons(before)
    answers = [zip(texts, ends, strict=True), zip(baselines, old_ends, strict=True)]
    rewards = _rewards(models.scorer, rows, list(zip(*answers, strict=True)), config.batch_size)
    counts = prompts.lengths.tolist()
    lengths, old_lengths = after.responses.lengths.tolist(), before.responses.lengths.tolist()
    return [
        Prediction(
            input_text=row.input_text,
            prediction=texts[i],
            baseline=baselines[i],
            reference=_reference(row.references),
            reward=rewards[i][0],
            baseline_reward=rewards[i][1],
            kl=round_figure(kl[i]),
            kl_k3=round_figure(k3[i]),
            prompt_tokens=counts[i],
            tokens=lengths[i],
            baseline_tokens=old_lengths[i],
            finish_reason=ends[i],
            baseline_finish_reason=old_ends[i],
        )
        for i, row in enumerate(rows)
    ]


def _texts(models: Models, generation: Generation) -> list[str]:
    return models.codec.decode_rows(generation.responses.tolists())


def finish_reasons(generation: Generation) -> list[FinishReason]:
    """Say how each response ended."""
    return ["eos" if finished else "length" for finished in generation.finished.tolist()]


def round_figure(value: float) -> float:
    """Return a reward or nats as on disk, to 6 digits: fp32 has no more."""
    return round(value, 6)


def _reference(references: Sequence[str]) -> str | list[str] | None:
    return list(references) if len(references) > 1 else next(iter(references), None)


def _rewards(
    scorer: Scorer | None,
    rows: Sequence[PromptRow],
    answers: Sequence[tuple[Answer, Answer]],
    batch_size: int,
) -> list[tuple[float, float] | tuple[None, None]]:
    """Rewards of both responses to each row; equal responses are scored once, so they tie."""
    if scorer is None:
        return [(None, None)] * len(rows)
    different = list(dict.fromkeys((i, one) for i, pair in enumerate(answers) for one in pair))
    scores = scorer.score(
        [rows[i].prompt for i, _ in different],
        [text for _, (text, _) in different],
        batch_size,
        finished=[end == "eos" for _, (_, end) in different],
    ).tolist()
    reward = {key: round_figure(score) for key, score in zip(different, scores, strict=True)}
    return [(reward[i, after], reward[i, before]) for i, (after, before) in enumerate(answers)]
