"""Reward models from rankings (Ouyang et al. 2022, eq. 1), against the formula written out."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import Case, read
from support.tiny import randomize_lora

from rlhf.config import LoRAConfig, RewardModelConfig, ScoreConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.pairs import Pairs
from rlhf.data.schema import PreferenceRow, PromptText
from rlhf.evaluation import evaluate_preferences
from rlhf.models.reward_model import load_reward_model
from rlhf.reward_model import RewardModelTrainer, train_reward_model
from rlhf.score import run_score

WORDS = ["cat", "dog", "sat", "ran", "the", "a", "post"]


def rankings(count: int, seed: int = 0, most: int = 5) -> list[dict[str, Any]]:
    """Rows of 2 to `most` candidates, in which more nines are better."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        size = rng.randint(2, most)
        nines = rng.sample(range(size), size)
        texts = [
            " " + " ".join(rng.sample(rng.choices(WORDS, k=rng.randint(1, 4)) + ["9"] * n, n + 1))
            for n in nines
        ]
        order = sorted(range(size), key=lambda index: -nines[index])
        prompt = f"{number} {rng.choice(WORDS)}"
        rows.append({"input_text": prompt, "candidates": texts, "ranking": order})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        base_model=str(tiny_checkpoint),
        preference_dataset=write(tmp_path / "rows.jsonl", rankings(80)),
        output_dir=str(tmp_path / "out"),
        device="cpu",
        batch_size=8,
        train_steps=6,
        learning_rate=1e-2,
        prompt_sequence_length=24,
        target_sequence_length=16,
        lora=LoRAConfig(rank=4),
        log_with=[],
        eval_every=3,
        save_every=6,
    )


def trainer_of(config: RewardModelConfig, **update: Any) -> RewardModelTrainer:
    trainer = RewardModelTrainer(config.model_copy(update=update))
    assert trainer.reward.adapter is not None
    randomize_lora(trainer.reward.lm, trainer.reward.adapter)
    return trainer


def row_of(number: int, texts: list[str], ranking: list[int]) -> PreferenceRow:
    words = WORDS[: 1 + number % 5]
    prompt = PromptText(text := " ".join(words), ((0, len(text)),))
    margin = 0.25 * number if len(texts) == 2 else None
    return PreferenceRow(prompt, tuple(texts), tuple(ranking), margin, "file:1", number)


MIXED = [
    row_of(number, texts, ranking)
    for number, (texts, ranking) in enumerate(
        [
            ([" a", " 9 cat"], [1, 0]),
            ([" the dog sat and ran", "", " 9", " x y"], [2, 0, 3, 1]),
            ([" post", " cat cat", " dog"], [0, 2, 1]),
            ([" 9 9", " a", " 9 9"], [0, 1, 2]),  # two are the same: that pair says nothing
            (["", " 9"], [1, 0]),
            ([" a", " the", " 9", " sat", " ran the dog", " post a"], [5, 3, 0, 1, 4, 2]),
        ]
    )
]


def float64_scores(trainer: RewardModelTrainer, row: PreferenceRow) -> list[torch.Tensor]:
    """Each candidate read alone, behind its own prompt; the whole model is in float64."""
    reward, codec = trainer.reward, trainer.reward.codec
    prompt = TokenBatch.from_lists([codec.prompt_ids(row.prompt)])
    scores = []
    for text in row.candidates:
        response = TokenBatch.from_lists([codec.response_ids(text)])
        (state,) = reward.lm.final_states(prompt, response)
        scores.append((state * reward.head.weight[0]).sum())
    return scores


