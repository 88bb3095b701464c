"""Which layers an adapter may sit on: linear ones whose weight no other module shares.

Decoding folds an adapter into its layer's weight temporarily, and merging does so for good. If an
embedding or another layer shared that weight, it would change as well.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Conv1D

from rlhf.models.compat import is_linear, is_targeted

_SHOWN = 5  # layers listed in a message


def adapted_layers(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Return the layers that peft would put an adapter on, by name.

    Args:
        model: The base; it may already have adapters, and needs no storage.
        config: The adapter's configuration.
    """
    return {name: layer for name, layer in _layers(model) if is_targeted(config, name)}


def free_linear_layers(model: Any) -> list[str]:
    """Return the last parts of the names of all layers that may have an adapter, without the head.

    Args:
        model: A model with an LM head; it may already have adapters, and needs no storage.
    """
    holders = _holders(model)
    head: Any = model.get_output_embeddings()
    names = [
        name
        for name, layer in _layers(model)
        if not _reason_against(name, layer, holders, head.weight)
    ]
    # A number alone, as in a Sequential, would also be the name of other layers.
    short = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if last.isdigit() else last for name, last in short.items()})


def linear_sizes(layer: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    first, second = layer.weight.shape
    return (first, second) if isinstance(layer, Conv1D) else (second, first)


def target_problems(
    model: nn.Module, config: LoraConfig, names: Sequence[str] = (), *, unread: Tensor | None = None
) -> list[str]:
    """Return what is wrong with an adapter's targets; empty if all are valid.

    Args:
        model: The base; needs no storage.
        config: The adapter's configuration.
        names: Names that the user wrote, each of which must match a layer.
        unread: A weight that the stage never uses.

    Returns:
        At most one line, which lists every invalid target and the valid choices.
    """
    holders = _holders(model)
    matched = adapted_layers(model, config)
    every = [name for name, _ in _layers(model)]
    problems = [text for name in dict.fromkeys(names) for text in _unmatched(name, every, matched)]
    if not matched and not problems:
        problems = [f"{_shown(_targets(config))} names no layer of this model"]
    reasons: dict[str, list[str]] = {}
    for name, layer in matched.items():
        reason = _reason_against(name, layer, holders, unread)
        if reason:
            reasons.setdefault(reason, []).append(name)
    problems += [f"{_shown(found)} {reason}" for reason, found in reasons.items()]
    if not problems:
        return []
    valid = {
        name.rpartition(".")[2]
        for name, layer in _layers(model)
        if not _reason_against(name, layer, holders, unread)
    }
    return [f"{'; '.join(problems)}; expected linear layers: {', '.join(sorted(valid))}"]


def _reason_against(
    name: str, layer: Any, holders: dict[int, list[str]], unread: Tensor | None
) -> str | None:
    if not is_linear(layer):
        return f"cannot be adapted: not a linear layer ({type(layer).__name__})"
    others = [holder for holder in holders[_key(layer.weight)] if holder != name]
    if others:
        return f"cannot be adapted: the weight is shared with {others[0]}, which would change too"
    if unread is not None and _key(unread) == _key(layer.weight):
        return "is not used in this stage, so nothing would be trained there"
    return None


def _unmatched(name: str, every: list[str], matched: dict[str, Any]) -> list[str]:
    """Return what is wrong with a name that selects none of the matched layers."""
    named = [layer for layer in every if layer == name or layer.endswith(f".{name}")]
    if not named:
        return [f"{name!r} names no layer of this model"]
    if not any(layer in matched for layer in named):
        return [f"{name!r} names layers outside of lora.where only, such as {named[0]}"]
    return []


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's modules under every name they have, without the adapters around them."""
    inner: set[str] = set()  # prefixes of what is inside layers that have adapters
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(name.startswith(prefix) for prefix in inner):
            continue
        if isinstance(module, LoraLayer):
            inner.add(f"{name}.")
            yield name, module.get_base_layer()
        else:
            yield name, module


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Map each tensor's key to the names of the modules that hold it."""
    holders: dict[int, list[str]] = {}
    for name, module in _layers(model):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(_key(parameter), []).append(name)
    return holders


def _key(tensor: Tensor) -> int:
    """Return an equal key for tensors that share memory; without memory, use their identity."""
    return tensor.data_ptr() or id(tensor)


def _targets(config: LoraConfig) -> list[str]:
    targets = config.target_modules or []
    return [targets] if isinstance(targets, str) else sorted(targets)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
