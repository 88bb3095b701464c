"""The losses of pairs of responses."""

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Bradley–Terry loss of each pair, −log σ(r_c − r_r − margin) + c·(r_c + r_r)².

    Ouyang et al. 2022, eq. 1; margin after Touvron et al. 2023, eq. 2; centering term after
    Eisenstein et al. 2023, because the first term does not determine the overall level of scores.

    Args:
        chosen: (B,) scores of the preferred responses.
        rejected: (B,) scores of the others.
        margin: (B,) minimum by which the chosen response should win.
        centering: Weight c of the centering term.

    Returns:
        (B,) losses.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + centering * (chosen + rejected) ** 2


def dpo_loss(log_ratios: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return −(1−ε) log σ(βh) − ε log σ(−βh) of each pair, with h from its responses.

    h = log π(y_c|x)/π_ref(y_c|x) − log π(y_r|x)/π_ref(y_r|x). Rafailov et al. 2023, eq. 7; with ε,
    the share of choices that are wrong, it is conservative DPO (Mitchell 2023, "A note on DPO with
    noisy preferences").

    Args:
        log_ratios: (B,) h, nats.
        beta: β.
        label_smoothing: ε.

    Returns:
        (B,) losses, nats.
    """
    margin = beta * log_ratios
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(log_ratios: Tensor, beta: float) -> Tensor:
    """Return (h − 1/(2τ))² of each pair (Azar et al. 2023, eq. 17), with `dpo_loss`'s h and τ = β.

    Log-probabilities are sums over a response's tokens, as in the paper, not means.

    Args:
        log_ratios: (B,) h, nats.
        beta: τ.

    Returns:
        (B,) losses.
    """
    return (log_ratios - 1 / (2 * beta)) ** 2
