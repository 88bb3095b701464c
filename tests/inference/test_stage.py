"""Inference from the outside: files in, files out, for T5 and LLaMA."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from rouge_score import rouge_scorer
from support.cases import PROMPT_LIMIT, RESPONSE_LIMIT, ROWS, Case, load_base, read
from support.tiny import make_tokenizer, tiny_model

from rlhf.config import InferenceConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptFields
from rlhf.errors import InputError, StoppedBySignal
from rlhf.evaluation import evaluate_preferences
from rlhf.files.text import write_text
from rlhf.inference import InferenceResult, before_and_after, run_inference
from rlhf.inference import stage as inference
from rlhf.inference.predictions import Prediction, read_predictions
from rlhf.inference.report import samples_markdown
from rlhf.models.language_model import LanguageModel
from rlhf.models.policy_folder import find_policy
from rlhf.models.reward_model import load_reward_model


@pytest.fixture
def case(arch: str, cases: dict[str, Case]) -> Case:
    return cases[arch]


@pytest.fixture(scope="module")
def finished(
    cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, InferenceResult]:
    """One run of each architecture; tests read it and copy it, but write nothing into it."""
    folder = tmp_path_factory.mktemp("finished")
    return {arch: case.run(folder / arch) for arch, case in cases.items()}


@pytest.fixture
def result(arch: str, finished: dict[str, InferenceResult]) -> InferenceResult:
    return finished[arch]


@pytest.fixture(scope="module")
def stopped(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that a SIGTERM stopped in their last batch of three, which is lost."""
    folder = tmp_path_factory.mktemp("stopped")
    for arch, case in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            stop_in(3, patch)
            with pytest.raises(StoppedBySignal):
                case.run(folder / arch)
    return {arch: folder / arch for arch in cases}


