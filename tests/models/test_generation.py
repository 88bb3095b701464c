"""Decoding against transformers' own generate(), sampling against the distribution."""

import shutil
from typing import Any

import pytest
import torch
from support.language_models import EOS, make_lm, plain_logits, ragged
from support.tiny import randomize_lora, tiny_model
from torch import Tensor

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError, NumericalError
from rlhf.models import generation
from rlhf.models.decoding import DecodeState
from rlhf.models.generation import generate, generate_in_chunks, rollout_uniforms, sample
from rlhf.models.language_model import LanguageModel


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_named_and_index_nothing(
    tiny_lm: LanguageModel, value: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    whole = tiny_lm.policy_logits

    def broken(*arguments: Any) -> torch.Tensor:
        logits = whole(*arguments)
        asked.append(len(logits))
        if len(asked) == 3:
            logits[0, 7] = value
        if len(asked) == 4:
            logits[:] = value
        return logits

    monkeypatch.setattr(tiny_lm, "policy_logits", broken)
    prompts = TokenBatch.from_lists([[5, 6, 7], [8, 9]])
    uniforms = rollout_uniforms(0, 0, range(2), 12)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        generate(tiny_lm, prompts, max_new_tokens=12, temperature=temperature, uniforms=uniforms)
    for width in (3, 255, 256, 257, 1000):  # no index leaves the vocabulary
        tokens = sample(torch.full((4, width), value), torch.rand(4))
        assert ((tokens >= 0) & (tokens < width)).all()


@pytest.mark.parametrize("untied", [False, True])
def test_greedy_is_transformers_generate_token_for_token(arch: str, untied: bool) -> None:
    lm = make_lm(arch, untied=untied)
    plain = tiny_model(arch, untied=untied).eval()
    prompts, _ = ragged(arch)
    ours = generate(lm, prompts, max_new_tokens=12, temperature=0.0)
    for prompt, response in zip(prompts.tolists(), ours.responses.tolists(), strict=True):
        ids = torch.tensor([prompt])
        output = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # by itself it would mask a PAD in the prompt
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS[arch],
        )[0].tolist()
        assert response == (output[1:] if arch == "t5" else output[len(prompt) :])


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.1, -2.0, 1.5, float("-inf"), 0.0])
    count = 200_000
    uniforms = (torch.arange(count) + 0.5) / count
    tokens = sample(logits.expand(count, -1), uniforms)
    frequencies = torch.bincount(tokens, minlength=5) / count
    torch.testing.assert_close(frequencies, logits.softmax(0), atol=1e-5, rtol=0)
    assert frequencies[3] == 0


