"""Machines by memory, from config.json alone, and what is said of machines that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.vertex_models import SHAPES

from rlhf.config import PipelineConfig
from rlhf.config.vertex import ACCELERATOR_NAMES
from rlhf.errors import InputError
from rlhf.vertex.image import DEFAULT_CUDA, cuda_of
from rlhf.vertex.machine_types import ACCELERATORS, MACHINE_TYPES
from rlhf.vertex.machines import (
    TABLE,
    Machine,
    choose_machine,
    fit,
    named_machine,
    problems_of_run,
)

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
        "preference_dataset": "gs://bkt/pairs.jsonl",
        "output_dir": "gs://bkt/runs/first",
    }
    return PipelineConfig.model_validate(least | fields)


def told(**vertex: Any) -> PipelineConfig:
    return run_config(Path("never/read"), vertex=vertex)


@pytest.mark.parametrize(
    ("shape", "machine", "billions"),
    [
        ("tiny", L4, "0.00 B"),
        ("1b", L4, "1.10 B"),  # TinyLlama
        ("t5-xl", L4, "2.85 B"),  # Flan, whose LM head is no embedding
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
    with pytest.raises(
        InputError, match="reward_model needs about"
    ):  # all weights of 7 B, with AdamW
        choose_machine(roomy)
    assert choose_machine(run_config(bases / "t5-xl", dtype="float32"))[0] == A100_80
    large = {"max_tokens_per_micro_batch": 8192}
    with pytest.raises(InputError, match="about 78 GiB, and 30% to spare"):  # of 80
        choose_machine(run_config(bases / "13b", **large))
    thrifty = run_config(bases / "13b", **large, gradient_checkpointing=True)
    assert choose_machine(thrifty)[0] == A100_80
    tight = {
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "ppo": {"rollout_batch_size": 4},
    }
    assert choose_machine(run_config(bases / "7b", **tight))[0] == L4
    # A rollout was made small, inference was not: its cache decides then.
    eval_too = tight | {"eval_dataset": "gs://bkt/e.jsonl", "inference": {"batch_size": 128}}
    chosen, why = choose_machine(run_config(bases / "7b", **eval_too))
    assert chosen == A100_80
    assert "inference needs" in why


def test_another_base_of_the_reward_model_counts_too(bases):
    alone, why = choose_machine(run_config(bases / "1b"))
    both, why = choose_machine(
        run_config(bases / "1b", reward_model={"base_model": str(bases / "7b")})
    )
    assert (alone, both) == (L4, A100), why


@pytest.mark.parametrize("fields", [{}, {"lora": {"rank": 0}}])
def test_too_large_names_the_fixes_and_the_figures(bases, fields):
    with pytest.raises(InputError) as caught:
        choose_machine(run_config(bases / "70b", **fields))
    [problem] = caught.value.problems
    assert problem.startswith("machine_type: ")
    assert "68.98 B parameters" in problem
    assert "NVIDIA_A100_80GB has 80" in problem
    for fix in ("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "LoRA"):
        assert fix in problem


@pytest.mark.parametrize(
    ("vertex", "expected"),
    [
        ({"accelerator_type": "CPU"}, ("n1-highmem-8", "", 0)),
        (
            {"accelerator_type": "CPU", "machine_type": "e2-standard-8"},
            ("e2-standard-8", "", 0),
        ),
        ({"accelerator_type": "NVIDIA_L4"}, ("g2-standard-12", "NVIDIA_L4", 1)),
        (
            {"accelerator_type": "NVIDIA_A100_80GB", "accelerator_count": 1},
            ("a2-ultragpu-1g", "NVIDIA_A100_80GB", 1),
        ),
        ({"accelerator_type": "NVIDIA_H100_80GB"}, ("a3-highgpu-1g", "NVIDIA_H100_80GB", 1)),
        ({"accelerator_type": "NVIDIA_TESLA_T4"}, ("n1-standard-8", "NVIDIA_TESLA_T4", 1)),
        ({"accelerator_type": "NVIDIA_TESLA_V100"}, ("n1-standard-8", "NVIDIA_TESLA_V100", 1)),
        ({"machine_type": "g2-standard-4"}, ("g2-standard-4", "NVIDIA_L4", 1)),
        ({"machine_type": "g2-standard-32"}, ("g2-standard-32", "NVIDIA_L4", 1)),
        (
            {"machine_type": "a2-ultragpu-1g", "accelerator_type": "NVIDIA_A100_80GB"},
            ("a2-ultragpu-1g", "NVIDIA_A100_80GB", 1),
        ),
        (
            {"machine_type": "n1-highmem-16", "accelerator_type": "NVIDIA_TESLA_T4"},
            ("n1-highmem-16", "NVIDIA_TESLA_T4", 1),
        ),
        (
            {
                "accelerator_type": "NVIDIA_RTX_PRO_6000",
                "image": "europe-west4-docker.pkg.dev/my-project/rlhf/rlhf:0.1.0-cu130",
                "boot_disk_type": "hyperdisk-balanced",
            },
            ("g4-standard-48", "NVIDIA_RTX_PRO_6000", 1),
        ),
    ],
)
def test_as_told(bases, vertex, expected):
    machine, why = choose_machine(run_config(bases / "tiny", vertex=vertex))
    assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count) == expected
    assert why.startswith(f"{expected[0]}: as told; ")


T4 = {"accelerator_type": "NVIDIA_TESLA_T4"}
CU130 = "europe-west4-docker.pkg.dev/my-project/rlhf/rlhf:0.1.0-cu130"


@pytest.mark.parametrize(
    ("vertex", "said"),
    [
        ({"machine_type": "n1-standard-8"}, "accelerator_type: n1-standard-8 is not known to come"),
        (
            {"machine_type": "g2-standard-8", **T4},
            "accelerator_type: g2-standard-8 comes with NVIDIA_L4, not with NVIDIA_TESLA_T4",
        ),
        (
            {"machine_type": "a2-highgpu-1g", "accelerator_count": 4},
            "accelerator_count: a2-highgpu-1g comes with 1, not with 4",
        ),
        (
            {"machine_type": "g2-standard-24", "accelerator_count": 1},
            "accelerator_count: g2-standard-24 comes with 2, not with 1",
        ),
        (
            {"machine_type": "g2-standard-8", "accelerator_type": "CPU"},
            "accelerator_type: g2-standard-8 comes with NVIDIA_L4, not without",
        ),
        ({"accelerator_count": 2}, "accelerator_count: a stage uses one accelerator, got 2"),
        (
            {"accelerator_type": "NVIDIA_L4", "accelerator_count": 2},
            "accelerator_count: a stage uses one accelerator, got 2",
        ),
        # Several accelerators where a stage uses one.
        (
            {"machine_type": "a2-highgpu-8g"},
            "machine_type: a2-highgpu-8g has 8 x NVIDIA_TESLA_A100, of which a stage uses one and "
            "all are paid; give machine_type a2-highgpu-1g",
        ),
        ({"machine_type": "g2-standard-24"}, "give machine_type g2-standard-12"),
        ({"machine_type": "a3-megagpu-8g"}, "none has one; give one such as NVIDIA_L4"),
        (
            {"machine_type": "n1-standard-8", "accelerator_count": 2, **T4},
            "accelerator_count: a stage uses one accelerator, got 2",
        ),
        # What Vertex does not have together.
        (
            {"machine_type": "n1-standard-8", "accelerator_type": "NVIDIA_L4"},
            "machine_type: n1-standard-8 cannot have NVIDIA_L4; give machine_type g2-standard-12",
        ),
        (
            {"machine_type": "e2-standard-8", **T4},
            "machine_type: e2-standard-8 cannot have NVIDIA_TESLA_T4; give machine_type "
            "n1-standard-8",
        ),
        (
            {"machine_type": "n1-standard-8", "accelerator_count": 3, **T4},
            "accelerator_count: n1-standard-8 takes 1, 2 or 4 x NVIDIA_TESLA_T4, not 3",
        ),
        (
            {"machine_type": "n1-standard-32", "accelerator_count": 1, **T4},
            "accelerator_count: n1-standard-32 takes 2 or 4 x NVIDIA_TESLA_T4, not 1",
        ),
        (
            {"machine_type": "n1-standard-32", **T4},
            "machine_type: n1-standard-32 has 2 or 4 x NVIDIA_TESLA_T4, of which a stage uses one",
        ),
        (
            {
                "machine_type": "n1-standard-16",
                "accelerator_type": "NVIDIA_TESLA_V100",
                "accelerator_count": 1,
            },
            "accelerator_count: n1-standard-16 takes 2, 4 or 8 x NVIDIA_TESLA_V100, not 1",
        ),
        # What there is not.
        (
            {"machine_type": "n1-standart-8"},
            "machine_type: 'n1-standart-8' is none that custom jobs take; did you mean "
            "`n1-standard-8`?",
        ),
        ({"machine_type": "n1-standard-1", **T4}, "machine_type: 'n1-standard-1' is none"),
        ({"accelerator_type": "NVIDIA_GB200"}, "accelerator_type: NVIDIA_GB200 cannot be used"),
        ({"accelerator_type": "NVIDIA_TESLA_P100"}, "have code for Volta and newer GPUs only"),
        ({"accelerator_type": "NVIDIA_TESLA_K80"}, "have code for Volta and newer GPUs only"),
        # FLEX_START gives some kinds only.
        ({"strategy": "FLEX_START", **T4}, "strategy: FLEX_START does not give NVIDIA_TESLA_T4"),
        ({"strategy": "FLEX_START", "accelerator_type": "CPU"}, "FLEX_START is for GPUs"),
        # Disks.
        (
            {"accelerator_type": "NVIDIA_L4", "boot_disk_type": "hyperdisk-balanced"},
            "boot_disk_type: g2-standard-12 does not take hyperdisk-balanced; expected pd-ssd or "
            "pd-standard",
        ),
        ({"boot_disk_type": "hyperdisk-balanced"}, "boot_disk_type: g2-standard-12 does not"),
        (
            {"accelerator_type": "NVIDIA_RTX_PRO_6000", "image": CU130},
            "boot_disk_type: g4-standard-48 does not take pd-ssd; expected hyperdisk-balanced",
        ),
        # Images whose tag says what torch is in them.
        (
            {"accelerator_type": "NVIDIA_RTX_PRO_6000", "boot_disk_type": "hyperdisk-balanced"},
            "image: torch for CUDA 12.6 has no code for NVIDIA_RTX_PRO_6000, which needs 12.8",
        ),
        (
            {"accelerator_type": "NVIDIA_TESLA_V100", "image": CU130},
            "image: torch for CUDA 13.0 has no code for NVIDIA_TESLA_V100 any more, 12.6 has",
        ),
        ({"image": CU130.replace("cu130", "cpu")}, "image: has torch's CPU build"),
    ],
)
def test_what_vertex_has_not_or_a_stage_cannot_use(vertex, said):
    """Compared with the table of Google's page on compute resources; no base is read for it."""
    [problem] = problems_of_run(told(**vertex))
    assert said in problem


