"""Machines by memory, from config.json alone, and what is said of machines that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import PipelineConfig
from rlhf.errors import InputError
from rlhf.vertex.machines import CPU, TABLE, Machine, choose_machine, fit

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13b": LLAMA
    | {
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "t5-xl": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "vocab_size": 32_128,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    },
}
L4, A100, A100_80 = TABLE


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    for name, shape in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape))
    return tmp_path


def run_config(base: Path, **fields: Any) -> PipelineConfig:
    least = {
        "base_model": str(base),
        "preference_dataset": "gs://b/pairs.jsonl",
        "output_dir": "gs://b/runs/first",
    }
    return PipelineConfig.model_validate(least | fields)


def told(**vertex: Any) -> PipelineConfig:
    return run_config(Path("never/read"), vertex=vertex)


@pytest.mark.parametrize(
    ("shape", "machine", "billions"),
    [
        ("tiny", L4, "0.00 B"),
        ("1b", L4, "1.10 B"),  # TinyLlama
        ("t5-xl", A100, "2.78 B"),
        ("7b", A100_80, "6.74 B"),  # Llama 2
    ],
)
def test_the_first_machine_that_a_model_fits_on(bases, shape, machine, billions):
    chosen, why = choose_machine(run_config(bases / shape))
    assert chosen == machine, why
    assert f"{shape} has {billions} parameters" in why
    assert f"{machine.accelerator_type} has {machine.memory}" in why


def test_the_table_is_in_order_of_memory_and_has_one_accelerator_each():
    assert [machine.memory for machine in TABLE] == sorted(machine.memory for machine in TABLE)
    assert {machine.accelerator_count for machine in TABLE} == {1}


def test_memory_decides_not_the_name(bases):
    roomy = run_config(bases / "7b", lora={"rank": 0}, ppo={"lora": {"rank": 8}})
    with pytest.raises(InputError, match="reward_model of"):  # all weights of 7 B, with AdamW
        choose_machine(roomy)
    assert choose_machine(run_config(bases / "t5-xl", dtype="float32"))[0] == A100_80
    with pytest.raises(InputError, match="about 70 GiB, and 30% to spare"):  # of 80
        choose_machine(run_config(bases / "13b"))
    thrifty = run_config(bases / "13b", gradient_checkpointing=True)
    assert choose_machine(thrifty)[0] == A100_80
    tight = {
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "ppo": {"rollout_batch_size": 4},
    }
    assert choose_machine(run_config(bases / "7b", **tight))[0] == L4
    # A rollout was made small, inference was not: its cache decides then.
    eval_too = tight | {"eval_dataset": "gs://b/e.jsonl", "inference": {"batch_size": 128}}
    chosen, why = choose_machine(run_config(bases / "7b", **eval_too))
    assert chosen == A100_80
    assert "inference needs" in why


def test_another_base_of_the_reward_model_counts_too(bases):
    alone, why = choose_machine(run_config(bases / "1b"))
    both, why = choose_machine(
        run_config(bases / "1b", reward_model={"base_model": str(bases / "7b")})
    )
    assert (alone, both) == (L4, A100_80), why


@pytest.mark.parametrize("fields", [{}, {"lora": {"rank": 0}}])
def test_too_large_names_the_fixes_and_the_figures(bases, fields):
    with pytest.raises(InputError) as caught:
        choose_machine(run_config(bases / "70b", **fields))
    [problem] = caught.value.problems
    assert problem.startswith("machine_type: ")
    assert "69.0 B parameters" in problem
    assert "NVIDIA_A100_80GB has 80" in problem
    for fix in ("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "LoRA"):
        assert fix in problem


@pytest.mark.parametrize(
    ("vertex", "expected"),
    [
        ({"accelerator_type": "CPU"}, CPU),
        ({"accelerator_type": "CPU", "machine_type": "e2-standard-8"}, Machine("e2-standard-8")),
        ({"accelerator_type": "NVIDIA_L4"}, L4),
        ({"accelerator_type": "NVIDIA_A100_80GB", "accelerator_count": 1}, A100_80),
        (
            {"accelerator_type": "NVIDIA_H100_80GB"},
            Machine("a3-highgpu-1g", "NVIDIA_H100_80GB", 1, 80),
        ),
        ({"machine_type": "g2-standard-4"}, Machine("g2-standard-4", "NVIDIA_L4", 1)),
        ({"machine_type": "g2-standard-24"}, Machine("g2-standard-24", "NVIDIA_L4", 2)),
        ({"machine_type": "g2-standard-96"}, Machine("g2-standard-96", "NVIDIA_L4", 8)),
        ({"machine_type": "a2-highgpu-4g"}, Machine("a2-highgpu-4g", "NVIDIA_TESLA_A100", 4)),
        ({"machine_type": "a2-megagpu-16g"}, Machine("a2-megagpu-16g", "NVIDIA_TESLA_A100", 16)),
        (
            {"machine_type": "a2-ultragpu-2g", "accelerator_type": "NVIDIA_A100_80GB"},
            Machine("a2-ultragpu-2g", "NVIDIA_A100_80GB", 2),
        ),
        ({"machine_type": "a3-highgpu-8g"}, Machine("a3-highgpu-8g", "NVIDIA_H100_80GB", 8)),
        (
            {"machine_type": "n1-highmem-16", "accelerator_type": "NVIDIA_TESLA_V100"},
            Machine("n1-highmem-16", "NVIDIA_TESLA_V100", 1),
        ),
        (
            {
                "machine_type": "n1-highmem-16",
                "accelerator_type": "NVIDIA_TESLA_T4",
                "accelerator_count": 4,
            },
            Machine("n1-highmem-16", "NVIDIA_TESLA_T4", 4),
        ),
    ],
)
def test_as_told(vertex, expected):
    machine, why = choose_machine(told(**vertex))
    assert machine == expected
    assert why == f"{expected.machine_type}: as told"


@pytest.mark.parametrize(
    ("vertex", "said"),
    [
        ({"machine_type": "n1-standard-8"}, "accelerator_type: n1-standard-8 is not known to come"),
        (
            {"machine_type": "g2-standard-8", "accelerator_type": "NVIDIA_TESLA_T4"},
            "accelerator_type: g2-standard-8 comes with NVIDIA_L4, not with NVIDIA_TESLA_T4",
        ),
        (
            {"machine_type": "a2-highgpu-1g", "accelerator_count": 4},
            "accelerator_count: a2-highgpu-1g comes with 1, not with 4",
        ),
        (
            {
                "machine_type": "g2-standard-24",
                "accelerator_type": "NVIDIA_L4",
                "accelerator_count": 1,
            },
            "accelerator_count: g2-standard-24 comes with 2, not with 1",
        ),
        (
            {"machine_type": "g2-standard-8", "accelerator_type": "CPU"},
            "accelerator_type: g2-standard-8 comes with NVIDIA_L4, not without",
        ),
        ({"accelerator_type": "NVIDIA_B200"}, "no usual machine for 1 NVIDIA_B200; give a machine"),
        (
            {"accelerator_type": "NVIDIA_L4", "accelerator_count": 2},
            "no usual machine for 2 NVIDIA_L4",
        ),
        ({"accelerator_count": 2}, "accelerator_count: a stage uses one accelerator"),
    ],
)
def test_contradictions(vertex, said):
    with pytest.raises(InputError) as caught:
        choose_machine(told(**vertex))
    [problem] = caught.value.problems
    assert said in problem


def test_what_an_accelerator_of_a_cpu_job_would_be():
    with pytest.raises(ValueError, match="accelerator_count: a CPU job has none"):
        told(accelerator_type="CPU", accelerator_count=1)


def test_a_run_that_fits_only_with_checkpointing_gets_it(bases):
    config, machine, why = fit(run_config(bases / "13b"))
    assert machine == A100_80
    assert config.stage_config("ppo").gradient_checkpointing is True
    assert "gradient_checkpointing, which is turned on" in why
    config, _, why = fit(run_config(bases / "7b"))
    assert config.stage_config("ppo").gradient_checkpointing is False
    assert "turned on" not in why
    with pytest.raises(InputError, match="lower"):  # whoever said no gets no
        fit(run_config(bases / "13b", gradient_checkpointing=False))
    with pytest.raises(InputError, match="lower"):
        fit(run_config(bases / "70b"))
