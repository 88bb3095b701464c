"""All stages by one call: what is written, what is checked first, what is not done again."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from rlhf.config import InferenceConfig, PipelineConfig, SourceEntry
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_preferences, read_once
from rlhf.errors import InputError, StoppedBySignal
from rlhf.files.lease import lease
from rlhf.inference import run_inference
from rlhf.pipeline import hold_out_rows, on_the_given_base, run_pipeline
from rlhf.ppo_trainer import train_ppo
from rlhf.reward_model import train_reward_model
from rlhf.stages import STAGES

WORDS = "the cat sat and the dog ran to a post"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def preferences(count, start=0):
    return [
        {
            "input_text": f"{number} {WORDS} [summary]:",
            "candidate_0": " the cat sat",
            "candidate_1": f" a dog ran {number}",
            "choice": number % 2,
            "id": number,  # a field of the user's own
        }
        for number in range(start, start + count)
    ]


@pytest.fixture
def values(checkpoints, tmp_path):
    """A small pipeline with all four stages, of T5."""
    rows = [{"input_text": f"{i} {WORDS}", "output_text": " the cat sat"} for i in range(12)]
    return {
        "base_model": str(checkpoints["t5"]),
        "output_dir": str(tmp_path / "out"),
        "preference_dataset": write_rows(tmp_path / "preferences.jsonl", preferences(40)),
        "sft_dataset": write_rows(tmp_path / "sft.jsonl", rows),
        "eval_dataset": write_rows(tmp_path / "eval.jsonl", preferences(6, start=100) + rows),
        "prompt_sequence_length": 48,
        "target_sequence_length": 8,
        "batch_size": 4,
        "train_steps": 2,
        "log_with": "none",
    }


def run(values, **changes):
    return run_pipeline(PipelineConfig.model_validate(values | changes))


def replace_run(monkeypatch, stage, run):
    monkeypatch.setitem(STAGES, stage, dataclasses.replace(STAGES[stage], run=run))


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_every_stage_leaves_its_folder_and_the_pipeline_its_figures(values, tiny_checkpoint):
    result = run(values, base_model=str(tiny_checkpoint))
    out = Path(result.output_dir)
    assert {path.name for path in out.iterdir()} == {
        "sft", "reward_model", "policy", "inference", "config.yaml", "metrics.json"
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["sft", "reward_model", "ppo", "inference", "seconds"]
    assert metrics["inference"]["rows"] == 18
    assert "reward_model_accuracy" in metrics["inference"]  # eval rows with candidates
    assert (out / "policy" / "merged" / "config.json").is_file()
    base = str(out / "sft" / "merged")
    for stage in ("reward_model", "policy"):
        assert yaml.safe_load((out / stage / "config.yaml").read_text())["base_model"] == base
    assert len((out / "inference" / "predictions.jsonl").read_text().splitlines()) == 18


def test_dpo_is_tuned_beside_ppo_where_it_is_asked_for(values, tiny_checkpoint):
    plain = run(values, base_model=str(tiny_checkpoint), output_dir=values["output_dir"] + "-plain")
    result = run(values, base_model=str(tiny_checkpoint), dpo={"beta": 0.5})
    out = Path(result.output_dir)
    assert list(result.metrics) == ["sft", "reward_model", "ppo", "dpo", "inference", "seconds"]
    config = yaml.safe_load((out / "dpo" / "config.yaml").read_text())
    assert config["base_model"] == str(out / "sft" / "merged")
    assert config["beta"] == 0.5
    assert result.metrics["dpo"]["eval/pairs"] == 6  # eval rows with candidates
    predictions = Path("inference") / "predictions.jsonl"
    assert (out / predictions).read_bytes() == (Path(plain.output_dir) / predictions).read_bytes()
    inference = InferenceConfig(
        policy_path=str(out / "dpo"),
        eval_dataset=values["eval_dataset"],
        reward_model_path=str(out / "reward_model"),
        output_dir=str(out / "inference-dpo"),
    )
    assert run_inference(inference).metrics["rows"] == 18
    assert run(values, base_model=str(tiny_checkpoint), dpo={"beta": 0.5}).metrics == result.metrics


def test_a_reward_model_that_is_given_is_used_by_all_stages(cases, arch, tmp_path):
    case = cases[arch]
    rows = [{"input_text": f"{number} the cat"} for number in range(4)]
    fields = {
        "base_model": str(case.base), "output_dir": str(tmp_path / "out"),
        "reward_model_path": str(case.reward),
        "prompt_dataset": write_rows(tmp_path / "prompts.jsonl", rows),
        "eval_dataset": str(case.data), "prompt_sequence_length": 24, "target_sequence_length": 8,
        "batch_size": 4, "train_steps": 1, "log_with": "none", "device": "cpu",
    }  # fmt: skip
    result = run(fields)
    out = Path(result.output_dir)
    assert {path.name for path in out.iterdir()} == {
        "policy", "inference", "config.yaml", "metrics.json"
    }  # fmt: skip
    assert list(result.metrics) == ["ppo", "inference", "seconds"]
    own = run_inference(
        InferenceConfig(
            policy_path=str(out / "policy"), reward_model_path=str(case.reward),
            eval_dataset=str(case.data), output_dir=str(tmp_path / "own"), device="cpu",
        )
    ).metrics  # fmt: skip
    assert result.metrics["inference"]["reward"] == pytest.approx(own["reward"], abs=1e-4)
    with pytest.raises(InputError, match=r"reward_model_path: there is no folder .*missing"):
        run(fields, reward_model_path=str(tmp_path / "missing"), output_dir=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_rankings_are_enough_for_all_stages(values, tiny_checkpoint, tmp_path):
    """Of rankings alone: held out, learned by reward model and DPO, PPO's prompts, evaluated."""
    rows = [
        {
            "input_text": f"{number} {WORDS} [summary]:",
            "candidates": [" the cat sat", f" a dog ran {number}", "", " the cat sat"],
            "ranking": [[1, 0, 2, 3], [0, 3, 2, 1]][number % 2],
        }
        for number in range(40)
    ]
    result = run(
        values,
        base_model=str(tiny_checkpoint),
        preference_dataset=write_rows(tmp_path / "ranked.jsonl", rows),
        eval_dataset=None,
        sft_dataset=None,
        dpo={"train_steps": 1},
        inference={"best_of": 3},
    )
    out, metrics = Path(result.output_dir), result.metrics
    held = [json.loads(line) for line in (out / "data" / "held_out.jsonl").read_text().splitlines()]
    assert all(row in rows for row in held)
    pairs = 5 * len(held)  # of six, one is of identical candidates
    assert len(held) == 2
    assert metrics["reward_model"]["eval/pairs"] == metrics["dpo"]["eval/pairs"] == pairs
    assert metrics["inference"]["reward_model_pairs"] == pairs
    assert (metrics["inference"]["rows"], metrics["inference"]["best_of"]) == (2, 3)
    predicted = [
        json.loads(line)
        for line in (out / "inference" / "predictions.jsonl").read_text().splitlines()
    ]
    assert [row["input_text"] for row in predicted] == [row["input_text"] for row in held]
    assert all(isinstance(row["best_of_n"], str) for row in predicted)


