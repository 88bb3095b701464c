"""The fused LoRA layer against peft's own forward and autograd."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Conv1D

from rlhf.models.lora import LoRALinear


def make_layer(
    bias: bool, dtype: torch.dtype = torch.float32, dropout: float = 0.0, *, conv: bool = False
) -> Linear:
    torch.manual_seed(0)
    inner = Conv1D(40, 24) if conv else nn.Linear(24, 40, bias=bias)
    nn.init.normal_(inner.weight)
    module = nn.Sequential(inner).to(dtype).requires_grad_(False)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], lora_dropout=dropout, fan_in_fan_out=conv
    )
    layer = get_peft_model(module, config).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def outcome(layer: Linear, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of input, A and B."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return [y, x.grad, *(weight.grad.clone() for weight in weights)]


@pytest.mark.parametrize(("bias", "conv"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
def test_output_and_gradients_are_those_of_peft(
    bias: bool, conv: bool, shape: tuple[int, ...]
) -> None:
    layer = make_layer(bias, conv=conv).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = outcome(layer, x)
    layer.__class__ = LoRALinear
    for ours, theirs in zip(outcome(layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = make_layer(True)
    layer.__class__ = LoRALinear
    layer.double()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    # A and B are fp32 in real life and their gradients are returned so; float64 shows the formula.
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, a, b), atol=1e-5)


def test_bf16_base_with_fp32_adapter_is_near_float32() -> None:
    exact, rounded = make_layer(True), make_layer(True, torch.bfloat16)
    x = torch.randn(64, 24)
    rounded.__class__ = LoRALinear
    expected = outcome(exact, x)
    for ours, theirs in zip(outcome(rounded, x.bfloat16()), expected, strict=True):
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.01
    assert rounded.lora_A["default"].weight.grad.dtype == torch.float32
    assert rounded(x.bfloat16()).dtype == torch.bfloat16


def test_it_computes_again_under_checkpointing() -> None:
    layer = make_layer(False)
    layer.__class__ = LoRALinear
    x = torch.randn(5, 24, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).pow(2).sum().backward()
    again, x.grad = x.grad, None
    layer(x).pow(2).sum().backward()
    assert torch.equal(again, x.grad)


def test_dropout_of_an_adapter_still_acts() -> None:
    layer = make_layer(False, dropout=0.5)
    layer.__class__ = LoRALinear
    x = torch.randn(5, 24)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_no_adapter_means_the_base_alone() -> None:
    layer = make_layer(True)
    layer.__class__ = LoRALinear
    x = torch.randn(5, 24)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_that_were_cast_before_give_the_same(dtype: torch.dtype, conv: bool) -> None:
    layer = make_layer(True, dtype, conv=conv)
    layer.__class__ = LoRALinear
    x = torch.randn(6, 1, 24).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        layer.prepare("default")
        assert layer.low_rank[0].dtype == dtype
        ours = layer(x)
        layer.low_rank = None
        assert torch.equal(layer(x), expected)
    assert ours.shape == expected.shape
    # The same products with one more rounding of each factor: 2^-24 in float32, 2^-9 in bfloat16.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("conv", [False, True])
def test_a_merged_weight_is_stored_as_the_base_and_computes_as_peft_merges(conv: bool) -> None:
    layer = make_layer(True, conv=conv)
    layer.__class__ = LoRALinear
    x = torch.randn(6, 24)
    ours = layer.merged_weight("default", torch.float32, torch.device("cpu"))
    layer.merging = "default"
    merging = layer(x)
    layer.merging = None
    layer.__class__ = Linear
    layer.merge()
    torch.testing.assert_close(ours, layer.base_layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merging, layer(x), rtol=1e-5, atol=1e-5)
