"""Our trainer in the place of TRL's: the same weights and rollout, quantities by the same names."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity_cases import LORA, RESPONSE, Case, Found
from rlhf.config import PPOConfig
from rlhf.data.batching import TokenBatch
from rlhf.models.saving import save_adapter, save_merged
from rlhf.ppo.experience import Experience, Rollout
from rlhf.ppo.roles import Role
from rlhf.ppo_trainer import PPOTrainer
from rlhf.quickstart import corpus
from rlhf.quickstart.run import ASSETS

PREFIX = re.compile(r"layers\.(\d+)\.(.*)\.lora_([AB])\.")
PAD = 3  # the toy tokenizer's, which TRL fills up with


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
    found, experience = our_experience(trainer, theirs)
    name, scale = "policy gradient", 1.0
    if trainer.critic is None:
        name = "policy gradient per response"
        scale = float(experience.responses.lengths.float().mean())
    update = trainer.accumulate_gradients(experience)
    if trainer.critic is not None:
        head = trainer.critic.head.weight.grad
        assert head is not None
        found |= {
            "value loss": torch.tensor(update.value_loss),
            "gradient of the value head": head.clone(),
            "gradient of the critic's adapter": gradients(trainer.critic.role),
        }
    found |= {"policy loss": torch.tensor(update.policy_loss)}
    found |= {name: scale * gradients(trainer.policy)}
    with torch.no_grad():
        state = {adapter_part(n): v for n, v in theirs.items() if n.startswith("adapter/")}
        for parameter_name, parameter in trainer.policy.named_trainable(""):
            parameter.copy_(state[adapter_part(parameter_name)])
    update = trainer.accumulate_gradients(experience)
    found |= {"policy loss, second update": torch.tensor(update.policy_loss)}
    return found | {f"{name}, second update": scale * gradients(trainer.policy)}


def our_experience(trainer: PPOTrainer, theirs: Found) -> tuple[Found, Experience]:
    """Return our experience of TRL's rollout, and its quantities by name."""
    seen: Found = {}

    def watched(rewards: Tensor, *arguments: Any) -> Any:
        seen["rewards"] = rewards
        seen["advantages"], returns = estimator.function(rewards, *arguments)
        return seen["advantages"], returns

    estimator = trainer.estimator
    trainer.estimator = replace(estimator, function=watched)
    rollout = their_rollout(trainer, theirs)
    experience, stats = trainer.make_experience(rollout, theirs["scores"].flatten())
    assert experience.ref_logprobs is not None
    found = {
        "log-probabilities": experience.logprobs,
        "log-probabilities of the reference": experience.ref_logprobs,
        "KL, per token": stats.kl,
    }
    if experience.values is None or experience.returns is None:
        found |= {
            "rewards of responses": seen["rewards"].sum(1),
            "advantages": experience.advantages[:, 0],
        }
    else:
        found |= {
            "values": experience.values,
            "token rewards": seen["rewards"],
            "advantages before whitening": seen["advantages"],
            "advantages": experience.advantages,
            "returns": experience.returns,
        }
    return found, experience


def their_rollout(trainer: PPOTrainer, theirs: Found) -> Rollout:
    """Return TRL's rollout as ours."""
    per_prompt, mask = trainer.config.effective_responses_per_prompt, response_mask(theirs)
    prompts = prompt_batch(theirs).select_rows(range(0, len(mask), per_prompt))
    return replace(
        trainer.rollout(trainer.next_prompts()),  # for the texts, which nothing here reads
        prompts=prompts,
        responses=TokenBatch(theirs["responses"], mask.sum(1)),
        finished=mask.sum(1) < RESPONSE,
        groups=torch.arange(len(mask)) // per_prompt,
        logprobs=None,
    )


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
