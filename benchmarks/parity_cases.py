"""The steps that parity.py compares, where their definitions differ, and how far apart they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

TOLERANCE = 1e-5  # largest difference relative to the largest value
RESPONSE, TEMPERATURE, KL_COEFF = 24, 0.7, 0.2
LORA = {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Found = dict[str, Tensor]

SCORE = "TRL puts the score one token after EOS"
AFTER_EOS = "TRL values the state after EOS as well, and the score comes one token later"
WHITENING = "TRL adds the mean back that it took off, (r - m) / s + m; ours is r / s"
MEAN_LOSS = "TRL averages over responses, we average over tokens"
RATIO = "TRL takes and clips the ratio of whole responses, we take and clip each token's"
ADVANTAGES = (
    "advantages before whitening",
    "advantages",
    "returns",
    "value loss",
    "gradient of the value head",
    "gradient of the critic's adapter",
    "policy gradient",
    "policy loss, second update",
    "policy gradient, second update",
)


@dataclass(frozen=True)
class Case:
    """A step to compare.

    Attributes:
        title: What it shows.
        trainer: TRL's, "ppo" or "rloo".
        eos: Whether EOS ends responses; otherwise it is a token like any other.
        responses_per_prompt: Responses to each prompt; TRL's PPO has no groups.
        whiten_rewards: Whether PPO whitens rewards.
        differ: Why, by quantity, where definitions differ; all others must agree.
        prompts: Number of prompts.
        seed: Seed of weights and sampling.
    """

    title: str
    trainer: str
    eos: bool = False
    responses_per_prompt: int = 1
    whiten_rewards: bool = False
    differ: Mapping[str, str] = field(default_factory=dict)
    prompts: int = 16
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Our trainer's fields."""
        return {
            "batch_size": self.prompts * self.responses_per_prompt,
            "responses_per_prompt": self.responses_per_prompt,
            "advantage": "gae" if self.trainer == "ppo" else "rloo",
            "whiten_rewards": self.whiten_rewards,
            "kl_coeff": KL_COEFF,
            "temperature": TEMPERATURE,
            "target_sequence_length": RESPONSE,
            "seed": self.seed,
            "lora": LORA,
        }

    def spec(self, prompts: list[list[int]], texts: list[str]) -> dict[str, Any]:
        """Return TRL's input; see workers/trl_parity.py."""
        return {
            "trainer": self.trainer,
            "prompts": prompts,
            "texts": texts,
            "response": RESPONSE,
            "temperature": TEMPERATURE,
            "kl_coeff": KL_COEFF,
            "eos": self.eos,
            "whiten_rewards": self.whiten_rewards,
            "responses_per_prompt": self.responses_per_prompt,
            "seed": self.seed,
        }


CASES: dict[str, Case] = {
    "ppo": Case("PPO, all responses as long as the limit", "ppo"),
    "ppo_eos": Case(
        "PPO, responses that end with EOS",
        "ppo",
        eos=True,
        differ={"token rewards": SCORE} | dict.fromkeys(ADVANTAGES, AFTER_EOS),
    ),
    "ppo_whitened": Case(
        "PPO, all responses as long as the limit, `whiten_rewards`",
        "ppo",
        whiten_rewards=True,
        differ={"token rewards": WHITENING} | dict.fromkeys(ADVANTAGES, "follows from the rewards"),
    ),
    "rloo": Case(
        "RLOO, 4 responses to each prompt, which end with EOS",
        "rloo",
        eos=True,
        responses_per_prompt=4,
        prompts=4,
        differ={
            "policy loss": MEAN_LOSS,
            "policy loss, second update": f"{MEAN_LOSS}; {RATIO}",
            "policy gradient per response, second update": RATIO,
        },
    ),
}


@dataclass(frozen=True)
class Quantity:
    """A quantity of both sides.

    Attributes:
        name: Its name.
        ours: Root mean square of our values.
        theirs: The same of theirs.
        difference: Largest difference, relative to the largest of their values; of a policy's
            loss, relative to the largest advantage.
        why: Why the definitions differ; "" if they do not.
    """

    name: str
    ours: float
    theirs: float
    difference: float
    why: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether they agree, or may differ for a known reason."""
        return bool(self.why) or self.difference <= TOLERANCE


def compare(ours: Found, theirs: Found, differ: Mapping[str, str]) -> list[Quantity]:
    """Return all quantities that both sides have, in our order."""
    result = []
    for name, own in ours.items():
        other = theirs[name]
        # A policy's loss may be 0: the advantages that it is a mean of set its scale.
        scale = theirs["advantages"] if name.startswith("policy loss") else other
        difference = float((own - other).abs().max() / scale.abs().max())
        result.append(Quantity(name, _rms(own), _rms(other), difference, differ.get(name, "")))
    return result


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