def test_rows_that_are_held_out_for_inference_are_not_learned_by_dpo(values):
    out = Path(run(values, eval_dataset=None, sft_dataset=None, dpo={"train_steps": 1}).output_dir)
    config = yaml.safe_load((out / "dpo" / "config.yaml").read_text())
    assert config["preference_dataset"] == str(out / "data" / "preferences.jsonl")
    assert config["eval_dataset"] == str(out / "data" / "held_out.jsonl")


def test_a_finished_pipeline_is_left_alone_and_a_changed_one_is_refused(values, monkeypatch):
    out = Path(run(values).output_dir)
    before = contents(out)
    monkeypatch.setattr("rlhf.ppo_trainer.PPOTrainer.train", lambda _: pytest.fail("ran again"))
    again = run(values)
    assert contents(out) == before
    assert again.metrics == json.loads((out / "metrics.json").read_text())
    with pytest.raises(InputError, match="kl_coeff"):
        run(values, ppo={"kl_coeff": 0.5})
    for folder in ("sft", "reward_model", "policy", "inference"):
        assert contents(out / folder) == {
            name.relative_to(folder): data
            for name, data in before.items()
            if name.parts[0] == folder
        }


def test_rows_that_are_held_out_keep_their_layout_and_columns(values, tmp_path):
    rows = [
        {"q": f"{number} {WORDS}", "response": text, "helpfulness": score, "id": number}
        for number in range(40)
        for text, score in ((" the cat sat", 3), (" a dog", number % 4))
    ]
    values = values | {
        "preference_dataset": write_rows(tmp_path / "helpful.jsonl", rows),
        "columns": {"prompt": "q"},
        "ties": "keep",
        "eval_dataset": None,
    }
    with read_once(keep_lines=True):
        config = hold_out_rows(PipelineConfig.model_validate(values))
    options = {"renderer": PromptRenderer(), "columns": config.columns, "ties": config.ties}
    train = load_preferences(config.preference_dataset, **options)
    held_out = load_preferences(config.eval_dataset, **options)
    assert (len(train), len(held_out)) == (38, 2)
    found = {
        row.prompt.text: (row.chosen, row.margin) for part in (train, held_out) for row in part
    }
    assert found == {
        f"{number} {WORDS}": (" the cat sat", 3.0 - number % 4 if number % 4 < 3 else None)
        for number in range(40)
    }


