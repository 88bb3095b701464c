"""Supervised fine-tuning of T5 and LLaMA, seen from outside."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.numerics import assert_same_gradients
from support.toy_trainer import lines, stop_at, without_timing

from rlhf.config import SFTConfig
from rlhf.errors import InputError, StoppedBySignal
from rlhf.sft import SFTTrainer, train_sft

ROWS: list[dict[str, Any]] = [
    {"input_text": "the cat sat", "output_text": "a cat"},
    {"input_text": "the dog ran to the post and sat", "output_text": ["dog", "the dog ran"]},
    {"input_text": "post", "output_text": ""},
    {"input_text": "a cat and a dog", "output_text": "the cat and the dog sat and ran"},
    {"input_text": "a", "output_text": "ran"},
    {"input_text": "the post sat and the post ran", "output_text": "post: sat, ran!"},
    {"input_text": "x y z", "output_text": "zyx"},
]


def write_rows(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl")


def sft_config(checkpoint: Path, dataset: str, folder: Path, **fields: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "base_model": str(checkpoint),
        "dataset": dataset,
        "output_dir": str(folder),
        "batch_size": 5,
        "micro_batch_size": 2,
        "train_steps": 4,
        "save_every": 3,
        "eval_every": 2,
        "learning_rate": 0.01,
        "prompt_sequence_length": 24,
        "target_sequence_length": 16,
        "device": "cpu",
        "dtype": "float32",
        "lora": {"rank": 4},
        "log_with": [],
    }
    return SFTConfig(**{**defaults, **fields})


@pytest.mark.parametrize(("step", "rank"), [(1, 4), (2, 4), (3, 4), (2, 0)])
def test_stopped_and_resumed_equals_never_stopped(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path, step: int, rank: int
) -> None:
    def config(name: str) -> SFTConfig:
        lora = {"rank": rank, "dropout": 0.2 if rank else 0.0}
        return sft_config(
            tiny_checkpoint, dataset, tmp_path / name, lora=lora, eval_dataset=dataset
        )

    whole = train_sft(config("whole"))
    with pytest.raises(StoppedBySignal):
        train_sft(config("stopped"), callbacks=[stop_at(step)])
    stopped = train_sft(config("stopped"))
    assert without_timing(stopped.metrics) == without_timing(whole.metrics)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    logs = [[*map(without_timing, lines(folder))] for folder in folders]
    assert logs[0] == logs[1]
    assert lines(folders[0], "samples.jsonl") == lines(folders[1], "samples.jsonl")
    weights = [load_file(folder / "merged" / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def gradients(
    checkpoint: Path, dataset: str, folder: Path, micro: int, **fields: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    config = sft_config(checkpoint, dataset, folder, micro_batch_size=micro, **fields)
    trainer = SFTTrainer(config)
    loss = trainer.accumulate_gradients(trainer.next_batch())
    grads = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
    return loss, grads


@pytest.mark.parametrize("rank", [4, 0])
def test_micro_batches_change_nothing(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path, rank: int
) -> None:
    lora = {"rank": rank}
    whole = gradients(tiny_checkpoint, dataset, tmp_path / "a", 5, lora=lora)
    for micro in (1, 2, 3):
        loss, grads = gradients(tiny_checkpoint, dataset, tmp_path / "a", micro, lora=lora)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert_same_gradients(grads, whole[1])


def test_loss_is_transformers_own_over_all_tokens(
    arch: str, tiny_model: Any, tiny_checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    """Row by row without padding, with the ids of the trainer and the loss of transformers."""
    trainer = SFTTrainer(sft_config(tiny_checkpoint, dataset, tmp_path / "run", lora={"rank": 0}))
    batch = trainer.next_batch()
    loss = trainer.accumulate_gradients(batch)
    total, count = 0.0, 0
    tiny_model.eval()
    pairs = zip(batch.prompts.tolists(), batch.responses.tolists(), strict=True)
    for prompt, response in pairs:
        assert response[-1] == trainer.lm.layout.eos_id or len(response) == 16
        if arch == "t5":
            ids, labels = prompt, response
        else:
            ids, labels = prompt + response, [-100] * len(prompt) + response
        with torch.no_grad():
            mean = tiny_model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(mean) * len(response)
        count += len(response)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_it_learns_and_exports_load_in_plain_transformers_and_peft(
    arch: str, tiny_checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    config = sft_config(
        tiny_checkpoint,
        dataset,
        tmp_path / "run",
        eval_dataset=dataset,
        train_steps=20,
        eval_every=10,
        batch_size=7,
        micro_batch_size=7,
        learning_rate=0.02,
    )
    result = train_sft(config)
    rows = lines(tmp_path / "run")
    assert rows[-1]["sft/loss"] < 0.8 * rows[0]["sft/loss"]
    assert result.metrics["eval/perplexity"] == pytest.approx(math.exp(result.metrics["eval/loss"]))
    assert abs(result.metrics["sft/kl_merged_adapter"]) < 1e-5
    assert (tmp_path / "run" / "README.md").read_text().startswith("---")
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert [row["step"] for row in samples] == [10] * 4 + [20] * 4
    assert {"prompt", "response", "reference"} <= samples[0].keys()
    script = """
import sys, torch, transformers, peft
auto = getattr(transformers, sys.argv[1])
ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
if auto is transformers.AutoModelForSeq2SeqLM:
    ids["decoder_input_ids"] = torch.tensor([[0, 9, 10]])
