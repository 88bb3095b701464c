"""What `device: auto` and `dtype: auto` mean on hardware that says what it can do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_trainer import LastTrainer, stop_at, toy_config

from rlhf.config import PPOConfig, RewardModelConfig
from rlhf.errors import InputError, StoppedBySignal
from rlhf.hardware import pick_device, pick_dtype
from rlhf.ppo_trainer import PPOTrainer
from rlhf.reward_model import RewardModelTrainer

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *instructions: str, onednn: bool = True) -> None:
    """A CPU with these instructions and no limit from the environment."""
    capabilities = dict.fromkeys(instructions, True) | {"architecture": "test"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        (("avx2", "avx512_f", "avx512_bf16"), torch.bfloat16),  # AMD Zen 4, Intel Cooper Lake
        (("avx2", "avx512_f", "avx512_bf16", "amx_bf16"), torch.bfloat16),  # Sapphire Rapids
        (("neon", "sve", "bf16"), torch.bfloat16),  # Graviton 3
        (("avx2", "avx512_f", "avx512_vnni"), torch.float32),
        (("avx2", "avx_ne_convert"), torch.float32),  # converts bfloat16, multiplies nothing
        (("neon", "dot"), torch.float32),
        ((), torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(
    instructions: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *instructions)
    assert pick_dtype("auto", CPU) == dtype
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert pick_dtype("float32", CPU) == torch.float32


@pytest.mark.parametrize(
    ("limits", "dtype"),
    [
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, torch.float32),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, torch.float32),
        ({"DNNL_MAX_CPU_ISA": "AVX2_VNNI_2"}, torch.float32),
        ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "SSE41"}, torch.float32),
        ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, torch.bfloat16),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, torch.bfloat16),
    ],
)
def test_auto_heeds_the_limit_set_for_onednn(
    limits: dict[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "avx512_bf16")
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    assert pick_dtype("auto", CPU) == dtype


def test_auto_is_float32_where_torch_cannot_use_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "neon", "bf16", onednn=False)  # a Mac
    assert pick_dtype("auto", CPU) == torch.float32
    pretend(monkeypatch, "avx512_bf16")
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_asks_a_gpu_itself(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert pick_dtype("auto", torch.device("cuda")) == dtype


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert pick_device("auto") == CPU
        with pytest.raises(InputError, match="device: 'cuda'"):
            pick_device("cuda")


def test_a_run_keeps_the_type_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path / "run", device="cpu")
    assert config.dtype == "auto"
    pretend(monkeypatch, "avx512_bf16")
    with pytest.raises(StoppedBySignal):
        LastTrainer(config, callbacks=[stop_at(4)]).train()
    assert "dtype: bfloat16\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["fields"]["dtype"] == "bfloat16"
    pretend(monkeypatch)
    with pytest.raises(InputError) as refused:
        LastTrainer(config)
    assert refused.value.problems[0] == (
        "dtype: changed from 'bfloat16' to 'float32', which is what auto means on this machine; "
        "give bfloat16 to continue"
    )
    result = LastTrainer(toy_config(tmp_path / "run", device="cpu", dtype="bfloat16")).train()
    assert result["steps"] == 8
    pretend(monkeypatch, "amx_bf16")  # another machine that has it
    assert LastTrainer(config).train() == result


PAIRS = [
    {"input_text": f"{n} the cat", "candidate_0": " sat", "candidate_1": " a dog", "choice": n % 2}
    for n in range(20)
]


def test_stages_run_in_bfloat16_under_auto(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "avx512_bf16")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    fields: dict[str, Any] = {
        "base_model": str(tiny_checkpoint), "device": "cpu", "batch_size": 4, "train_steps": 1,
        "prompt_sequence_length": 16, "target_sequence_length": 6, "lora": {"rank": 2},
        "log_with": [],
    }  # fmt: skip
    ppo = PPOTrainer(
        PPOConfig(**fields, prompt_dataset=str(rows), output_dir=str(tmp_path / "ppo")),
        reward_fn=lambda prompts, responses: [float(len(text)) for text in responses],
    )
    reward = RewardModelTrainer(
        RewardModelConfig(**fields, preference_dataset=str(rows), output_dir=str(tmp_path / "rm"))
    )
    for trainer, lm, loss in (
        (ppo, ppo.policy.lm, "ppo/policy_loss"),
        (reward, reward.reward.lm, "reward_model/loss"),
    ):
        assert lm.dtype == lm.module.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in trainer.parameters.values()} == {torch.float32}
        assert torch.tensor(trainer.step()[loss]).isfinite()
        assert trainer.skipped_updates == 0
        with lm.using(None), torch.no_grad():
            inputs = ppo.codec.prompts([ppo.prompts[0].prompt])
            assert lm.prefill(inputs, 1)[1].dtype == torch.bfloat16
