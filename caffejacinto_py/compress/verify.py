"""Do two nets, one made of the other by absorbing, compute the same? On random inputs, in float64, blob by blob."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.engine.net import Net
from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.passes.absorb import Absorbed
from caffejacinto_py.passes.shapes import reshape
from caffejacinto_py.schema.weights import ModelFile

TOLERANCE = 1e-3  # of a blob's largest value; rounding the new weights to float32 makes about 1e-6
_IMAGES = 2


@dataclass(frozen=True)
class Difference:
    """The largest difference of all blobs that both nets have, as part of the largest value of that blob.

    blob, layer: where it is. outputs: the largest among the outputs of the net. blobs: how many were compared.
    """

    value: float
    blob: str
    layer: str
    outputs: float
    blobs: int


def compare(before: Graph, model: ModelFile, done: Absorbed, *, seed: int = 0) -> Difference:
    """Run the net before and after absorbing on random inputs, at most two images. model: the weights before."""
    inputs = random_inputs(_small(before), seed)
    first, second = _Record(), _Record()
    for graph, weights, record in ((before, model, first), (done.graph, done.model, second)):
        net = Net(_small(graph), dtype=torch.float64, seed=0)
        net.load(weights)
        net.hook = record
        with torch.no_grad():
            net(inputs)
    return _largest(first, second, changed(before, done), set(before.outputs))


class _Record(Hook):
    """Keeps every blob of one pass."""

    def __init__(self) -> None:
        self.blobs: dict[Value, tuple[str, Tensor]] = {}

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.blobs.update((v, (node.name, out.clone())) for v, out in zip(node.outputs, outs, strict=True))
        return outs


def _largest(first: _Record, second: _Record, skip: Collection[Value], outputs: Collection[Value]) -> Difference:
    worst, blob, layer, ends, count = -1.0, "", "", 0.0, 0
    for value, (name, a) in first.blobs.items():
        if value in skip or value not in second.blobs or not a.numel():
            continue
        b = second.blobs[value][1]
        size = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().nan_to_num(nan=float("inf")))
        found = float(apart.max()) / max(size, 1e-12)
        count += 1
        if value in outputs:
            ends = max(ends, found)
        if found > worst:
            worst, blob, layer = found, value.name, name
    return Difference(max(worst, 0.0), blob, layer, ends, count)


def changed(graph: Graph, done: Absorbed) -> set[Value]:
    """Blobs that mean something else after absorbing: those between a product and what it took in."""
    made = {v: n for n in graph.nodes for v in n.outputs}
    readers = graph.readers()
    taken = {m.node for m in done.merged}
    found: set[Value] = set()
    for merge in done.merged:
        node = graph.node(merge.node)
        values = [node.outputs[0] if merge.before else node.inputs[0]]
        while values:  # also through what stands between and does nothing
            value = values.pop()
            if value in found:
                continue
            found.add(value)
            near = [n for n, _ in readers[value]] if merge.before else [made[value]]
            for n in near:
                if n.name in taken or n.layer.hands_through():
                    values += n.outputs if merge.before else n.inputs
    return found


def _small(graph: Graph) -> Graph:
    """For few images, where all inputs have the same number of them."""
    tops = [v for n in graph.nodes if n.layer.source for v in n.outputs]
    batches = {graph.shapes[v][:1] for v in tops}
    if len(batches) != 1 or not (batch := batches.pop()) or batch[0] <= _IMAGES:
        return graph
    return _finished(graph, {v.name: (_IMAGES, *graph.shapes[v][1:]) for v in tops})


def _finished(graph: Graph, given: Mapping[str, tuple[int, ...]]) -> Graph:
    from caffejacinto_py.passes import finish

    return finish(reshape(graph, given))


def random_inputs(graph: Graph, seed: int) -> dict[str, Tensor]:
    """Normal numbers for every input; zeros where a layer wants labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = {
        v for n in graph.nodes if not n.layer.source for i, v in enumerate(n.inputs) if not n.layer.differentiable(i)
    }
    made = {}
    for node in graph.nodes:
        for v in node.outputs if node.layer.source else ():
            shape = graph.shapes[v]
            zeros = v in labels
            made[v.name] = torch.zeros(shape) if zeros else torch.randn(shape, generator=generator)
    return made
