"""Decoding against transformers' own generate(), sampling against the distribution."""

import pytest
import torch
from test_language_model import EOS, make_lm, ragged
from tiny import randomise_lora, tiny_model
from torch import Tensor

from rlhf import generation
from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.generation import generate, generate_in_chunks, rollout_uniforms, sample
from rlhf.models.language_model import DecodeState


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
    randomise_lora(lm, "policy", std=0.3)
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
    shuffled = generate(lm, prompts.select(order), max_new_tokens=10, uniforms=uniforms[order])
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
