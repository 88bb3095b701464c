"""The schema as a user meets it: files, overrides, and what is said about mistakes."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

import rlhf
from rlhf.config import (
    BASE_LEARNING_RATES,
    InferenceConfig,
    LoRAConfig,
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    Schema,
    ScoreConfig,
    SFTConfig,
    config_to_yaml,
    load_config,
    result_fields,
)
from rlhf.config.describe import leaf_fields
from rlhf.errors import InputError

ALL = [SFTConfig, RewardModelConfig, PPOConfig, InferenceConfig, PipelineConfig, ScoreConfig]
PPO = {"base_model": "base", "output_dir": "out", "prompt_dataset": "prompts.jsonl"}
RUN = {"base_model": "base", "output_dir": "out", "preference_dataset": "pairs.jsonl"}


def ppo(**fields):
    return load_config(PPOConfig, None, PPO | fields)


def problems_of(cls, fields, path=None):
    with pytest.raises(InputError) as caught:
        load_config(cls, path, fields)
    return caught.value.problems


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "config.yaml"
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write


@pytest.mark.parametrize("cls", ALL)
def test_every_field_has_a_description_and_says_whether_it_affects_results(cls: type[Schema]):
    for name, field in leaf_fields(cls):
        assert field.description, name
        assert field.description.rstrip().endswith("."), name
        assert isinstance(field.json_schema_extra["affects_result"], bool), name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("kl_coef", "kl_coeff"),
        ("lora.rnk", "rank"),
        ("lr", None),
        ("lora_rank", "lora.rank"),
        ("batchsize", "batch_size"),
    ],
)
def test_an_unknown_field_names_the_nearest_valid_one(typed, name):
    [problem] = problems_of(PPOConfig, PPO | {typed: 1})
    assert problem.startswith(f"{typed}: unknown field")
    assert (f"did you mean `{name}`?" in problem) == (name is not None)


def test_all_problems_are_reported_at_once():
    problems = problems_of(
        PPOConfig, {"batch_size": 0, "dtype": "fp16", "lora.rank": "x", "gama": 1, "device": "gpu"}
    )
    named = {problem.split(":")[0] for problem in problems}
    assert named == {
        *("base_model", "output_dir", "prompt_dataset"),  # missing
        *("batch_size", "dtype", "lora.rank", "gama", "device"),  # wrong
    }
    assert "dtype: expected auto | float32 | bfloat16, got 'fp16'" in problems


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"train_steps": 5, "num_epochs": 1}, "train_steps, num_epochs"),
        ({"learning_rate": 1e-4, "learning_rate_multiplier": 2}, "learning_rate_multiplier"),
        ({"micro_batch_size": 65}, "micro_batch_size"),
        ({"num_minibatches": 5}, "num_minibatches"),
        ({"train_steps": 5, "warmup_steps": 5}, "warmup_steps"),
        ({"missing_eos_penalty": 1, "missing_eos_score": -1}, "missing_eos_score"),
        ({"min_response_length": 65}, "min_response_length"),
        ({"kl_placement": "loss"}, "kl_placement, kl_estimator"),
        ({"length_penalty_start": 8}, "without length_penalty"),
        ({"length_penalty": 1, "length_penalty_start": 64}, "target_sequence_length 64"),
        ({"advantage": "rloo", "responses_per_prompt": 1}, "rloo compares"),
        ({"advantage": "grpo", "responses_per_prompt": 1}, "responses_per_prompt to 2"),
        ({"advantage": "reinforce_pp_baseline", "responses_per_prompt": 1}, "per_prompt"),
    ],
)
def test_fields_that_do_not_fit_together(fields, named):
    [problem] = problems_of(PPOConfig, PPO | fields)
    assert named in problem


def test_some_estimators_take_a_single_response_per_prompt():
    for name in ("gae", "reinforce_pp"):
        assert ppo(advantage=name, responses_per_prompt=1).responses_per_prompt == 1
    assert ppo(advantage="rloo").effective_responses_per_prompt == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", True, [1], None, ""])
def test_numbers_are_finite_numbers(value):
    [problem] = problems_of(PPOConfig, PPO | {"kl_coeff": value})
    assert problem.startswith("kl_coeff: ")


def test_assignment_is_checked_too():
    config = ppo()
    with pytest.raises(ValidationError):
        config.batch_size = 0


def test_yaml_with_numbers_that_yaml_takes_for_text(yaml_file):
    path = yaml_file("learning_rate: 1e-4\nlora: {rank: 4}\nbatch_size: 8\r\n")
    config = load_config(PPOConfig, path, PPO | {"lora.alpha": "2", "batch_size": "16"})
    assert config.learning_rate == 1e-4
    assert config.lora == LoRAConfig(rank=4, alpha=2)
    assert config.batch_size == 16  # flags win


def test_a_flag_takes_the_place_of_the_field_that_it_excludes(yaml_file):
    path = yaml_file("num_epochs: 2\nlearning_rate: 1e-4\n")
    overrides = {"train_steps": 7, "learning_rate_multiplier": 0.5}
    config = load_config(PPOConfig, path, PPO | overrides)
    assert config.total_steps(100) == 7
    assert config.effective_learning_rate == BASE_LEARNING_RATES["ppo"]["lora"] * 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not valid YAML"),
        ("- base_model", "expected a mapping"),
        ("just text", "expected a mapping"),
        ("3: x", "expected a mapping"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("[" * 5000, "config.yaml"),
    ],
)
def test_bad_yaml_is_one_clear_message(yaml_file, text, said):
    [problem] = problems_of(PPOConfig, PPO, yaml_file(text))
    assert said in problem
    assert "config.yaml" in problem


def test_unreadable_files(yaml_file, tmp_path):
    [problem] = problems_of(PPOConfig, PPO, str(tmp_path / "none.yaml"))
    assert "none.yaml: cannot be read: No such file" in problem
    [problem] = problems_of(PPOConfig, PPO, yaml_file("instruction: é", encoding="latin-1"))
    assert "UTF-8" in problem
    assert load_config(PPOConfig, yaml_file("", encoding="utf-8-sig"), PPO) == ppo()


@pytest.mark.parametrize(
    ("fields", "rows", "steps"),
    [
        ({"train_steps": 3}, 1000, 3),
        ({"num_epochs": 1, "batch_size": 64}, 65, 2),
        ({"num_epochs": 0.5, "batch_size": 10}, 100, 5),
        ({"num_epochs": 1, "batch_size": 64}, 1, 1),
    ],
)
def test_total_steps(fields, rows, steps):
    assert ppo(**fields).total_steps(rows) == steps
    sft = SFTConfig(output_dir="out", dataset="rows.jsonl")
    assert sft.total_steps(640) == 10  # one epoch


def test_learning_rates_follow_stage_and_kind_of_training():
    assert ppo().effective_learning_rate == BASE_LEARNING_RATES["ppo"]["lora"]
    full = ppo(**{"lora.rank": 0, "learning_rate_multiplier": 2})
    assert full.effective_learning_rate == 2 * BASE_LEARNING_RATES["ppo"]["full"]
    assert full.effective_critic_learning_rate == 2 * BASE_LEARNING_RATES["critic"]["full"]
    assert ppo(learning_rate=1e-3).effective_learning_rate == 1e-3


def test_written_configuration_is_resolved_and_reads_back(tmp_path):
    config = ppo(**{"learning_rate_multiplier": 3, "lora.rank": 4, "instruction": "Zähle: “x”\n"})
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    again = load_config(PPOConfig, str(path))
    assert again.lora.alpha == 8
    assert again.learning_rate == config.effective_learning_rate
    assert again.instruction == config.instruction
    assert result_fields(again) == result_fields(config)


def test_only_what_affects_results_decides_whether_a_run_may_continue():
    base = result_fields(ppo())
    elsewhere = {"output_dir": "x", "device": "cpu", "micro_batch_size": 2, "log_every": 9}
    elsewhere |= {"save_every": 4, "rollout_batch_size": 3, "resume": "never", "log_with": "none"}
    assert result_fields(ppo(**elsewhere)) == base
    for name, value in {"seed": 1, "kl_coeff": 0.2, "lora.rank": 4, "train_steps": 9}.items():
        changed = result_fields(ppo(**{name: value}))
        assert changed[name] != base[name]
    assert result_fields(ppo(learning_rate_multiplier=2))["learning_rate"] != base["learning_rate"]


def test_pipeline_fills_each_stage():
    config = load_config(
        PipelineConfig,
        None,
        RUN
        | {
            "sft_dataset": "demos.jsonl",
            "eval_dataset": "eval.jsonl",
            "seed": 3,
            "lora.rank": 4,
            "num_epochs": 2,
            "ppo.train_steps": "50",
            "ppo.lora.alpha": 32,
        },
    )
    assert config.stages() == ["sft", "reward_model", "ppo", "inference"]
    sft, reward, tuned, inference = map(config.stage_config, config.stages())
    assert (sft.base_model, sft.output_dir, sft.dataset) == ("base", "out/sft", "demos.jsonl")
    assert reward.base_model == tuned.base_model == "out/sft/merged"
    assert (reward.preference_dataset, reward.num_epochs) == ("pairs.jsonl", 2)
    assert tuned.lora == LoRAConfig(rank=4, alpha=32)
    assert (tuned.train_steps, tuned.num_epochs) == (50, None)
    assert tuned.reward_model_path == inference.reward_model_path == "out/reward_model"
    assert tuned.prompt_dataset == "pairs.jsonl"  # the preference set's prompts
    assert (inference.policy_path, inference.eval_dataset) == ("out/policy", "eval.jsonl")
    assert {stage.seed for stage in (sft, reward, tuned, inference)} == {3}


def test_dpo_runs_in_a_pipeline_that_has_its_section():
    given = RUN | {"eval_dataset": "eval.jsonl", "sft_dataset": "demos.jsonl"}
    plain = load_config(PipelineConfig, None, given)
    for unasked in (plain, PipelineConfig.model_validate(plain.resolved())):  # has an empty section
        assert unasked.stages() == ["sft", "reward_model", "ppo", "inference"]
    config = load_config(PipelineConfig, None, given | {"dpo.loss": "ipo", "seed": 3})
    assert config.stages() == ["sft", "reward_model", "ppo", "dpo", "inference"]
    dpo = config.stage_config("dpo")
    assert (dpo.base_model, dpo.output_dir) == ("out/sft/merged", "out/dpo")
    assert (dpo.preference_dataset, dpo.eval_dataset) == ("pairs.jsonl", "eval.jsonl")
    assert (dpo.loss, dpo.seed) == ("ipo", 3)
    assert dpo.effective_learning_rate == BASE_LEARNING_RATES["dpo"]["lora"]
    assert config.stage_config("inference").policy_path == "out/policy"
    assert PipelineConfig.model_validate(config.resolved()).stages() == config.stages()


def test_a_reward_model_that_is_given_is_not_trained():
    given = {
        "base_model": "b", "output_dir": "out", "reward_model_path": "team/scorer",
        "prompt_dataset": "prompts.jsonl", "eval_dataset": "eval.jsonl",
    }  # fmt: skip
    config = load_config(PipelineConfig, None, given)
    assert config.stages() == ["ppo", "inference"]
    for stage in config.stages():
        assert config.stage_config(stage).reward_model_path == "team/scorer"
    pairs = load_config(
        PipelineConfig, None, RUN | {"reward_model_path": "team/scorer", "dpo.beta": 0.5}
    )
    assert pairs.stages() == ["ppo", "dpo", "inference"]
    assert pairs.stage_config("ppo").prompt_dataset == "pairs.jsonl"


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        ({}, ["preference_dataset: is required, but not given (or reward_model_path)"]),
        (
            {"reward_model_path": "r"},
            [
                f"{name}: is required, but not given; without preference_dataset there is no other"
                for name in ("prompt_dataset", "eval_dataset")
            ],
        ),
        (
            {"reward_model_path": "out/reward_model", "preference_dataset": "p",
             "reward_model.seed": 1},
            [
                "reward_model: no reward model is trained when reward_model_path is given; leave "
                "one of them out",
                "reward_model_path: is the folder of this pipeline's own reward model; leave it "
                "out",
            ],
        ),
    ],
)  # fmt: skip
def test_a_pipeline_says_what_it_lacks(fields, problems):
    with pytest.raises(InputError) as caught:
        load_config(PipelineConfig, None, {"base_model": "b", "output_dir": "out"} | fields)
    assert caught.value.problems == problems


def test_stages_of_a_pipeline_do_not_share_a_tensorboard_folder():
    fields = {"base_model": "b", "preference_dataset": "p.jsonl", "output_dir": "out"}
    config = PipelineConfig(**fields, tensorboard_dir="gs://b/logs", ppo={"tensorboard_dir": "own"})
    assert config.stage_config("reward_model").tensorboard_dir == "gs://b/logs/reward_model"
    assert config.stage_config("ppo").tensorboard_dir == "own"
    assert config.stage_config("inference").output_dir == "out/inference"
    unset = PipelineConfig(**fields, tensorboard_dir=None)
    assert unset.stage_config("ppo").tensorboard_dir is None


def test_pipeline_without_demonstrations_and_with_another_reward_base():
    config = load_config(PipelineConfig, None, RUN | {"reward_model.base_model": "scorer"})
    assert config.stages() == ["reward_model", "ppo", "inference"]
    assert config.stage_config("reward_model").base_model == "scorer"
    assert config.stage_config("ppo").base_model == "base"
    assert config.stage_config("inference", eval_dataset="held.jsonl").eval_dataset == "held.jsonl"


def test_pipeline_reports_problems_in_sections_by_their_dotted_names():
    problems = problems_of(
        PipelineConfig,
        RUN | {"ppo.kl_coef": 1, "ppo.output_dir": "x", "sft.lora.rnk": 1, "reward_model": 3},
    )
    assert "ppo.kl_coef: unknown field; did you mean `kl_coeff`?" in problems
    assert "ppo.output_dir: is set by the pipeline and cannot be given here" in problems
    assert "sft.lora.rnk: unknown field; did you mean `rank`?" in problems
    assert any(problem.startswith("reward_model: expected") for problem in problems)
    [problem] = problems_of(PipelineConfig, RUN | {"ppo.num_minibatches": 3})
    assert problem == "ppo.num_minibatches: 3 does not divide batch_size 64"


def test_import_is_cheap_and_every_name_is_there():
    code = (
        "import sys, rlhf; rlhf.PPOConfig; "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in rlhf.__all__:
        assert getattr(rlhf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = rlhf.train
    assert set(rlhf.__all__) <= set(dir(rlhf))
