"""What a trainer does differently where it is one of several processes; here it is the only one.

Another way to train, with each process taking a part of every batch, overrides `is_main` and
`reduce` and wraps the models so that their gradients add up.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


class Processes:
    """The only process of a run."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs, publishes, exports and calls callbacks."""
        return True

    def reduce(self, values: Tensor, how: Literal["sum", "mean", "max"] = "sum") -> Tensor:
        """Combine each of the values over all processes; in the only process, return them.

        Nothing decides on values of one process alone. Through here go the counts that losses are
        divided by, moments of whitening, KL and ratio of a minibatch, the KL that adapts its
        coefficient, which gradients are not finite, requests to stop between steps, and metrics.
        Two things do not: gradients, and a request to stop inside a step (`stop_point`), on which
        one of several processes must not act, since the others would wait for it.

        Args:
            values: Any shape and type, on any device.
            how: What to do with the values of the processes, element by element.
        """
        del how
        return values

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics' means over all processes."""
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        return dict(zip(metrics, self.reduce(values, "mean").tolist(), strict=True))
