"""Best of n against a slow reference: every sample generated and scored alone, then the first
of the highest."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cases import RESPONSE_LIMIT, ROWS, Case, read

from rlhf.config import InferenceConfig, PipelineConfig
from rlhf.errors import InputError, StoppedBySignal
from rlhf.evaluation import corpus_rouge
from rlhf.inference import InferenceResult, best_of, run_inference
from rlhf.inference import stage as inference
from rlhf.inference.before_and_after import Models, load_models
from rlhf.inference.best_of import Sample, choose
from rlhf.inference.metrics import kl_bound
from rlhf.inference.predictions import read_predictions
from rlhf.models.generation import generate, rollout_uniforms
from rlhf.models.reward_model import load_reward_model
from rlhf.signals import StopRequested

N = 5
FIELDS = ("best_of_n", "best_of_n_reward", "best_of_n_tokens", "best_of_n_finish_reason")


@pytest.fixture
def case(arch: str, cases: dict[str, Case]) -> Case:
    return cases[arch]


@pytest.fixture(scope="module")
def finished(
    cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, InferenceResult]:
    """A run of each architecture, its own responses greedy; tests only read it."""
    folder = tmp_path_factory.mktemp("best-of")
    return {
        arch: case.run(folder / arch, best_of=N, sampling_strategy="greedy", temperature=0.8)
        for arch, case in cases.items()
    }


@pytest.fixture
def result(arch: str, finished: dict[str, InferenceResult]) -> InferenceResult:
    return finished[arch]


def loaded(case: Case, tmp_path: Path, **fields: Any) -> tuple[Models, InferenceConfig, list[Any]]:
    config = case.config(tmp_path / "unused", best_of=N, **fields)
    source = inference.find_policy(config.policy_path)
    config = inference.with_policy_settings(config, source)
    return load_models(config, source), config, inference._read_inputs(config, source).prompts[:]


def one_by_one(
    models: Models, config: InferenceConfig, prompt: Any, row: int, sample: int
) -> tuple[str, int, str]:
    """The text, tokens and end of one sample of the untuned model, decoded alone."""
    uniforms = rollout_uniforms(
        config.seed, sample, range(row, row + 1), config.target_sequence_length, "best_of"
    )
    with models.base.using(None):
        generation = generate(
            models.base,
            models.codec.prompts([prompt]),
            max_new_tokens=config.target_sequence_length,
            temperature=config.temperature,
            uniforms=uniforms,
        )
    (text,) = models.codec.decode_rows(generation.responses.tolists())
    end = "eos" if bool(generation.finished) else "length"
    return text, int(generation.responses.lengths), end


def test_the_best_of_samples_made_and_scored_alone(
    case: Case, result: InferenceResult, tmp_path: Path
) -> None:
    models, config, rows = loaded(case, tmp_path, temperature=0.8)
    scorer = load_reward_model(str(case.reward), device="cpu")
    different = 0
    for number, (row, found) in enumerate(zip(rows, read(result.predictions), strict=True)):
        samples = [one_by_one(models, config, row.prompt, number, s) for s in range(N)]
        rewards = [
            float(scorer.score([row.prompt], [text], finished=[end == "eos"]))
            for text, _, end in samples
        ]
        different += len(set(samples)) > 1
        # Which of nearly equal ones wins is up to rounding; any other would be wrong.
        best = [s for s, r in zip(samples, rewards, strict=True) if r > max(rewards) - 1e-4]
        text, reward, tokens, end = (found[name] for name in FIELDS)
        assert (text, tokens, end) in best
        assert reward == pytest.approx(max(rewards), abs=1e-4)
    assert different >= 5


def test_ties_go_to_the_first() -> None:
    def sample(text: str, reward: float) -> Sample:
        return Sample((text, "eos"), 1, reward)

    assert choose([sample("a", 1.0), sample("b", 2.0), sample("c", 2.0)]).answer[0] == "b"
    assert choose([sample("a", -3.0)] * 2 + [sample("b", -4.0)]).answer[0] == "a"


def test_a_constant_reward_chooses_the_first_sample(case: Case, tmp_path: Path) -> None:
    class Constant:
        shares_base = False

        def score(self, prompts: Any, responses: Any, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros(len(prompts))

    models, config, rows = loaded(case, tmp_path)
    samples = best_of.sample_rows(replace(models, scorer=Constant()), config, rows, 0)
    for number, (row, found) in enumerate(zip(rows, samples, strict=True)):
        best = choose(found)
        assert (*best.answer, best.tokens) == (
            found[0].answer[0], found[0].answer[1], found[0].tokens
        )  # fmt: skip
        text, tokens, end = one_by_one(models, config, row.prompt, number, 0)
        assert (best.answer, best.tokens) == ((text, end), tokens)


def test_best_of_one_is_a_plain_sample(case: Case, tmp_path: Path) -> None:
    models, config, rows = loaded(case, tmp_path)
    one = config.model_copy(update={"best_of": 1})
    for number, (row, found) in enumerate(
        zip(rows, best_of.sample_rows(models, one, rows, 0), strict=True)
    ):
        text, tokens, end = one_by_one(models, config, row.prompt, number, 0)
        assert [(sample.answer, sample.tokens) for sample in found] == [((text, end), tokens)]


def test_more_samples_only_add_to_fewer(case: Case, tmp_path: Path) -> None:
    models, config, rows = loaded(case, tmp_path)
    two = best_of.sample_rows(models, config.model_copy(update={"best_of": 2}), rows, 0)
    for few, many in zip(two, best_of.sample_rows(models, config, rows, 0), strict=True):
        assert [s.answer for s in few] == [s.answer for s in many[:2]]
        assert choose(many).reward >= choose(few).reward - 1e-4


def test_nothing_depends_on_the_batch(case: Case, result: InferenceResult, tmp_path: Path) -> None:
    """Batches below, at and above n, which cut the samples of a row apart or join rows."""
    expected = read(result.predictions)
    for size in (1, N, 64):
        other = case.run(
            tmp_path / str(size), best_of=N, batch_size=size, sampling_strategy="greedy",
            temperature=0.8,
        )  # fmt: skip
        for row, same in zip(expected, read(other.predictions), strict=True):
            assert row["best_of_n_reward"] == pytest.approx(same["best_of_n_reward"], abs=1e-4)
            assert row["prediction"] == same["prediction"]
            assert row["best_of_n"] == same["best_of_n"]


def test_at_most_batch_size_responses_are_decoded_at_once(case: Case, tmp_path: Path) -> None:
    models, config, rows = loaded(case, tmp_path, batch_size=3)
    sizes = []

    def generator(lm: Any, prompts: Any, **options: Any) -> Any:
        generation = generate(lm, prompts, **options)
        sizes.append(len(generation.responses))
        return generation

    best_of.sample_rows(replace(models, generator=generator), config, rows[:3], 0)
    assert sizes == [3] * N


def test_a_prompt_is_read_once_for_its_samples(case: Case, tmp_path: Path) -> None:
    models, config, rows = loaded(case, tmp_path, batch_size=2 * N)
    prompts, groups = [], []

    def generator(lm: Any, batch: Any, **options: Any) -> Any:
        prompts.append(len(batch))
        groups.append(options["groups"].tolist())
        return generate(lm, batch, **options)

    best_of.sample_rows(replace(models, generator=generator), config, rows[:3], 0)
    assert prompts == [2, 1]
    assert groups == [[0] * N + [1] * N, [0] * N]


def test_the_tuned_and_untuned_responses_are_as_without(case: Case, tmp_path: Path) -> None:
    plain, more = (
        case.run(tmp_path / str(n), best_of=n, sampling_strategy="temperature_sampling")
        for n in (1, N)
    )
    assert not any("best_of" in name for name in plain.metrics)
    for row, other in zip(read(plain.predictions), read(more.predictions), strict=True):
        assert [row[name] for name in FIELDS] == [None] * 4
        assert {**other, **dict.fromkeys(FIELDS)} == row
    assert {name: more.metrics[name] for name in plain.metrics} == plain.metrics


def test_seeds_give_other_samples(case: Case, result: InferenceResult, tmp_path: Path) -> None:
    other = case.run(
        tmp_path / "out", best_of=N, seed=1, sampling_strategy="greedy", temperature=0.8
    )
    rows, others = read(result.predictions), read(other.predictions)
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in others]
    assert [row["best_of_n"] for row in rows] != [row["best_of_n"] for row in others]


def test_an_interrupted_run_ends_in_the_same_bytes(case: Case, tmp_path: Path) -> None:
    whole = case.run(tmp_path / "whole", best_of=N)
    calls = 0

    def stop(lm: Any, prompts: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * (2 + N) - 2:  # amid the samples of the second batch of rows
            raise StopRequested
        return generate(lm, prompts, **options)

    with pytest.raises(StoppedBySignal):
        run_inference(case.config(tmp_path / "out", best_of=N), generator=stop)
    assert len(read(tmp_path / "out" / inference.PARTIAL)) == 3
    resumed = case.run(tmp_path / "out", best_of=N)
    assert Path(resumed.predictions).read_bytes() == Path(whole.predictions).read_bytes()
    assert resumed.metrics == whole.metrics


# Metrics and tables


def test_figures_by_hand(case: Case, result: InferenceResult) -> None:
    rows = read(result.predictions)
    metrics = json.loads(Path(result.output_dir, "metrics.json").read_text())
    best = np.array([row["best_of_n_reward"] for row in rows])
    before = np.array([row["baseline_reward"] for row in rows])
    assert metrics["best_of"] == N
    assert metrics["best_of_n_reward"] == pytest.approx(best.mean())
    assert metrics["best_of_n_reward_gain"] == pytest.approx((best - before).mean())
    wins = (best > before).mean() + 0.5 * (best == before).mean()
    assert metrics["best_of_n_win_rate"] == pytest.approx(wins)
    tokens = [row["best_of_n_tokens"] for row in rows]
    assert metrics["best_of_n_tokens_mean"] == pytest.approx(sum(tokens) / len(ROWS))
    assert max(tokens) <= RESPONSE_LIMIT
    ends = [row["best_of_n_finish_reason"] == "eos" for row in rows]
    assert metrics["best_of_n_eos_rate"] == pytest.approx(sum(ends) / len(ROWS))
    references = [row.references for row in read_predictions(Path(result.predictions))]
    rouge = corpus_rouge([row["best_of_n"] for row in rows], references)
    assert metrics["best_of_n_rougeL"] == pytest.approx(rouge["rougeL"].mean)
    assert metrics["best_of_n_kl_bound"] == pytest.approx(math.log(5) - 0.8)


def test_the_bound_is_one_and_is_approached() -> None:
    """KL(best of n‖base) of K equally likely outcomes without ties, summed exactly."""
    assert kl_bound(1) == 0
    for n in (2, 4, 16):
        exact = []
        for outcomes in (2, 10, 2000):
            edges = np.arange(outcomes + 1) / outcomes
            chosen = edges[1:] ** n - edges[:-1] ** n  # P(the best of n is the k-th best)
            exact.append(float((chosen * np.log(chosen * outcomes)).sum()))
        assert exact == sorted(exact)
        assert exact[-1] < kl_bound(n)
        assert exact[-1] == pytest.approx(kl_bound(n), rel=0.02)


def test_tables_show_it_beside_the_tuned_model(
    case: Case, result: InferenceResult, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Path(result.output_dir, "README.md").read_text(encoding="utf-8")
    assert f"| | before | after | best of {N} before |" in report
    figure = f"{result.metrics['best_of_n_win_rate']:.3f}"
    (wins,) = [line for line in report.splitlines() if line.startswith("| win rate against")]
    assert wins.count("|") == 5
    assert figure in wins.split("|")[4]
    assert "| at most 0.809 |" in report
    assert "judge that it was chosen by" in report
    samples = Path(result.samples).read_text(encoding="utf-8")
    assert samples.count("| | before | after | best of n |") == len(ROWS)
    tables = [line for line in samples.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in tables)


def test_the_summary_tells_it(
    cases: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = cases["t5"].run(tmp_path / "out", best_of=2)
    said = " ".join("".join(capsys.readouterr()).split())
    figure = f"{result.metrics['best_of_n_reward']:.3f}"
    assert f"best of 2 untuned samples: reward, by the model that chose it: {figure}" in said
    assert "at most: 0.193" in said


# Bad input


@pytest.mark.parametrize("value", [0, -1, 2**12 + 1, 10**30, 1.5, "x", True, float("nan"), [4]])
def test_what_is_no_count_is_refused(cases: dict[str, Case], tmp_path: Path, value: Any) -> None:
    with pytest.raises((InputError, ValueError), match="best_of"):
        cases["t5"].config(tmp_path / "out", best_of=value)


def test_it_needs_a_reward_model(cases: dict[str, Case], tmp_path: Path) -> None:
    config = cases["t5"].config(tmp_path / "out").model_dump()
    with pytest.raises((InputError, ValueError), match="best_of: needs reward_model_path"):
        run_inference(InferenceConfig(**config | {"best_of": 2, "reward_model_path": None}))
    assert InferenceConfig(**config | {"best_of": 1, "reward_model_path": None}).best_of == 1


def test_a_pipeline_hands_over_its_reward_model(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate(
        {
            "base_model": "toy",
            "output_dir": str(tmp_path),
            "preference_dataset": "pairs.jsonl",
            "prompt_dataset": "prompts.jsonl",
            "inference": {"best_of": 16},
        }
    )
    stage = config.stage_config("inference")
    assert (stage.best_of, stage.reward_model_path) == (16, config.stage_dir("reward_model"))
