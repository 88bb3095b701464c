"""The command line from the outside: flags, help, exit codes, what goes to stderr."""

import subprocess
import sys

import pytest

import rlhf
from rlhf.cli import main
from rlhf.config import (
    DPOConfig,
    InferenceConfig,
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from rlhf.config.describe import leaf_fields
from rlhf.errors import InputError, StoppedBySignal

COMMANDS = {
    "sft": (SFTConfig, "train_sft"),
    "reward-model": (RewardModelConfig, "train_reward_model"),
    "ppo": (PPOConfig, "train_ppo"),
    "dpo": (DPOConfig, "train_dpo"),
    "infer": (InferenceConfig, "run_inference"),
    "run": (PipelineConfig, "run_pipeline"),
    "score": (ScoreConfig, "run_score"),
}
PPO = ["ppo", "--base_model", "base", "--output_dir", "out", "--prompt_dataset", "rows.jsonl"]
SCORED = [*PPO, "--reward_model_path", "scorer"]


@pytest.fixture
def called(monkeypatch):
    """Replace the stages by recorders; returns the list of (function, config, options)."""
    calls = []
    for _, function in COMMANDS.values():

        def record(config, _function=function, **options):
            calls.append((_function, config, options))

        monkeypatch.setitem(vars(rlhf), function, record)  # no import of the real one
    return calls


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_field_with_type_default_and_meaning(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    sections = ("sft", "reward_model", "ppo", "dpo", "inference") if command == "run" else ()
    for name, field in leaf_fields(COMMANDS[command][0]):
        if name in sections:
            assert f"--{name}.FIELD" in text
            continue
        assert f"--{name} " in text
        assert " ".join(field.description.split())[:40] in text, name
    if command == "ppo":
        assert "--kl_coeff NUMBER Weight of the KL penalty" in text
        assert "[default: 0.1]" in text
        assert "--critic [adapter|head]" in text
        assert "[required]" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_fields_are_named_on_stderr_with_exit_code_2(command, capsys, called):
    assert main([command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is required, but not given" in captured.err
    assert not called


def test_flags_reach_the_stage(called):
    flags = "--kl-coeff=0.05 --lora.rank 4 --dry-run --gradient_checkpointing=false --seed 7"
    assert main([*SCORED, *flags.split(), "--target_kl", "null"]) == 0
    [(function, config, options)] = called
    assert function == "train_ppo"
    assert (config.kl_coeff, config.lora.rank, config.seed) == (0.05, 4, 7)
    assert (config.dry_run, config.gradient_checkpointing) == (True, False)
    assert config.prompt_dataset == "rows.jsonl"
    assert options == {}


def test_a_flag_given_twice_makes_a_list_where_one_is_meant(called):
    assert main([*SCORED, "--prompt_dataset", "more.jsonl", "--log_with", "none"]) == 0
    assert main([*SCORED, "--lora.target_modules", "q_proj"]) == 0
    [(_, first, _), (_, second, _)] = called
    assert first.prompt_dataset == ["rows.jsonl", "more.jsonl"]
    assert first.log_with == []
    assert second.lora.target_modules == ["q_proj"]


def test_flags_win_over_the_file(called, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("kl_coeff: 1e-1\nnum_epochs: 3\nlora: {rank: 2}\ncritic: head\n")
    assert main([*SCORED, "--config", str(path), "--train_steps", "9", "--lora.alpha", "1"]) == 0
    [(_, config, _)] = called
    assert (config.kl_coeff, config.critic, config.train_steps) == (0.1, "head", 9)
    assert (config.lora.rank, config.lora.alpha) == (2, 1.0)


def test_sections_of_the_pipeline_are_flags_too(called):
    flags = "--base_model b --output_dir o --preference_dataset p --ppo.lora.rank 2 --ppo.gamma .9"
    assert main(["run", *flags.split()]) == 0
    [(_, config, _)] = called
    assert (config.stage_config("ppo").lora.rank, config.stage_config("ppo").gamma) == (2, 0.9)
    assert config.stage_config("reward_model").lora.rank == 8


def test_every_problem_is_one_unwrapped_line(called, capsys):
    long = "x" * 300
    flags = ["--kl-coef=3", "stray", "--lora.rnk", "3", "--batch-size", "0", "--resume", long]
    assert main([*PPO, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "rlhf: --kl-coef: unknown flag; did you mean `--kl_coeff`?" in lines
    assert "rlhf: --lora.rnk: unknown flag; did you mean `--lora.rank`?" in lines
    assert "rlhf: 'stray': unexpected argument; values belong to a --flag" in lines
    assert any(line.startswith("rlhf: resume: ") and "x" * 150 in line for line in lines)
    assert any(line.startswith("rlhf: batch_size: ") for line in lines)
    assert any(line.startswith("rlhf: reward_model_path: ") for line in lines)
    assert len(lines) == 6
    assert not called


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pppo"], "ppo"),
        ([*SCORED, "--seed"], "--seed"),
        ([*SCORED, "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["run", "--ppo.kl_coef", "1"], "did you mean `--ppo.kl_coeff`?"),
        (["--colour"], "--colour"),
    ],
)
def test_mistakes_are_exit_code_2(arguments, said, capsys, called):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not called


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError(["rows.jsonl:3: choice: wrong", "second"]), 2, "rlhf: rows.jsonl:3: choice"),
        (StoppedBySignal(12), 75, "after step 12"),
    ],
)
def test_what_stages_raise_becomes_an_exit_code(error, code, said, monkeypatch, capsys):
    def stage(config, **_):
        raise error

    monkeypatch.setitem(vars(rlhf), "train_ppo", stage)
    assert main(SCORED) == code
    captured = capsys.readouterr().err
    assert said in captured
    assert "Traceback" not in captured


def test_anything_else_keeps_its_traceback(monkeypatch):
    def stage(config, **_):
        raise ZeroDivisionError

    monkeypatch.setitem(vars(rlhf), "train_ppo", stage)
    with pytest.raises(ZeroDivisionError):
        main(SCORED)


def test_reward_fn_is_imported_from_the_current_folder(called, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text("def short(prompts, responses): return [1.0]\nN = 3\n")
    (tmp_path / "needs_more.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert main([*PPO, "--reward_fn", "my_rewards:short"]) == 0
    [(_, config, options)] = called
    assert list(options["reward_fn"]) == ["my_rewards:short"]
    assert options["reward_fn"]["my_rewards:short"](["a"], ["b"]) == [1.0]
    assert config.reward_model_path is None

    for address, said in {
        "my_rewards": "expected MODULE:FUNCTION",
        "my_reward:short": "there is no module 'my_reward'",
        "my_rewards:long": "has no function 'long'",
        "my_rewards:N": "has no function 'N'",
        "needs_more:f": "'needs_more' needs 'no_such_module_anywhere'",
    }.items():
        assert main([*PPO, "--reward_fn", address]) == 2
        assert said in capsys.readouterr().err
    both = ["--reward_fn", "my_rewards:short", "--reward_fn", "math:fsum"]
    assert main([*SCORED, *both, "--rewards", "out/other"]) == 0
    assert list(called[-1][2]["reward_fn"]) == ["my_rewards:short", "math:fsum"]
    assert [entry.path for entry in called[-1][1].rewards] == ["out/other"]
    assert main(["sft", "--reward_fn", "my_rewards:short"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), ([], 0), (["--version"], 0), (["reward_model"], 2)]
)
def test_as_a_module(arguments, code):
    process = subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments], capture_output=True, text=True
    )
    assert process.returncode == code
    assert "Traceback" not in process.stderr
    assert bool(process.stdout) == (code == 0)


def test_data_commands(tmp_path, capsys):
    source = tmp_path / "hh.jsonl"
    source.write_text(
        '{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", '
        '"rejected": "\\n\\nHuman: Hi\\n\\nAssistant: No"}\n'
    )
    rows = tmp_path / "rows.jsonl"
    assert main(["data", "convert", str(source), str(rows)]) == 0
    assert "1 rows" in capsys.readouterr().out
    assert main(["data", "check", str(rows), "--kind=preference"]) == 0
    said = capsys.readouterr().out
    assert "preferences" in said
    held_out = ["--eval_dataset", str(rows), "--columns", '{"context": "c"}']
    assert main(["data", "check", "--preference_dataset", str(rows), *held_out]) == 0
    assert "eval_dataset, also in preference_dataset  1  of 1" in capsys.readouterr().out
    for wrong, named in (
        ([], "FILE: give one"),
        ([str(rows), "--columns", "x"], "columns: expected JSON"),
        ([str(rows), "--columns", "[1]"], "columns: expected JSON"),
        ([str(rows), "--columns", '{"promt": "x"}'], "columns.promt: unknown field"),
        ([str(rows), "--chat_template_options", "no"], "chat_template_options: expected JSON"),
    ):
        assert main(["data", "check", *wrong]) == 2
        assert named in capsys.readouterr().err

    rows.write_text('{"input_text": "x", "candidate_0": "a", "candidate_1": "b", "choice": 2}\n')
    assert main(["data", "check", str(rows)]) == 2
    assert "rows.jsonl:1: choice: " in capsys.readouterr().err
    assert main(["data", "check", str(rows), "--kimd=prompt"]) == 2
    assert "--kind" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert capsys.readouterr().err.startswith("Usage: rlhf data")


def test_quickstart_takes_architecture_folder_and_seed(monkeypatch):
    from rlhf.quickstart import run as quickstart

    calls = []
    monkeypatch.setattr(quickstart, "run_quickstart", lambda **options: calls.append(options))
    assert main(["quickstart"]) == 0
    assert main(["quickstart", "--arch", "llama", "--output-dir", "x", "--seed=2"]) == 0
    assert main(["quickstart", "--arch", "bert"]) == 2
    assert calls == [
        {"arch": "t5", "output_dir": None, "seed": 0},
        {"arch": "llama", "output_dir": "x", "seed": 2},
    ]
