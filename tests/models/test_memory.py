"""What a dry run says about memory, against models that really exist."""

import pytest
import torch

from rlhf.config import DPOConfig, LoRAConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf.models.memory import (
    count_parameters,
    memory_per_role,
    total_memory,
)

PPO = {"output_dir": "out", "prompt_dataset": "rows", "dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(rank=3),
        LoRAConfig(rank=2, where="decoder"),
    ],
)
def test_counts_are_those_of_the_real_model(tiny_lm, lora):
    real = sum(parameter.numel() for parameter in tiny_lm.module.parameters())
    counts = count_parameters(tiny_lm.config, lora)
    tiny_lm.add_adapter("policy", lora)
    adapter = sum(tensor.numel() for _, tensor in tiny_lm.named_trainable("policy"))
    assert (counts.base, counts.adapter) == (real, adapter)
    assert counts.head == tiny_lm.hidden_size


def test_roles_share_one_base_with_lora_and_not_under_full_fine_tuning(tiny_lm):
    counts = count_parameters(tiny_lm.config, LoRAConfig(rank=4))
    shared = memory_per_role(
        tiny_lm.config, PPOConfig(**PPO, lora={"rank": 4}, reward_model_path="scorer")
    )
    assert shared["frozen base"] == 4 * counts.base
    # fp32 weight, gradient and two moments
    assert shared["policy adapter"] == 16 * counts.adapter
    assert shared["critic"] == 16 * (counts.adapter + counts.head)
    assert shared["reward adapter"] == 4 * (counts.adapter + counts.head)

    full = memory_per_role(tiny_lm.config, PPOConfig(**PPO, lora={"rank": 0}))
    assert full["frozen base"] == 4 * counts.base
    assert full["policy"] == 16 * counts.base
    assert full["critic"] == 16 * (counts.base + counts.head)
    alone = {"lora": {"rank": 0}, "kl_coeff": 0, "critic": "head"}
    alone_roles = memory_per_role(tiny_lm.config, PPOConfig(**PPO, **alone))
    assert "frozen base" not in alone_roles
    assert alone_roles["critic"] == 16 * counts.head


def test_the_reference_of_dpo_is_a_second_model_under_full_fine_tuning_only(tiny_lm):
    counts = count_parameters(tiny_lm.config, LoRAConfig(rank=4))
    common = {"output_dir": "out", "dtype": "float32", "device": "cpu"}
    dpo = DPOConfig(**common, preference_dataset="rows", lora={"rank": 4})
    shared = memory_per_role(tiny_lm.config, dpo)
    assert shared["frozen base"] == 4 * counts.base
    assert shared["policy adapter"] == 16 * counts.adapter
    full = DPOConfig(**common, preference_dataset="rows", lora={"rank": 0})
    separate = memory_per_role(tiny_lm.config, full)
    assert separate["frozen base"] == 4 * counts.base
    assert separate["trained weights"] == 16 * counts.base
    # As many tokens in a pass, those of a prompt once for both responses of a pair.
    sft = memory_per_role(tiny_lm.config, SFTConfig(**common, dataset="rows", lora={"rank": 4}))
    assert sft["activations"] / 2 < shared["activations"] <= 2 * sft["activations"]


def test_cache_is_that_of_a_real_generation(tiny_lm):
    from rlhf.data.batching import TokenBatch

    rows, prompt, response = 3, 5, 7
    config = PPOConfig(
        **PPO,
        batch_size=rows,
        prompt_sequence_length=prompt,
        target_sequence_length=response,
    )
    state, _ = tiny_lm.prefill(TokenBatch.from_lists([[5] * prompt] * rows), response)
    layers = (*state.keys, *state.values, *state.prompt_keys, *state.prompt_values)
    real = sum(layer.numel() * 4 for layer in layers)
    expected = memory_per_role(tiny_lm.config, config)["cache"]
    assert abs(expected - real) <= 0.15 * real  # one token more or less per row


def test_every_knob_for_memory_lowers_the_estimate(tiny_lm):
    def of(**fields):
        return memory_per_role(tiny_lm.config, PPOConfig(**PPO, **fields))

    usual = of()
    assert of(micro_batch_size=2)["activations"] < usual["activations"]
    assert of(gradient_checkpointing=True)["activations"] < usual["activations"]
    assert of(rollout_batch_size=8)["cache"] == usual["cache"] / 8
    kept = of(compile_decode=True)  # through the update, so it is there together with activations
    assert total_memory(kept) > total_memory(usual)
    reward = RewardModelConfig(
        output_dir="out", preference_dataset="rows", device="cpu", dtype="bfloat16"
    )
    roles = memory_per_role(tiny_lm.config, reward)
    assert roles["frozen base"] == usual["frozen base"] / 2
    assert "cache" not in roles


def test_table_ends_with_the_peak():
    roles = {"frozen base": 3 * 2**30, "activations": 2**30, "cache": 2**29}
    assert total_memory(roles) == 4 * 2**30


def test_activations_are_about_what_autograd_keeps(tiny_lm):
    from rlhf.data.batching import TokenBatch

    rows, prompt, response = 4, 64, 32
    config = PPOConfig(
        **PPO,
        lora={"rank": 1},
        micro_batch_size=rows,
        prompt_sequence_length=prompt,
        target_sequence_length=response,
    )
    tiny_lm.add_adapter("policy", config.lora)
    weights = {tensor.untyped_storage().data_ptr() for tensor in tiny_lm.module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    prompts = TokenBatch.from_lists([[5] * prompt] * rows)
    responses = TokenBatch.from_lists([[6] * response] * rows)
    with (
        tiny_lm.using("policy"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        tiny_lm.token_logprobs(tiny_lm.response_states(prompts, responses), responses)
    real = sum(size for _, size in kept.values())
    assert 0.5 < memory_per_role(tiny_lm.config, config)["activations"] / real < 2
