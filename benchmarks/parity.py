"""Compare one step of our PPO and RLOO with TRL 1.12.0's, quantity by quantity.

    python benchmarks/parity.py            # two minutes; writes results/parity.json, docs/parity.md

TRL samples and computes in its own environment, and hooks read what it computes
(workers/trl_parity.py). Our trainer gets the same weights, tokens and scores. Everything is float32
on the CPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
from environments import prepare
from report import insert, table_lines
from rlhf.config import PPOConfig
from rlhf.data.batching import TokenBatch
from rlhf.models.saving import save_adapter, save_merged
from rlhf.ppo.roles import Role
from rlhf.ppo_trainer import PPOTrainer
from rlhf.quickstart import corpus
from rlhf.quickstart.run import ASSETS
from rounds import HERE, environment, log_tail

RESULTS = HERE / "results" / "parity.json"
PAGE = HERE.parent / "docs" / "parity.md"
PEER = "trl-1.12.0"
TOLERANCE = 1e-5  # largest difference relative to the largest value
RESPONSE, TEMPERATURE, KL_COEFF = 24, 0.7, 0.2
LORA = {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
PREFIX = re.compile(r"layers\.(\d+)\.(.*)\.lora_([AB])\.")
PAD = 3  # the toy tokenizer's, which TRL fills up with
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


def run_theirs(folder: Path, spec: dict[str, Any]) -> Found:
    """Run TRL in its environment and return what it computed.

    Raises:
        RuntimeError: It failed; the message is the end of its output.
    """
    interpreter, log = prepare(PEER), folder / "theirs.log"
    command = [interpreter.python, str(HERE / "workers" / "trl_parity.py"), str(folder)]
    variables = environment(torch.get_num_threads()) | {"PYTHONPATH": str(interpreter.packages)}
    with log.open("w") as output:
        done = subprocess.run(
            [*command, json.dumps(spec)], stdout=output, stderr=subprocess.STDOUT, env=variables
        )
    if done.returncode:
        raise RuntimeError("\n".join(log_tail(log)))
    found: Found = torch.load(folder / "theirs.pt")
    return found


def make_trainer(case: Case, folder: Path) -> PPOTrainer:
    """Return our trainer, with adapters and a value head that are not at their start."""
    sizes = corpus.CorpusSizes(sft=1, preferences=1, prompts=case.prompts, eval=1)
    corpus.write_corpus(folder / "data", case.seed, sizes)
    config = PPOConfig(
        base_model=str(ASSETS / "toy_llama"),
        prompt_dataset=str(folder / "data" / "prompts.jsonl"),
        output_dir=str(folder / "ours"),
        dtype="float32",
        device="cpu",
        prompt_sequence_length=96,
        train_steps=1,
        **case.config,
    )
    trainer = PPOTrainer(config, reward_fn=lambda prompts, _: [0.0] * len(prompts))
    generator = torch.Generator().manual_seed(case.seed)
    roles = [trainer.policy] + ([trainer.critic.role] if trainer.critic else [])
    with torch.no_grad():
        for role in roles:
            for name, parameter in role.named_trainable(""):
                if "lora_B" in name:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        if trainer.critic:
            head = trainer.critic.head.weight
            head.copy_(0.1 * torch.randn(head.shape, generator=generator))
    return trainer


def save_weights(trainer: PPOTrainer, folder: Path) -> None:
    """Write the weights as plain peft, transformers and torch read them."""
    (folder / "base").symlink_to(ASSETS / "toy_llama")
    lm = trainer.policy.lm
    save_adapter(lm, "policy", folder / "adapter")
    if trainer.critic is not None:
        save_merged(lm, trainer.critic.role.adapter, folder / "value")
        torch.save(trainer.critic.head.weight.detach(), folder / "head.pt")


def adapter_part(name: str) -> str | None:
    """Return which LoRA matrix a parameter is, whatever its adapter is called; else None."""
    found = PREFIX.search(name)
    return None if found is None else "/".join(found.groups())


def flat(parameters: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Return all LoRA matrices as one vector, in an order that does not depend on theirs."""
    parts = {part: value for name, value in parameters if (part := adapter_part(name))}
    return torch.cat([parts[part].flatten() for part in sorted(parts)])