def close(first: Any, second: Any) -> bool:
    """Equal, floats up to the rounding of other batches: a hundredfold of float32's, summed."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(close, first, second))
    return bool(
        first == (pytest.approx(second, rel=1e-5, abs=1e-4) if type(first) is float else second)
    )


# What is written


def test_predictions_are_in_input_order_and_complete(case: Case, result: InferenceResult) -> None:
    rows = read(result.predictions)
    assert [row["input_text"] for row in rows[:5]] == [row["input_text"] for row in ROWS[:5]]
    assert json.loads(rows[5]["input_text"]) == [{"author": "user", "content": "sat the cat?"}]
    assert [row["reference"] for row in rows] == [
        "a cat", ["the dog", "a dog ran"], None, "the dog", None, None, None
    ]  # fmt: skip
    assert any(row["prediction"] != row["baseline"] for row in rows)
    for row in rows:
        assert 1 <= row["tokens"] <= RESPONSE_LIMIT
        assert row["finish_reason"] == "eos" or row["tokens"] == RESPONSE_LIMIT
        assert row["prompt_tokens"] <= PROMPT_LIMIT
        assert row["kl_k3"] >= 0
    assert rows[-1]["prompt_tokens"] == PROMPT_LIMIT
    metrics = json.loads(Path(result.output_dir, "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["kl"] == pytest.approx(sum(row["kl"] for row in rows) / len(rows))
    assert {path.name for path in Path(result.output_dir).iterdir()} == {
        "README.md", "config.yaml", "metrics.json", "predictions.jsonl", "run.json",
        "samples.md", "tensorboard",
    }  # fmt: skip


def test_rouge_is_that_of_rouge_score(case: Case, result: InferenceResult) -> None:
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names)
    rows = [row for row in read(result.predictions) if row["reference"]]
    assert len(rows) == 3
    for prefix, field in (("", "prediction"), ("baseline_", "baseline")):
        for name in names:
            best = [
                max(
                    scorer.score(text, row[field])[name].fmeasure
                    for text in ([row["reference"]] if field and isinstance(row["reference"], str)
                                 else row["reference"])
                )
                for row in rows
            ]  # fmt: skip
            assert result.metrics[prefix + name] == pytest.approx(sum(best) / 3)


def test_rewards_equal_an_independent_rescoring(case: Case, result: InferenceResult) -> None:
    scorer = load_reward_model(str(case.reward), device="cpu")
    for row in read(result.predictions):
        fields = PromptFields(row["input_text"], (), None)
        if row["input_text"].startswith("[{"):
            continue
        prompt = PromptRenderer().render(fields)
        texts = [row["prediction"], row["baseline"]]
        ends = [row[name] == "eos" for name in ("finish_reason", "baseline_finish_reason")]
        both = scorer.score([prompt, prompt], texts, 1, finished=ends)
        assert [row["reward"], row["baseline_reward"]] == pytest.approx(both.tolist(), abs=1e-4)


def test_kl_is_the_log_ratio_of_plain_forward_passes(case: Case, tmp_path: Path) -> None:
    """Against merged and base models in plain transformers, at the sampling temperature."""
    temperature = 0.7
    result = case.run(tmp_path / "out", temperature=temperature, batch_size=7)
    lm = load_base(case.arch, case.base)
    merged = type(lm.module).from_pretrained(case.policy / "merged")
    plain = type(lm.module).from_pretrained(case.base)
    config = case.config(tmp_path / "out", temperature=temperature)
    source = inference.find_policy(config.policy_path)
    config = inference.with_policy_settings(config, source)
    models = before_and_after.load_models(config, source)
    seen = record_responses(models, config)
    assert len(seen) == len(ROWS)
    for row, (prompt, response) in zip(read(result.predictions), seen, strict=True):
        tuned = plain_logprobs(merged, lm, prompt, response, temperature)
        base = plain_logprobs(plain, lm, prompt, response, temperature)
        assert row["kl"] == pytest.approx(float((tuned - base).sum()), abs=2e-3)
        ratio = base - tuned
        assert row["kl_k3"] == pytest.approx(float((ratio.exp() - 1 - ratio).sum()), abs=2e-3)


def record_responses(
    models: before_and_after.Models, config: InferenceConfig
) -> list[tuple[list[int], list[int]]]:
    inputs = inference._read_inputs(config, inference.find_policy(config.policy_path))
    rows = inputs.prompts[:]
    prompts = models.codec.prompts([row.prompt for row in rows])
    uniforms = before_and_after.rollout_uniforms(
        0, 0, range(len(rows)), RESPONSE_LIMIT, "inference"
    )
    with models.tuned.using(models.adapter):
        generation = models.generator(
            models.tuned,
            prompts,
            max_new_tokens=RESPONSE_LIMIT,
            temperature=config.temperature,
            uniforms=uniforms,
        )
    return list(zip(prompts.tolists(), generation.responses.tolists(), strict=True))


@torch.no_grad()
def plain_logprobs(
    model: Any, lm: LanguageModel, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    model.eval()
    target = torch.tensor(response)
    if lm.config.is_encoder_decoder:
        decoder = torch.tensor([[0, *response[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    else:
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, target[:, None])[:, 0]


def test_preference_rows_evaluate_the_reward_model(case: Case, result: InferenceResult) -> None:
    metrics = result.metrics
    scorer = load_reward_model(str(case.reward), device="cpu")
    pairs = [row for row in ROWS if "choice" in row]
    scores = []
    for row in pairs:
        prompt = PromptRenderer().render(PromptFields(row["input_text"], (), None))
        candidates = [row["candidate_0"], row["candidate_1"]]
        scores.append(scorer.score([prompt, prompt], candidates, 1).tolist())
    chosen = [score[row["choice"]] for row, score in zip(pairs, scores, strict=True)]
    rejected = [score[1 - row["choice"]] for row, score in zip(pairs, scores, strict=True)]
    expected = evaluate_preferences(chosen, rejected, [1, 2], [2, 1])
    assert metrics["reward_model_pairs"] == 2
    assert metrics["reward_model_accuracy"] == expected.accuracy.mean
    assert metrics["reward_model_log_loss"] == pytest.approx(expected.log_loss, abs=1e-4)
    assert metrics["reward_model_longer_accuracy"] == 0.5
    assert sum(row["count"] for row in metrics["reward_model_calibration"]) == 2


def test_without_reward_model_and_references_there_are_no_such_figures(
    case: Case, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_text": "the cat"}\n')
    result = case.run(tmp_path / "out", reward_model_path=None, eval_dataset=str(data))
    assert not any("rouge" in name or "reward" in name for name in result.metrics)
    assert "win_rate" not in result.metrics
    row = read(result.predictions)[0]
    assert row["reward"] is None
    assert row["baseline_reward"] is None
    assert row["reference"] is None


def test_samples_and_report_can_be_read(case: Case, result: InferenceResult) -> None:
    samples = Path(result.samples).read_text(encoding="utf-8")
    assert "the cat sat \\[summary]:" in samples
    assert samples.count("| | before | after |") == len(ROWS)
    tables = [line for line in samples.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in tables)
    report = Path(result.output_dir, "README.md").read_text(encoding="utf-8")
    assert "win rate" in report
    assert "ROUGE-Lsum" in report


def test_local_evaluate_modules_are_computed_too(cases: dict[str, Case], tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    module = tmp_path / "letters"
    module.mkdir()
    (module / "letters.py").write_text(LETTERS)
    result = cases["t5"].run(tmp_path / "out", extra_metrics=[str(module)])
    rows = read(result.predictions)
    for name, field in (("letters", "prediction"), ("baseline_letters", "baseline")):
        expected = sum(len(row[field]) for row in rows if row["reference"]) / 3
        assert result.metrics[name] == pytest.approx(expected)


LETTERS = """
import datasets
import evaluate


