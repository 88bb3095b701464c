"""What "the same numbers" means when sums are taken in another order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def assert_same_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that float32 gradients are equal except for the order of their sums.

    An entry whose terms nearly cancel keeps the rounding error of those terms, 6e-8 of each, so its
    relative error is unbounded. Errors are therefore compared with the whole tensor or, if all of
    its entries cancel, with all tensors. The bound of 1e-5 is more than a hundred rounding errors,
    and far less than a missing row, token or factor.
    """
    assert actual.keys() == expected.keys()
    total = sum(float(tensor.double().square().sum()) for tensor in expected.values()) ** 0.5
    assert total > 0
    for name, tensor in expected.items():
        error = float((actual[name].double() - tensor.double()).norm())
        assert error <= 1e-5 * float(tensor.double().norm()) + 1e-6 * total, name


class InFloat64(TorchFunctionMode):
    """Compute in float64 throughout, also where code asks for float32, as norms and softmax do.

    What is left of the difference between two ways of computing the same is below 1e-12, so a real
    difference cannot hide in rounding.
    """

    def __enter__(self) -> "InFloat64":
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._before)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        given = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **given)
