"""How long a net takes: the whole of it as it trains, and each layer on its own. Seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from caffejacinto_py.engine.layerwise import Tape
from caffejacinto_py.engine.net import Net
from caffejacinto_py.ir.graph import Node, Value


@dataclass
class LayerTime:
    """Mean seconds of one layer; backward 0 for layers that take no part in it."""

    node: Node
    forward: float = 0.0
    backward: float = 0.0


def time_net(net: Net, batch: Mapping[str, Tensor], iterations: int) -> tuple[float, float]:
    """Mean forward and backward seconds of whole passes, after one that is not counted. Backward 0: no loss to start
    from.
    """
    spent = [0.0, 0.0]
    for i in range(-1, iterations):
        start = _now(net.device)
        loss = net(batch).loss
        middle = _now(net.device)
        if loss.requires_grad:
            loss.backward()
        end = _now(net.device)
        if i >= 0:
            spent[0] += middle - start
            spent[1] += end - middle if loss.requires_grad else 0.0
        for blob in net.learnable:
            blob.param.grad = None
    return spent[0] / iterations, spent[1] / iterations


def time_layers(net: Net, batch: Mapping[str, Tensor], iterations: int) -> list[LayerTime]:
    """Mean seconds of each layer that computes, run one by one after one round that is not counted.

    Each layer gets its own autograd graph, and no layer works in place, so their sum exceeds what `time_net` measures.
    """
    alone = Net(net.graph, device=net.device, dtype=net.dtype, share=net, inplace=False, types=net.types)
    found = [LayerTime(step.node) for step in alone.plan.steps]
    for i in range(-1, iterations):
        rounds = _one_round(alone, batch)
        if i >= 0:
            for layer, (forward, backward) in zip(found, rounds, strict=True):
                layer.forward += forward / iterations
                layer.backward += backward / iterations
        for blob in alone.learnable:
            blob.param.grad = None
    return found


def _one_round(net: Net, batch: Mapping[str, Tensor]) -> list[tuple[float, float]]:
    tape, times = Tape(), []
    values: dict[Value, Tensor] = {
        v: net.feed(v.name, batch).detach() for source in net.sources for v in source.node.outputs
    }
    for i, (step, module) in enumerate(zip(net.plan.steps, net.layers, strict=True)):
        start = _now(net.device)
        tops = tape.forward(i, step.node, module, [values[v] for v in step.node.inputs])
        times.append([_now(net.device) - start, 0.0])
        values.update(zip(step.node.outputs, tops, strict=True))
    diffs: dict[Value, Tensor] = {}
    for i, step in reversed(list(enumerate(net.plan.steps))):
        if i not in tape:
            continue
        seeds = [_seed(values[v], w, diffs.pop(v, None)) for v, w in zip(step.node.outputs, step.node.loss_weights)]
        start = _now(net.device)
        found = tape.backward(i, net.params.get(step.node.name, []), seeds)
        times[i][1] = _now(net.device) - start
        for v, diff in zip(step.node.inputs, found, strict=True):
            if diff is not None:
                diffs[v] = diffs[v] + diff if v in diffs else diff
    return [(forward, backward) for forward, backward in times]


def _seed(top: Tensor, weight: float, diff: Tensor | None) -> Tensor:
    """The gradient of a top: its loss weight, what its readers found, or zero."""
    if weight:
        return torch.full_like(top, weight)
    return torch.zeros_like(top) if diff is None else diff


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
