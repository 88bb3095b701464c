"""Random encoder-decoder models against transformers' own forward, one unpadded row at a time."""

import copy
import random
from typing import Any

import pytest
import torch
from support.encoder_decoders import DRAWS, VOCAB
from support.numerics import assert_same_gradients
from support.tiny import make_tokenizer, randomize_lora
from torch import Tensor

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.models.families import family_of
from rlhf.models.generation import generate, rollout_uniforms
from rlhf.models.language_model import LanguageModel
from rlhf.models.merging import plain_weights

TOKENIZER = make_tokenizer("t5")
SEEDS = range(20)
Rows = list[list[int]]


def drawn(kind: str, seed: int) -> tuple[Any, random.Random]:
    """Build a random model of a random configuration, and what draws its rows."""
    draw = random.Random(f"{kind} {seed}")
    config = DRAWS[kind](draw)
    torch.manual_seed(seed)
    family = family_of(config)
    model = family.auto_class.from_config(config).double()
    with torch.no_grad():
        if not family.head_is_tied(config):
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, config.d_model).double())
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    return model.eval(), draw


def loaded(model: Any, **options: Any) -> LanguageModel:
    model = copy.deepcopy(model)
    return family_of(model.config)(model, TOKENIZER, base_name="drawn", **options)


def rows_of(draw: random.Random, count: int, low: int, high: int) -> Rows:
    return [draw.choices(range(VOCAB), k=draw.randint(low, high)) for _ in range(count)]


def plain_logits(model: Any, lm: LanguageModel, prompt: list[int], response: list[int]) -> Tensor:
    """Return (R + 1, V) from the model's own forward."""
    start = list(lm.start_ids)
    ids = torch.tensor([prompt]), torch.tensor([start + response])
    return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0, len(start) - 1 :].float()


def assert_close(ours: Tensor, plain: Tensor) -> None:
    """Assert that logits differ by rounding alone, which grows with the largest of them."""
    scale = float(plain.detach().abs().amax()) if plain.numel() else 0.0
    torch.testing.assert_close(ours.float(), plain, atol=1e-5 * scale, rtol=0)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", DRAWS)
def test_logprobs_and_gradients_are_those_of_transformers(kind: str, seed: int) -> None:
    model, draw = drawn(kind, seed)
    prompts, responses = rows_of(draw, 3, 1, 17), rows_of(draw, 3, 0, 6)
    lm = loaded(model, trainable=True)
    if seed % 2:
        lm.module.gradient_checkpointing_enable({"use_reentrant": False})
    batch = TokenBatch.from_lists(responses)
    states = lm.response_states(TokenBatch.from_lists(prompts), batch)
    ours = lm.token_logprobs(states, batch, temperature=0.7).logprobs
    weights = torch.randn(ours.shape)
    (ours * weights).sum().backward()

    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = plain_logits(model, lm, prompt, response)
        n = len(response)
        assert_close(lm.logits(states[row, : n + 1]), logits)
        expected = (logits[:-1] / 0.7).log_softmax(-1)[range(n), response]
        assert_close(ours[row, :n], expected)
        (expected * weights[row, :n]).sum().backward()
    assert_same_gradients(gradients(lm.module), gradients(model))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", DRAWS)
def test_groups_adapters_and_merged_weights(kind: str, seed: int) -> None:
    model, draw = drawn(kind, seed)
    prompts = TokenBatch.from_lists(rows_of(draw, 3, 1, 17))
    groups = torch.tensor([2, 0, 2, 1])
    lm = loaded(model)
    where = ("all", "encoder", "decoder")[seed % 3]
    for number, role in enumerate(("policy", "value")):
        lm.add_adapter(role, LoRAConfig(rank=2, where=where), seed=number)
        randomize_lora(lm, role, number)
    merged = copy.deepcopy(model)
    weights = {name: weight.make() for name, weight in plain_weights(lm, "policy").items()}
    missing, unexpected = merged.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not {name for name, _ in merged.named_parameters()} & set(missing)

    temperature = float(seed % 2)
    uniforms = rollout_uniforms(seed, 0, range(4), 6)
    with lm.using("policy"):
        known = lm.with_states(prompts, 2)
        made = generate(lm, known, groups=groups, max_new_tokens=6, temperature=temperature,
                        uniforms=uniforms)  # fmt: skip
        states = lm.response_states(known, made.responses, groups)
        lm.token_logprobs(states, made.responses).logprobs.sum().backward()
    assert all(p.grad is not None for _, p in lm.named_trainable("policy"))
    assert all(p.grad is None for _, p in lm.named_trainable("value"))
    with torch.no_grad():
        for row, response in enumerate(made.responses.tolists()):
            prompt = prompts.tolists()[groups[row]]
            expected = plain_logits(merged, lm, prompt, response)
            assert_close(lm.logits(states[row, : len(response) + 1]), expected)
            if temperature:
                logprobs = expected[:-1].log_softmax(-1)[range(len(response)), response]
                assert_close(made.logprobs[row, : len(response)], logprobs)
            else:
                assert response == expected[:-1].argmax(-1).tolist()
            base = plain_logits(model, lm, prompt, response)
            assert float((base - expected).abs().max()) > 1e-3 * float(base.abs().max())