def test_sampling_at_the_edges_of_the_unit_interval() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert sample(logits, edges).tolist() == [1, 2]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_sampling_is_the_plain_inverse_cdf(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(400, size, generator=generator) * 3
    logits[:, ::3] = float("-inf")
    logits[:, -1] = 0.0
    uniforms = torch.rand(400, generator=generator)
    tokens = sample(logits, uniforms)
    cdf = logits.double().softmax(-1).cumsum(-1)
    above = cdf.gather(1, tokens[:, None])[:, 0]
    below = above - logits.double().softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (below - 1e-6 <= uniforms).all()
    assert (uniforms <= above + 1e-6).all()
    assert logits.gather(1, tokens[:, None]).isfinite().all()


def test_rows_that_finish_leave_the_batch(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm(arch)
    prompts = TokenBatch.from_lists([[i, 5, 7][: 1 + i % 3] for i in range(3, 60)])
    uniforms = rollout_uniforms(1, 0, range(len(prompts)), 100)
    options = {"max_new_tokens": 100, "uniforms": uniforms, "temperature": 3.0}
    sizes: list[int] = []
    decode = lm.decode

    def counting(state: DecodeState, tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return decode(state, tokens)

    monkeypatch.setattr(lm, "decode", counting)
    leaving = generate(lm, prompts, **options)
    assert sizes[-1] < len(prompts)
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(generation, "DROP_AT", 0.0)
    sizes.clear()
    staying = generate(lm, prompts, **options)
    assert set(sizes) == {len(prompts)}
    assert leaving.responses.tolists() == staying.responses.tolists()
    assert torch.equal(leaving.finished, staying.finished)


def test_folding_the_adapter_changes_no_sample_and_leaves_no_trace(arch: str) -> None:
    lm = make_lm(arch)
    prompts, _ = ragged(arch)
    lm.add_adapter("policy", LoRAConfig(rank=4))
    randomize_lora(lm, "policy", std=0.3)
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in lm.module.state_dict().items()}
    uniforms = rollout_uniforms(0, 0, range(4), 10)
    with lm.using("policy"):
        with lm.folded():
            folded, _ = lm.prefill(prompts, 1)
            inside = lm.adapters.active
        folded_run = generate(lm, prompts, max_new_tokens=10, uniforms=uniforms)
        with lm.inference():
            plain, _ = lm.prefill(prompts, 1)
    assert inside is None
    torch.testing.assert_close(folded.keys, plain.keys, atol=1e-5, rtol=1e-5)
    base = generate(lm, prompts, max_new_tokens=10, uniforms=uniforms)
    assert folded_run.responses.tolists() != base.responses.tolists()
    for name, tensor in lm.module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == places[name]


def test_a_bf16_base_is_never_folded(arch: str) -> None:
    lm = make_lm(arch)
    lm.module.to(torch.bfloat16)
    lm.add_adapter("policy", LoRAConfig(rank=4))
    with lm.using("policy"), lm.folded():
        assert lm.adapters.active == "policy"


def test_uniforms_belong_to_seed_iteration_row_and_token() -> None:
    whole = rollout_uniforms(3, 7, range(6), 5)
    assert torch.equal(rollout_uniforms(3, 7, range(2, 4), 5), whole[2:4])
    assert not torch.equal(rollout_uniforms(3, 8, range(6), 5), whole)
    assert not torch.equal(rollout_uniforms(4, 7, range(6), 5), whole)
    assert len(set(whole.flatten().tolist())) == 30
    many = rollout_uniforms(0, 0, range(3000), 4)
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1].abs() < 0.06


def test_batch_composition_and_chunks_change_no_sample(arch: str) -> None:
    lm = make_lm(arch)
    prompts, _ = ragged(arch)
    uniforms = rollout_uniforms(0, 0, range(4), 10)
    whole = generate(lm, prompts, max_new_tokens=10, uniforms=uniforms)
    for size in (1, 2, 3):
        chunked = generate_in_chunks(
            lm, prompts, chunk_size=size, max_new_tokens=10, uniforms=uniforms
        )
        assert chunked.responses.tolists() == whole.responses.tolists()
        assert torch.equal(chunked.finished, whole.finished)
    order = [2, 0, 3, 1]
    shuffled = generate(lm, prompts.select_rows(order), max_new_tokens=10, uniforms=uniforms[order])
    assert shuffled.responses.tolists() == [whole.responses.tolists()[i] for i in order]


def test_responses_are_cut_after_the_first_eos(arch: str) -> None:
    lm = make_lm(arch)
    eos = EOS[arch]
    prompts = TokenBatch.from_lists([[i] for i in range(3, 110)])
    uniforms = rollout_uniforms(1, 0, range(len(prompts)), 20)
    generation = generate(lm, prompts, max_new_tokens=20, uniforms=uniforms, temperature=3.0)
    rows = generation.responses.tolists()
    assert 0 < generation.finished.sum() < len(rows)
    for row, finished in zip(rows, generation.finished.tolist(), strict=True):
        assert (row[-1] == eos) is finished
        assert eos not in row[:-1]
        assert finished or len(row) == 20


def test_min_response_length_holds(arch: str) -> None:
    lm = make_lm(arch)
    prompts = TokenBatch.from_lists([[i] for i in range(3, 60)])
    uniforms = rollout_uniforms(1, 0, range(len(prompts)), 24)
    options = {"max_new_tokens": 24, "uniforms": uniforms, "temperature": 3.0}
    free = generate(lm, prompts, **options)
    bound = generate(lm, prompts, **options, min_response_length=16)
    assert free.responses.lengths.min() < 16
    assert bound.responses.lengths.min() >= 16


def test_sampling_without_uniforms_is_a_mistake(arch: str) -> None:
    with pytest.raises(ValueError, match="uniforms"):
        generate(make_lm(arch), TokenBatch.from_lists([[5]]), max_new_tokens=2)


def test_gradient_checkpointing_changes_no_sample(arch: str) -> None:
    lm = make_lm(arch)
    prompts, _ = ragged(arch)
    uniforms = rollout_uniforms(0, 0, range(4), 10)
    expected = generate(lm, prompts, max_new_tokens=10, uniforms=uniforms).responses.tolists()
    lm.module.gradient_checkpointing_enable({"use_reentrant": False})
    actual = generate(lm, prompts, max_new_tokens=10, uniforms=uniforms).responses.tolists()
    assert actual == expected
    assert lm.module.training


COMPILERS = [
    {"backend": "eager"},
    pytest.param(
        {"mode": "reduce-overhead"},
        marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")],
    ),
]


@pytest.mark.parametrize("options", COMPILERS, ids=["eager", "inductor"])
def test_a_compiled_step_decodes_what_the_plain_one_does(
    arch: str, options: dict[str, str]
) -> None:
    plain, compiled = make_lm(arch), make_lm(arch)
    for lm in (plain, compiled):
        lm.add_adapter("policy", LoRAConfig(rank=4))
        randomize_lora(lm, "policy", std=0.3)
    compiled.compile_decoding(6, 9, **options)
    torch.compiler.reset()
    steps = {"max_new_tokens": 10, "temperature": 1.5}
    prompts, _ = ragged(arch)
    full = TokenBatch.from_lists([[7, i, 9, 4, 5, 6, 7, 8, i][: 9 - i % 5] for i in range(20, 26)])
    # Fewer rows than fit, all, fewer again: the third reads what the second has left behind.
    for number, (batch, role) in enumerate(
        [(prompts, "policy"), (full, None), (full.select_rows([3, 1]), "policy")]
    ):
        before = batch.tolists()
        uniforms = rollout_uniforms(0, number, range(len(batch)), 10)
        with plain.using(role), compiled.using(role):
            expected = generate(plain, batch, uniforms=uniforms, **steps)
            actual = generate(compiled, batch, uniforms=uniforms, **steps)
            with plain.inference(), compiled.inference():
                states = []
                for lm in (plain, compiled):
                    state, first = lm.prefill(batch, 3)
                    states.append(torch.stack([first, lm.decode(state, batch.ids[:, 0])]))
        assert actual.responses.tolists() == expected.responses.tolists()
        assert torch.equal(actual.finished, expected.finished)
        torch.testing.assert_close(states[1], states[0], atol=2e-5, rtol=1e-4)
        assert batch.tolists() == before


def test_a_compiled_step_is_compiled_once_for_all_batches(arch: str) -> None:
    lm = make_lm(arch)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    lm.compile_decoding(4, 8, backend=backend)
    places = set()
    for size, length in ((4, 3), (2, 8), (1, 1), (3, 5)):
        prompts = TokenBatch.from_lists([[5] * length] * size)
        generate(lm, prompts, max_new_tokens=6, temperature=0.0)
        with lm.inference():
            state, _ = lm.prefill(prompts, 6)
        places.add(tuple(tensor.data_ptr() for tensor in state.tensors))
    assert len(graphs) == 1
    assert len(places) == 1, "a CUDA graph would be recorded again"


def test_what_cannot_be_compiled_is_said(arch: str) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no compiler")

    lm = make_lm(arch)
    torch.compiler.reset()
    lm.compile_decoding(2, 4, backend=no_compiler)
    prompts = TokenBatch.from_lists([[5]])
    with pytest.raises(InputError, match=r"compile_decode: .*no compiler"):
        generate(lm, prompts, max_new_tokens=4, temperature=0.0)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_log_probabilities_of_samples_are_those_of_plain_transformers(
    arch: str, chunk_size: int
) -> None:
    lm, temperature, limit = make_lm(arch), 0.7, 10
    prompts, _ = ragged(arch)
    uniforms = rollout_uniforms(3, 0, range(len(prompts)), limit)
    made = generate_in_chunks(
        lm, prompts, chunk_size=chunk_size, max_new_tokens=limit, temperature=temperature,
        uniforms=uniforms,
    )  # fmt: skip
    plain = tiny_model(arch).double().eval()
    assert made.logprobs.shape == made.responses.ids.shape
    assert not made.logprobs[~made.responses.mask].any()
    lists = zip(prompts.tolists(), made.responses.tolists(), strict=True)
    for row, (prompt, response) in enumerate(lists):
        logits = plain_logits(arch, plain, prompt, response)[: len(response)] / temperature
        expected = logits.log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(
            made.logprobs[row, : len(response)].double(), expected, atol=1e-4, rtol=1e-4
        )
