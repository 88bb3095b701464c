"""Direct preference optimization of T5 and LLaMA, seen from outside."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from support.numerics import assert_same_gradients
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from support.toy_trainer import lines, stop_at, without_timing
from torch import Tensor

from rlhf import DPOConfig, DPOTrainer, InputError, StoppedBySignal, train_dpo
from rlhf.cli import main
from rlhf.data.batching import TokenBatch
from rlhf.data.pairs import Pairs
from rlhf.data.schema import PreferenceRow
from rlhf.models.language_model import LanguageModel

PROMPTS = ["the cat sat", "a dog", "post [summary", "x", "the dog ran to the cat and sat to"]
TEXTS = [" 9 cat", "", " the dog sat and ran", " x", " a", " post the 9 9", " " + "to " * 20]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preferences(count: int) -> list[dict[str, Any]]:
    """Pairs of different lengths in which the candidate with a 9 is preferred."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        texts = [rng.choice([" 9", " the 9", " 9 cat dog"]), rng.choice(["", " cat", " the dog"])]
        choice = rng.randint(0, 1)
        rows.append(
            {
                "input_text": f"{rng.choice(PROMPTS)} {number}",
                "candidate_0": texts[choice],
                "candidate_1": texts[1 - choice],
                "choice": choice,
            }
        )
    return rows


def dpo_config(folder: Path, **fields: Any) -> DPOConfig:
    defaults: dict[str, Any] = {
        "base_model": "tiny",
        "output_dir": str(folder / "dpo"),
        "batch_size": 8,
        "micro_batch_size": 3,
        "train_steps": 4,
        "save_every": 3,
        "eval_every": 2,
        "learning_rate": 0.01,
        "prompt_sequence_length": 24,
        "target_sequence_length": 12,
        "device": "cpu",
        "dtype": "float32",
        "lora": {"rank": 4},
        "log_with": [],
    }
    if "preference_dataset" not in fields:
        fields["preference_dataset"] = write_rows(folder / "pairs.jsonl", preferences(40))
    return DPOConfig(**(defaults | fields))


def make_trainer(arch: str, folder: Path, **fields: Any) -> DPOTrainer:
    config = dpo_config(folder, **fields)
    return DPOTrainer(config, model=tiny_model(arch), tokenizer=make_tokenizer(arch))


def move_policy(trainer: DPOTrainer) -> None:
    """Give the policy weights of its own: where it is the reference, a mix-up would not show."""
    lm, adapter = trainer.policy.lm, trainer.policy.adapter
    if adapter is not None:
        randomize_lora(lm, adapter, std=0.3)
        return
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in lm.named_trainable(None):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + 0.1 * noise)


def ragged_pairs(trainer: DPOTrainer, seed: int = 0, sizes: Sequence[int] = (2,) * 5) -> Pairs:
    """Rows with prompts and candidates of mixed lengths: empty ones, and one cut by the limit."""
    rng = random.Random(seed)
    prompt = trainer.inputs.train[0].prompt
    rows = []
    for text, size in zip(PROMPTS, sizes, strict=True):
        texts = tuple(rng.sample(TEXTS, size))
        ranking = tuple(rng.sample(range(size), size))
        part = type(prompt)(text, ((0, len(text)),))
        rows.append(PreferenceRow(part, texts, ranking, None, "file:1"))
    return Pairs.from_rows(rows, trainer.codec)


# --- the formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 0])
def test_the_first_loss_is_that_of_equal_models(arch: str, rank: int, tmp_path: Path) -> None:
    for fields, expected in (
        ({}, math.log(2)),
        ({"label_smoothing": 0.2, "beta": 3.0}, math.log(2)),
        ({"loss": "ipo", "beta": 0.5}, 1.0),  # 1 / (4 beta^2)
        ({"loss": "ipo", "beta": 0.1}, 25.0),
    ):
        trainer = make_trainer(arch, tmp_path, lora={"rank": rank}, **fields)
        metrics = trainer.accumulate_gradients(ragged_pairs(trainer))
        assert metrics["dpo/loss"] == pytest.approx(expected, rel=1e-5)
        for name in ("margin", "chosen_reward", "rejected_reward"):
            assert metrics[f"dpo/{name}"] == pytest.approx(0, abs=1e-4)