base = auto.from_pretrained(sys.argv[2]).eval()
merged = auto.from_pretrained(sys.argv[3] + "/merged").eval()
plain = base(**ids).logits
adapted = peft.PeftModel.from_pretrained(base, sys.argv[3] + "/adapter").eval()
torch.testing.assert_close(merged(**ids).logits, adapted(**ids).logits, rtol=1e-3, atol=1e-4)
assert (plain - adapted(**ids).logits).abs().max() > 0.1
assert "rlhf" not in sys.modules
"""
    auto = {"t5": "AutoModelForSeq2SeqLM", "llama": "AutoModelForCausalLM"}[arch]
    command = [sys.executable, "-c", script, auto, str(tiny_checkpoint), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_references_of_a_row_take_turns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "one.jsonl", [{"input_text": "a", "output_text": ["cat", "dog"]}])
    trainer = SFTTrainer(sft_config(tiny_checkpoint, data, tmp_path / "run", batch_size=4))
    texts = [trainer.codec.decode(ids) for ids in trainer.next_batch().responses.tolists()]
    assert [text.strip() for text in texts] == ["cat", "dog", "cat", "dog"]


def test_lora_dropout_acts_in_training_only(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    lora = {"rank": 4, "dropout": 0.5}
    config = sft_config(tiny_checkpoint, dataset, tmp_path / "run", lora=lora, eval_dataset=dataset)
    trainer = SFTTrainer(config)
    trainer.step()  # B is zero before
    batch = trainer.next_batch()
    with torch.no_grad(), trainer.lm.using("sft"):
        losses = {float(trainer.negative_log_likelihood(batch)) for _ in range(3)}
    assert len(losses) == 3
    assert trainer.evaluate() == trainer.evaluate()
    assert trainer.lm.module.training


def test_gradient_checkpointing_changes_nothing(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    plain = gradients(tiny_checkpoint, dataset, tmp_path / "a", 5)
    saved = gradients(tiny_checkpoint, dataset, tmp_path / "a", 5, gradient_checkpointing=True)
    assert saved[0] == pytest.approx(plain[0], rel=1e-5)
    assert_same_gradients(saved[1], plain[1])


def test_bfloat16_runs_and_keeps_what_is_trained_in_fp32(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    for rank in (4, 0):
        config = sft_config(
            tiny_checkpoint,
            dataset,
            tmp_path / f"run{rank}",
            dtype="bfloat16",
            lora={"rank": rank},
            eval_dataset=dataset,
            train_steps=1,
        )
        trainer = SFTTrainer(config)
        assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
        metrics = trainer.train()
        assert math.isfinite(metrics["sft/loss"])
        merged = load_file(tmp_path / f"run{rank}" / "merged" / "model.safetensors")
        assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_model_and_tokenizer_as_objects(
    tiny_model: Any, tokenizer: Any, dataset: str, tmp_path: Path
) -> None:
    config = sft_config(Path("unused"), dataset, tmp_path / "run", base_model=None, train_steps=1)
    result = train_sft(config, model=tiny_model, tokenizer=tokenizer)
    assert result.metrics["steps"] == 1
    with pytest.raises(InputError, match="base_model"):
        train_sft(sft_config(Path(), dataset, tmp_path / "other", base_model=None))


def test_all_problems_at_once_and_nothing_written(tmp_path: Path, checkpoints: Any) -> None:
    train = write_rows(tmp_path / "train.jsonl", [*ROWS, {"input_text": "no answer"}])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"input_text": 3, "output_text": "x"}])
    config = sft_config(
        checkpoints["llama"],
        train,
        tmp_path / "run",
        eval_dataset=held_out,
        prompt_sequence_length=500,
    )
    with pytest.raises(InputError) as caught:
        train_sft(config)
    problems = caught.value.problems
    assert any("train.jsonl:8: output_text" in problem for problem in problems)
    assert any("held_out.jsonl:1: input_text" in problem for problem in problems)
    assert any("128 positions" in problem for problem in problems)
    assert not (tmp_path / "run").exists()


def test_evaluation_decodes_with_a_cache_under_gradient_checkpointing(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path
) -> None:
    seen = []
    for checkpointing in (False, True):
        config = sft_config(
            tiny_checkpoint,
            dataset,
            tmp_path / "run",
            eval_dataset=dataset,
            gradient_checkpointing=checkpointing,
        )
        trainer = SFTTrainer(config)
        metrics = trainer.evaluate()
        samples = [row["response"] for row in trainer._samples]
        seen.append((pytest.approx(metrics["eval/loss"]), samples))
    assert seen[0] == (seen[1][0].expected, seen[1][1])


def test_dry_run_says_what_would_happen_and_writes_nothing(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_sft(sft_config(tiny_checkpoint, dataset, tmp_path / "run", dry_run=True))
    assert result.metrics == {}
    told = capsys.readouterr().out
    assert "7 rows" in told
    assert "steps: 4 of 5, 20 in all" in told
    assert not (tmp_path / "run").exists()


def test_rows_for_evaluation_that_are_also_trained_on_are_counted(
    tiny_checkpoint: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input_text": text, "output_text": "a"} for text in ("x", "post", "a  cat and a dog")]
    held_out = write_rows(tmp_path / "held_out.jsonl", rows)
    fields = {"eval_dataset": held_out, "dry_run": True}
    train_sft(sft_config(tiny_checkpoint, dataset, tmp_path / "run", **fields))
    said = [line for line in capsys.readouterr().out.splitlines() if "memory" in line]
    assert said[0] == (
        f"eval_dataset: 2 of 3 rows have a prompt that dataset has, too, such as {held_out}:2 "
        f"(as {dataset}:3); results on them show memory"
    )
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[:1])
    train_sft(sft_config(tiny_checkpoint, dataset, tmp_path / "run", **fields))
    assert "show memory" not in capsys.readouterr().out