def test_a_stopped_pipeline_goes_on_with_the_stage_it_was_in(values, monkeypatch):
    def stop(config):
        raise StoppedBySignal(1)

    calls = []

    def counted(config):
        calls.append("reward_model")
        return train_reward_model(config)

    replace_run(monkeypatch, "ppo", stop)
    with pytest.raises(StoppedBySignal):
        run(values)
    assert not (Path(values["output_dir"]) / "metrics.json").exists()
    monkeypatch.undo()
    replace_run(monkeypatch, "reward_model", counted)
    trained = (Path(values["output_dir"]) / "reward_model" / "head.safetensors").stat().st_mtime_ns
    assert "inference" in run(values).metrics
    assert calls == ["reward_model"]  # asked, and found finished
    head = Path(values["output_dir"]) / "reward_model" / "head.safetensors"
    assert head.stat().st_mtime_ns == trained


def test_without_eval_dataset_rows_are_held_out_by_prompt_for_all_stages(values, tmp_path):
    rows = preferences(40) + preferences(40)  # every prompt twice
    path = write_rows(tmp_path / "twice.jsonl", rows)
    out = Path(run(values, eval_dataset=None, sft_dataset=None, preference_dataset=path).output_dir)
    parts = [
        [json.loads(line) for line in (out / "data" / name).read_text().splitlines()]
        for name in ("preferences.jsonl", "held_out.jsonl")
    ]
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in rows)
    train, held_out = ({row["input_text"] for row in part} for part in parts)
    assert held_out
    assert not train & held_out
    predicted = (out / "inference" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["input_text"] for line in predicted} == held_out
    config = yaml.safe_load((out / "policy" / "config.yaml").read_text())
    assert config["prompt_dataset"] == str(out / "data" / "preferences.jsonl")
    assert run(values, eval_dataset=None, sft_dataset=None, preference_dataset=path).metrics


def test_all_that_is_wrong_with_any_stage_is_said_before_a_model_is_loaded(
    values, tmp_path, monkeypatch
):
    for stage in STAGES:
        replace_run(monkeypatch, stage, lambda _: pytest.fail("a stage ran"))
    bad = {
        "sft_dataset": [{"input_text": "no output"}],
        "preference_dataset": [preferences(1)[0] | {"choice": 2}],
        "prompt_dataset": [{"input_text": 3}],
        "eval_dataset": [preferences(1)[0] | {"candidate_1": None}],
    }
    changes = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in bad.items()}
    with pytest.raises(InputError) as error:
        run(values, **changes)
    text = str(error.value)
    for name in bad:
        assert f"{name}.jsonl:1: " in text
    assert len(error.value.problems) == len(set(error.value.problems))
    assert not Path(values["output_dir"]).exists()


def test_limits_of_a_single_stage_are_found_first(values, checkpoints):
    with pytest.raises(InputError, match="prompt_sequence_length"):
        run(
            values,
            base_model=str(checkpoints["llama"]),
            ppo={"prompt_sequence_length": 100_000},
        )
    assert not Path(values["output_dir"]).exists()


def test_a_dry_run_says_what_would_happen_and_writes_nothing(values, capsys):
    result = run(values, dry_run=True)
    said, warned = capsys.readouterr()
    for stage in ("sft", "reward_model", "ppo", "inference"):
        assert stage in said
    assert "eval_dataset: 18 rows" in said
    assert "12 of 18 rows have a prompt that dataset of stage sft has, too" in warned
    assert "preference_dataset has, too" not in said + warned
    assert result.metrics == {}
    assert not Path(values["output_dir"]).exists()


def test_only_the_pipelines_dry_run_does_without_the_reward_model(values):
    config = PipelineConfig.model_validate(values | {"dry_run": True})
    run_pipeline(config)
    ppo = on_the_given_base(config, "ppo")
    with pytest.raises(InputError, match="reward_model_path: there is no folder"):
        train_ppo(ppo)
    assert not Path(values["output_dir"]).exists()