def slow_logprob(lm: LanguageModel, prompt: list[int], response: list[int]) -> Tensor:
    """One row without padding, with transformers' own forward, token by token in float64."""
    batches = TokenBatch.from_lists([prompt]), TokenBatch.from_lists([response])
    logits = lm.transformers_logits(*batches)[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for place, token in enumerate(response):
        total = total + logits[place, token] - torch.logsumexp(logits[place], 0)
    return total


def slow_gradients(trainer: DPOTrainer, pairs: Pairs) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The papers' formulas as they are printed, one response at a time."""
    config = trainer.config
    sums = dict.fromkeys(("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"), 0.0)
    prompts, candidates = pairs.prompts.tolists(), pairs.responses.tolists()
    groups, compared = pairs.groups.tolist(), (pairs.winners.tolist(), pairs.losers.tolist())
    for winner, loser in zip(*compared, strict=True):
        prompt, responses = prompts[groups[winner]], [candidates[winner], candidates[loser]]
        share = 1 / len(pairs) / [groups[other] for other in compared[0]].count(groups[winner])
        with torch.no_grad(), trainer.reference.active() as lm:
            reference = [slow_logprob(lm, prompt, response) for response in responses]
        with trainer.policy.active() as lm:
            policy = [slow_logprob(lm, prompt, response) for response in responses]
            chosen, rejected = (p - r for p, r in zip(policy, reference, strict=True))
            if config.loss == "ipo":
                loss = (chosen - rejected - 1 / (2 * config.beta)) ** 2
            else:
                right = torch.log(torch.sigmoid(config.beta * (chosen - rejected)))
                wrong = torch.log(torch.sigmoid(config.beta * (rejected - chosen)))
                loss = -(1 - config.label_smoothing) * right - config.label_smoothing * wrong
            (loss * share).backward()
        rewards = config.beta * float(chosen.detach()), config.beta * float(rejected.detach())
        found = (
            float(loss.detach()),
            float(rewards[0] > rewards[1]),
            rewards[0] - rewards[1],
            *rewards,
        )
        for name, value in zip(sums, found, strict=True):
            sums[name] += value * share
    gradients = {
        name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None
    }
    return {f"dpo/{name}": value for name, value in sums.items()}, gradients


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("sizes", [(2, 2, 2, 2, 2), (2, 4, 3, 2, 5)])
@pytest.mark.parametrize(
    "fields", [{}, {"beta": 0.5, "label_smoothing": 0.3}, {"loss": "ipo", "beta": 0.2}]
)
def test_gradients_are_those_of_the_papers_formulas(
    arch: str, rank: int, fields: dict[str, Any], sizes: tuple[int, ...], tmp_path: Path
) -> None:
    trainer = make_trainer(arch, tmp_path, lora={"rank": rank}, **fields)
    move_policy(trainer)
    pairs = ragged_pairs(trainer, sizes=sizes)
    assert len(pairs.winners) == sum(size * (size - 1) // 2 for size in sizes)
    assert len(pairs.responses.lengths.unique()) > 1
    expected, reference = slow_gradients(trainer, pairs)
    assert abs(expected["dpo/chosen_reward"]) > 1e-3
    for micro, tokens in ((1, 4096), (2, 4096), (16, 4096), (16, 30)):
        trainer.optimizer.zero_grad()
        trainer.config.micro_batch_size = min(micro, trainer.config.batch_size)
        trainer.config.max_tokens_per_micro_batch = tokens
        metrics = trainer.accumulate_gradients(pairs)
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-4)
        found = {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}
        assert_same_gradients(found, reference)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DPOTrainer]:
    made = {}
    for arch in ("t5", "llama"):
        made[arch] = make_trainer(arch, tmp_path_factory.mktemp(arch))
        move_policy(made[arch])
    return made


@pytest.mark.parametrize("name", ["t5", "llama"])
@given(st.permutations(range(5)), st.integers(0, 9), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=20)
def test_order_padding_and_company_change_no_pair(
    trainers: dict[str, DPOTrainer], name: str, order: list[int], wider: int, seed: int, filler: int
) -> None:
    trainer = trainers[name]
    pairs = ragged_pairs(trainer, seed, (2, 4, 3, 2, 5))
    with torch.no_grad():
        whole = trainer.log_ratios(pairs)
        alone = trainer.log_ratios(pairs.select_rows(order[:1]))

        def padded(batch: TokenBatch) -> TokenBatch:
            ids = torch.nn.functional.pad(batch.ids, (0, wider), value=filler % 120)
            return TokenBatch(ids, batch.lengths)

        shuffled = pairs.select_rows(order)
        shuffled = replace(
            shuffled, prompts=padded(shuffled.prompts), responses=padded(shuffled.responses)
        )
        found = trainer.log_ratios(shuffled)
    expected = [whole[pairs.responses_of([row])] for row in order]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-4)