class Letters(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        return {"letters": sum(map(len, predictions)) / len(predictions)}
"""


def test_any_text_survives_the_files(tmp_path: Path) -> None:
    text = "a | b\n\n`c` <d> ![e](https://example.com/e.png) \u2028 \ud83d caf\u00e9"
    row = Prediction(text, text, "", [text, "x"], 0.5, None, 0.0, 0.0, 1, 2, 1, "eos", "length")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row.line() * 2)
    assert list(read_predictions(path)) == [row, row]
    samples = samples_markdown([row])
    write_text(tmp_path / "samples.md", samples)
    assert "a \\| b<br><br>\\`c\\` &lt;d> !\\[e](https" in samples
    assert "*(empty)*" in samples


# What must not change a result


@pytest.mark.parametrize("strategy", ["greedy", "temperature_sampling"])
def test_batch_size_changes_nothing(case: Case, tmp_path: Path, strategy: str) -> None:
    one = case.run(tmp_path / "one", batch_size=1, sampling_strategy=strategy)
    all_ = case.run(tmp_path / "all", batch_size=64, sampling_strategy=strategy)
    assert close(read(one.predictions), read(all_.predictions))
    assert close(dict(one.metrics), dict(all_.metrics))


def test_compiled_decoding_changes_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_compiler = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(
        torch, "compile", lambda step, mode, **more: with_compiler(step, backend="eager", **more)
    )
    plain, compiled = (
        read(case.run(tmp_path / str(flag), compile_decode=flag).predictions)
        for flag in (False, True)
    )
    assert [row["prediction"] for row in compiled] == [row["prediction"] for row in plain]
    assert [row["baseline"] for row in compiled] == [row["baseline"] for row in plain]


def test_an_adapter_and_its_merged_model_answer_alike(case: Case, tmp_path: Path) -> None:
    adapter = case.run(tmp_path / "adapter", sampling_strategy="greedy")
    for number, path in enumerate([case.policy / "merged", case.policy / "adapter"]):
        other = case.run(tmp_path / str(number), policy_path=str(path), sampling_strategy="greedy")
        assert close(read(adapter.predictions), read(other.predictions))


def test_a_policy_that_is_its_base_changes_nothing(case: Case, tmp_path: Path) -> None:
    result = case.run(
        tmp_path / "out",
        policy_path=str(case.base),
        base_model=str(case.base),
        prompt_sequence_length=PROMPT_LIMIT,
        target_sequence_length=RESPONSE_LIMIT,
    )
    metrics = result.metrics
    assert metrics["kl"] == metrics["kl_k3"] == metrics["reward_gain"] == 0
    assert metrics["win_rate"] == metrics["win_rate_low"] == metrics["win_rate_high"] == 0.5
    assert all(row["prediction"] == row["baseline"] for row in read(result.predictions))


def test_seeds_give_other_samples_and_greedy_knows_no_seed(case: Case, tmp_path: Path) -> None:
    def texts(name: str, **fields: Any) -> list[str]:
        return [row["prediction"] for row in read(case.run(tmp_path / name, **fields).predictions)]

    assert texts("a", seed=0) != texts("b", seed=1)
    greedy = texts("c", seed=0, sampling_strategy="greedy")
    assert greedy == texts("d", seed=1, sampling_strategy="greedy", temperature=0.3)


# Interruption


def stop_in(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGTERM at the beginning of a batch, counted from 1."""
    original: Callable[..., Any] = before_and_after.predict_rows
    calls = 0

    def predict_rows(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(inference, "predict_rows", predict_rows)


@pytest.mark.parametrize("damage", ["none", "torn", "no newline", "garbage", "half a batch"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    case: Case, result: InferenceResult, stopped: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    shutil.copytree(stopped[case.arch], tmp_path / "out")
    partial = tmp_path / "out" / inference.PARTIAL
    content = partial.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 6
    damaged = {
        "none": content,
        "torn": content + lines[0][:25],
        "no newline": content[:-1],
        "garbage": content + b"\0\0\0\n",
        "half a batch": b"".join(lines[:5]),
    }
    partial.write_bytes(damaged[damage])
    resumed = case.run(tmp_path / "out")
    assert Path(resumed.predictions).read_bytes() == Path(result.predictions).read_bytes()
    assert resumed.metrics == result.metrics
    assert not partial.exists()


def test_only_the_rest_is_computed(
    case: Case, stopped: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped[case.arch], tmp_path / "out")
    starts = []
    original = before_and_after.predict_rows

    def predict_rows(models: Any, config: Any, rows: Any, start: int) -> Any:
        starts.append(start)
        return original(models, config, rows, start)

    monkeypatch.setattr(inference, "predict_rows", predict_rows)
    case.run(tmp_path / "out")
    assert starts == [6]
    starts.clear()
    # Stopped between the renaming of the predictions and the final metrics.
    (tmp_path / "out" / "metrics.json").unlink()
    case.run(tmp_path / "out")
    assert starts == []


def test_a_finished_run_returns_at_once(
    case: Case, result: InferenceResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "load_models", lambda *_: pytest.fail("nothing to load"))
    assert case.run(Path(result.output_dir)) == result


def test_another_run_does_not_overwrite(case: Case, result: InferenceResult) -> None:
    before = Path(result.predictions).read_bytes()
    with pytest.raises(InputError, match="temperature"):
        case.run(Path(result.output_dir), temperature=0.5)
    assert Path(result.predictions).read_bytes() == before


def test_a_remote_folder_gets_whole_files(
    cases: dict[str, Case], finished: dict[str, InferenceResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """memory:// stands for gs://: an object store without append."""
    case, folder = cases["t5"], "memory://bucket/inference"
    with monkeypatch.context() as patch:
        stop_in(3, patch)
        with pytest.raises(StoppedBySignal):
            run_inference(case.config(folder))
    store = fsspec.filesystem("memory")
    assert store.cat_file(f"/bucket/inference/{inference.PARTIAL}").count(b"\n") == 6
    done = run_inference(case.config(folder))
    whole = Path(finished["t5"].predictions).read_bytes()
    assert done.predictions == f"{folder}/predictions.jsonl"
    assert store.cat_file("/bucket/inference/predictions.jsonl") == whole
    assert not store.exists(f"/bucket/inference/{inference.PARTIAL}")
    assert run_inference(case.config(folder)) == done


# Bad input


def refuse(case: Case, tmp_path: Path, match: str, **fields: Any) -> None:
    with pytest.raises(InputError, match=match):
        case.run(tmp_path / "refused", **fields)
    assert not (tmp_path / "refused").exists()


def test_bad_input_is_refused_and_nothing_written(case: Case, tmp_path: Path) -> None:
    refuse(case, tmp_path, "there is no folder", policy_path=str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    refuse(case, tmp_path, "holds no policy", policy_path=str(tmp_path / "empty"))
    refuse(case, tmp_path, "does not exist", eval_dataset=str(tmp_path / "missing.jsonl"))
    refuse(case, tmp_path, "never downloaded", extra_metrics=["bleu"])
    refuse(case, tmp_path, "prompt_sequence_length", prompt_sequence_length=1)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input_text": "a"}\n{"input_txt": "b"}\n')
    refuse(case, tmp_path, r"bad.jsonl:2: input_text: is missing", eval_dataset=str(bad))
    shutil.copytree(case.policy / "merged", tmp_path / "lonely")
    (tmp_path / "lonely" / "rlhf.json").unlink()
    refuse(case, tmp_path, "base_model", policy_path=str(tmp_path / "lonely"))
    (tmp_path / "torn").mkdir()
    shutil.copy(case.policy / "adapter" / "adapter_config.json", tmp_path / "torn")
    refuse(case, tmp_path, "incomplete", policy_path=str(tmp_path / "torn"))


def test_an_adapter_on_another_base_is_refused(
    case: Case, tmp_path: Path, cases: dict[str, Case]
) -> None:
    other = tmp_path / "other"
    tiny_model(case.arch, seed=9).save_pretrained(other)
    make_tokenizer(case.arch).save_pretrained(other)
    refuse(case, tmp_path, "trained on", base_model=str(other))
    stranger = next(c for name, c in cases.items() if name != case.arch)
    refuse(
        case,
        tmp_path,
        "another architecture or vocabulary",
        policy_path=str(case.policy / "merged"),
        base_model=str(stranger.base),
    )


def test_a_reward_model_with_another_instruction_is_refused(case: Case, tmp_path: Path) -> None:
    refuse(case, tmp_path, "instruction", instruction="the cat")


def test_limits_of_the_model_are_known_before_it_is_loaded(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "load_models", lambda *_: pytest.fail("nothing to load"))
    refuse(cases["llama"], tmp_path, "exceed", prompt_sequence_length=127)


def test_dry_run_loads_and_writes_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference, "load_models", lambda *_: pytest.fail("nothing to load"))
    result = case.run(tmp_path / "out", dry_run=True)
    assert result.metrics == {}
    assert not (tmp_path / "out").exists()
    report = capsys.readouterr().out
    assert "7 rows" in report
    assert "memory" in report


# Settings


def test_eos_waits_for_the_shortest_response(cases: dict[str, Case], tmp_path: Path) -> None:
    result = cases["t5"].run(tmp_path / "out", min_response_length=RESPONSE_LIMIT)
    assert {row["tokens"] for row in read(result.predictions)} == {RESPONSE_LIMIT}
    assert result.metrics["eos_rate"] == result.metrics["baseline_eos_rate"] == 0


def test_an_adapter_of_plain_peft_names_its_base(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(case.policy / "adapter", folder)
    (folder / "rlhf.json").unlink()
    source = find_policy(str(folder))
    assert (source.kind, source.base_model) == ("adapter", str(case.base))
    assert source.settings == {}


def test_a_policy_in_an_object_store(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(str(case.policy), f"/policies/{case.arch}", recursive=True)
    for part, kind in (("", "adapter"), ("/adapter", "adapter"), ("/merged", "full")):
        source = find_policy(f"memory://policies/{case.arch}{part}")
        local = find_policy(f"{case.policy}{part}")
        assert (source.kind, source.base_model) == (kind, str(case.base))
        assert source.fingerprint == local.fingerprint
        assert source.settings == local.settings != {}


def test_settings_come_from_the_policy_unless_given(case: Case, tmp_path: Path) -> None:
    source = inference.find_policy(str(case.policy))
    config = inference.with_policy_settings(case.config(tmp_path / "out"), source)
    assert config.prompt_sequence_length == PROMPT_LIMIT
    assert config.base_model == str(case.base)
    given = case.config(tmp_path / "out", prompt_sequence_length=9)
    assert inference.with_policy_settings(given, source).prompt_sequence_length == 9
    options = {"enable_thinking": False}
    trained = dataclasses.replace(
        source, settings={**source.settings, "chat_template_options": options}
    )
    fresh = case.config(tmp_path / "out")
    assert inference.with_policy_settings(fresh, trained).chat_template_options == options
    given = case.config(tmp_path / "out", chat_template_options={"depth": 1})
    assert inference.with_policy_settings(given, trained).chat_template_options == {"depth": 1}


def test_a_moved_base_can_be_given(case: Case, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(case.base, moved)
    before = case.run(tmp_path / "a")
    after = case.run(tmp_path / "b", base_model=str(moved))
    assert read(before.predictions) == read(after.predictions)


def test_a_scorer_of_the_other_architecture(
    case: Case, cases: dict[str, Case], tmp_path: Path
) -> None:
    """Both tokenizers render conversations alike here, so each may scorer the other's texts."""
    scorer = next(c for name, c in cases.items() if name != case.arch)
    result = case.run(tmp_path / "out", reward_model_path=str(scorer.reward))
    scorer = load_reward_model(str(scorer.reward), device="cpu")
    row = read(result.predictions)[0]
    prompt = PromptRenderer().render(PromptFields(row["input_text"], (), None))
    ended = row["finish_reason"] == "eos"
    score = float(scorer.score([prompt], [row["prediction"]], finished=[ended]))
    assert row["reward"] == pytest.approx(score, abs=1e-4)
