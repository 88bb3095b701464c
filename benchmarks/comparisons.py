"""The comparisons: names are stable, sizes and lengths fixed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from environments import OURS
from shapes import MODELS, Lengths


@dataclass(frozen=True)
class Side:
    """One way of doing the work.

    Attributes:
        module: Worker module.
        environment: Name of the environment it runs in.
        options: Options for the worker.
        target: Target speed relative to its peer.
        memory: Target of its peak memory, at most this share of the peer's.
    """

    module: str
    environment: str = OURS
    options: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The same work done by several sides, or our own side alone.

    Attributes:
        model: Name in shapes.MODELS.
        batch: Rows per round; of PPO and RLOO, responses.
        lengths: Lengths of prompts and responses.
        sides: Sides by name.
        baseline: The peer's side; None if there is none.
        group: "main" or "scaling".
        devices: Devices it runs on.
        rounds: Maximum number of rounds; None for as many as requested.
        responses_per_prompt: Responses to each prompt; divides the batch.
    """

    model: str
    batch: int
    lengths: Lengths
    sides: Mapping[str, Side]
    baseline: str | None = None
    group: str = "main"
    devices: tuple[str, ...] = ("cpu", "cuda")
    rounds: int | None = None
    responses_per_prompt: int = 1


SHORT = Lengths(128, 48)
LONG = Lengths(448, 64)
REAL = Lengths(512, 64, real=True)
LARGE = Lengths(512, 64)

LLAMA_LORA = {"rank": 8, "target_modules": ["q_proj", "v_proj"]}
T5_LORA = {"rank": 8, "target_modules": ["q", "v"]}

_TRL_PPO = Side("workers.trl_ppo", "trl-1.12.0")
_TRL_T5_PPO = Side("workers.trl_t5_ppo", "trl-0.11.4")


def ppo(
    target: float | None = None,
    reward: str = "model",
    memory: float | None = None,
    **config: Any,
) -> Side:
    """Return our PPO with some configuration fields; `reward` is "model" or "function"."""
    options = {"reward": reward, "config": config}
    return Side("workers.ours_ppo", options=options, target=target, memory=memory)


def _ppo_llama(model: str, target: float) -> Comparison:
    like = {"dtype": "float32", "critic": "adapter", "lora": LLAMA_LORA, "kl_coeff": 0.1}
    sides = {
        "TRL 1.12.0": _TRL_PPO,
        "like_for_like": ppo(1.5, **like),
        "defaults": ppo(target, memory=0.4),
        "critic_head": ppo(critic="head"),
    }
    return Comparison(model, 16, SHORT, sides, "TRL 1.12.0")


def _reward(batch: int, lengths: Lengths, fp32: float | None, bf16: float | None) -> Comparison:
    def ours(dtype: str, target: float | None) -> Side:
        options = {"config": {"dtype": dtype, "lora": LLAMA_LORA}}
        return Side("workers.ours_reward", options=options, target=target)

    sides = {
        "TRL 1.16.0": Side("workers.trl_reward", "trl-1.16.0"),
        "float32": ours("float32", fp32),
        "bfloat16": ours("bfloat16", bf16),
    }
    return Comparison("llama_15m", batch, lengths, sides, "TRL 1.16.0")


def _generate(model: str, lora: Mapping[str, Any] | None = None) -> Comparison:
    def side(module: str, dtype: str, target: float | None = None) -> Side:
        return Side(f"workers.{module}", options={"dtype": dtype, "lora": lora}, target=target)

    sides = {
        "generate() float32": side("transformers_generate", "float32"),
        "generate() bfloat16": side("transformers_generate", "bfloat16"),
        "float32": side("ours_generate", "float32", 1.25),
        "bfloat16": side("ours_generate", "bfloat16", 2.0),
    }
    return Comparison(model, 16, SHORT, sides, "generate() float32")


def _scaling() -> dict[str, Comparison]:
    base = Comparison(
        "llama_15m", 16, SHORT, {"defaults": ppo()}, group="scaling", devices=("cpu",), rounds=3
    )
    points = {"scaling_base": base}
    points |= {f"scaling_batch_{n}": replace(base, batch=n) for n in (8, 32)}
    points |= {
        f"scaling_prompt_{n}": replace(base, lengths=Lengths(n, SHORT.response))
        for n in (64, 256, 512)
    }
    points |= {
        f"scaling_response_{n}": replace(base, lengths=Lengths(SHORT.prompt, n))
        for n in (16, 32, 64, 128)
    }
    return points | {f"scaling_{n}": replace(base, model=n) for n in ("llama_toy", "llama_38m")}


