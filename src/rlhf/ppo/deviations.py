"""Metrics of a PPO step that reveal an update that does not see the policy that sampled."""

from collections.abc import Mapping

# The first ratios of a step are 1 up to rounding; float32 stays below this.
RATIO_TOLERANCE = 1e-4
# Decoding sums in a different order than the update; float32 stays below this.
DECODE_TOLERANCE = 1e-3


def deviation_warnings(metrics: Mapping[str, float], *, exact: bool) -> dict[str, str]:
    """Return the warnings to give, by name of the deviation.

    Args:
        metrics: Metrics of a step.
        exact: Whether the policy computes in float32.
    """
    warnings = {}
    cause = "a bug: please report it" if exact else "rounding in bfloat16; float32 has none"
    deviation = metrics["ppo/ratio_first"]
    if not deviation < RATIO_TOLERANCE:
        warnings["ratio"] = (
            f"the first probability ratios are off 1 by up to {deviation:.2g} ({cause})"
        )
    deviation = metrics["ppo/decode_deviation"]
    if exact and not deviation < DECODE_TOLERANCE:
        warnings["decode"] = (
            f"ppo/decode_deviation is {deviation:.2g}: responses were sampled from "
            "another distribution than the one that is trained (a bug: please report it)"
        )
    return warnings
