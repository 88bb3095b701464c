"""What TRL 1.12.0 computes in one step of PPO or RLOO, looked at while it runs.

    python trl_parity.py FOLDER SPEC        SPEC: JSON, see `parity_cases.Case`

FOLDER has base/, adapter/ (the policy's), value/ (the critic as a whole model) and head.pt. The
quantities go to theirs.pt. Nothing of TRL is computed again here: its own loops run, and hooks read
their variables at the first and the second update on the rollout.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

RATE = 3e-3  # large enough for the second update to clip


class Done(Exception):  # noqa: N818 (not an error)
    """Everything has been seen."""


class Seen:
    """Quantities by name, as they become known; "2" at the end of a name is the second update.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.values: dict[str, Tensor] = {}

    def take(self, frame: FrameType, **names: str) -> None:
        """Copy variables of a frame; `names` maps the names here to those there."""
        for name, theirs in names.items():
            self.values[name] = frame.f_locals[theirs].detach().clone()

    def take_gradients(self, model: Any, kind: str) -> None:
        """Copy gradients as KIND/PARAMETER."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.values[f"{kind}/{name}"] = parameter.grad.detach().clone()

    def take_adapter(self, model: Any) -> None:
        """Copy the policy's adapter before the second update."""
        state = get_peft_model_state_dict(model)
        self.values |= {f"adapter/{name}": value.clone() for name, value in state.items()}

    def write(self) -> None:
        """Write everything."""
        torch.save(self.values, self._folder / "theirs.pt")


def ppo(folder: Path, spec: dict[str, Any], seen: Seen) -> None:
    """Run TRL's PPO for two epochs on one rollout."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(
            folder / name, num_labels=1, dtype=torch.float32
        )
        for name in ("value", "base")
    )
    value.score.weight.data = torch.load(folder / "head.pt")
    batch = len(spec["prompts"])
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        local_rollout_forward_batch_size=batch,
        num_ppo_epochs=2,
        total_episodes=batch,
        response_length=spec["response"],
        stop_token="eos" if spec["eos"] else None,
        temperature=spec["temperature"],
        kl_coef=spec["kl_coeff"],
        whiten_rewards=spec["whiten_rewards"],
        learning_rate=RATE,
        **common(),
    )
    data = Dataset.from_dict({"input_ids": spec["prompts"]})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        peft_config=lora(folder),
    )
    load_policy(trainer.policy_model, folder)
    look_at_ppo(trainer, seen)
    trainer.train()


def look_at_ppo(trainer: Any, seen: Seen) -> None:
    """Read the variables of `PPOTrainer.train` at its two calls of `backward`."""
    backward, model = trainer.accelerator.backward, trainer.model
    unwhitened = watch_whitening()

    def hook(loss: Tensor) -> None:
        frame = sys._getframe(1)
        second = "logprobs" in seen.values
        backward(loss)
        if second:
            seen.take(frame, policy_loss2="pg_loss")
            seen.take_gradients(model.policy, "gradient2")
            seen.write()
            raise Done
        names = ("queries", "responses", "logprobs", "ref_logprobs", "scores", "values", "kl")
        seen.take(frame, **{name: name for name in (*names, "rewards", "advantages", "returns")})
        seen.take(frame, policy_loss="pg_loss", value_loss="vf_loss", past_end="padding_mask")
        seen.values["unwhitened"] = unwhitened[-1]
        seen.take_gradients(model.policy, "gradient")
        seen.take_gradients(model.value_model, "value_gradient")

    def stepped(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        seen.take_adapter(model.policy)
        return result

    step, trainer.optimizer.step = trainer.optimizer.step, stepped
    trainer.accelerator.backward = hook


def watch_whitening() -> list[Tensor]:
    """Return a list that gets what TRL's PPO whitens, before it does."""
    from trl.experimental.ppo import ppo_trainer

    whiten, given = ppo_trainer.masked_whiten, []

    def watched(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        given.append(values.clone())
        return whiten(values, *arguments, **options)

    ppo_trainer.masked_whiten = watched
    return given


def rloo(folder: Path, spec: dict[str, Any], seen: Seen) -> None:
    """Run TRL's RLOO for two updates on one rollout."""
    from trl import RLOOConfig, RLOOTrainer

    per_prompt = spec["responses_per_prompt"]
    config = RLOOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=per_prompt * len(spec["texts"]),
        num_generations=per_prompt,
        num_iterations=2,
        max_steps=2,
        max_completion_length=spec["response"],
        temperature=spec["temperature"],
        beta=spec["kl_coeff"],
        learning_rate=RATE,
        max_grad_norm=0.0,  # no clipping: gradients are looked at after it
        shuffle_dataset=False,
        logging_strategy="no",
        **common(),
    )
    looks = RLOOLooks(seen)
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "base", padding_side="left"),
        reward_funcs=lambda completion_ids, **_: [score(ids) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": spec["texts"]}),
        peft_config=lora(folder),
        callbacks=[looks],
    )
    load_policy(trainer.model, folder)
    looks.watch(trainer)
    trainer.train()


