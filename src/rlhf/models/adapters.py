"""LoRA adapters on one base model, through peft: add them, switch between them, name them.

peft's own `set_adapter` and `disable_adapter` change `requires_grad` of every adapter, so a switch
between a forward pass and its backward pass silently loses gradients. Here each adapter's flag is
fixed when the adapter is added, and every switch restores the flags.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers import Conv1D, PreTrainedModel

from rlhf.data.batching import seeded_generator
from rlhf.errors import InputError
from rlhf.models.lora import LoRALinear
from rlhf.models.targets import adapted_layers, target_problems


class AdapterSet:
    """The adapters of one base model, at most one of which is active.

    Args:
        module: The base model; LoRA layers are inserted in place.
        task_type: peft's task type, recorded in adapter_config.json.
    """

    def __init__(self, module: PreTrainedModel, task_type: str) -> None:
        self._module = module
        self._task_type = task_type
        self._trainable: dict[str, bool] = {}
        self._parameters: dict[str, list[tuple[str, nn.Parameter]]] = {}
        self._active: str | None = None
        self._layers: list[LoraLayer] = []
        self.peft_model: PeftModel | None = None

    @property
    def names(self) -> list[str]:
        """Names of the adapters that exist."""
        return list(self._trainable)

    @property
    def active(self) -> str | None:
        """Name of the active adapter; None means the base alone."""
        return self._active

    def add(
        self,
        name: str,
        config: LoraConfig,
        *,
        trainable: bool,
        seed: int = 0,
        asked_for: Sequence[str] = (),
    ) -> None:
        """Add an adapter (B zero, A random from `seed`) without activating it.

        Args:
            name: Role name, such as "policy".
            config: peft's configuration of the adapter.
            trainable: Whether its tensors get gradients, whichever role is active.
            seed: Makes A reproducible.
            asked_for: Layer names that the user wrote; each one must match a layer.

        Raises:
            InputError: The targets are not linear layers with their own weights.
        """
        if name in self._trainable:
            raise ValueError(f"adapter {name!r} exists already")
        problems = target_problems(self._module, config, asked_for)
        if problems:
            raise InputError([f"lora.target_modules: {problem}" for problem in problems])
        config.task_type = self._task_type
        # GPT-2's kind of layer; peft would find out itself, with a warning per layer.
        layers = adapted_layers(self._module, config).values()
        config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in layers)
        device = self._module.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeded_generator(f"adapter {name}", seed).initial_seed())
            if self.peft_model is None:
                self.peft_model = get_peft_model(self._module, config, adapter_name=name)
            else:
                self.peft_model.add_adapter(name, config)
        self._layers = [part for part in self._module.modules() if isinstance(part, LoraLayer)]
        for layer in self._layers:
            if type(layer) is Linear:
                layer.__class__ = LoRALinear
        self._parameters[name] = [
            (n, p) for n, p in self._module.named_parameters() if f".{name}." in n
        ]
        self._trainable[name] = trainable
        self._switch(self._active)

    def duplicate(self, source: str, target: str, *, trainable: bool) -> None:
        """Add `target` with the configuration and the values of `source`."""
        assert self.peft_model is not None
        config: Any = copy.deepcopy(self.peft_model.peft_config[source])
        self.add(target, config, trainable=trainable)
        with torch.no_grad():
            pairs = zip(self.named_parameters(source), self.named_parameters(target), strict=True)
            for (_, old), (_, new) in pairs:
                new.copy_(old)

    def active_reaches(self, prefix: str) -> bool:
        """Return whether the active adapter has tensors under `prefix`; False if none is active."""
        active = self._active
        return active is not None and any(
            name.startswith(prefix) for name, _ in self._parameters[active]
        )

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Return the adapter's tensors and their names, which include the adapter's name."""
        self._check(name)
        return self._parameters[name]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Activate `name` inside the context; afterwards restore what was active before."""
        if name is not None:
            self._check(name)
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the active adapter into copies of its layers' weights, for decoding in fp32.

        The copies are stored transposed: a CPU then multiplies a few rows by them a third faster.
        On exit the original tensors are back, untouched.
        """
        name = self._active
        if name is None:
            yield
            return
        layers = [layer for layer in self._layers if name in layer.lora_A]
        bases = [layer.get_base_layer() for layer in layers]
        originals = [base.weight.data for base in bases]
        try:
            for layer, base, original in zip(layers, bases, originals, strict=True):
                weight = original + layer.get_delta_weight(name)
                transposed = getattr(layer, "fan_in_fan_out", False)
                base.weight.data = weight if transposed else weight.t().contiguous().t()
            with self.using(None):
                yield
        finally:
            for base, original in zip(bases, originals, strict=True):
                base.weight.data = original

    @contextmanager
    def merging(self, name: str) -> Iterator[None]:
        """Let layers act as if the adapter were merged, holding one merged weight at a time."""
        self._check(name)
        layers = [
            layer
            for layer in self._layers
            if isinstance(layer, LoRALinear) and name in layer.lora_A
        ]
        try:
            for layer in layers:
                layer.merging = name
            with self.using(None):
                yield
        finally:
            for layer in layers:
                layer.merging = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Cast the active adapter to the weights' dtype once, for decoding without folding."""
        name = self._active
        if name is None:
            yield
            return
        layers = [layer for layer in self._layers if isinstance(layer, LoRALinear)]
        try:
            for layer in layers:
                if name in layer.lora_A:
                    layer.prepare(name)
            yield
        finally:
            for layer in layers:
                layer.low_rank = None

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([name])
        self._active = name
        for adapter, trainable in self._trainable.items():
            for _, parameter in self._parameters[adapter]:
                parameter.requires_grad_(trainable)

    def _check(self, name: str) -> None:
        if name not in self._trainable:
            raise KeyError(f"no adapter {name!r}; there are {self.names}")