def test_all_problems_of_a_machine_are_said_at_once():
    config = told(
        machine_type="a4-highgpu-8g", strategy="FLEX_START"
    )  # the default image is for CUDA 12.6
    said = problems_of_run(config)
    assert [problem.split(":")[0] for problem in said] == [
        "machine_type",
        "boot_disk_type",
        "image",
    ]
    assert "NVIDIA_B200, which needs 12.8" in said[-1]
    with pytest.raises(InputError) as caught:
        choose_machine(config)
    assert caught.value.problems == said
    [kind, count] = problems_of_run(told(machine_type="e2-standard-8", accelerator_count=3, **T4))
    assert kind.startswith("machine_type: e2-standard-8 cannot have NVIDIA_TESLA_T4")
    assert count.startswith("accelerator_count: a stage uses one")


# From Google's compatibility table: how many of each kind a machine may have.
COUNTS = {
    ("n1-standard-4", "NVIDIA_TESLA_T4"): (1, 2, 4),
    ("n1-highmem-2", "NVIDIA_TESLA_V100"): (1, 2, 4, 8),
    ("n1-highcpu-16", "NVIDIA_TESLA_V100"): (2, 4, 8),
    ("n1-highmem-32", "NVIDIA_TESLA_T4"): (2, 4),
    ("n1-standard-32", "NVIDIA_TESLA_V100"): (4, 8),
    ("n1-standard-64", "NVIDIA_TESLA_T4"): (4,),
    ("n1-standard-96", "NVIDIA_TESLA_V100"): (8,),
    ("g2-standard-16", "NVIDIA_L4"): (1,),
    ("g2-standard-48", "NVIDIA_L4"): (4,),
    ("g2-standard-96", "NVIDIA_L4"): (8,),
    ("g4-standard-384", "NVIDIA_RTX_PRO_6000"): (8,),
    ("a2-highgpu-4g", "NVIDIA_TESLA_A100"): (4,),
    ("a2-megagpu-16g", "NVIDIA_TESLA_A100"): (16,),
    ("a2-ultragpu-8g", "NVIDIA_A100_80GB"): (8,),
    ("a3-highgpu-2g", "NVIDIA_H100_80GB"): (2,),
    ("a3-ultragpu-8g", "NVIDIA_H200_141GB"): (8,),
    ("a4-highgpu-8g", "NVIDIA_B200"): (8,),
    ("a4x-highgpu-4g", "NVIDIA_GB200"): (4,),
}


