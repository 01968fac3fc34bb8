"""A hook sees every blob of a pass, and what it returns is what later layers read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.engine.hooks import Hook, Hooks, Module
from caffejacinto_py.engine.net import Net
from caffejacinto_py.ir.graph import Node
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import text
from caffejacinto_py.schema.weights import ModelFile

NET = """
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
"""


class _Seen(Hook):
    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, net: Net) -> None:
        self.names.append("begin")

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.names.append(node.name)
        return outs

    def end(self, net: Net) -> None:
        self.names.append("end")


class _Double(Hook):
    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(2 * o for o in outs)


def _net() -> Net:
    return Net(prepare(text.parse(NET, "NetParameter"), phase="TEST"), seed=1)


def test_every_layer_passes_by_though_layers_are_fused_without_a_hook() -> None:
    net, seen = _net(), _Seen()
    inputs = {"data": torch.randn(2, 3, 4, 4)}
    with torch.no_grad():
        plain = net(inputs).outputs["conv"]
        net.hook = seen
        watched = net(inputs).outputs["conv"]
        net.hook = None
        again = net(inputs).outputs["conv"]
    assert seen.names == ["begin", "in", "conv", "bn", "scale", "relu", "end"]
    torch.testing.assert_close(watched, plain)
    assert torch.equal(again, plain)


def test_what_hooks_return_is_read_by_the_next_layer() -> None:
    net = _net()
    inputs = {"data": torch.randn(2, 3, 4, 4)}
    with torch.no_grad():
        plain = net(inputs).outputs["conv"]
        net.hook = Hooks(_Double(), _Seen())
        doubled = net(inputs).outputs["conv"]
    torch.testing.assert_close(doubled, 32 * plain)  # five layers, all linear up to scale here


class _Marked(Hook):
    """Adds one to what the convolution makes, counts, and leaves a mark in weights files."""

    def __init__(self) -> None:
        self.count = 0

    def module(self, node: Node, module: Module) -> Module:
        return (lambda *args: module(*args) + 1) if node.name == "conv" else module

    def end(self, net: Net) -> None:
        self.count += 1

    def saving(self, net: Net, model: ModelFile) -> None:
        model.name = f"{model.name}+{self.count}"

    def state(self) -> dict[str, np.ndarray]:
        return {"count": np.asarray(self.count)}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.count = int(arrays["count"])


def test_modules_are_replaced_on_both_roads_and_state_goes_round() -> None:
    net, inputs = _net(), {"data": torch.randn(2, 3, 4, 4)}
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        for node, outs in net.run(dict(inputs)):
            seen[node.name] = outs[0]
        hook = _Marked()
        net.hook = Hooks(Hook(), hook)
        blobs = dict(inputs)
        for node, outs in net.run(blobs):
            if node.name == "conv":
                assert torch.equal(outs[0], seen["conv"] + 1)
        assert torch.allclose(net(inputs).outputs["conv"], blobs["conv"])
    assert hook.count == 2
    assert net.model().name.endswith("+2")
    again = Hooks(Hook(), _Marked())
    again.load_state(net.hook.state())
    assert again.state() == {"1/count": np.asarray(2)}
    for _ in net.run(dict(inputs), end="bn"):
        pass
    assert hook.count == 2  # a pass that does not reach the last layer is none
