"""What a dry run prints."""

import pytest

from rlhf.config import InferenceConfig, SFTConfig
from rlhf.errors import InputError
from rlhf.reports.dry_run import dry_run_report, memory_table


def test_memory_is_a_table_with_the_peak_last():
    roles = {"frozen base": 3 * 2**30, "activations": 2**30, "cache": 2**29}
    assert memory_table(roles).splitlines()[-1].split() == ["peak", "4.0", "GiB"]
    assert "512.0 MiB" in memory_table(roles)


def test_report_of_a_dry_run(tiny_checkpoint, arch):
    config = SFTConfig(
        base_model=str(tiny_checkpoint),
        output_dir="out",
        dataset="rows",
        batch_size=8,
        train_steps=5,
        device="cpu",
    )
    text = dry_run_report("sft", config, 20, ["dataset: 20 rows"])
    assert "steps: 5 of 8, 40 in all, 2.00 epochs of 20 rows" in text
    assert "dataset: 20 rows" in text
    assert f"({arch}), " in text
    assert "frozen base" in text
    other = InferenceConfig(policy_path="p", output_dir="out", eval_dataset="rows")
    text = dry_run_report("inference", other, 20, base_model=str(tiny_checkpoint))
    assert "policy adapter" in text
    config.base_model = "/nowhere/at/all"
    with pytest.raises(InputError, match="/nowhere/at/all"):
        dry_run_report("sft", config, 20)