# --- the exact optimum ---------------------------------------------------------------------------

ANSWERS = ["", " a", " cat dog", " the 9"]


def learned(arch: str, folder: Path, wins: list[list[int]], **fields: Any) -> Tensor:
    """Compare all answers to one prompt; return (4,) β·log π/π_ref of them, with mean 0.

    Args:
        arch: The family.
        folder: For the rows.
        wins: How often the first of two answers is preferred to the second.
        fields: Of the configuration.
    """
    rows = [
        {"prompt": "the cat sat", "chosen": ANSWERS[i], "rejected": ANSWERS[j]}
        for i, j in itertools.permutations(range(4), 2)
        for _ in range(wins[i][j])
    ]
    trainer = make_trainer(
        arch, folder, preference_dataset=write_rows(folder / "pairs.jsonl", rows), beta=0.5,
        batch_size=len(rows), micro_batch_size=len(rows), train_steps=120, max_grad_norm=100,
        **fields,
    )  # fmt: skip
    assert len(trainer.inputs.train) == len(rows)  # of a single prompt nothing is held out

    def logprobs() -> Tensor:
        prompt = trainer.codec.prompt_ids(trainer.inputs.train[0].prompt)
        with torch.no_grad(), trainer.policy.active() as lm:
            rows = [slow_logprob(lm, prompt, trainer.codec.response_ids(a)) for a in ANSWERS]
        return torch.stack(rows)

    before = logprobs()
    for _ in range(trainer.total_steps):
        trainer.step()
    rewards = 0.5 * (logprobs() - before)
    return rewards - rewards.mean()


@pytest.mark.parametrize(("rank", "rate"), [(4, 1e-2), (0, 2e-3)])
def test_bandit_reaches_the_optimum_of_the_known_reward(
    arch: str, rank: int, rate: float, tmp_path: Path
) -> None:
    """π ∝ π_ref·e^{r/β} over all answers that are compared (Rafailov et al. 2023, eq. 4).

    A preference with probability w_i / (w_i + w_j) is Bradley–Terry with r = log w. Nothing is said
    of answers that are never compared: a constant for the prompt cancels in every pair.
    """
    strength = [3, 1, 2, 1]
    wins = [[strength[i]] * 4 for i in range(4)]
    found = learned(arch, tmp_path, wins, lora={"rank": rank}, learning_rate=rate)
    reward = torch.tensor(strength).double().log()
    torch.testing.assert_close(found, reward - reward.mean(), rtol=0, atol=0.005)


@pytest.mark.parametrize(("rank", "rate"), [(4, 1e-2), (0, 2e-3)])
def test_bandit_reaches_the_optimum_of_ipo(
    arch: str, rank: int, rate: float, tmp_path: Path
) -> None:
    """π ∝ π_ref·e^{p/τ}, p the probability to win against a random answer (Azar et al., eq. 7).

    Also for preferences that no reward explains, such as the circle 0 > 1 > 2 > 0 here.
    """
    wins = [[0, 2, 0, 2], [0, 0, 2, 1], [2, 0, 0, 2], [0, 1, 0, 0]]
    found = learned(arch, tmp_path, wins, loss="ipo", lora={"rank": rank}, learning_rate=rate)
    # Against itself an answer wins half of the time.
    wins_of = torch.tensor([(sum(row) / 2 + 0.5) / 4 for row in wins]).double()
    torch.testing.assert_close(found, wins_of - wins_of.mean(), rtol=0, atol=0.005)


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 0])
def test_only_the_policy_changes(arch: str, rank: int, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, lora={"rank": rank}, learning_rate=1e-3)
    lm = trainer.policy.lm
    assert (trainer.reference.lm is lm) == (rank > 0)
    frozen = {n: t.clone() for n, t in trainer.reference.lm.module.state_dict().items()}
    before = {name: tensor.detach().clone() for name, tensor in trainer.parameters.items()}
    trainer.step()
    trainer.step()
    for name, tensor in trainer.reference.lm.module.state_dict().items():
        assert torch.equal(tensor, frozen[name]) != (".policy." in name), name
    # A new B is zero, so A has no gradient in the first step; in the second both move.
    assert all(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())


