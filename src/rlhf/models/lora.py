"""LoRA's arithmetic, y = xWᵀ + s·(xAᵀ)Bᵀ, without passes over tensors as large as y.

peft's own forward multiplies and adds whole outputs and keeps them for backward; at rank 8, these
passes over memory take longer than the product with W.

GPT-2 keeps its weights transposed (`Conv1D`), which peft calls `fan_in_fan_out`.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

# How many numbers of a weight are summed in fp32 at once.
MERGED_AT_ONCE = 2**22


class _LoRAProduct(Function):
    """Gradients go to x, A and B; W and its bias are frozen."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        # (T, in), (out, in), (out,), (r, in), (out, r); A and B are fp32, the rest may be bf16.
        a_used, b_used = a.to(x.dtype), b.to(x.dtype)
        inner = (x @ a_used.t()).mul_(scale)
        ctx.save_for_backward(x, weight, a_used, b_used, inner)
        ctx.scale, ctx.kept = scale, a.dtype
        return torch.nn.functional.linear(x, weight, bias).addmm_(inner, b_used.t())

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        (g,) = gradients
        of_inner = (g @ b).mul_(ctx.scale)
        of_x = (g @ weight).addmm_(of_inner, a) if ctx.needs_input_grad[0] else None
        of_a = (of_inner.t() @ x).to(ctx.kept) if ctx.needs_input_grad[3] else None
        of_b = (inner.t() @ g).t().to(ctx.kept) if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None


class LoRALinear(Linear):
    """peft's linear layer with adapters, computed by `_LoRAProduct` where that applies.

    Attributes:
        low_rank: Aᵀ (in, r) and s·Bᵀ (r, out) of the active adapter in the base's dtype, while
            responses are decoded; else None.
        merging: The adapter that each forward pass merges into a copy of the weight; else None.
    """

    low_rank: tuple[Tensor, Tensor] | None = None
    merging: str | None = None

    def _as_stored(self, weight: Tensor) -> Tensor:
        """Turn (out, in) into the orientation in which the base layer keeps its weight, or back."""
        return weight.t() if self.fan_in_fan_out else weight

    def prepare(self, name: str) -> None:
        """Cast an adapter once for many calls without gradients, until `low_rank` is None."""
        dtype = self.base_layer.weight.dtype
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        self.low_rank = a.to(dtype).t(), (b * self.scaling[name]).to(dtype).t()

    def merged_weight(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the weight, as it is stored, with an adapter added, summed in fp32 and cast once.

        Works on one block of rows at a time, so that the fp32 sums take little memory.
        """
        weight, scale = self.base_layer.weight.detach(), self.scaling[name]
        a = self.lora_A[name].weight.detach().to(device, torch.float32)
        b = self.lora_B[name].weight.detach().to(device, torch.float32)
        left, right = (a.t(), b.t()) if self.fan_in_fan_out else (b, a)
        merged = torch.empty(weight.shape, dtype=dtype, device=device)
        rows = max(1, MERGED_AT_ONCE // weight.shape[1])
        parts = zip(merged.split(rows), weight.split(rows), left.split(rows), strict=True)
        for target, old, low in parts:
            target.copy_(old.to(device, torch.float32) + (low @ right).mul_(scale))
        return merged

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merging is not None:
            weight = self.base_layer.weight
            weight = self.merged_weight(self.merging, weight.dtype, weight.device)
            return torch.nn.functional.linear(x, self._as_stored(weight), self.base_layer.bias)
        if self.low_rank is not None:
            a, b = self.low_rank
            flat = x.reshape(-1, x.shape[-1])
            return self.base_layer(flat).addmm_(flat @ a, b).view(*x.shape[:-1], -1)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not names:
            return self.base_layer(x)
        name = names[0]
        if len(names) > 1 or not isinstance(self.lora_dropout[name], torch.nn.Identity):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        weight = self._as_stored(base.weight)
        product = _LoRAProduct.apply(flat, weight, base.bias, a, b, self.scaling[name])
        return product.view(*x.shape[:-1], -1)