def gradients(role: Role) -> Tensor:
    """Return the gradient of a role's adapter as one vector, and clear it."""
    parameters = role.named_trainable("")
    grads = [(name, p.grad.clone()) for name, p in parameters if p.grad is not None]
    for _, parameter in parameters:
        parameter.grad = None
    return flat(grads)


def our_step(trainer: PPOTrainer, theirs: Found) -> Found:
    """Compute our quantities for TRL's rollout and scores.

    Args:
        trainer: Ours, with the weights that TRL started from.
        theirs: What TRL computed: rollout, scores, and the adapter after the first update.
    """
    per_prompt = trainer.config.effective_responses_per_prompt
    mask = response_mask(theirs)
    prompts = prompt_batch(theirs).select_rows(range(0, len(mask), per_prompt))
    sampled = trainer.rollout(trainer.next_prompts())
    rollout = replace(
        sampled,
        prompts=prompts.to(trainer.device),
        responses=TokenBatch(theirs["responses"], mask.sum(1)),
        finished=mask.sum(1) < RESPONSE,
        groups=torch.arange(len(mask)) // per_prompt,
        logprobs=None,
    )
    rewards: list[Tensor] = []
    plain: list[Tensor] = []

    def watched(given: Tensor, *arguments: Any) -> Any:
        rewards.append(given)
        advantages, returns = estimator.function(given, *arguments)
        plain.append(advantages)
        return advantages, returns

    estimator = trainer.estimator
    trainer.estimator = replace(estimator, function=watched)
    experience, stats = trainer.make_experience(rollout, theirs["scores"].flatten())
    assert experience.ref_logprobs is not None
    found = {
        "log-probabilities": experience.logprobs,
        "log-probabilities of the reference": experience.ref_logprobs,
        "KL, per token": stats.kl,
    }
    update = trainer.accumulate_gradients(experience)
    if trainer.critic is not None:
        assert experience.values is not None
        assert experience.returns is not None
        found |= {
            "values": experience.values,
            "token rewards": rewards[0],
            "advantages before whitening": plain[0],
            "advantages": experience.advantages,
            "returns": experience.returns,
            "value loss": torch.tensor(update.value_loss),
            "gradient of the value head": trainer.critic.head.weight.grad.clone(),
            "gradient of the critic's adapter": gradients(trainer.critic.role),
        }
        name, scale = "policy gradient", 1.0
    else:
        found |= {
            "rewards of responses": rewards[0].sum(1),
            "advantages": experience.advantages[:, 0],
        }
        name, scale = "policy gradient per response", update.tokens / len(mask)
    found |= {"policy loss": torch.tensor(update.policy_loss)}
    found |= {name: scale * gradients(trainer.policy)}
    with torch.no_grad():
        state = {adapter_part(n): v for n, v in theirs.items() if n.startswith("adapter/")}
        for parameter_name, parameter in trainer.policy.named_trainable(""):
            parameter.copy_(state[adapter_part(parameter_name)])
    update = trainer.accumulate_gradients(experience)
    found |= {"policy loss, second update": torch.tensor(update.policy_loss)}
    return found | {f"{name}, second update": scale * gradients(trainer.policy)}


def response_mask(theirs: Found) -> Tensor:
    """Return (B, R) bool, true on the tokens of TRL's responses."""
    return theirs["mask"].bool() if "mask" in theirs else ~theirs["past_end"]


def prompt_batch(theirs: Found) -> TokenBatch:
    """Return TRL's left-padded prompts as ours, one per response."""
    queries = theirs["queries"]
    real = theirs["query_mask"].bool() if "query_mask" in theirs else queries != PAD
    return TokenBatch.from_lists(
        [row[keep].tolist() for row, keep in zip(queries, real, strict=True)]
    )


