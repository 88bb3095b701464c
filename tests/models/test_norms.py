"""RMSNorm's own backward pass against transformers' forward and float64's autograd."""

import importlib

import pytest
import torch
from support.families import draw_model
from support.tiny import tiny_model
from torch import Tensor, nn

from rlhf.models.norms import KINDS, faster, use_faster_norms


def class_of(name: str) -> type[nn.Module]:
    """Find transformers' class."""
    model = name.removesuffix("RMSNorm").removesuffix("LayerNorm").lower()
    kind: type[nn.Module] = getattr(
        importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name
    )
    return kind


def make_norms(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Transformers' norm and ours, of the same frozen weight."""
    norms = [class_of(name)(48, eps=1e-4).to(dtype).requires_grad_(False) for _ in range(2)]
    weight = torch.randn(48, generator=torch.Generator().manual_seed(1)) + 1
    for norm in norms:
        norm.weight.copy_(weight)
    use_faster_norms(norms[1])
    assert type(norms[1]) is not class_of(name)
    return norms[0], norms[1]


def exact_gradient(norm: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """By float64's autograd through the formula."""
    x = x.detach().double().requires_grad_()
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt()
    factor = norm.weight.double() + (1 if "Gemma" in type(norm).__name__ else 0)
    (gradient,) = torch.autograd.grad(normed * factor, x, g.double())
    return gradient


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_norms_are_those_of_transformers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs, ours = make_norms(name, dtype)
    random = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 5, 48, generator=random).to(dtype) for _ in range(2))
    x[0, 0] *= 1e-3  # here ε counts
    x.requires_grad_()
    output = ours(x)
    assert torch.equal(output, theirs(x))
    (gradient,) = torch.autograd.grad(output, x, g)
    assert gradient.dtype == dtype
    expected = exact_gradient(theirs, x, g)
    error = (gradient.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < tolerance


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_that_is_trained_gets_its_gradient(name: str) -> None:
    theirs, ours = make_norms(name, torch.float32)
    x = torch.randn(3, 5, 48)
    gradients = []
    for norm in (theirs, ours):
        norm.requires_grad_(True)
        (gradient,) = torch.autograd.grad(norm(x).square().sum(), norm.weight)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def test_all_norms_of_a_model_are_found(arch: str) -> None:
    model = tiny_model(arch)
    before = model.state_dict().keys()
    use_faster_norms(model)
    kinds = [type(part) for part in model.modules() if "Norm" in type(part).__name__]
    assert len(kinds) >= 5
    assert set(kinds) == {faster(class_of({"llama": "LlamaRMSNorm", "t5": "T5LayerNorm"}[arch]))}
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "phi3", "qwen3", "smollm3"])
def test_no_norm_of_a_family_is_left_as_it_was(family: str) -> None:
    model = draw_model(family, 0)
    use_faster_norms(model)
    kinds = {type(part).__name__ for part in model.modules() if "Norm" in type(part).__name__}
    assert all(kind.startswith("Faster") for kind in kinds)


def test_a_norm_from_elsewhere_keeps_its_own_pass() -> None:
    class LlamaRMSNorm(nn.Module):
        pass

    assert faster(LlamaRMSNorm) is LlamaRMSNorm