def test_counts_are_those_of_googles_table():
    for (machine, accelerator), counts in COUNTS.items():
        assert MACHINE_TYPES[machine].accelerators[accelerator] == counts, machine
    for family in ("e2", "n2", "n4", "c2", "m1"):
        members = [m for name, m in MACHINE_TYPES.items() if name.startswith(f"{family}-")]
        assert members
        assert not any(machine.accelerators for machine in members)
    kinds = {kind for machine in MACHINE_TYPES.values() for kind in machine.accelerators}
    assert kinds == set(ACCELERATORS) - {"NVIDIA_TESLA_K80"}
    assert set(ACCELERATORS) == set(ACCELERATOR_NAMES)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "bfloat16"}, ["dtype"]),
        ({"ppo": {"dtype": "bfloat16"}}, ["ppo.dtype"]),
        ({"dtype": "bfloat16", "reward_model": {"dtype": "float32"}}, ["dtype"]),
        ({"dtype": "float32"}, []),
        ({}, []),
    ],
)
@pytest.mark.parametrize("accelerator", ["NVIDIA_TESLA_T4", "NVIDIA_TESLA_V100"])
def test_bfloat16_needs_hardware_that_has_it(fields, named, accelerator):
    base = Path("never/read")
    said = problems_of_run(run_config(base, vertex={"accelerator_type": accelerator}, **fields))
    assert [problem.split(":")[0] for problem in said] == named
    assert all(f"{accelerator} has no bfloat16; give float32 or auto" in text for text in said)
    assert not problems_of_run(run_config(base, vertex={"accelerator_type": "NVIDIA_L4"}, **fields))


