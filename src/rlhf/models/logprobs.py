"""Log-probabilities of tokens under an LM head, without ever holding all logits at once.

Shape letters: N tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

# Logits of one chunk: 2^25 fp32 numbers are 128 MiB, so (N, V) never exists for large V.
LOGITS_PER_CHUNK = 2**25
# Part of a chunk this small stays in a CPU's cache between passes.
LOGITS_PER_CHUNK_CPU = 2**22
# Below this, exp gives denormal numbers, which take a CPU fifty times as long.
LEAST_EXPONENT = -80.0

# Maps (N, D) states and the (N,) positions of the tokens they predict to (N, V) fp32 logits.
Head = Callable[[Tensor, Tensor], Tensor]


def token_stats(
    head: Head,
    states: Tensor,
    tokens: Tensor,
    positions: Tensor,
    vocab_size: int,
    *,
    entropy: bool,
    head_is_trained: bool,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's token and the entropy of its distribution.

    Args:
        head: Maps states to logits.
        states: (N, D).
        tokens: (N,).
        positions: (N,), for `head`.
        vocab_size: V.
        entropy: Whether to compute entropies, which takes more passes over the logits.
        head_is_trained: Whether the head has parameters that need gradients.

    Returns:
        (N,) and (N,) fp32 nats; entropies are 0 if not requested.
    """
    if not entropy and not head_is_trained:
        logprobs = _Logprobs.apply(states, tokens, positions, head, vocab_size)
        return logprobs, torch.zeros_like(logprobs)

    def chunk(states: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = head(states, positions).log_softmax(-1)
        own = -nn.functional.nll_loss(logprobs, tokens, reduction="none")
        if not entropy:
            return own, torch.zeros_like(own)
        return own, -(logprobs.exp() * logprobs).sum(-1)

    with_gradient = torch.is_grad_enabled()
    rows = LOGITS_PER_CHUNK // vocab_size if with_gradient else _rows(vocab_size, states.device)
    # Recomputing the logits in backward keeps only one chunk of them alive.
    several = with_gradient and len(tokens) > rows
    parts = [
        checkpoint(chunk, *piece, use_reentrant=False) if several else chunk(*piece)
        for piece in _split(max(1, rows), states, tokens, positions)
    ]
    logprobs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, entropies


class _Logprobs(Function):
    """log p(token) of each row; the gradient flows to the state only.

    d log p / d logits is the token's one-hot vector minus p. Forward pulls it back through the head
    right away, while the chunk's logits exist: this keeps (N, D) instead of (N, V), and backward
    only multiplies each row by its incoming gradient.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, states: Tensor, tokens: Tensor, positions: Tensor, head: Head, vocab_size: int
    ) -> Tensor:
        logprobs: list[Tensor] = []
        slopes: list[Tensor] = []
        for state, token, position in _split(
            _rows(vocab_size, states.device), states, tokens, positions
        ):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = state.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = head(leaf, position)
            every = logits.detach().log_softmax(-1)
            index = token[:, None]
            logprobs.append(every.gather(1, index)[:, 0])
            if ctx.needs_input_grad[0]:
                p = every.clamp_(min=LEAST_EXPONENT).exp_()
                p.scatter_add_(1, index, p.new_full(index.shape, -1.0))
                slopes += torch.autograd.grad(logits, leaf, p)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (-gradients[0][:, None] * slopes).to(slopes.dtype), None, None, None, None


def _rows(vocab_size: int, device: torch.device) -> int:
    """Return how many rows a chunk has when nothing of it is kept for backward."""
    logits = LOGITS_PER_CHUNK_CPU if device.type == "cpu" else LOGITS_PER_CHUNK
    return max(1, logits // vocab_size)


def _split(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the tensors into chunks of `rows` rows."""
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
