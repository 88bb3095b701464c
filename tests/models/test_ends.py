"""One text has one score, whoever asks and whatever ended it; and what stands around a prompt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import make_case, read
from support.reward_models import make_reward, slow_raw_scores
from support.tiny import make_tokenizer, tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.config import PPOConfig, RewardModelConfig, ScoreConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptRow, PromptText
from rlhf.errors import InputError
from rlhf.models.classifiers import SequenceClassifier
from rlhf.models.families import FAMILIES
from rlhf.models.reward_model import RewardModel, limit_lines, load_reward_model
from rlhf.ppo.experience import Rollout
from rlhf.ppo_trainer import PPOTrainer
from rlhf.reward_model import train_reward_model
from rlhf.score import run_score

PROMPT_LIMIT, LIMIT = 24, 6
INPUTS = ["the cat sat", "a dog", "post [summary", "x", "the dog ran to the cat and sat to"]
OTHER = {"t5": "llama", "llama": "t5"}
MORE_EOS = [40, 41]  # of the generation config, beside the tokenizer's


def checkpoint(arch: str, folder: Path, eos: Sequence[int] = MORE_EOS) -> Path:
    model = tiny_model(arch)
    model.generation_config.eos_token_id = list(eos)
    model.save_pretrained(folder)
    make_tokenizer(arch).save_pretrained(folder)
    return folder


def reward_model(arch: str, base: Path, folder: Path, full: bool) -> RewardModel:
    lm = FAMILIES[arch](tiny_model(arch), make_tokenizer(arch), base_name=str(base))
    limits = {"prompt_sequence_length": PROMPT_LIMIT, "target_sequence_length": LIMIT}
    reward = make_reward(lm, None if full else "reward", **limits)
    reward.save(folder)
    return reward


def trainer_for(arch: str, folder: Path, base: Path, reward: Path) -> PPOTrainer:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_text": text}) + "\n" for text in INPUTS))
    return PPOTrainer(
        PPOConfig(
            base_model=str(base), prompt_dataset=str(prompts), output_dir=str(folder / "ppo"),
            reward_model_path=str(reward), batch_size=8, micro_batch_size=3, train_steps=1,
            prompt_sequence_length=PROMPT_LIMIT, target_sequence_length=LIMIT,
            lora={"rank": 2}, log_with=[], dtype="float32", device="cpu",
        )
    )  # fmt: skip


def sampled(trainer: PPOTrainer, rows: list[list[int]]) -> Rollout:
    """A rollout of given ids, cut after the first EOS as decoding does."""
    eos = trainer.policy.lm.layout.eos_ids
    ends = [next((i + 1 for i, id_ in enumerate(row) if id_ in eos), len(row)) for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends, strict=True)]
    finished = torch.tensor([row[-1] in eos for row in rows])
    chosen = [trainer.prompts[i // 5 % len(INPUTS)] for i in range(len(rows))]
    prompts = trainer.codec.prompts([row.prompt for row in chosen])
    answers = trainer.codec.decode_rows(rows)
    responses, groups = TokenBatch.from_lists(rows), torch.arange(len(rows))
    return Rollout(chosen, prompts, responses, finished, answers, groups)


def file_scores(reward: Path, rollout: Rollout, folder: Path) -> list[float]:
    """`rlhf score` of the rollout's texts."""
    data, output = folder / "in.jsonl", folder / "out.jsonl"
    rows = [
        {"input_text": prompt.text, "response": text, "finish_reason": "eos" if end else "length"}
        for prompt, text, end in zip(
            rollout.prompt_texts, rollout.texts, rollout.finished.tolist(), strict=True
        )
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_score(
        ScoreConfig(
            reward_model_path=str(reward), dataset=str(data), output=str(output), device="cpu",
            dtype="float32",
        )
    )  # fmt: skip
    return [row["reward"] for row in read(output)]


def rows_of(arch: str) -> list[list[int]]:
    eos = make_tokenizer(arch).eos_token_id
    the = make_tokenizer(arch).convert_tokens_to_ids("▁the")
    letters = make_tokenizer(arch).convert_tokens_to_ids(list("the"))
    return [
        [the, eos], [the, 40], [the, 41],  # one text, ended in three ways
        [the],  # the same, cut
        [*letters, eos],  # spelled as no tokenizer would
        [50, 0, 2, 51, 0, 52], [50, 51, 52, 53, 54, 55],  # special tokens inside, cut by the limit
        [eos], [40], [the, letters[0], the, 60, 61, 41],
    ]  # fmt: skip


@pytest.mark.parametrize("scorer", ["same base", "other base", "full"])
def test_one_text_has_one_score(
    arch: str, scorer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = checkpoint(arch, tmp_path / "base")
    family = OTHER[arch] if scorer == "other base" else arch
    its_base = base if scorer == "same base" else checkpoint(family, tmp_path / "other")
    reward = reward_model(family, its_base, tmp_path / "reward", scorer == "full")
    trainer = trainer_for(arch, tmp_path, base, tmp_path / "reward")
    assert trainer.rewards.scorers["reward_model"].shares_base == (scorer == "same base")
    rollout = sampled(trainer, rows_of(arch))
    scores = trainer.score(rollout)
    assert scores[0] == pytest.approx(float(scores[1]), abs=1e-5)
    assert scores[0] == pytest.approx(float(scores[2]), abs=1e-5)
    assert abs(scores[0] - scores[3]) > 1e-3  # a cut response is not the same as a finished one
    again = load_reward_model(str(tmp_path / "reward"), device="cpu", dtype="float32")
    ends = rollout.finished.tolist()
    alone = again.score(rollout.prompt_texts, rollout.texts, finished=ends)
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
    written = file_scores(tmp_path / "reward", rollout, tmp_path)
    assert scores.tolist() == pytest.approx(written, abs=1e-5)
    if scorer != "full":
        ids = zip(*plain_ids(family, rollout), strict=True)
        raw = torch.tensor(slow_raw_scores(reward, family, ids))
        torch.testing.assert_close(scores, (raw - 0.3) / 1.7, rtol=1e-4, atol=1e-4)
    assert "prompts up to 24 and responses up to 6 tokens" in capsys.readouterr().err


def plain_ids(arch: str, rollout: Rollout) -> tuple[list[list[int]], list[list[int]]]:
    """What the tokenizer alone makes of the texts, and one EOS behind what has ended."""
    tokenizer = make_tokenizer(arch)
    eos = [tokenizer.eos_token_id]
    prompts = [tokenizer(prompt.text).input_ids for prompt in rollout.prompt_texts]
    prompts = [ids + (eos if arch == "t5" else []) for ids in prompts]
    # LLaMA's response goes on in a text: what stands before it must not be a text's beginning.
    before = "" if arch == "t5" else "\n"
    skipped = len(tokenizer(before).input_ids)
    responses = [tokenizer(before + text).input_ids[skipped:] for text in rollout.texts]
    ends = rollout.finished.tolist()
    cut = [
        (ids + (eos if ended else []))[:LIMIT] for ids, ended in zip(responses, ends, strict=True)
    ]
    return prompts, cut


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PPOTrainer]:
    made = {}
    for arch in ("t5", "llama"):
        folder = tmp_path_factory.mktemp(arch)
        base = checkpoint(arch, folder / "base")
        reward_model(arch, base, folder / "reward", full=False)
        made[arch] = trainer_for(arch, folder, base, folder / "reward")
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.lists(st.integers(0, 119), min_size=1, max_size=LIMIT), min_size=1, max_size=6)
)
def test_any_sample_scores_as_its_text(
    arch: str, trainers: dict[str, PPOTrainer], rows: list[list[int]]
) -> None:
    trainer = trainers[arch]
    rollout = sampled(trainer, rows)
    scorer = trainer.rewards.scorers["reward_model"]
    assert isinstance(scorer, RewardModel)
    ids = plain_ids(arch, rollout)
    expected = scorer.score_tokens(*map(TokenBatch.from_lists, ids), batch_size=1)
    torch.testing.assert_close(trainer.score(rollout), expected, rtol=1e-5, atol=1e-5)