def test_a_named_machine_must_hold_the_run(bases):
    """7 B parameters are 25 GiB in float32, 12.6 GiB in bfloat16, without anything else."""
    with pytest.raises(InputError) as caught:
        fit(run_config(bases / "7b", vertex=T4))
    [problem] = caught.value.problems
    assert problem.startswith(f"machine_type: {bases / '7b'} has 6.74 B parameters, ")
    assert "NVIDIA_TESLA_T4 has 16; give machine_type " in problem
    need = int(problem.split("needs about ")[1].split(" GiB")[0])
    assert need > 4 * 6.74e9 / 2**30
    assert choose_machine(run_config(bases / "tiny", vertex=T4))[0].memory == 16
    # What is checkpointed or named with more memory fits.
    machine, why = choose_machine(
        run_config(bases / "7b", vertex={"accelerator_type": "NVIDIA_A100_80GB"})
    )
    assert machine == A100_80
    assert "NVIDIA_A100_80GB has 80" in why
    with pytest.raises(InputError, match="NVIDIA_L4 has 24; give machine_type a2-"):
        choose_machine(run_config(bases / "7b", vertex={"machine_type": "g2-standard-8"}))


def test_a_named_machine_without_gpus_must_hold_the_run(bases):
    """e2-standard-4 has 4 CPUs with 4 GB each."""
    small = {"accelerator_type": "CPU", "machine_type": "e2-standard-4"}
    assert choose_machine(run_config(bases / "tiny", vertex=small))[0] == Machine(
        "e2-standard-4", memory=14
    )
    with pytest.raises(InputError, match="e2-standard-4 has 14; give machine_type n1-highmem-"):
        choose_machine(run_config(bases / "7b", vertex=small))


