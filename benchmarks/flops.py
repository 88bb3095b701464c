"""The minimum arithmetic of a phase: FLOPs of its dense matrix products.

Counted like torch.utils.flop_counter, two per multiply-add, over real tokens only:

- every role reads prompt and response once per pass, through all layers;
- the LM head is applied to response positions only;
- what responses to the same prompt share (the prompt, T5's encoder output) is computed once;
- a prompt attends to itself, and a response to the prompt and itself, all counted as full squares,
  although a causal kernel may skip half of a square;
- a frozen matrix costs as much backward as forward (the gradient of its input) unless its input
  needs no gradient; LoRA matrices and attention cost twice.

So a phase at 100 % of the measured matrix product rate could only be faster by computing less than
this, and one that does compute less can exceed 100 %.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

from shapes import T5, Llama, Model

Matrices = Mapping[str, tuple[int, int]]
Row = tuple[int, int]  # tokens of prompt and response
Group = tuple[int, Sequence[int]]  # tokens of a prompt and of each response to it


@dataclass(frozen=True)
class Lora:
    """An adapter.

    Attributes:
        rank: Its rank.
        targets: Names of the adapted matrices; None for all of them.
        encoder: Whether T5's encoder has it, too.
    """

    rank: int
    targets: tuple[str, ...] | None = None
    encoder: bool = True


NONE = Lora(0)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, grouped by their cost in the backward pass.

    Attributes:
        frozen: Products with frozen matrices.
        leaves: The same where no gradient propagates further back.
        lora: Products with adapters.
        attention: Scores, and weighted sums of values.
    """

    frozen: float = 0.0
    leaves: float = 0.0
    lora: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return self.frozen + self.leaves + self.lora + self.attention

    @property
    def training(self) -> float:
        """FLOPs of forward and backward pass."""
        return self.forward + self.frozen + 2 * (self.lora + self.attention)


def pass_over(
    model: Model,
    prompt: int,
    responses: Sequence[int],
    lora: Lora = NONE,
    *,
    head: bool = True,
    decoding: bool = False,
    encode: bool = True,
) -> Flops:
    """Count one pass over a prompt and the responses to it.

    Args:
        model: Model sizes.
        prompt: Tokens of the prompt.
        responses: Tokens of each response.
        lora: The active adapter.
        head: Whether the LM head is applied to the response positions.
        decoding: Whether to decode token by token with a cache, so that tokens attend to earlier
            ones only.
        encode: Whether to run T5's encoder; false if its output is already available.
    """
    tokens = sum(responses)
    squares = sum(length * length * (0.5 if decoding else 1.0) for length in responses)
    lm_head = Flops(frozen=2.0 * tokens * model.hidden * model.vocab) if head else Flops()
    if isinstance(model, Llama):
        attended = prompt * prompt + tokens * prompt + squares
        inputs = ("q_proj", "k_proj", "v_proj")
        blocks = _blocks(model, model.block, prompt + tokens, attended, lora, inputs)
        return blocks + lm_head
    return (
        lm_head
        + _decoder(model, prompt, tokens, squares, lora, encode)
        + (_encoder(model, prompt, lora) if encode else Flops())
    )


def ppo_phases(
    model: Model,
    groups: Iterable[Group],
    lora: Lora,
    *,
    critic: str | None,
    scorer: Lora | None,
    reference: bool,
    epochs: int,
) -> dict[str, float]:
    """Return the FLOPs of each phase of an iteration of PPO or RLOO.

    Args:
        model: Model sizes.
        groups: Lengths of all prompts and the responses to each.
        lora: Adapters of policy and critic.
        critic: "adapter", or "head" on the policy's trunk; None without one.
        scorer: The reward model's adapter on the same base; None for a function.
        reference: Whether there is a KL penalty to the reference.
        epochs: Passes over the rollout.
    """
    phases = dict.fromkeys(("rollout", "score", "experience", "update"), 0.0)
    # An encoder that no role changes already read the prompts in the rollout.
    encode = lora.encoder
    for prompt, responses in groups:
        policy = pass_over(model, prompt, responses, lora, encode=encode)
        phases["rollout"] += pass_over(model, prompt, responses, lora, decoding=True).forward
        phases["experience"] += policy.forward
        phases["update"] += epochs * policy.training
        if scorer is not None:
            phases["score"] += pass_over(model, prompt, responses, scorer, head=False).forward
        if reference:
            phases["experience"] += pass_over(model, prompt, responses, encode=encode).forward
        if critic == "adapter":
            values = pass_over(model, prompt, responses, lora, head=False, encode=encode)
            phases["experience"] += values.forward
            phases["update"] += epochs * values.training
    return phases


def decode_bytes(model: Model, rows: Sequence[Row], width: int) -> float:
    """Return the bytes that decoding must read: per step all weights, and keys and values so far.

    Args:
        model: Model sizes.
        rows: Lengths of the batch, which is decoded together.
        width: Bytes per number.
    """
    steps = max(response for _, response in rows)
    per_token = 2 * model.layers * model.kv_width
    cached = sum(response * prompt + response * response / 2 for prompt, response in rows)
    return width * (steps * _decoder_weights(model) + cached * per_token)


def _blocks(
    model: Model,
    matrices: Matrices,
    tokens: float,
    attended: float,
    lora: Lora,
    inputs: Sequence[str],
) -> Flops:
    """Count all blocks; `inputs` are the matrices that read the embedding in the first one."""
    frozen = 2.0 * tokens * sum(a * b for a, b in matrices.values())
    leaves = 2.0 * tokens * sum(a * b for a, b in (matrices[name] for name in inputs))
    return Flops(
        frozen=model.layers * frozen - leaves,
        leaves=leaves,
        lora=model.layers * _lora(matrices, tokens, lora),
        attention=model.layers * 4.0 * model.inner * attended,
    )


def _encoder(model: T5, prompt: int, lora: Lora) -> Flops:
    lora = lora if lora.encoder else NONE
    matrices = model.attention | model.feed_forward
    return _blocks(model, matrices, prompt, prompt * prompt, lora, ("q", "k", "v"))


def _decoder(
    model: T5, prompt: int, tokens: int, squares: float, lora: Lora, encode: bool
) -> Flops:
    own = model.attention | model.feed_forward
    result = _blocks(model, own, tokens, squares + tokens * prompt, lora, ("q", "k", "v"))
    asks = {name: model.attention[name] for name in ("q", "o")}
    reads = {name: model.attention[name] for name in ("k", "v")}
    encoded = 2.0 * model.layers * prompt * sum(a * b for a, b in reads.values())
    trained = encode and lora.encoder
    result += Flops(**{"frozen" if trained else "leaves": encoded})
    result += Flops(frozen=2.0 * model.layers * tokens * sum(a * b for a, b in asks.values()))
    adapters = _lora(asks, tokens, lora) + _lora(reads, prompt, lora)
    return result + Flops(lora=model.layers * adapters)


def _lora(matrices: Matrices, tokens: float, lora: Lora) -> float:
    adapted = [size for name, size in matrices.items() if not lora.targets or name in lora.targets]
    return 2.0 * tokens * lora.rank * sum(a + b for a, b in adapted)


def _decoder_weights(model: Model) -> float:
    head = model.hidden * model.vocab
    if isinstance(model, Llama):
        return head + model.layers * sum(a * b for a, b in model.block.values())
    once = sum(a * b for a, b in (model.attention | model.feed_forward).values())
    return head + model.layers * (once + 2 * model.hidden * model.inner)