def slow(
    trainer: RewardModelTrainer, rows: list[PreferenceRow], centering: float
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Eq. 1 as printed: −1/C(K,2) Σ log σ(r_w − r_l), averaged over the prompts."""
    trainer.optimizer.zero_grad()
    reward = trainer.reward
    reward.lm.module.double()
    reward.head.double()
    sums = dict.fromkeys(("loss", "accuracy", "margin", "score"), 0.0)
    total = torch.zeros((), dtype=torch.float64)
    with reward.lm.using(reward.adapter):
        for row in rows:
            scores = float64_scores(trainer, row)
            pairs = [
                (scores[a], scores[b])
                for a, b in itertools.combinations(row.ranking, 2)
                if row.candidates[a] != row.candidates[b]
            ]
            for better, worse in pairs:
                z = better - worse - (row.margin or 0.0)
                loss = torch.log1p(torch.exp(-z)) + centering * (better + worse) ** 2
                total = total + loss / len(pairs) / len(rows)
                loss, better, worse = loss.detach(), better.detach(), worse.detach()
                share = 1 / len(pairs) / len(rows)
                sums["loss"] += float(loss) * share
                sums["accuracy"] += float(better > worse) * share
                sums["margin"] += float(better - worse) * share
                sums["score"] += float(better + worse) / 2 * share
        total.backward()
    return (
        {f"reward_model/{name}": value for name, value in sums.items()},
        {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None},
    )


def close(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Gradients in float32 against float64, relative to the largest of a weight matrix."""
    assert ours.keys() == exact.keys()
    for name, gradient in ours.items():
        limit = 1e-4 * float(exact[name].abs().max()) + 1e-7
        torch.testing.assert_close(
            gradient.double(), exact[name].double(), atol=limit, rtol=0, msg=name
        )


def test_the_loss_is_eq_1_with_any_numbers_of_candidates(config: RewardModelConfig) -> None:
    found = []
    limits = ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_tokens_per_micro_batch": 60})
    for update in (*limits, {}):
        trainer = trainer_of(config, centering_coeff=0.05, **update)
        for rows in (MIXED, MIXED[::-1]):
            trainer.optimizer.zero_grad()
            metrics = trainer.accumulate_gradients(Pairs.from_rows(rows, trainer.reward.codec))
            grads = {name: p.grad.clone() for name, p in trainer.parameters.items()}
            found.append((metrics, grads))
    expected, exact = slow(trainer, MIXED, 0.05)
    for metrics, grads in found:
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
        close(grads, exact)
    assert all(gradient.any() for gradient in exact.values())


def test_only_pairs_of_different_candidates_count(config: RewardModelConfig) -> None:
    trainer = trainer_of(config)
    twice = row_of(0, [" 9", " a", " a"], [0, 1, 2])
    assert len(Pairs.from_rows([twice], trainer.reward.codec).winners) == 2
    metrics = trainer.accumulate_gradients(Pairs.from_rows([twice], trainer.reward.codec))
    expected, _ = slow(trainer, [row_of(0, [" 9", " a"], [0, 1])], 0.0)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_rankings_of_two_are_pairs(config: RewardModelConfig, tmp_path: Path) -> None:
    """All that a run writes is the same, to the bit."""
    rows = rankings(60, most=2)
    pairs = [
        {
            "input_text": row["input_text"],
            "candidate_0": row["candidates"][0],
            "candidate_1": row["candidates"][1],
            "choice": row["ranking"][0],
        }
        for row in rows
    ]
    runs = []
    for name, lines in (("ranked", rows), ("paired", pairs)):
        data = write(tmp_path / f"{name}.jsonl", lines)
        update = {"preference_dataset": data, "output_dir": str(tmp_path / name)}
        result = train_reward_model(config.model_copy(update=update))
        head = (tmp_path / name / "head.safetensors").read_bytes()
        figures = {k: v for k, v in result.metrics.items() if k.startswith(("eval/", "reward_"))}
        runs.append((figures, head, read(tmp_path / name / "samples.jsonl")))
    assert runs[0] == runs[1]
    assert runs[0][0]["eval/pairs"] == 3


def test_learns_rankings(config: RewardModelConfig) -> None:
    result = train_reward_model(config.model_copy(update={"train_steps": 40, "eval_every": 20}))
    assert result.metrics["eval/accuracy"] > 0.8  # about 0.5 before training
    scorer = load_reward_model(result.output_dir, device="cpu")
    right = []
    for row in rankings(40, seed=9):
        text = row["input_text"]
        prompts = [PromptText(text, ((0, len(text)),))] * len(row["candidates"])
        scores = scorer.score(prompts, row["candidates"]).tolist()
        right += [scores[a] > scores[b] for a, b in itertools.combinations(row["ranking"], 2)]
    assert sum(right) / len(right) > 0.8


def test_evaluation_is_over_all_pairs_rows_weighing_the_same(
    config: RewardModelConfig, tmp_path: Path
) -> None:
    rows = rankings(13, seed=3)
    trainer = trainer_of(config, eval_dataset=write(tmp_path / "eval.jsonl", rows))
    metrics = trainer.evaluate()
    accuracies, losses, longer, count = [], [], [], 0
    for row in trainer.inputs.held_out:
        prompt = [row.prompt] * len(row.candidates)
        scores = trainer.reward.score(prompt, row.candidates, 1).double().tolist()
        sizes = [len(trainer.reward.codec.response_ids(text)) for text in row.candidates]
        pairs = list(itertools.combinations(row.ranking, 2))
        count += len(pairs)
        accuracies.append(sum(scores[a] > scores[b] for a, b in pairs) / len(pairs))
        gaps = torch.tensor([scores[a] - scores[b] for a, b in pairs])
        losses.append(float(torch.log1p(torch.exp(-gaps)).mean()))
        longer.append(
            sum((sizes[a] > sizes[b]) + 0.5 * (sizes[a] == sizes[b]) for a, b in pairs) / len(pairs)
        )
    assert len(accuracies) == 13
    assert metrics["eval/accuracy"] == pytest.approx(sum(accuracies) / 13)
    assert metrics["eval/log_loss"] == pytest.approx(sum(losses) / 13, rel=1e-4)
    assert metrics["eval/longer_accuracy"] == pytest.approx(sum(longer) / 13)
    assert metrics["eval/pairs"] == count > 13


@pytest.mark.parametrize("size", [1, 3, 64])
def test_candidates_score_the_same_in_any_batch(config: RewardModelConfig, size: int) -> None:
    trainer = trainer_of(config)
    reward = trainer.reward
    reward.normalize(0.5, 2.0)
    pairs = Pairs.from_rows(MIXED, reward.codec)
    alone = [float(reward.score([row.prompt], [text])) for row in MIXED for text in row.candidates]
    scores = reward.score_tokens(pairs.prompts, pairs.responses, size, pairs.groups)
    assert scores.tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_prompts_and_candidates_are_read_once(config: RewardModelConfig, arch: str) -> None:
    trainer = trainer_of(config)
    module = trainer.reward.lm.module
    layers = {
        "t5": lambda: [module.encoder.block[0].layer[1], module.decoder.block[0].layer[2]],
        "llama": lambda: [module.model.layers[0].mlp],
    }[arch]()
    read_tokens: list[int] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, inputs, __: read_tokens.append(inputs[0][..., 0].numel())
        )
    prompt = PromptText(text := "the cat sat and the dog ran to a post", ((0, len(text)),))
    texts = (" a", " 9 cat", "", " the dog", " post")
    row = PreferenceRow(prompt, texts, (1, 0, 4, 2, 3), None, "file:1")
    pairs = Pairs.from_rows([row] * 3, trainer.reward.codec)
    trainer.accumulate_gradients(pairs)
    # T5 begins each candidate with a token of its own.
    assert sum(read_tokens) <= int(pairs.tokens.sum()) + len(pairs.responses)


