"""RMSNorm with its own backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override


class _RMSNorm(Function):
    """Zhang and Sennrich 2019: y = w·x̂ with x̂ = x·s and s = (mean x² + ε)^−½.

    The gradient flows to x only. Forward matches transformers bit for bit; autograd would go back
    through it step by step, with a float32 tensor as large as x for each step.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(dtype)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # float32, like the scale
        g = gradients[0] * weight.float()
        along = (g * normed).mean(-1, keepdim=True)
        return g.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), None, None, None


def _plain(norm: Any) -> bool:
    """Return whether transformers' own forward will do: no backward, or the weight trains too."""
    return norm.weight.requires_grad or not torch.is_grad_enabled()


class _Llama(nn.Module):
    @override
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _plain(self):
            return super().forward(hidden_states)
        return _RMSNorm.apply(
            hidden_states, self.weight, self.variance_epsilon, hidden_states.dtype
        )


class _T5(nn.Module):
    @override
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _plain(self):
            return super().forward(hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.weight.dtype)


class _Gemma(nn.Module):
    """The weight is what is added to 1, and multiplies before the cast to the input's dtype."""

    @override
    def forward(self: Any, x: Tensor) -> Tensor:
        if _plain(self):
            return super().forward(x)
        return _RMSNorm.apply(x, 1.0 + self.weight.float(), self.eps, torch.float32).type_as(x)


# How each class of transformers computes its norm; by name, so that no model's code is imported.
KINDS: dict[str, type[nn.Module]] = {
    "Gemma2RMSNorm": _Gemma,
    "Gemma3RMSNorm": _Gemma,
    "LlamaRMSNorm": _Llama,
    "LongT5LayerNorm": _T5,
    "MT5LayerNorm": _T5,
    "MistralRMSNorm": _Llama,
    "Phi3RMSNorm": _Llama,
    "Qwen2RMSNorm": _Llama,
    "Qwen3RMSNorm": _Llama,
    "SmolLM3RMSNorm": _Llama,
    "T5LayerNorm": _T5,
    "UMT5LayerNorm": _T5,
}


_FASTER: dict[type[nn.Module], type[nn.Module]] = {}


def faster(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class with this module's backward pass for a class of transformers' norms.

    All other classes, also those that share a name with one of these, are returned as they are.
    """
    if kind.__name__ not in KINDS or not kind.__module__.startswith("transformers.models."):
        return kind
    if kind not in _FASTER:
        _FASTER[kind] = type(f"Faster{kind.__name__}", (KINDS[kind.__name__], kind), {})
    return _FASTER[kind]


def use_faster_norms(module: nn.Module) -> None:
    """Give the model's norms this module's backward pass; their weights stay as they are."""
    for part in module.modules():
        part.__class__ = faster(type(part))
