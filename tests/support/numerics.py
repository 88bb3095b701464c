"""What "the same numbers" means where sums are taken in another order."""

from collections.abc import Mapping

from torch import Tensor


def assert_same_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Gradients in float32 that are equal but for the order of their sums.

    An entry whose terms nearly cancel keeps the rounding of those terms, 6e-8 of each, so that its
    own error may have any size beside it. Errors are held against the whole tensor, and where all
    of its entries cancel against all tensors. A bound of 1e-5 is more than a hundred roundings and
    far less than a row, a token or a factor that went missing.
    """
    assert actual.keys() == expected.keys()
    total = sum(float(tensor.double().square().sum()) for tensor in expected.values()) ** 0.5
    assert total > 0
    for name, tensor in expected.items():
        error = float((actual[name].double() - tensor.double()).norm())
        assert error <= 1e-5 * float(tensor.double().norm()) + 1e-6 * total, name