def _on_gpu() -> dict[str, Comparison]:
    options = {"dtype": "bfloat16", "lora": None}
    ours = Side("workers.ours_generate", options=options | {"prefill": True}, target=5.0)
    peer = Side("workers.transformers_generate", options=options)
    rollout = {"generate() bfloat16": peer, "bfloat16": ours}
    # Settings that affect memory but not the result.
    seven = {"dtype": "bfloat16", "rollout_batch_size": 16, "micro_batch_size": 2}
    seven |= {"gradient_checkpointing": True}
    cuda = ("cuda",)
    return {
        "rollout_llama_1b": Comparison(
            "llama_1b", 64, LARGE, rollout, "generate() bfloat16", devices=cuda
        ),
        "ppo_llama_1b": Comparison(
            "llama_1b", 64, LARGE, {"bfloat16": ppo(dtype="bfloat16")}, devices=cuda
        ),
        "ppo_llama_7b_memory": Comparison(
            "llama_7b", 16, LARGE, {"bfloat16": ppo(**seven)}, devices=cuda, rounds=1
        ),
    }


_T5_PPO = {
    "TRL 0.11.4": _TRL_T5_PPO,
    "like_for_like": ppo(reward="function", dtype="float32", critic="head", lora=T5_LORA),
    "defaults": ppo(3.0, reward="function"),
    "lora_decoder": ppo(6.0, reward="function", lora={"where": "decoder"}),
}


def _groups() -> dict[str, Comparison]:
    """Return our sides with 4 responses per prompt against peers that answer as often."""

    def against(name: str, peer: Side, lengths: Lengths = LONG, **sides: Side) -> Comparison:
        model = "t5_small" if peer is _TRL_T5_PPO else "llama_15m"
        return Comparison(model, 16, lengths, {name: peer, **sides}, name, responses_per_prompt=4)

    def ours(target: float, **config: Any) -> Side:
        return ppo(target, memory=0.4, responses_per_prompt=4, **config)

    rloo = Side("workers.trl_rloo", "trl-1.16.0")
    return {
        "groups_ppo_llama_15m": against("TRL 1.12.0", _TRL_PPO, defaults=ours(6.0)),
        "groups_ppo_llama_15m_real_lengths": against(
            "TRL 1.12.0", _TRL_PPO, REAL, defaults=ours(6.0)
        ),
        "groups_rloo_llama_15m": against("TRL 1.16.0", rloo, rloo=ours(6.0, advantage="rloo")),
        "groups_ppo_t5_small": against(
            "TRL 0.11.4",
            _TRL_T5_PPO,
            defaults=ours(4.0, reward="function"),
            lora_decoder=ours(8.0, reward="function", lora={"where": "decoder"}),
        ),
    }


COMPARISONS: dict[str, Comparison] = {
    "ppo_llama_15m": _ppo_llama("llama_15m", 2.5),
    "ppo_llama_38m": _ppo_llama("llama_38m", 4.0),
    "ppo_llama_15m_real_lengths": Comparison(
        "llama_15m",
        16,
        REAL,
        {"TRL 1.12.0": _TRL_PPO, "defaults": ppo(5.0)},
        "TRL 1.12.0",
    ),
    "ppo_t5_small": Comparison("t5_small", 16, SHORT, _T5_PPO, "TRL 0.11.4"),
    **_groups(),
    "reward_llama_15m_448": _reward(8, LONG, 1.7, 3.0),
    "reward_llama_15m_128": _reward(16, SHORT, None, None),
    "generate_llama_15m": _generate("llama_15m"),
    "generate_llama_15m_lora": _generate("llama_15m", LLAMA_LORA),
    "generate_t5_small": _generate("t5_small"),
    "generate_t5_small_lora": _generate("t5_small", T5_LORA),
    **_scaling(),
    **_on_gpu(),
}


def quick(comparison: Comparison) -> Comparison:
    """Return the same sides at sizes that only show whether they run."""
    arch = MODELS[comparison.model].arch
    batch = max(4, 2 * comparison.responses_per_prompt)
    lengths = replace(comparison.lengths, prompt=24, response=8)
    return replace(comparison, model=f"{arch}_toy", batch=batch, lengths=lengths, rounds=1)
