"""What may look at a net while it runs, and replace what layers make: quantization simulation, observers, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from caffejacinto_py.engine.ranks import ALONE, Ranks
from caffejacinto_py.ir.graph import Node

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net

Module = Callable[..., Tensor | tuple[Tensor, ...]]


class Hook:
    """Set as `net.hook`; called in `forward` and `run`. The base class changes nothing.

    While a net has a hook no layer is fused into another, so that every blob of the graph passes by. A later in-place
    layer may overwrite a tensor that passed by: copy what you keep.

    repeatable: a hook that can stand to see a layer a second time in backward (training in little memory), and gives
    the same numbers then. repeating: whether it does so now; nothing is to be counted. ranks: what is measured on
    blobs holds for all of them.
    """

    repeatable = False
    repeating = False
    ranks: Ranks = ALONE

    def begin(self, net: Net) -> None:
        """Before the first layer of a pass, after the inputs are in place."""

    def module(self, node: Node, module: Module) -> Module:
        """Before each layer that computes: what is called in place of its module."""
        return module

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """After each layer, sources included: its tops. What is returned takes their place."""
        return outs

    def end(self, net: Net) -> None:
        """After the last layer of a pass."""

    def saving(self, net: Net, model: Any) -> None:
        """When the net becomes a ModelFile: add to it what belongs into a weights file."""

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed training needs beside the weights."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state`. Raises KeyError or ValueError for one of another net."""


class Hooks(Hook):
    """Several hooks, in order."""

    def __init__(self, *hooks: Hook) -> None:
        self.hooks = hooks

    @property
    def repeatable(self) -> bool:  # type: ignore[override]
        return all(hook.repeatable for hook in self.hooks)

    @property
    def repeating(self) -> bool:  # type: ignore[override]
        return any(hook.repeating for hook in self.hooks)

    @repeating.setter
    def repeating(self, value: bool) -> None:
        for hook in self.hooks:
            hook.repeating = value

    @property
    def ranks(self) -> Ranks:  # type: ignore[override]
        return self.hooks[0].ranks if self.hooks else ALONE

    @ranks.setter
    def ranks(self, value: Ranks) -> None:
        for hook in self.hooks:
            hook.ranks = value

    def begin(self, net: Net) -> None:
        for hook in self.hooks:
            hook.begin(net)

    def module(self, node: Node, module: Module) -> Module:
        for hook in self.hooks:
            module = hook.module(node, module)
        return module

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for hook in self.hooks:
            outs = hook.tops(node, outs)
        return outs

    def end(self, net: Net) -> None:
        for hook in self.hooks:
            hook.end(net)

    def saving(self, net: Net, model: Any) -> None:
        for hook in self.hooks:
            hook.saving(net, model)

    def state(self) -> dict[str, np.ndarray]:
        return {f"{i}/{key}": value for i, hook in enumerate(self.hooks) for key, value in hook.state().items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        for i, hook in enumerate(self.hooks):
            hook.load_state({k.removeprefix(f"{i}/"): v for k, v in arrays.items() if k.startswith(f"{i}/")})
