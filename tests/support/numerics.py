"""What "the same numbers" means when sums are taken in another order."""

from collections.abc import Mapping

from torch import Tensor


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