def named_as_ours(theirs: Found, critic: Found) -> Found:
    """Return TRL's quantities by our names, 0 past a response's end.

    Args:
        theirs: What TRL computed.
        critic: Our critic's LoRA matrices, on which the gradient of TRL's whole value model is
            projected; empty without a critic.
    """
    mask = response_mask(theirs)
    tokens = {
        "log-probabilities": "logprobs",
        "log-probabilities of the reference": "ref_logprobs",
        "KL, per token": "kl",
        "values": "values",
        "advantages before whitening": "unwhitened",
        "returns": "returns",
    }
    found = {name: theirs[key] * mask for name, key in tokens.items() if key in theirs}
    found |= {
        "advantages": theirs["advantages"],
        "policy loss": theirs["policy_loss"],
        "policy loss, second update": theirs["policy_loss2"],
    }
    name = "policy gradient" if critic else "policy gradient per response"
    for suffix, key in (("", "gradient/"), (", second update", "gradient2/")):
        grads = [(n, value) for n, value in theirs.items() if n.startswith(key)]
        found |= {f"{name}{suffix}": flat(grads)}
    if not critic:
        return found | {"rewards of responses": theirs["rewards"]}
    return found | {
        "token rewards": theirs["rewards"],
        "value loss": theirs["value_loss"],
        "gradient of the value head": theirs["value_gradient/score.weight"],
        "gradient of the critic's adapter": projected(theirs, critic),
    }


def projected(theirs: Found, critic: Found) -> Tensor:
    """Return the gradient of LoRA matrices that the gradient G of the whole weights W implies.

    With W + s·B·A it is s·G·Aᵀ for B and s·Bᵀ·G for A.

    Args:
        theirs: What TRL computed, with the gradients of the whole value model.
        critic: Our critic's matrices by name.
    """
    scale = LORA["alpha"] / LORA["rank"]
    parts = {adapter_part(name): value for name, value in critic.items()}
    grads = []
    for name in critic:
        layer, module, which = str(adapter_part(name)).split("/")
        whole = theirs[f"value_gradient/model.layers.{layer}.{module}.weight"]
        other = parts[f"{layer}/{module}/{'B' if which == 'A' else 'A'}"]
        grads.append((name, scale * (other.T @ whole if which == "A" else whole @ other.T)))
    return flat(grads)


def run(case: Case) -> list[Quantity]:
    """Run both sides of a case."""
    with tempfile.TemporaryDirectory(prefix="rlhf-parity-") as name:
        folder = Path(name)
        trainer = make_trainer(case, folder)
        save_weights(trainer, folder)
        rows = trainer.next_prompts()
        prompts = trainer.codec.prompts([row.prompt for row in rows]).tolists()
        theirs = run_theirs(folder, case.spec(prompts, [row.prompt.text for row in rows]))
        critic = trainer.critic
        weights = (
            {n: p.detach().clone() for n, p in critic.role.named_trainable("")} if critic else {}
        )
        peers = named_as_ours(theirs, weights)
        return compare(our_step(trainer, theirs), peers, case.differ)


HEADER = ["quantity", "ours", "TRL", "largest difference", ""]


def rows(quantities: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row per quantity of the results."""
    return [
        [
            one["name"],
            f"{one['ours']:.6g}",
            f"{one['theirs']:.6g}",
            f"{one['difference']:.1e}",
            one["why"] or "agrees",
        ]
        for one in quantities
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of all cases."""
    blocks = [f"Measured on {results['device']} ({results['instructions']})."]
    for name, case in results["cases"].items():
        table = table_lines(HEADER, rows(case["quantities"]))
        blocks += [f"### {case['title']} (`{name}`)", "\n".join(table)]
    return "\n\n".join(blocks)


def main() -> int:
    """Compare all cases, write the results; return 1 if anything is not as expected."""
    cases: dict[str, Any] = {}
    surprises = []
    for name, case in CASES.items():
        found = run(case)
        surprises += [f"{name}: {one}" for one in found if not one.as_expected]
        cases[name] = {"title": case.title, "quantities": [vars(one) for one in found]}
    results = {"device": machine.processor(), "instructions": machine.instructions()}
    results |= {"peer": PEER, "cases": cases}
    text = markdown(results)
    print("\n".join([text, *surprises]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(insert(PAGE.read_text(), "parity", text))
    return int(bool(surprises))


if __name__ == "__main__":
    sys.exit(main())