def test_scores_are_normalized_on_all_candidates(config: RewardModelConfig) -> None:
    train_reward_model(config)
    scorer = load_reward_model(config.output_dir, device="cpu")
    scores = []
    for row in rankings(80):
        prompt = PromptText(row["input_text"], ((0, len(row["input_text"])),))
        scores += scorer.score([prompt] * len(row["candidates"]), row["candidates"]).tolist()
    assert abs(sum(scores) / len(scores)) < 0.3  # the held-out twentieth was not among them


# Other stages


def test_inference_evaluates_the_reward_model_on_all_pairs(
    arch: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    case = cases[arch]
    rows = [
        *rankings(5, seed=2),
        {"input_text": "the cat", "candidates": [" a", " the dog", " a"], "ranking": [0, 1, 2]},
        {"input_text": "the dog", "candidate_0": " a dog ran", "candidate_1": " the", "choice": 1},
        {"input_text": "no candidates"},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    metrics = case.run(tmp_path / "out", eval_dataset=data).metrics
    scorer = load_reward_model(str(case.reward), device="cpu")
    found = []
    for number, row in enumerate(rows[:-1]):
        texts = row.get("candidates") or [row["candidate_0"], row["candidate_1"]]
        order = row.get("ranking") or [row["choice"], 1 - row["choice"]]
        prompt = PromptText(row["input_text"], ((0, len(row["input_text"])),))
        scores = [float(scorer.score([prompt], [text])) for text in texts]
        found += [
            (scores[a], scores[b], number)
            for a, b in itertools.combinations(order, 2)
            if texts[a] != texts[b]
        ]
    better, worse, numbers = zip(*found, strict=True)
    expected = evaluate_preferences(better, worse, better, worse, rows=numbers)
    assert metrics["reward_model_pairs"] == len(found)
    assert metrics["reward_model_accuracy"] == pytest.approx(expected.accuracy.mean)
    assert metrics["reward_model_log_loss"] == pytest.approx(expected.log_loss, abs=1e-4)
    assert len(read(tmp_path / "out" / "predictions.jsonl")) == len(rows)


def test_score_gives_a_list_of_rewards(arch: str, cases: dict[str, Case], tmp_path: Path) -> None:
    model = str(cases[arch].reward)
    rows = [*rankings(3), {"input_text": "the cat", "candidates": [" a", "", " 9"]}]
    config = ScoreConfig(
        reward_model_path=model,
        dataset=write(tmp_path / "in.jsonl", rows),
        output=str(tmp_path / "out.jsonl"),
        device="cpu",
    )
    metrics = run_score(config).metrics
    scorer = load_reward_model(model, device="cpu")
    scored = read(tmp_path / "out.jsonl")
    for row, before in zip(scored, rows, strict=True):
        assert {**before, "rewards": row["rewards"]} == row
        prompt = PromptText(row["input_text"], ((0, len(row["input_text"])),))
        alone = [float(scorer.score([prompt], [text])) for text in row["candidates"]]
        assert row["rewards"] == pytest.approx(alone, abs=1e-4)
    right = [
        [row["rewards"][a] > row["rewards"][b] for a, b in itertools.combinations(order, 2)]
        for row in scored
        if (order := row.get("ranking"))  # a row without one says nothing of accuracy
    ]
    assert metrics["pairs"] == sum(map(len, right))
    assert metrics["accuracy"] == pytest.approx(sum(sum(r) / len(r) for r in right) / len(right))
    assert metrics["responses"] == sum(len(row["candidates"]) for row in rows)
