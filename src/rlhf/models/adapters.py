"""LoRA adapters on one base, through peft: added, switched and told apart by name.

peft's own `set_adapter` and `disable_adapter` flip `requires_grad` of every adapter, so a switch
between a forward and its backward loses gradients without a word. Here each adapter's flag is
fixed when it is added, and every switch puts the flags back.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers import PreTrainedModel

from rlhf.data.batching import seeded_generator
from rlhf.errors import InputError
from rlhf.models.lora import LoRALinear
from rlhf.models.targets import target_problems


class AdapterSet:
    """The adapters of one base model, of which one or none is active.

    Args:
        module: The base model; LoRA layers are put into it in place.
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
        """The adapters that exist."""
        return list(self._trainable)

    @property
    def active(self) -> str | None:
        """The adapter that acts now, None for the base alone."""
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
        """Adds an adapter (B zero, A random from `seed`); none becomes active by that.

        Args:
            name: Role name, such as "policy".
            config: peft's configuration of it.
            trainable: Whether its tensors get gradients, in whatever role is active.
            seed: Makes A reproducible.
            asked_for: Names of layers that somebody wrote, none of which may be overlooked.

        Raises:
            InputError: The targets are not linear layers with weights of their own.
        """
        if name in self._trainable:
            raise ValueError(f"adapter {name!r} exists already")
        problems = target_problems(self._module, config, asked_for)
        if problems:
            raise InputError([f"lora.target_modules: {problem}" for problem in problems])
        config.task_type = self._task_type
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
        """Adds `target` with the configuration and the values of `source`."""
        assert self.peft_model is not None
        config: Any = copy.deepcopy(self.peft_model.peft_config[source])
        self.add(target, config, trainable=trainable)
        with torch.no_grad():
            pairs = zip(self.named_parameters(source), self.named_parameters(target), strict=True)
            for (_, old), (_, new) in pairs:
                new.copy_(old)

    def active_reaches(self, prefix: str) -> bool:
        """Whether the active adapter has tensors under `prefix`; false without one."""
        active = self._active
        return active is not None and any(
            name.startswith(prefix) for name, _ in self._parameters[active]
        )

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The adapter's tensors with their names, which contain the adapter's."""
        self._check(name)
        return self._parameters[name]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Makes `name` active inside, and what was active before afterwards."""
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
        """Adds the active adapter into copies of the weights it acts on, for decoding in fp32.

        The copies lie in memory transposed, which a CPU multiplies few rows by a third faster.
        Afterwards the original tensors are back, untouched.
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
                base.weight.data = weight.t().contiguous().t()
            with self.using(None):
                yield
        finally:
            for base, original in zip(bases, originals, strict=True):
                base.weight.data = original

    @contextmanager
    def merging(self, name: str) -> Iterator[None]:
        """Inside, layers act as if the adapter were merged; one merged weight exists at a time."""
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
        """Casts the active adapter to the weights' type once, for decoding where nothing folds."""
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