@pytest.mark.parametrize(("step", "rank"), [(1, 4), (2, 4), (3, 0)])
def test_stopped_and_resumed_equals_never_stopped(
    tiny_checkpoint: Path, tmp_path: Path, step: int, rank: int
) -> None:
    def config(name: str) -> DPOConfig:
        base, output = str(tiny_checkpoint), str(tmp_path / name)
        return dpo_config(tmp_path, base_model=base, output_dir=output, lora={"rank": rank})

    whole = train_dpo(config("whole"))
    with pytest.raises(StoppedBySignal):
        train_dpo(config("stopped"), callbacks=[stop_at(step)])
    stopped = train_dpo(config("stopped"))
    assert without_timing(stopped.metrics) == without_timing(whole.metrics)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    logs = [[*map(without_timing, lines(folder))] for folder in folders]
    assert logs[0] == logs[1]
    assert lines(folders[0], "samples.jsonl") == lines(folders[1], "samples.jsonl")
    weights = [load_file(folder / "merged" / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert train_dpo(config("whole")).metrics == whole.metrics  # finished: nothing is done again


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_it_learns_a_preference(arch: str, loss: str, tmp_path: Path) -> None:
    config = dpo_config(
        tmp_path, loss=loss, train_steps=30, eval_every=10, batch_size=20, micro_batch_size=20,
        eval_dataset=write_rows(
            tmp_path / "eval.jsonl", [*preferences(9), {"input_text": "no candidates"}]
        ),
    )  # fmt: skip
    result = train_dpo(config, model=tiny_model(arch), tokenizer=make_tokenizer(arch))
    metrics, log = result.metrics, lines(tmp_path / "dpo")
    assert log[-1]["dpo/loss"] < 0.8 * log[0]["dpo/loss"]
    assert metrics["eval/accuracy"] == 1
    assert metrics["eval/pairs"] == 9
    assert metrics["eval/margin"] == pytest.approx(
        metrics["eval/chosen_reward"] - metrics["eval/rejected_reward"], rel=1e-4
    )
    evaluated = [row["eval/loss"] for row in log if "eval/loss" in row]
    assert len(evaluated) == 3
    assert metrics["best"] == metrics["eval/loss"] == min(evaluated)
    if loss == "sigmoid":
        assert metrics["eval/loss"] == pytest.approx(metrics["eval/log_loss"], rel=1e-4)
    samples = lines(tmp_path / "dpo", "samples.jsonl")
    assert [row["step"] for row in samples] == [10] * 4 + [20] * 4 + [30] * 4
    assert samples[-1]["chosen_reward"] > samples[-1]["rejected_reward"]
    assert {"prompt", "response", "chosen", "rejected"} <= samples[-1].keys()
    card = (tmp_path / "dpo" / "README.md").read_text()
    assert "| eval/accuracy | 1 |" in card
    assert abs(metrics["dpo/kl_merged_adapter"]) < 1e-5


def test_both_models_read_a_prompt_once_for_both_responses(arch: str, tmp_path: Path) -> None:
    rows = [row | {"input_text": "the cat sat and the dog ran"} for row in preferences(6)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    trainer = make_trainer(arch, tmp_path, micro_batch_size=8, preference_dataset=data)
    module = trainer.policy.lm.module
    layers = {
        "t5": lambda: [module.encoder.block[0].layer[1], module.decoder.block[0].layer[2]],
        "llama": lambda: [module.model.layers[0].mlp],
    }[arch]()
    read: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, __: read.append(inputs[0][..., 0].numel()))
    pairs = Pairs.from_rows(list(trainer.inputs.train), trainer.codec)
    trainer.accumulate_gradients(pairs)
    # A response may have a state more than it has tokens; reading prompts twice would cost more.
    assert pairs.prompts.lengths.sum() > 3 * len(pairs)
    assert sum(read) / 2 <= int(pairs.tokens.sum()) + 2 * len(pairs)


def test_margins_of_rows_are_not_used(arch: str, tmp_path: Path) -> None:
    plain = preferences(8)
    steps = []
    for rows in (plain, [row | {"margin": 2.5} for row in plain]):
        data = write_rows(tmp_path / "pairs.jsonl", rows)
        trainer = make_trainer(arch, tmp_path, preference_dataset=data)
        steps.append(without_timing(trainer.step()))
    assert steps[0] == steps[1]


def test_gradient_checkpointing_changes_nothing(arch: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(arch, tmp_path, gradient_checkpointing=checkpointing)
        move_policy(trainer)
        metrics = trainer.accumulate_gradients(ragged_pairs(trainer))
        found.append((metrics, {n: p.grad for n, p in trainer.parameters.items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
    assert_same_gradients(found[1][1], found[0][1])


def test_lora_in_the_decoder_reads_the_encoder_once_for_both_roles(tmp_path: Path) -> None:
    trainer = make_trainer("t5", tmp_path, lora={"rank": 4, "where": "decoder"})
    move_policy(trainer)
    pairs = ragged_pairs(trainer)
    reads: list[int] = []
    trainer.policy.lm.module.encoder.register_forward_hook(
        lambda module, inputs, output: reads.append(len(output.last_hidden_state))
    )
    found = trainer.accumulate_gradients(pairs)
    assert sum(reads) == len(pairs)
    expected, gradients = slow_gradients(trainer, pairs)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert gradients


def test_bfloat16_starts_at_the_reference_and_keeps_what_is_trained_in_float32(
    arch: str, tmp_path: Path
) -> None:
    trainer = make_trainer(arch, tmp_path, dtype="bfloat16")
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    metrics = trainer.step()
    assert metrics["dpo/loss"] == pytest.approx(math.log(2), rel=0.01)
    assert math.isfinite(trainer.step()["dpo/loss"])


@pytest.mark.parametrize("rank", [4, 0])
def test_its_policy_goes_into_inference(
    tiny_checkpoint: Path, rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = preferences(12)
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    flags = ["--batch_size=6", "--train_steps=5", f"--lora.rank={rank}", "--learning_rate=0.01",
             "--prompt_sequence_length=24", "--target_sequence_length=8", "--log_with=none",
             "--dtype=float32", f"--output_dir={tmp_path / 'dpo'}", "--loss=ipo"]  # fmt: skip
    base = ["--base_model", str(tiny_checkpoint), "--preference_dataset", data]
    assert main(["dpo", *base, *flags]) == 0, capsys.readouterr().err
    infer = ["infer", "--policy_path", str(tmp_path / "dpo"), "--eval_dataset", data,
             "--output_dir", str(tmp_path / "infer"), "--dtype=float32"]  # fmt: skip
    assert main(infer) == 0, capsys.readouterr().err
    assert len(lines(tmp_path / "infer", "predictions.jsonl")) == 12
    metrics = json.loads((tmp_path / "infer" / "metrics.json").read_text())
    assert metrics["kl_k3"] > 1e-3  # two different models
    said = capsys.readouterr().err
    assert ("adapter off" in said) == (rank > 0)


# --- what is refused -----------------------------------------------------------------------------


def test_label_smoothing_belongs_to_the_sigmoid(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="label_smoothing, loss: ipo has no label smoothing"):
        dpo_config(tmp_path, loss="ipo", label_smoothing=0.1)
    for fields in ({"beta": 0}, {"label_smoothing": 0.5}, {"loss": "hinge"}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            dpo_config(tmp_path, **fields)


def test_what_is_wrong_is_said_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = preferences(3)
    rows[1]["choice"] = 2
    fields = {"base_model": str(tiny_checkpoint), "preference_dataset": str(tmp_path / "bad.jsonl")}
    write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=r"bad\.jsonl:2: choice"):
        train_dpo(dpo_config(tmp_path, **fields))
    write_rows(tmp_path / "bad.jsonl", preferences(3))
    with pytest.raises(InputError, match="prompt_sequence_length"):
        train_dpo(dpo_config(tmp_path, **fields, instruction="the cat sat " * 20))
    assert not (tmp_path / "dpo").exists()


def test_dry_run_says_what_would_happen_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, held in ((4, "policy adapter"), (0, "trained weights")):
        config = dpo_config(
            tmp_path, base_model=str(tiny_checkpoint), dry_run=True, lora={"rank": rank}
        )
        assert train_dpo(config).metrics == {}
        told = capsys.readouterr().out
        assert "2 rows held out by prompt" in told
        assert "steps: 4 of 8, 32 in all" in told
        assert "frozen base" in told
        assert held in told
    assert not (tmp_path / "dpo").exists()
