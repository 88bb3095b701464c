"""Another engine, from outside the package: one class, and every stage that generates takes it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import RESPONSE_LIMIT, make_case, read
from support.language_models import plain_logits
from support.ppo import count_letters, make_config, make_trainer
from support.tiny import make_tokenizer, tiny_model
from torch import Tensor

from rlhf.config import SFTConfig
from rlhf.data.batching import TokenBatch
from rlhf.inference import run_inference
from rlhf.models.generation import Generation, Generator
from rlhf.models.language_model import LanguageModel
from rlhf.ppo_trainer import PPOTrainer
from rlhf.sft import SFTTrainer
from rlhf.vertex.serve import Predictor


@dataclass
class RowByRow:
    """Decode one row at a time with transformers' own forward pass over the whole text."""

    arch: str
    rows: list[int] = field(default_factory=list)

    def __call__(
        self,
        lm: LanguageModel,
        prompts: TokenBatch,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        min_response_length: int = 0,
        groups: Tensor | None = None,
    ) -> Generation:
        if groups is not None:
            prompts = prompts.select_rows(groups)
        self.rows.append(len(prompts))
        responses, logprobs = [], torch.zeros(len(prompts), max_new_tokens)
        eos = sorted(lm.layout.eos_ids)
        for row, prompt in enumerate(prompts.tolists()):
            response: list[int] = []
            while len(response) < max_new_tokens and not set(response[-1:]) & set(eos):
                logits = plain_logits(self.arch, lm.module, prompt, response)[-1].double()
                if len(response) < min_response_length:
                    logits[eos] = -math.inf
                if temperature == 0:
                    response.append(int(logits.argmax()))
                    continue
                assert uniforms is not None
                weights = (logits / temperature).softmax(-1)
                drawn = uniforms[row, len(response)].double()
                token = int((weights.cumsum(-1) <= drawn).sum())
                logprobs[row, len(response)] = weights[token].log()
                response.append(token)
            responses.append(response)
        batch = TokenBatch.from_lists(responses).to(prompts.ids.device)
        finished = torch.tensor([row[-1] in eos for row in responses])
        return Generation(batch, finished, logprobs[:, : batch.ids.shape[1]])


def test_ppo_samples_with_it(arch: str, tmp_path: Path) -> None:
    options = {"temperature": 0.8, "min_response_length": 2}
    ours = make_trainer(arch, tmp_path, **options)
    engine = RowByRow(arch)
    other = make_trainer(arch, tmp_path, **options, generator=engine)
    for _ in range(2):  # the second time with an adapter that has been trained
        expected, actual = (trainer.rollout(trainer.next_prompts()) for trainer in (ours, other))
        assert actual.responses.tolists() == expected.responses.tolists()
        assert torch.equal(actual.finished, expected.finished)
        for trainer in (ours, other):
            metrics = trainer.step()
            assert metrics["ppo/decode_deviation"] < 1e-3
    assert engine.rows == [8] * 4


def test_it_answers_in_a_whole_run_of_ppo(arch: str, tmp_path: Path) -> None:
    def run(name: str, generator: Generator | None) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir()
        trainer = PPOTrainer(
            make_config(tmp_path / name), reward_fn=count_letters, model=tiny_model(arch),
            tokenizer=make_tokenizer(arch), generator=generator,
        )  # fmt: skip
        trainer.train()
        lines = (trainer.output_path / "samples.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    expected, actual = run("ours", None), run("other", RowByRow(arch))
    assert [row["response"] for row in actual] == [row["response"] for row in expected]


def test_sft_shows_its_samples(arch: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = ("the cat", "a dog sat"), ("x", "y")
    rows.write_text(
        "".join(json.dumps({"input_text": a, "output_text": b}) + "\n" for a, b in texts)
    )
    responses = []
    for name, generator in {"ours": None, "other": RowByRow(arch)}.items():
        config = SFTConfig(
            base_model="tiny", dataset=str(rows), output_dir=str(tmp_path / name), batch_size=2,
            train_steps=1, prompt_sequence_length=24, target_sequence_length=6, dtype="float32",
            log_with=[],
        )  # fmt: skip
        trainer = SFTTrainer(
            config, model=tiny_model(arch), tokenizer=make_tokenizer(arch), generator=generator
        )
        trainer.train()
        lines = (trainer.output_path / "samples.jsonl").read_text().splitlines()
        responses.append([json.loads(line)["response"] for line in lines])
        assert generator is None or generator.rows == [2]
    assert responses[0]
    assert responses[1] == responses[0]


@pytest.mark.parametrize("strategy", ["greedy", "temperature_sampling"])
def test_inference_asks_it_for_both_models(
    arch: str, strategy: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case, engine = make_case(arch, checkpoints[arch], tmp_path), RowByRow(arch)
    expected = case.run(tmp_path / "ours", sampling_strategy=strategy)
    config = case.config(tmp_path / "other", sampling_strategy=strategy)
    actual = run_inference(config, generator=engine)
    for other, ours in zip(read(actual.predictions), read(expected.predictions), strict=True):
        assert other["prediction"] == ours["prediction"]
        assert other["baseline"] == ours["baseline"]
    assert engine.rows == [3, 3, 3, 3, 1, 1]  # batches of three: tuned, then untuned


def test_the_server_answers_with_it(
    arch: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    request = {
        "instances": [{"inputs": "the cat"}, {"inputs": "a dog sat"}],
        "parameters": {"temperature": 0.7, "seed": 3},
    }
    folder, engine = str(checkpoints[arch]), RowByRow(arch)
    ours = Predictor(folder, 24, RESPONSE_LIMIT, "float32")
    other = Predictor(folder, 24, RESPONSE_LIMIT, "float32", generator=engine)
    assert other.predict(request) == ours.predict(request)
    assert engine.rows == [2]
