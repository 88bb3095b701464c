"""The T5/LLaMA seam against plain transformers, row by row and without padding."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.language_models import EOS, LORA, PAD, make_lm, plain_logits, ragged
from support.numerics import assert_same_gradients
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch import Tensor

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError
from rlhf.models import logprobs
from rlhf.models.families import FAMILIES
from rlhf.models.language_model import LanguageModel
from rlhf.models.weights import loaded_fingerprint


@pytest.mark.parametrize("untied", [False, True])
@torch.no_grad()
def test_states_give_the_logits_of_plain_transformers(arch: str, untied: bool) -> None:
    lm = make_lm(arch, untied=untied)
    plain = tiny_model(arch, untied=untied).eval()
    prompts, responses = ragged(arch)
    logits = lm.logits(lm.response_states(prompts, responses))
    for i, (prompt, response) in enumerate(
        zip(prompts.tolists(), responses.tolists(), strict=True)
    ):
        expected = plain_logits(arch, plain, prompt, response)
        torch.testing.assert_close(logits[i, : len(response) + 1], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_logprobs_and_entropy_against_float64(arch: str) -> None:
    lm = make_lm(arch)
    plain = tiny_model(arch).eval()
    prompts, responses = ragged(arch)
    states = lm.response_states(prompts, responses)
    stats = lm.token_logprobs(states, responses, temperature=0.7, entropy=True)
    for i, (prompt, response) in enumerate(
        zip(prompts.tolists(), responses.tolists(), strict=True)
    ):
        logits = plain_logits(arch, plain, prompt, response)[:-1].double() / 0.7
        p = torch.softmax(logits, -1)
        expected = torch.stack([p[t, token].log() for t, token in enumerate(response)])
        entropy = -(p * p.log()).sum(-1)
        n = len(response)
        torch.testing.assert_close(stats.logprobs[i, :n].double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stats.entropy[i, :n].double(), entropy, atol=1e-4, rtol=1e-4)
        assert not stats.logprobs[i, n:].any()
        assert not stats.entropy[i, n:].any()


@torch.no_grad()
def test_decoding_step_by_step_is_one_forward(arch: str) -> None:
    lm = make_lm(arch)
    prompts, _ = ragged(arch)
    tokens = torch.tensor([[20, 21, 22], [PAD, 23, PAD], [24, EOS[arch], 25], [26, 27, 28]])
    responses = TokenBatch(tokens, torch.full((4,), 3))
    expected = lm.response_states(prompts, responses)
    state, first = lm.prefill(prompts, 4)
    states = [first, *(lm.decode(state, tokens[:, t]) for t in range(3))]
    torch.testing.assert_close(torch.stack(states, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_final_states_and_pairs_are_those_of_single_reads(arch: str, attention: str) -> None:
    lm = make_lm(arch)
    lm.module.set_attn_implementation(attention)
    prompts, first = ragged(arch)
    second = TokenBatch.from_lists([[24, 25, EOS[arch]], [], [26], [27, 28, 29, 30, 31, 32]])
    lm.add_adapter("reward", LORA)
    randomize_lora(lm, "reward")
    parameters = dict(lm.named_trainable("reward"))
    with lm.using("reward"):
        singles = []
        for responses in (first, second):
            states = lm.response_states(prompts, responses)
            expected = states[torch.arange(len(states)), responses.lengths]
            final = lm.final_states(prompts, responses)
            torch.testing.assert_close(final, expected, atol=1e-5, rtol=1e-5)
            singles.append(expected)
        pairs = lm.final_states(
            prompts, TokenBatch.concat([first, second]), torch.arange(len(first)).repeat(2)
        ).chunk(2)
        weights = torch.randn(2, *expected.shape, generator=torch.Generator().manual_seed(0))
        gradients = [
            torch.autograd.grad((torch.stack(list(states)) * weights).sum(), parameters.values())
            for states in (singles, pairs)
        ]
    for ours, plain in zip(pairs, singles, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    expected_gradients, ours = (dict(zip(parameters, one, strict=True)) for one in gradients)
    assert_same_gradients(ours, expected_gradients)


ROW = st.tuples(
    st.lists(st.integers(0, 119), min_size=1, max_size=9),
    st.lists(st.integers(0, 119), min_size=0, max_size=6),
)


@given(rows=st.lists(ROW, min_size=1, max_size=5), filler=st.integers(0, 119), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("name", ["t5", "llama"])
@torch.no_grad()
def test_padding_batch_size_and_order_change_nothing(
    name: str, rows: list[tuple[list[int], list[int]]], filler: int, data: st.DataObject
) -> None:
    lm = _cached_lm(name)
    order = data.draw(st.permutations(range(len(rows))))

    def pad(lists: list[list[int]]) -> TokenBatch:
        batch = TokenBatch.from_lists(lists)
        extra = data.draw(st.integers(0, 3))
        ids = torch.nn.functional.pad(batch.ids, (0, extra), value=0)
        ids[~TokenBatch(ids, batch.lengths).mask] = filler
        return TokenBatch(ids, batch.lengths)

    prompts, responses = pad([rows[i][0] for i in order]), pad([rows[i][1] for i in order])
    together = lm.response_states(prompts, responses)
    for place, i in enumerate(order):
        alone = lm.response_states(
            TokenBatch.from_lists([rows[i][0]]), TokenBatch.from_lists([rows[i][1]])
        )[0]
        length = len(rows[i][1])
        torch.testing.assert_close(
            together[place, : length + 1], alone[: length + 1], atol=5e-5, rtol=1e-4
        )


_CACHE: dict[str, LanguageModel] = {}


def _cached_lm(arch: str) -> LanguageModel:
    return _CACHE.setdefault(arch, make_lm(arch))


def two_roles(arch: str) -> LanguageModel:
    lm = make_lm(arch)
    lm.add_adapter("policy", LORA, seed=1)
    lm.add_adapter("value", LORA, seed=2)
    lm.add_adapter("reward", LORA, trainable=False, seed=3)
    for seed, name in enumerate(("policy", "value", "reward")):
        randomize_lora(lm, name, seed)
    return lm


def test_switching_restores_adapter_and_flags(arch: str) -> None:
    lm = two_roles(arch)
    flags = {n: p.requires_grad for n, p in lm.module.named_parameters()}
    assert {n for n, on in flags.items() if on} == {
        n for role in ("policy", "value") for n, _ in lm.named_trainable(role)
    }
    with lm.using("policy"):
        with pytest.raises(KeyError), lm.using("value"), lm.using(None), lm.using("reward"):
            lm.using("no such adapter").__enter__()
        assert lm.adapters.active == "policy"
    assert lm.adapters.active is None
    assert {n: p.requires_grad for n, p in lm.module.named_parameters()} == flags


def test_roles_differ_and_the_base_is_the_base(arch: str) -> None:
    lm = two_roles(arch)
    prompts, responses = ragged(arch)
    states = {}
    for role in ("policy", "value", "reward", None):
        with lm.using(role), torch.no_grad():
            states[role] = lm.response_states(prompts, responses)[responses.mask.nonzero().T[0]]
    base = make_lm(arch)
    with torch.no_grad():
        expected = base.response_states(prompts, responses)[responses.mask.nonzero().T[0]]
    assert torch.equal(states[None], expected)
    names = list(states)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.allclose(states[one], states[other], atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_go_to_the_active_role_only(arch: str, checkpointing: bool) -> None:
    lm = two_roles(arch)
    if checkpointing:
        lm.module.gradient_checkpointing_enable({"use_reentrant": False})
    prompts, responses = ragged(arch)
    with lm.using("value"):
        lm.response_states(prompts, responses).square().sum().backward()
    with lm.using("policy"):
        with torch.no_grad(), lm.using(None):
            lm.response_states(prompts, responses)
        loss = lm.token_logprobs(lm.response_states(prompts, responses), responses).logprobs.sum()
        value_gradients = [p.grad.clone() for _, p in lm.named_trainable("value")]
        loss.backward()
    for (_, p), before in zip(lm.named_trainable("value"), value_gradients, strict=True):
        assert torch.equal(p.grad, before)
    assert all(p.grad is not None and p.grad.any() for _, p in lm.named_trainable("policy"))
    others = {n for r in ("policy", "value") for n, _ in lm.named_trainable(r)}
    assert all(p.grad is None for n, p in lm.module.named_parameters() if n not in others)


def policy_gradients(lm: LanguageModel, arch: str, *, entropy: bool = True) -> dict[str, Tensor]:
    prompts, responses = ragged(arch)
    with lm.using("policy"):
        states = lm.response_states(prompts, responses)
        stats = lm.token_logprobs(states, responses, entropy=entropy)
        (stats.logprobs.sum() + 0.1 * stats.entropy.sum()).backward()
    return {name: p.grad for name, p in lm.named_trainable("policy")}


def test_checkpointing_changes_no_gradient(arch: str) -> None:
    plain, recomputed = two_roles(arch), two_roles(arch)
    recomputed.module.gradient_checkpointing_enable({"use_reentrant": False})
    calls = count_calls(recomputed)
    assert_same_gradients(policy_gradients(recomputed, arch), policy_gradients(plain, arch))
    assert max(calls.values()) == 2, "nothing was recomputed"


READS: dict[str, Callable[[LanguageModel, TokenBatch, TokenBatch], Tensor]] = {
    "policy": lambda lm, p, r: lm.token_logprobs(lm.response_states(p, r), r).logprobs,
    "critic": lambda lm, p, r: lm.response_states(p, r),
    "pairs": lambda lm, p, r: lm.final_states(
        p, TokenBatch.concat([r, r]), torch.arange(len(r)).repeat(2)
    ),
}


def kept_and_gradients(
    arch: str, read: str, layers: int, *, checkpointing: bool
) -> tuple[int, dict[str, Tensor]]:
    """Bytes of activations that forward leaves for backward, and what backward makes of them."""
    module = tiny_model(arch, layers=layers)
    lm = FAMILIES[arch](module, make_tokenizer(arch), base_name="tiny")
    for seed, role in enumerate(("policy", "value")):
        lm.add_adapter(role, LORA)
        randomize_lora(lm, role, seed)
    if checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    tokens = torch.arange(3 * 40).view(3, 40) % 97 + 3
    batches = [TokenBatch(part, torch.full((3,), part.shape[1])) for part in tokens.split(24, 1)]
    with lm.using("policy"), lm.using("value"):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = READS[read](lm, *batches)
        total = sum(kept.values())  # recomputing keeps more, a layer at a time
        # Squares would not do: a norm fixes their sum, so that their gradient is rounding alone.
        (states * torch.randn(states.shape)).mean().backward()
    return total, {name: p.grad for name, p in lm.named_trainable("value")}


@pytest.mark.parametrize("read", READS)
def test_checkpointing_keeps_a_layers_input_only(arch: str, read: str) -> None:
    kept = {}
    for layers in (2, 6):
        kept[layers], plain = kept_and_gradients(arch, read, layers, checkpointing=False)
        kept[-layers], recomputed = kept_and_gradients(arch, read, layers, checkpointing=True)
        assert_same_gradients(recomputed, plain)
    # Tokens that a layer reads: the prompt, each response after T5's start or the prompt's last.
    responses = 2 if read == "pairs" else 1
    tokens = (24 if arch == "t5" else 23) + responses * 17
    assert kept[-6] - kept[-2] == 4 * 3 * tokens * 32 * 4
    assert kept[-6] - kept[-2] < (kept[6] - kept[2]) / 8


def test_what_needs_no_gradient_is_never_computed_again(arch: str) -> None:
    lm = two_roles(arch)
    lm.module.gradient_checkpointing_enable({"use_reentrant": False})
    calls = count_calls(lm)
    prompts, responses = ragged(arch)
    with lm.using("policy"), torch.no_grad():
        lm.token_logprobs(lm.response_states(prompts, responses), responses)
    assert set(calls.values()) == {1}


def count_calls(lm: LanguageModel) -> dict[str, int]:
    calls: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        return count

    for name, module in lm.module.named_modules():
        if name.endswith(("self_attn.o_proj", "SelfAttention.o")):
            module.register_forward_hook(hook(name))
    return calls


@pytest.mark.parametrize("entropy", [False, True])
def test_chunks_of_the_lm_head_change_nothing(
    arch: str, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = policy_gradients(two_roles(arch), arch, entropy=entropy)
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 3 * 120)
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK_CPU", 3 * 120)
    chunked = policy_gradients(two_roles(arch), arch, entropy=entropy)
    assert_same_gradients(chunked, whole)


@pytest.mark.parametrize("width", [1.0, 40.0])
def test_gradients_of_logprobs_against_float64(
    arch: str, width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(arch)
    _, responses = ragged(arch)
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK_CPU", 4 * 120)
    random = torch.Generator().manual_seed(0)
    shape = (len(responses), responses.ids.shape[1] + 1, lm.hidden_size)
    states = (width * torch.randn(shape, generator=random)).requires_grad_()
    weights = torch.randn(responses.ids.shape, generator=random)
    ours = lm.token_logprobs(states, responses, 0.7, 1).logprobs
    (gradient,) = torch.autograd.grad((ours * weights).sum(), states)

    exact = states.detach().double().requires_grad_()
    head = lm.module.get_output_embeddings().weight.double()
    logits = lm.scale_for_head(exact[:, :-1]) @ head.T / 0.7
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    forbidden[:, :1, sorted(lm.layout.eos_ids)] = True
    expected = logits.masked_fill(forbidden, -math.inf).log_softmax(-1)
    expected = expected.gather(2, responses.ids[..., None])[..., 0]
    mask = responses.mask & expected.isfinite()  # a response of EOS alone was impossible
    assert mask.sum() > 8
    # Logits round by 6e-8 of their size, which grows with the states; a gradient sums them up.
    rounding = 1e-6 * float(logits.detach().abs().max())
    torch.testing.assert_close(ours[mask].double(), expected[mask], atol=rounding, rtol=0)
    (exact_gradient,) = torch.autograd.grad((expected[mask] * weights[mask]).sum(), exact)
    sure = torch.nn.functional.pad(mask, (0, 1))[..., None]
    limit = rounding * float(exact_gradient.abs().max())
    torch.testing.assert_close(
        (gradient * sure).double(), exact_gradient * sure, atol=limit, rtol=0
    )


def test_logprobs_keep_no_logits(arch: str) -> None:
    lm = make_lm(arch)
    _, responses = ragged(arch)
    shape = (len(responses), responses.ids.shape[1] + 1, lm.hidden_size)
    head, kept = lm.module.get_output_embeddings(), []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != head.weight.data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.token_logprobs(torch.randn(shape).requires_grad_(), responses)
    assert lm.vocab_size > lm.hidden_size
    assert max(kept) <= responses.ids.numel() * lm.hidden_size


def test_dropout_is_off_although_training_mode_is_on(arch: str) -> None:
    lm = make_lm(arch)
    prompts, responses = ragged(arch)
    assert lm.module.training
    with torch.no_grad():
        first = lm.response_states(prompts, responses)
        assert torch.equal(first, lm.response_states(prompts, responses))


def test_gradient_of_the_pad_embedding_is_not_lost() -> None:
    # An untied head, so that the embedding's gradient comes from reading the token alone.
    model = tiny_model("llama", untied=True)
    lm = FAMILIES["llama"](model, make_tokenizer("llama"), trainable=True)
    prompts, responses = ragged("llama")
    states = lm.response_states(prompts, responses)
    (states * torch.randn(states.shape)).sum().backward()
    assert model.get_input_embeddings().weight.grad[PAD].any()


def test_min_response_length_forbids_eos_and_leaves_the_rest(arch: str) -> None:
    lm = make_lm(arch)
    state = torch.randn(4, lm.hidden_size)
    positions = torch.tensor([0, 1, 2, 3])
    free = lm.policy_logits(state, positions, 1.0, 0)
    bound = lm.policy_logits(state, positions, 1.0, 2)
    eos = EOS[arch]
    assert (bound.softmax(-1)[:2, eos] == 0).all()
    assert torch.equal(bound[2:], free[2:])
    others = [i for i in range(120) if i != eos]
    assert torch.equal(bound[:, others], free[:, others])


def test_a_frozen_encoder_reads_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm("t5")
    prompts, responses = ragged("t5")
    for name, where in (("policy", "decoder"), ("value", "decoder"), ("reward", "all")):
        lm.add_adapter(name, LoRAConfig(rank=4, where=where))
        randomize_lora(lm, name)
    expected = {}
    for role in ("policy", "value", "reward", None):
        with lm.using(role):
            expected[role] = lm.response_states(prompts, responses)
    with lm.using("reward"):
        assert lm.with_states(prompts, 2) is prompts
    with lm.using("policy"):
        known = lm.with_states(prompts, 3)
    runs: list[int] = []
    lm.module.encoder.register_forward_hook(lambda *_: runs.append(1))
    rows = [2, 0, 1]
    for role, states in expected.items():
        with lm.using(role):
            again = lm.response_states(known, responses)
            some = lm.response_states(known.select_rows(rows), responses.select_rows(rows))
        mask = torch.nn.functional.pad(responses.mask, (1, 0), value=True)
        torch.testing.assert_close(again[mask], states[mask], atol=1e-5, rtol=1e-5)
        mask = torch.nn.functional.pad(responses.select_rows(rows).mask, (1, 0), value=True)
        torch.testing.assert_close(
            some[mask], states[rows, : mask.shape[1]][mask], atol=1e-5, rtol=1e-5
        )
    assert len(runs) == 2  # the reward adapter's, whose encoder is another


@pytest.mark.parametrize("where", ["decoder", "encoder"])
def test_lora_where(arch: str, where: str) -> None:
    lm = make_lm(arch)
    lora = LoRAConfig(rank=2, where=where)
    if (arch, where) == ("llama", "encoder"):
        with pytest.raises(InputError, match=r"lora\.where"):
            lm.add_adapter("policy", lora)
        return
    lm.add_adapter("policy", lora)
    names = [n for n, _ in lm.named_trainable("policy")]
    assert names
    if arch == "t5":
        assert all(n.startswith(f"{where}.") for n in names)


def test_unknown_target_modules_are_refused(arch: str) -> None:
    with pytest.raises(InputError, match=r"lora\.target_modules"):
        make_lm(arch).add_adapter("policy", LoRAConfig(rank=2, target_modules=["nonsense"]))


def test_default_targets_are_all_linear_layers_but_the_head(arch: str) -> None:
    lm = make_lm(arch)
    linear = {
        n for n, m in lm.module.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    lm.add_adapter("policy", LORA)
    adapted = {n.split(".lora_")[0] for n, _ in lm.named_trainable("policy")}
    assert adapted == linear


def test_copied_adapter_has_the_same_values_and_its_own_tensors(arch: str) -> None:
    lm = two_roles(arch)
    lm.adapters.duplicate("reward", "copy", trainable=True)
    for (_, a), (_, b) in zip(
        lm.named_trainable("reward"), lm.named_trainable("copy"), strict=True
    ):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert (a.requires_grad, b.requires_grad) == (False, True)


def test_adapter_seed_decides_its_values(arch: str) -> None:
    def values(seed: int) -> list[Tensor]:
        lm = make_lm(arch)
        lm.add_adapter("policy", LORA, seed=seed)
        return [p.detach() for _, p in lm.named_trainable("policy")]

    assert all(map(torch.equal, values(1), values(1)))
    assert not all(map(torch.equal, values(1), values(2)))


def test_fingerprint_survives_bf16_and_sees_a_change(arch: str) -> None:
    model = tiny_model(arch)
    first = loaded_fingerprint(model)
    assert loaded_fingerprint(copy.deepcopy(model).bfloat16()) == first
    assert loaded_fingerprint(tiny_model(arch, seed=1)) != first


@torch.no_grad()
def test_bf16_base_with_fp32_adapters(arch: str) -> None:
    lm = FAMILIES[arch](
        tiny_model(arch).bfloat16(), make_tokenizer(arch), dtype=torch.bfloat16, base_name="tiny"
    )
    lm.add_adapter("policy", LORA)
    randomize_lora(lm, "policy")
    assert {p.dtype for _, p in lm.named_trainable("policy")} == {torch.float32}
    prompts, responses = ragged(arch)
    exact = two_roles(arch)
    with lm.using(None):
        states = lm.response_states(prompts, responses)
        assert states.dtype == torch.bfloat16
        logprobs = lm.token_logprobs(states, responses).logprobs
    assert logprobs.dtype == torch.float32
    expected = exact.token_logprobs(exact.response_states(prompts, responses), responses).logprobs
    torch.testing.assert_close(logprobs, expected, atol=0.3, rtol=0.1)


def test_full_fine_tuning_in_bf16_keeps_fp32_weights_and_computes_in_bf16(arch: str) -> None:
    lm = FAMILIES[arch](
        tiny_model(arch), make_tokenizer(arch), dtype=torch.bfloat16, trainable=True
    )
    prompts, responses = ragged(arch)
    seen = set()
    for module in lm.module.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    stats = lm.token_logprobs(lm.response_states(prompts, responses), responses)
    stats.logprobs.sum().backward()
    assert seen == {torch.bfloat16}
    assert {p.dtype for _, p in lm.named_trainable(None)} == {torch.float32}
    assert all(p.grad is not None for _, p in lm.named_trainable(None))