class RLOOLooks(TrainerCallback):
    """Reads the variables of `RLOOTrainer`.

    Args:
        seen: Where they go.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def watch(self, trainer: Any) -> None:
        """Read variables where the rollout ends, and the losses."""
        seen = self._seen
        reduce, compute_loss = trainer.accelerator.reduce, trainer._compute_loss

        def at_end(*arguments: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            if "grouped_rewards" in frame.f_locals and "rewards" not in seen.values:
                seen.take(frame, queries="prompt_ids", query_mask="prompt_mask", kl="per_token_kl")
                seen.take(frame, responses="completion_ids", mask="completion_mask")
                seen.take(frame, logprobs="old_per_token_logps", scores="rewards_per_func")
                seen.take(frame, ref_logprobs="ref_per_token_logps", sequence_kl="kl")
                seen.take(frame, rewards="rewards", advantages="advantages")
            return reduce(*arguments, **options)

        def watched(model: Any, inputs: dict[str, Tensor]) -> Tensor:
            loss = compute_loss(model, inputs)
            name = "policy_loss2" if "policy_loss" in seen.values else "policy_loss"
            seen.values[name] = loss.detach().clone()
            return loss

        trainer.accelerator.reduce, trainer._compute_loss = at_end, watched

    def on_pre_optimizer_step(self, _args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        """Copy the gradients of an update."""
        self._seen.take_gradients(model, "gradient2" if state.global_step else "gradient")

    def on_step_end(self, _args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        """Copy the adapter between the updates; write everything after the second."""
        if state.global_step == 1:
            self._seen.take_adapter(model)
        else:
            self._seen.write()
            raise Done


def score(ids: list[int]) -> float:
    """Return a number that differs between responses."""
    return sum(ids) % 17 / 8 - 1


def common() -> dict[str, Any]:
    """Return what both configurations have in common."""
    return {
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def lora(folder: Path) -> Any:
    """Return the adapter's configuration, for training."""
    config = LoraConfig.from_pretrained(folder / "adapter")
    config.inference_mode = False  # the file says that it is done with training
    return config


def load_policy(model: Any, folder: Path) -> None:
    """Give the policy an adapter that is not at its start, so that there is a KL."""
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():  # in place: the optimizer holds these parameters
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                assert parameter.requires_grad
                parameter.copy_(state.pop(name.replace(".default", "")))
    assert not state


CASES: dict[str, Callable[[Path, dict[str, Any], Seen], None]] = {"ppo": ppo, "rloo": rloo}


def main() -> None:
    """Run one case."""
    folder, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(spec["seed"])
    seen = Seen(folder)
    try:
        CASES[spec["trainer"]](folder, spec, seen)
    except Done:
        return
    raise RuntimeError("training ended before everything was seen")


if __name__ == "__main__":
    main()
