"""What a trainer does differently when it is one of several processes; here there is only one.

A trainer in which each process takes a share of every batch overrides `is_main` and `reduce`, and
wraps the models so that their gradients are summed.
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
        """Combine each value over all processes; with a single process, return the values.

        No decision depends on one process's values alone. Everything shared goes through here:
        the counts that losses are divided by, the moments of whitening, KL and ratio of a
        minibatch, the KL that adapts its coefficient, which gradients are not finite, requests to
        stop between steps, and metrics. There are two exceptions: gradients, and a request to
        stop inside a step (`stop_point`), which one of several processes must ignore because the
        others would wait for it.

        Args:
            values: Any shape and type, on any device.
            how: How to combine the processes' values, element by element.
        """
        del how
        return values

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each metric over all processes."""
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        return dict(zip(metrics, self.reduce(values, "mean").tolist(), strict=True))
