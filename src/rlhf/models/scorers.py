"""What every scorer is: a reward model, a sequence classifier or a Python function."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rlhf.data.schema import PromptText


class Scorer(Protocol):
    """Anything that scores texts; higher is better.

    Attributes:
        shares_base: True if it runs on the policy's own base and tokenizer, so that it can reuse
            what the policy computed from the prompts (`read` of `RewardModel.score`).
    """

    shares_base: bool

    def score(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[str],
        batch_size: int = 32,
        *,
        finished: Sequence[bool] | None = None,
    ) -> Tensor:
        """Score responses to prompts: (N,) fp32 on the CPU, in the given order.

        Args:
            prompts: N prompts.
            responses: N responses to them.
            batch_size: Rows per batch; does not affect scores.
            finished: Whether each response ended on its own and so is read with the scorer's EOS; a
                response cut by the limit gets no EOS. By default all ended.
        """
        ...
