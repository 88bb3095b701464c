"""Every family against plain transformers, over random configurations drawn from fixed seeds.

Transformers reads one prompt and response at a time, without padding, cache or adapters.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.families import (
    DRAWS,
    draw_model,
    language_model,
    plain_logits,
    plain_logprobs,
    random_model,
)
from support.numerics import InFloat64, assert_same_gradients
from support.tiny import randomize_lora
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Conv1D

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.models.agreement import check_agreement
from rlhf.models.compat import attention_kind
from rlhf.models.generation import generate
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.lora import LoRALinear
from rlhf.models.merging import plain_weights
from rlhf.models.saving import load_adapter, save_adapter, save_merged
from rlhf.models.sequence_classifier import save_sequence_classifier

DRAWN = range(20)
LORA = LoRAConfig(rank=2)

# Prompts of one token and longer than most windows; responses that are empty, cut, and longer than
# a window; groups of different sizes in no order, and a prompt without a response.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [11], [0, 12, 0, 13], [16, 17]]
RESPONSES = [[20, 21, 0, 22, 2], [23, 24, 25, 26, 27, 28, 29], [], [30, 2], [31, 32, 33]]
GROUPS = [2, 0, 1, 0, 1]


def batch() -> tuple[TokenBatch, TokenBatch, Tensor]:
    return TokenBatch.from_lists(PROMPTS), TokenBatch.from_lists(RESPONSES), torch.tensor(GROUPS)


def weighted(logprobs: Tensor, row: int) -> Tensor:
    """A loss in which no token counts like another."""
    return (logprobs * torch.linspace(0.5, 1.5 + row, len(logprobs))).sum()


def grouped_logprobs(lm: LanguageModel) -> list[Tensor]:
    prompts, responses, groups = batch()
    states = lm.response_states(prompts, responses, groups)
    stats = lm.token_logprobs(states, responses)
    return [stats.logprobs[i, : len(row)] for i, row in enumerate(RESPONSES)]


def plain_rows(model: Any) -> list[Tensor]:
    rows = zip(GROUPS, RESPONSES, strict=True)
    return [plain_logprobs(model, PROMPTS[group], response) for group, response in rows]


def backward(logprobs: list[Tensor]) -> None:
    torch.stack([weighted(part, i) for i, part in enumerate(logprobs)]).sum().backward()


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float, config: Any) -> None:
    """Assert that log-probabilities, which are differences of logits, are equal."""
    mine, expected = torch.cat(ours), torch.cat(theirs)
    assert (mine - expected).abs().max() <= tolerance * (1 + expected.abs().max()), config


@pytest.mark.parametrize("family", DRAWS)
def test_logprobs_all_gradients_and_greedy_responses_are_those_of_plain_transformers(
    family: str,
) -> None:
    for seed in DRAWN:
        model = draw_model(family, seed).double()
        plain = copy.deepcopy(model)
        for part in plain.modules():  # else PAD's own row gets no gradient
            if isinstance(part, torch.nn.Embedding):
                part.padding_idx = None
        lm = language_model(model, trainable=True)
        with InFloat64():
            gradients_agree(lm, plain)
            greedy_responses_agree(lm, plain)


def gradients_agree(lm: LanguageModel, plain: Any) -> None:
    ours, theirs = grouped_logprobs(lm), plain_rows(plain)
    backward(ours)
    backward(theirs)
    assert_same(ours, theirs, 1e-9, plain.config)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    total = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    for name, parameter in lm.module.named_parameters():
        if gradients[name] is None:  # a table of positions
            assert parameter.grad is None
            continue
        error = (parameter.grad - gradients[name]).norm()
        assert error <= 1e-9 * total, (name, plain.config)


@torch.no_grad()
def greedy_responses_agree(lm: LanguageModel, plain: Any) -> None:
    prompts, _, groups = batch()
    made = generate(lm, prompts, groups=groups, max_new_tokens=6, temperature=0.0)
    for group, response in zip(GROUPS, made.responses.tolists(), strict=True):
        best = plain_logits(plain, PROMPTS[group], response).argmax(-1).tolist()
        assert response == best[:-1], plain.config
        eos = lm.layout.eos_id
        assert eos not in response[:-1]
        assert len(response) == 6 or response[-1] == eos


@pytest.mark.parametrize("family", DRAWS)
def test_an_adapter_and_its_merge_are_those_of_plain_transformers(
    family: str, tmp_path: Path
) -> None:
    for seed in DRAWN:
        lm = language_model(draw_model(family, seed))
        lm.add_adapter("policy", LORA)
        randomize_lora(lm, "policy", std=0.2)
        if seed % 2:
            lm.module.gradient_checkpointing_enable()
        with lm.using("policy"):
            ours = grouped_logprobs(lm)
            backward(ours)
        plain = merged(lm, "policy", tmp_path / str(seed) if seed < 3 else None)
        theirs = plain_rows(plain)
        backward(theirs)
        assert_same(ours, theirs, 1e-5, plain.config)
        adapter = {name: p.grad for name, p in lm.named_trainable("policy")}
        assert_same_gradients(adapter, through_the_merge(lm, plain))


def merged(lm: LanguageModel, adapter: str, folder: Path | None) -> Any:
    """The model that plain transformers makes of the merged weights; most do without files."""
    kind = attention_kind(lm.config)
    if folder is not None:
        save_merged(lm, adapter, folder)
        return type(lm).auto_class.from_pretrained(folder, attn_implementation=kind)
    plain: Any = random_model(copy.deepcopy(lm.config), attn_implementation=kind)
    weights = {name: weight.make() for name, weight in plain_weights(lm, adapter).items()}
    problems = plain.load_state_dict(weights, strict=False)
    assert not problems.unexpected_keys
    state = {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()}
    written = {state[name] for name in weights}
    assert all(state[name] in written for name in problems.missing_keys)
    return plain.eval()


def through_the_merge(lm: LanguageModel, plain: Any) -> dict[str, Tensor]:
    """Gradients of A and B from those of merged weights: W + s·BA."""
    weights, gradients = dict(plain.named_parameters()), {}
    for name, layer in lm.module.named_modules():
        if isinstance(layer, LoRALinear):
            a, b, scale = layer.lora_A["policy"], layer.lora_B["policy"], layer.scaling["policy"]
            of_weight = weights[f"{name}.weight"].grad
            if isinstance(layer.base_layer, Conv1D):
                of_weight = of_weight.t()
            gradients[f"{name}.lora_A.policy.weight"] = scale * b.weight.t() @ of_weight
            gradients[f"{name}.lora_B.policy.weight"] = scale * of_weight @ a.weight.t()
    return {name: gradient.detach() for name, gradient in gradients.items()}


@pytest.mark.parametrize("family", DRAWS)
@torch.no_grad()
def test_decoding_with_an_adapter_in_the_weights_is_reading_with_it(family: str) -> None:
    lm = language_model(draw_model(family, 1))
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy", std=0.2)
    prompts, responses, groups = batch()
    with lm.using("policy"), lm.inference():
        read = lm.logits(lm.response_states(prompts, responses, groups))
        with lm.folded():
            state, first = lm.prefill(prompts, 8, groups)
            rest = [lm.decode(state, tokens) for tokens in responses.ids.unbind(1)]
            decoded = lm.logits(torch.stack([first, *rest], dim=1))
    mask = torch.arange(decoded.shape[1]) <= responses.lengths[:, None]
    error = (decoded - read)[mask].abs().max()
    assert error <= 1e-4 * read[mask].abs().max(), lm.config


@pytest.mark.parametrize("family", DRAWS)
@torch.no_grad()
def test_a_saved_adapter_is_plain_pefts(family: str, tmp_path: Path) -> None:
    model = draw_model(family, 0)
    plain, again = copy.deepcopy(model), language_model(copy.deepcopy(model))
    lm = language_model(model)
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy", std=0.2)
    save_adapter(lm, "policy", tmp_path)
    load_adapter(again, tmp_path, "sft")
    with lm.using("policy"), again.using("sft"):
        ours = grouped_logprobs(lm)
        assert_same(grouped_logprobs(again), ours, 1e-6, plain.config)
    assert_same(ours, plain_rows(PeftModel.from_pretrained(plain, tmp_path)), 1e-5, plain.config)


@pytest.mark.parametrize("family", DRAWS)
def test_the_default_adapter_is_on_all_linear_layers_but_the_head(family: str) -> None:
    lm = language_model(draw_model(family, 0))
    head = lm.module.get_output_embeddings()
    linear = {
        name
        for name, part in lm.module.named_modules()
        if part is not head and isinstance(part, torch.nn.Linear | Conv1D)
    }
    lm.add_adapter("policy", LORA)
    adapted = {n for n, part in lm.module.named_modules() if isinstance(part, LoRALinear)}
    assert adapted == linear


@pytest.mark.parametrize("family", DRAWS)
@torch.no_grad()
def test_bfloat16_is_as_exact_as_plain_transformers(family: str) -> None:
    """States have 8 bits; both ways are compared with float64's."""
    for seed in range(3):
        model = draw_model(family, seed)
        lm, exact = language_model(copy.deepcopy(model).bfloat16()), language_model(model.double())
        prompts, responses, groups = batch()
        mask = torch.arange(8) <= responses.lengths[:, None]
        right = exact.response_states(prompts, responses, groups)[mask]
        states = lm.response_states(prompts, responses, groups)[mask]
        error = (states.double() - right).norm() / right.norm()
        own = lm.response_states(prompts.select_rows(groups), responses)[mask]
        assert error < 2 * (own.double() - right).norm() / right.norm() + 0.02


@pytest.mark.parametrize("family", DRAWS)
def test_the_check_at_every_load_passes(family: str) -> None:
    for seed in range(6):
        lm = language_model(draw_model(family, seed))
        check_agreement(lm)


@pytest.mark.parametrize("family", DRAWS)
@torch.no_grad()
def test_a_reward_model_is_transformers_sequence_classifier(family: str, tmp_path: Path) -> None:
    lm = language_model(draw_model(family, 1))
    if not lm.has_sequence_classifier:
        return
    lm.add_adapter("reward", LORA)
    randomize_lora(lm, "reward", std=0.2)
    head = ScalarHead(lm.hidden_size, seed=1, init_std=1.0)
    save_sequence_classifier(lm, "reward", head, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    prompts, responses, groups = batch()
    with lm.using("reward"):
        scores = head(lm.final_states(prompts, responses, groups))
    for score, group, response in zip(scores, GROUPS, RESPONSES, strict=True):
        if response:  # 0 is its PAD, which does not count at the end
            row = torch.tensor([PROMPTS[group] + response])
            expected = plain(input_ids=row).logits[0, 0]
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)