def test_a_second_pipeline_on_the_same_folder_is_refused(values):
    with (
        lease(values["output_dir"], "rlhf run"),
        pytest.raises(InputError, match=r"is being written by 'rlhf run' \(process "),
    ):
        run(values)
    assert not Path(values["output_dir"]).exists()


def test_the_reward_model_may_have_a_base_of_its_own(values, checkpoints):
    other = str(checkpoints["llama"])
    result = run(values, reward_model={"base_model": other})
    record = Path(result.output_dir) / "reward_model" / "reward_model.json"
    assert json.loads(record.read_text())["base_model"] == other


def by_id(prompts, responses, id):  # noqa: A002 (the name of a field)
    return [0.01 * (number or 0) for number in id]


@pytest.mark.parametrize("held_out", [True, False])
def test_rules_and_further_rewards_add_to_the_reward_model(values, held_out, cases):
    """With and without an `eval_dataset`: rows that are written again keep their fields."""
    values["ppo"] = {"rewards": [{"path": str(cases["t5"].reward), "weight": 0.5, "name": "other"}]}
    del values["sft_dataset"]
    if not held_out:
        del values["eval_dataset"]
    config = PipelineConfig.model_validate(values)
    metrics = run_pipeline(config, reward_fn=by_id).metrics["ppo"]
    total = (
        metrics["ppo/reward_reward_model"]
        + 0.5 * metrics["ppo/reward_other"]
        + metrics["ppo/reward_by_id"]
    )
    assert metrics["ppo/reward_by_id"] > 0
    assert metrics["ppo/score"] == pytest.approx(total, abs=1e-4)


def test_rewards_are_checked_before_any_stage_runs(values, tmp_path, monkeypatch):
    def judge(prompts, responses, answer):
        return []

    missing = str(tmp_path / "nothing")
    values["ppo"] = {"rewards": [missing, {"function": "rules:length"}]}
    replace_run(monkeypatch, "sft", None)
    with pytest.raises(InputError) as caught:
        run(values)
    assert caught.value.problems == [
        "rewards.1.function: a configuration alone runs no code; allow it with the flag "
        "--reward_fn rules:length, or in Python pass the function as reward_fn"
    ]
    values["ppo"] = {"rewards": [missing]}
    for dry in (True, False):
        config = PipelineConfig.model_validate(values | {"dry_run": dry})
        with pytest.raises(InputError) as caught:
            run_pipeline(config, reward_fn=judge)
        assert caught.value.problems == [
            "reward_fn judge: needs the column 'answer', which no row of prompt_dataset has; there "
            "are input_text, candidate_0, candidate_1, choice, id, prompt_tokens, "
            "response_tokens, finished",
            "reward_fn judge: needs the column 'answer', which no row of eval_dataset has; there "
            "are input_text, candidate_0, candidate_1, choice, id, output_text, prompt_tokens, "
            "response_tokens, finished",
            f"rewards.0.path: there is no folder {missing}",
        ]
    assert not Path(values["output_dir"]).exists()


def test_a_dry_run_does_not_mind_an_unfinished_reward_model(values, capsys):
    del values["sft_dataset"]
    (Path(values["output_dir"]) / "reward_model" / "checkpoints").mkdir(parents=True)
    config = PipelineConfig.model_validate(values | {"dry_run": True})
    run_pipeline(config, reward_fn=by_id)
    assert "reward by_id: weight 1, a function" in capsys.readouterr().out


def test_rows_held_out_of_a_mixture_keep_its_weights(values, tmp_path):
    first, second = preferences(30), preferences(50, start=200)
    mixture = [
        {"path": write_rows(tmp_path / "first.jsonl", first), "weight": 2},
        write_rows(tmp_path / "second.jsonl", second),
    ]
    config = PipelineConfig.model_validate(
        values | {"preference_dataset": mixture, "eval_dataset": None, "sft_dataset": None}
    )
    with read_once(keep_lines=True):
        held = hold_out_rows(config)
    folder = tmp_path / "out" / "data"
    assert held.preference_dataset == [
        SourceEntry(path=str(folder / "preferences-0.jsonl"), weight=2),
        SourceEntry(path=str(folder / "preferences-1.jsonl"), weight=1),
    ]
    parts = [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("preferences-0.jsonl", "preferences-1.jsonl", "held_out.jsonl")
    ]
    assert len(parts[2]) == 4
    for part, rows in zip(parts, (first, second), strict=False):
        assert part == [row for row in rows if row not in parts[2]]
    assert held.eval_dataset == str(folder / "held_out.jsonl")
