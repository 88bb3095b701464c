"""What decoder families refuse, and what only some of their models have."""

import copy
from typing import Any

import pytest
import torch
from support.families import draw_model, language_model, model_of, plain_logprobs
from support.tiny import make_tokenizer
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from rlhf.config import InferenceConfig, StageConfig
from rlhf.data.batching import TokenBatch
from rlhf.errors import InputError
from rlhf.models.checkpoint_files import check_config
from rlhf.models.families import family_of
from rlhf.models.generation import generate, rollout_uniforms
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import check_limits, load_language_model
from rlhf.models.memory import count_parameters, memory_per_role

SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
DECODERS = [
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3",
    "smollm3",
]  # fmt: skip
KINDS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Qwen2Config(**SIZES, layer_types=["chunked_attention"] * 2), "chunked_attention is not"),
        (Qwen2Config(**SIZES, layer_types=KINDS), "sliding_attention needs a sliding_window"),
        (
            Qwen2Config(**SIZES, layer_types=KINDS, use_sliding_window=True, sliding_window=0),
            "sliding_window: expected 1 to",
        ),
        (Gemma2Config(**SIZES, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), "use_bidirectional_attenti"),
    ],
)
def test_what_no_family_computes_is_refused_before_weights_are_loaded(
    config: PretrainedConfig, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_config(config, family_of(config), "base_model: x")


def test_a_model_that_rotates_by_two_tables_is_read_up_to_where_the_second_begins() -> None:
    config = next(
        config
        for config in (draw_model("phi3", seed).config for seed in range(20))
        if config.rope_parameters["rope_type"] == "longrope"
    )
    assert check_limits(config, 20, 4) == []
    (problem,) = check_limits(config, 20, 5)
    assert "20 + target_sequence_length 5 exceed the first 24 positions" in problem
    plain = {"rope_type": "default", "rope_theta": 100.0}
    by_layer = draw_model("gemma3_text", 0).config
    by_layer.rope_parameters = {KINDS[0]: config.rope_parameters, KINDS[1]: plain}
    assert check_limits(by_layer, 20, 4) == []
    assert check_limits(by_layer, 20, 5) == [problem]
    config.rope_parameters = plain
    assert check_limits(config, 40, 8) == []
    (problem,) = check_limits(config, 41, 8)
    assert "the 48 positions of the model" in problem


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "qwen2", "smollm3"])
def test_the_memory_of_the_cache_is_known_before_loading(family: str) -> None:
    model = draw_model(family, 2)
    config = InferenceConfig(
        policy_path="p", eval_dataset="d", output_dir="x", device="cpu", dtype="float32",
        batch_size=2, prompt_sequence_length=5, target_sequence_length=7,
    )  # fmt: skip
    state, _ = language_model(model).prefill(TokenBatch.from_lists([[5] * 5] * 2), 7)
    layers = (*state.keys, *state.values, *state.prompt_keys, *state.prompt_values)
    real = sum(layer.numel() * 4 for layer in layers)
    assert memory_per_role(model.config, config)["cache"] == real
    counted = count_parameters(model.config).base
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def load(family: str, dtype: str, *, trainable: bool, seed: int = 0) -> LanguageModel:
    config = StageConfig(output_dir="x", device="cpu", dtype=dtype)
    model = draw_model(family, seed)
    return load_language_model(
        config, model=model, tokenizer=make_tokenizer("llama"), trainable=trainable
    )


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_models_are_loaded_and_trained(family: str, trainable: bool) -> None:
    """Loading compares them with transformers; the loss and its gradients are finite."""
    lm = load(family, "bfloat16", trainable=trainable, seed=3)
    rows = TokenBatch.from_lists([[5, 6, 7], [8]]), TokenBatch.from_lists([[9, 2], [10]])
    stats = lm.token_logprobs(lm.response_states(*rows), rows[1])
    assert torch.isfinite(stats.logprobs).all()
    if trainable:
        stats.logprobs.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in lm.module.parameters())


def test_frequencies_of_both_kinds_of_layers_are_exact() -> None:
    """A model cast as a whole has frequencies in bfloat16, which would turn far positions."""
    model = draw_model("gemma3_text", 0)
    expected = {n: b.clone() for n, b in model.named_buffers() if "inv_freq" in n}
    assert expected
    config = StageConfig(output_dir="x", device="cpu", dtype="float32")
    lm = load_language_model(
        config, model=model.bfloat16(), tokenizer=make_tokenizer("llama"), trainable=False
    )
    for name, buffer in lm.module.named_buffers():
        if name in expected:
            assert torch.equal(buffer, expected[name])


@torch.no_grad()
def test_rows_that_leave_early_take_their_prompts_along() -> None:
    """A fifth of all ids end a response; the others still see what is in their window."""
    model = model_of(MistralConfig(**SIZES, sliding_window=5), 0)
    model.generation_config.eos_token_id = list(range(2, 120, 5))
    plain = copy.deepcopy(model)
    lm = language_model(model)
    prompts = [[5, 6, 7, 8, 9, 10], [13], [14, 15, 16], [17, 18]]
    groups = [3, 0, 1, 0, 2, 1, 3, 2]
    made = generate(
        lm, TokenBatch.from_lists(prompts), groups=torch.tensor(groups), max_new_tokens=10,
        temperature=1.0, uniforms=rollout_uniforms(0, 0, range(8), 10),
    )  # fmt: skip
    assert len(set(made.responses.lengths.tolist())) > 3
    for row, (group, response) in enumerate(zip(groups, made.responses.tolists(), strict=True)):
        expected = plain_logprobs(plain, prompts[group], response)
        ours = made.logprobs[row, : len(response)]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_compiled_step_has_windows_and_caps_too() -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = Gemma2Config(
        **SIZES, head_dim=8, sliding_window=3, layer_types=KINDS, attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0, query_pre_attn_scalar=8, rope_parameters=rope,
    )  # fmt: skip
    plain, compiled = (language_model(model_of(config, 0)) for _ in range(2))
    torch.compiler.reset()
    compiled.compile_decoding(3, 8, backend="eager")
    prompts = TokenBatch.from_lists([[5, 6, 7, 8, 9, 10, 11, 12], [13], [14, 15]])
    options = {"max_new_tokens": 8, "temperature": 0.0}
    expected, made = (generate(lm, prompts, **options) for lm in (plain, compiled))
    assert made.responses.tolists() == expected.responses.tolists()
    torch.testing.assert_close(made.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
