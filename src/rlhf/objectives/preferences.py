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
