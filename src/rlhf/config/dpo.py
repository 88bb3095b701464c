"""The fields of direct preference optimization."""

from typing import Any, ClassVar, Literal

from rlhf.config.common import LARGEST_WEIGHT, TrainingConfig, option
from rlhf.config.shared import PATHS, ties, tuned_base
from rlhf.config.sources import Sources, UnweightedSources


class DPOConfig(TrainingConfig):
    """Direct preference optimization, without a reward model (Rafailov et al. 2023)."""

    stage: ClassVar[str] = "dpo"
    folder: ClassVar[str] = "dpo"
    base_rate: ClassVar[str | None] = "dpo"

    preference_dataset: Sources = option(
        ..., f"Preference rows; their margin is not used. {PATHS}."
    )
    eval_dataset: UnweightedSources | None = option(
        None,
        "Preference rows for evaluation. Default: 5 % of the training rows, "
        "at most 1000, held out by prompt.",
    )
    ties: Literal["drop", "keep"] = ties()
    loss: Literal["sigmoid", "ipo"] = option(
        "sigmoid",
        "sigmoid: DPO (Rafailov et al. 2023, arXiv 2305.18290); ipo: the squared loss of Azar et "
        "al. 2023 (arXiv 2310.12036), for choices that are nearly certain.",
    )
    beta: float = option(
        0.1,
        "Weight of the KL to the untuned policy that the optimum trades for reward, reward per "
        "nat; tau of ipo, whose log-ratios aim for 1 / (2 beta).",
        ge=1e-6,
        le=LARGEST_WEIGHT,
    )
    label_smoothing: float = option(
        0.0,
        "Share of choices taken to be wrong (conservative DPO: Mitchell 2023, 'A note on DPO with "
        "noisy preferences'); sigmoid only.",
        ge=0,
        lt=0.5,
    )

    def cross_problems(self) -> list[str]:
        """Say what is wrong between fields that are each valid, one line each."""
        problems = super().cross_problems()
        if self.loss == "ipo" and self.label_smoothing > 0:
            problems.append(
                "label_smoothing, loss: ipo has no label smoothing, which would only be a larger "
                "beta; leave label_smoothing out or use loss sigmoid"
            )
        return problems

    @classmethod
    def runs_in(cls, pipeline: Any) -> bool:
        """Whether its section says anything: as a rule the pipeline tunes with PPO alone."""
        return bool(pipeline.section(cls.stage))

    @classmethod
    def handed_over(cls, pipeline: Any) -> dict[str, Any]:
        """Return the base that the SFT stage tunes, if it runs."""
        return tuned_base(pipeline)
