"""The built-in default: its figures by hand, the shipped checkpoints, and the whole run (slow)."""

import json
import random

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from rlhf.inference.predictions import Prediction
from rlhf.quickstart import corpus
from rlhf.quickstart import run as quickstart
from rlhf.quickstart.make_checkpoints import make_checkpoint, make_tokenizer, ship

POST = "My friend Anna bought a lamp. It was last May. [summary]:"
PUBLIC = {
    "gold_reward_before", "gold_reward_after", "gold_reward_std_before", "reward_before",
    "reward_after", "kl", "reward_model_accuracy", "seconds",
}  # fmt: skip


def prediction(before, after):
    return Prediction(
        input_text=POST, prediction=after, baseline=before, reference=None, reward=1.0,
        baseline_reward=0.0, kl=2.0, kl_k3=2.0, prompt_tokens=9, tokens=6, baseline_tokens=4,
        finish_reason="eos", baseline_finish_reason="eos",
    )  # fmt: skip


INFERENCE = {
    "baseline_reward": 0.0, "reward": 1.0, "kl": 2.0, "reward_model_accuracy": 0.8,
    "rougeL": 0.7, "baseline_rougeL": 0.5,
}  # fmt: skip
ROW = {"input_text": POST, "candidate_0": " Anna.", "candidate_1": " Boris.", "choice": 0}


def test_figures_of_hand_worked_samples():
    predictions = [
        prediction(" Anna bought a thing.", " Anna bought a lamp last May."),  # gold 2, 4
        prediction(" Boris.", " Anna sold a lamp."),  # gold -1, 1
    ]
    figures = quickstart.summarize(predictions, INFERENCE, [ROW])
    assert figures["gold_reward_before"] == pytest.approx(0.5)
    assert figures["gold_reward_after"] == pytest.approx(2.5)
    assert figures["gold_reward_std_before"] == pytest.approx(3.0 / 2**0.5)  # of a sample
    assert figures["gold_gain"] == pytest.approx(2.0 / (3.0 / 2**0.5))
    assert figures["reward_model_accuracy_allowed"] == pytest.approx(
        1 / (1 + 2.718281828 ** (-1.25 * 2.0))
    )
    assert (figures["reward_before"], figures["reward_after"], figures["kl"]) == (0.0, 1.0, 2.0)
    assert (figures["tokens_before"], figures["tokens_after"]) == (4, 6)
    assert set(figures) | {"seconds"} >= PUBLIC


def test_the_report_shows_texts_as_they_are(tmp_path, capsys):
    predictions = [prediction(" Anna [bold] x", " Anna bought a lamp."), prediction("", "")]
    metrics = quickstart.summarize(predictions, INFERENCE, [ROW]) | {"seconds": 12.0}
    quickstart.report(metrics, predictions, tmp_path, Console(width=200))
    said = capsys.readouterr().out
    for text in (POST, "Anna [bold] x", "gold reward", "ROUGE-L", "nats", "policy/merged"):
        assert text in said


def test_the_configuration_keeps_held_out_rows_out_of_every_choice(arch, tmp_path):
    config = quickstart.quickstart_config(arch, tmp_path, seed=2)
    assert config.seed == config.stage_config("ppo").seed == 2
    for stage in ("reward_model", "ppo"):
        assert config.stage_config(stage).eval_dataset is None
    inference = config.stage_config("inference")
    assert inference.sampling_strategy == "temperature_sampling"
    assert inference.eval_dataset == str(tmp_path / "data" / "eval.jsonl")
    assert config.stage_config("ppo").temperature == 1.0
    assert corpus.CorpusSizes().eval >= 256


def test_the_tokenizer_reads_and_writes_the_corpus_without_loss(arch, tmp_path):
    make_tokenizer(arch).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    corpus.write_corpus(tmp_path, 5, corpus.CorpusSizes(200, 200, 0, 50))
    longest = {"input_text": 0, "output": 0}
    for name in ("sft", "preferences", "eval"):
        for row in corpus.read_rows(tmp_path / f"{name}.jsonl"):
            outputs = [row.get("candidate_0"), row.get("candidate_1"), row.get("output_text")]
            texts = [text for text in outputs if isinstance(text, str)]
            for kind, text in [("input_text", row["input_text"]), *(("output", t) for t in texts)]:
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == (text.strip() if arch == "t5" else text)
                longest[kind] = max(longest[kind], len(ids))
    assert longest["input_text"] < 96
    assert longest["output"] < 32
    assert len(tokenizer) < 600
    spelled = tokenizer("Zebra?! {x}\n", add_special_tokens=False).input_ids
    assert tokenizer.decode(spelled) == "Zebra?! {x}\n"


def test_shipped_checkpoints_are_of_this_grammar_and_load_plainly(arch):
    folder = quickstart.ASSETS / f"toy_{arch}"
    tokenizer, fresh = AutoTokenizer.from_pretrained(folder), make_tokenizer(arch)
    assert tokenizer.get_vocab() == fresh.get_vocab()
    loader = AutoModelForSeq2SeqLM if arch == "t5" else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == pytest.approx(1.4e6 if arch == "t5" else 0.83e6, rel=0.05)
    post = corpus.make_post(random.Random(11))
    inputs = tokenizer(post.text, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=32
    )
    start = 1 if arch == "t5" else inputs.input_ids.shape[1]
    text = tokenizer.decode(output[0, start:], skip_special_tokens=True)
    told = corpus.facts_in(text)
    assert len(told) >= 2
    assert told <= corpus.facts_in(post.text)


def test_a_checkpoint_can_be_made_trained_further_and_shipped(arch, tmp_path):
    made = make_checkpoint(arch, tmp_path / "first", steps=2)
    ship(made, tmp_path / "shipped")
    further = make_checkpoint(arch, tmp_path / "second", steps=1, start_from=tmp_path / "shipped")
    weights = [path / "model.safetensors" for path in (made, tmp_path / "shipped", further)]
    assert weights[1].stat().st_size < 0.6 * weights[0].stat().st_size
    first, again = (corpus.read_rows(tmp_path / f"{name}-data" / "sft.jsonl") for name in
                    ("first", "second"))  # fmt: skip
    assert not {row["input_text"] for row in first} & {row["input_text"] for row in again}


@pytest.mark.slow
def test_quickstart_keeps_its_promises(arch, tmp_path):
    result = quickstart.run_quickstart(arch, str(tmp_path))
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures.keys() >= PUBLIC
    gain = figures["gold_reward_after"] - figures["gold_reward_before"]
    assert gain >= figures["gold_reward_std_before"]
    assert 0 < figures["kl"] < 10
    allowed = figures["reward_model_accuracy_allowed"]
    assert figures["reward_model_accuracy"] >= 0.9 * allowed
    assert quickstart.run_quickstart(arch, str(tmp_path)).metrics == result.metrics  # at once