def test_predictions_score_as_inference_scored_them(arch: str, tmp_path: Path) -> None:
    # A tenth of the vocabulary ends a response, so that both kinds of ends occur.
    base = checkpoint(arch, tmp_path / "base", range(30, 42))
    case = make_case(arch, base, tmp_path)
    prompts = [{"input_text": f"the cat {number}"} for number in range(40)]
    case.data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    result = case.run(tmp_path / "inference", dtype="float32", batch_size=20)
    rows = read(result.predictions)
    assert {row["finish_reason"] for row in rows} == {"eos", "length"}
    output = tmp_path / "scored.jsonl"
    run_score(
        ScoreConfig(
            reward_model_path=str(case.reward), dataset=result.predictions, output=str(output),
            device="cpu", dtype="float32",
        )
    )  # fmt: skip
    for row, scored in zip(rows, read(output), strict=True):
        assert scored["reward"] == pytest.approx(row["reward"], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("end", [3, True, ["length"], {"a": 1}])
def test_a_finish_reason_is_text(tmp_path: Path, end: Any) -> None:
    base = checkpoint("t5", tmp_path / "base")
    reward_model("t5", base, tmp_path / "reward", full=False)
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps({"input_text": "a", "response": "b", "finish_reason": end}))
    with pytest.raises(InputError, match=r"in\.jsonl:1: finish_reason: is not text"):
        run_score(
            ScoreConfig(
                reward_model_path=str(tmp_path / "reward"), dataset=str(data),
                output=str(tmp_path / "out.jsonl"), device="cpu",
            )
        )  # fmt: skip


