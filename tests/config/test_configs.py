"""Every shipped configuration loads and runs dry."""

import json
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.config import PipelineConfig, load_config
from rlhf.vertex.conversion import to_config, to_parameters

ROOT = Path(__file__).parents[2]
# Recipes name data on the Hub, and have their own test.
RECIPES = {
    "ultrafeedback_qwen2.5_0.5b",
    "hh_llama3.2_1b",
    "tldr_pythia_1b",
    "tldr_flan_t5_base",
}
FILES = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if path.stem not in RECIPES]


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    """Three files that serve every dataset field."""
    prompts = [{"input_text": f"the cat sat {i} [summary]: "} for i in range(5)]
    rows = {
        "preference_dataset": [
            row | {"candidate_0": " a cat", "candidate_1": " the", "choice": i % 2}
            for i, row in enumerate(prompts)
        ],
        "prompt_dataset": prompts,
        "sft_dataset": [row | {"output_text": " the cat"} for row in prompts],
    }
    files = {}
    for name, lines in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        files[name] = str(path)
    return files | {"eval_dataset": files["preference_dataset"]}


def test_the_promised_configurations_are_there():
    assert {path.stem for path in FILES} >= RECIPES | {
        "quickstart_t5",
        "quickstart_llama",
        "tldr_flan_t5_small",
        "tldr_llama_1b_lora",
        "tldr_llama_1b_ppo_and_dpo",
        "tldr_llama_7b_lora_single_gpu",
        "local_tldr",
        "local_tldr_t5",
        "vertex_tldr",
        "vertex_tldr_t5",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_every_stage_can_be_built(path):
    config = load_config(PipelineConfig, str(path))
    for stage in config.stages():
        config.stage_config(stage)
    if "tldr" in path.stem:
        assert config.instruction
        assert config.stage_config("ppo").temperature == 0.7
        assert config.stage_config("inference").temperature == 0.7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_dry(path, data, checkpoints, tmp_path, capsys):
    config = load_config(PipelineConfig, str(path))
    arch = "t5" if "t5" in path.stem else "llama"
    output = tmp_path / "out"
    overrides = data | {
        "base_model": str(checkpoints[arch]),
        "output_dir": str(output),
        "prompt_sequence_length": "96",  # the tiny LLaMA reads 128 tokens at most
        "target_sequence_length": "32",
        "dry_run": "true",
        "device": "cpu",
    }
    if config.sft_dataset is None:
        del overrides["sft_dataset"]
    flags = [f"--{name}={value}" for name, value in overrides.items()]
    assert main(["run", "--config", str(path), *flags]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    steps = config.stage_config("ppo").total_steps(5)
    assert f"steps: {steps} of {config.batch_size}" in text
    for stage in config.stages():
        assert stage in text
    assert "frozen base" in text
    assert not output.exists()


def stages_of(config: PipelineConfig) -> dict[str, dict]:
    """What each stage would be told, but for the folders that differ with output_dir."""
    folders = {"output_dir", "policy_path", "reward_model_path"}
    return {
        stage: config.stage_config(stage).model_dump(exclude=folders) for stage in config.stages()
    }


def test_the_parameters_of_google_s_notebook_are_those_of_the_yaml():
    given = json.loads((ROOT / "configs" / "vertex_tldr.json").read_text())
    path = str(ROOT / "configs" / "vertex_tldr.yaml")
    yaml = load_config(PipelineConfig, path, {"output_dir": "gs://my-bucket/rlhf/tldr"})
    folder, _, name = yaml.output_dir.rpartition("/")
    config = to_config(given | {"output_directory": folder, "run_name": name})
    assert config.output_dir == yaml.output_dir
    expected, got = stages_of(yaml), stages_of(config)
    # The two things that the notebook's dict does not say.
    for stage, field in (
        ("ppo", "temperature"),
        ("inference", "temperature"),
        ("inference", "sampling_strategy"),
    ):
        assert got[stage].pop(field) != expected[stage].pop(field)
    assert got == expected


def test_the_run_is_the_one_of_google_s_notebook():
    config = load_config(PipelineConfig, str(ROOT / "configs" / "vertex_tldr.yaml"))
    reward, ppo = config.stage_config("reward_model"), config.stage_config("ppo")
    assert (config.base_model, reward.train_steps, ppo.train_steps, ppo.kl_coeff) == (
        "meta-llama/Llama-2-7b-hf", 1410, 320, 0.1,
    )  # fmt: skip
    assert config.instruction == "Summarize in less than 50 words"
    assert to_parameters(config)["eval_dataset"].endswith("/reddit_tfds/val/*.jsonl")


@pytest.mark.parametrize("name", ["tldr", "tldr_t5"])
def test_the_run_on_one_machine_is_the_run_on_vertex(name):
    cloud, local = (
        load_config(PipelineConfig, str(ROOT / "configs" / f"{place}_{name}.yaml"))
        for place in ("vertex", "local")
    )
    expected, got = stages_of(cloud), stages_of(local)
    for stages in (expected, got):  # changes no result
        for stage in ("reward_model", "ppo"):
            stages[stage].pop("gradient_checkpointing")
    assert got == expected
    assert "vertex" not in local.model_fields_set
    # The T5 run is the LLaMA run but for the model.
    other = load_config(PipelineConfig, str(ROOT / "configs" / "vertex_tldr.yaml"))
    same = {"base_model", "output_dir", "vertex"}
    assert cloud.model_dump(exclude=same) == other.model_dump(exclude=same)