def test_the_named_machine_is_known_without_the_base():
    assert named_machine(told()) is None
    assert named_machine(told(**T4)) == Machine("n1-standard-8", "NVIDIA_TESLA_T4", 1, 16)
    assert named_machine(told(machine_type="a2-ultragpu-1g")) == A100_80


@pytest.mark.parametrize(
    ("image", "cuda"),
    [
        ("", 126),  # the default one
        ("us-central1-docker.pkg.dev/my-project/rlhf/rlhf:0.1.0", 126),
        (CU130, 130),
        ("gcr.io/my-project/mine:cu128", 128),
        ("gcr.io/my-project/mine:0.1.0-cpu", 0),
        ("gcr.io/my-project/mine:0.1.0", None),
        (f"gcr.io/my-project/mine:0.1.0-cu130@sha256:{'a' * 64}", 130),
        (f"gcr.io/my-project/mine@sha256:{'a' * 64}", None),
    ],
)
def test_what_an_images_tag_says_of_torch(image, cuda):
    assert cuda_of(image) == cuda
    assert cuda_of(image, 128) == 128  # known in the job itself


def test_the_default_images_torch_is_the_default_variants():
    text = (Path(__file__).parents[2] / "containers" / "cloudbuild.yaml").read_text()
    assert f"_VARIANT: cu{DEFAULT_CUDA}\n" in text


def test_what_an_accelerator_of_a_cpu_job_would_be():
    with pytest.raises(ValueError, match="accelerator_count: a CPU job has none"):
        told(accelerator_type="CPU", accelerator_count=1)


def test_a_run_that_fits_only_with_checkpointing_gets_it(bases):
    large = {"max_tokens_per_micro_batch": 8192}
    config, machine, why = fit(run_config(bases / "13b", **large))
    assert machine == A100_80
    assert config.stage_config("ppo").gradient_checkpointing is True
    assert "gradient_checkpointing, which is turned on" in why
    config, _, why = fit(run_config(bases / "7b"))
    assert config.stage_config("ppo").gradient_checkpointing is False
    assert "turned on" not in why
    with pytest.raises(InputError, match="lower"):  # whoever said no gets no
        fit(run_config(bases / "13b", **large, gradient_checkpointing=False))
    with pytest.raises(InputError, match="lower"):
        fit(run_config(bases / "70b"))