def test_other_limits_are_said_and_do_not_change_scores(arch: str, tmp_path: Path) -> None:
    base = checkpoint(arch, tmp_path / "base")
    reward_model(arch, base, tmp_path / "reward", full=False)
    trainer = trainer_for(arch, tmp_path, base, tmp_path / "reward")
    path, config = str(tmp_path / "reward"), trainer.config
    assert limit_lines(path, config) == []
    long = {"prompt_sequence_length": 40, "target_sequence_length": 12, "truncation_side": "right"}
    wide = config.model_copy(update=long)
    assert limit_lines(path, wide) == [
        "reward_model_path: scores with the limits of its training: prompt_sequence_length 24 "
        "(here 40), target_sequence_length 6 (here 12), truncation_side left (here right)"
    ]
    text = PromptText("the cat and the dog ran " * 4, ((0, 96),))
    answer = "the cat 0123456789"
    scorer = trainer.rewards.scorers["reward_model"]
    expected = scorer.score([text], [answer])
    codec = PromptCodec(
        trainer.codec.tokenizer, trainer.codec.layout, 40, 12, truncation_side="right"
    )
    prompts, responses = codec.prompts([text]), codec.responses([answer])
    row, ended = PromptRow(text, text.text, [], "rows.jsonl:1"), torch.tensor([True])
    rollout = Rollout([row], prompts, responses, ended, [answer], torch.tensor([0]))
    torch.testing.assert_close(trainer.score(rollout), expected, rtol=1e-5, atol=1e-5)


# --- the exported classifier ---------------------------------------------------------------------

PAIRS = [
    {"input_text": "the cat sat", "candidate_0": " a dog", "candidate_1": " the cat", "choice": 1},
    {"input_text": "post: ", "candidate_0": " ran", "candidate_1": " to and", "choice": 0},
    {"input_text": "a dog ran", "candidate_0": "", "candidate_1": " sat", "choice": 1},
]


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_bos_token = True
    return tokenizer


def test_the_exported_classifier_scores_as_the_reward_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    with_bos(make_tokenizer("llama")).save_pretrained(base)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    train_reward_model(
        RewardModelConfig(
            base_model=str(base), preference_dataset=str(data), output_dir=str(tmp_path / "reward"),
            batch_size=2, train_steps=1, lora={"rank": 2}, log_with=[], dtype="float32",
            device="cpu", prompt_sequence_length=PROMPT_LIMIT, target_sequence_length=LIMIT,
        )
    )  # fmt: skip
    folder = tmp_path / "reward" / "sequence_classifier"
    reward = load_reward_model(str(tmp_path / "reward"), device="cpu", dtype="float32")
    scorer = load_reward_model(str(folder), device="cpu", dtype="float32")
    assert isinstance(reward, RewardModel)
    assert isinstance(scorer, SequenceClassifier)
    inputs = [*INPUTS, "post: [summary ", "the cat and the dog ran " * 4]
    texts = [PromptText(text, ((0, len(text)),)) for text in inputs for _ in range(4)]
    answers = [" a dog", "", " the  cat", "0123456789"] * len(inputs)
    finished = [i % 3 != 0 for i in range(len(answers))]
    record = reward.record
    expected = reward.score(texts, answers, finished=finished) * record.scale + record.shift
    found = scorer.score(texts, answers, finished=finished)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float(found.std()) > 1e-3
    # Plain transformers, on text: the tokenizer puts BOS before and EOS behind it.
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, answer in (("the cat sat", " a dog"), ("x", " to and"), ("a dog", "")):
        ids = tokenizer(prompt + answer, return_tensors="pt")
        whole = reward.score([PromptText(prompt, ())], [answer])[0] * record.scale + record.shift
        torch.testing.assert_close(model(**ids).logits[0, 0].detach(), whole, rtol=1e-5, atol=1e-5)
