"""What may look at a net while it runs, and replace what layers make: quantization simulation, observers, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from caffejacinto_py.ir.graph import Node

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net


class Hook:
    """Set as `net.hook`; called in `forward` and `run`. The base class changes nothing.

    While a net has a hook no layer is fused into another, so that every blob of the graph passes by. A later in-place
    layer may overwrite a tensor that passed by: copy what you keep.
    """

    def begin(self, net: Net) -> None:
        """Before the first layer of a pass, after the inputs are in place."""

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """After each layer, sources included: its tops. What is returned takes their place."""
        return outs

    def end(self, net: Net) -> None:
        """After the last layer of a pass."""


class Hooks(Hook):
    """Several hooks, in order."""

    def __init__(self, *hooks: Hook) -> None:
        self.hooks = hooks

    def begin(self, net: Net) -> None:
        for hook in self.hooks:
            hook.begin(net)

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for hook in self.hooks:
            outs = hook.tops(node, outs)
        return outs

    def end(self, net: Net) -> None:
        for hook in self.hooks:
            hook.end(net)
