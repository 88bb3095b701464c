"""RMSNorm with its own backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from rlhf.models.compat import LlamaRMSNorm, T5LayerNorm


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


def _plain(norm: LlamaRMSNorm | T5LayerNorm) -> bool:
    """Return whether transformers' own forward will do: no backward, or the weight trains too."""
    return norm.weight.requires_grad or not torch.is_grad_enabled()


class _LlamaNorm(LlamaRMSNorm):
    @override
    def forward(self, hidden_states: Tensor) -> Tensor:
        if _plain(self):
            return super().forward(hidden_states)
        return _RMSNorm.apply(
            hidden_states, self.weight, self.variance_epsilon, hidden_states.dtype
        )


class _T5Norm(T5LayerNorm):
    @override
    def forward(self, hidden_states: Tensor) -> Tensor:
        if _plain(self):
            return super().forward(hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.weight.dtype)


FASTER: dict[type[nn.Module], type[nn.Module]] = {LlamaRMSNorm: _LlamaNorm, T5LayerNorm: _T5Norm}


def use_faster_norms(module: nn.Module) -> None:
    """Give the model's norms this module's backward pass; their weights stay as they are."""
    for part in module.modules():
        part.__class__ = FASTER.get(type(part), type(part))
