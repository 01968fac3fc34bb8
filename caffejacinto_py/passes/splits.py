"""The listing view: Caffe's Split layers, with Caffe's names, where a blob has several readers.

Autograd needs no splits; people's scripts, logs and tools know their names.
"""

from __future__ import annotations

from dataclasses import replace

from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.layers.registry import make
from caffejacinto_py.schema import pb


def split_name(blob: str, layer: str, top: int) -> str:
    return f"{blob}_{layer}_{top}_split"


def insert(graph: Graph) -> Graph:
    """The graph with a Split node behind every value that is read more than once (a loss weight counts as a reader)."""
    readers = graph.readers()
    renamed: dict[tuple[str, int, Value], Value] = {}
    nodes: list[Node] = []
    shapes = dict(graph.shapes)
    for node in graph.nodes:
        inputs = tuple(renamed.get((node.name, i, v), v) for i, v in enumerate(node.inputs))
        weights = list(node.loss_weights)
        added = []
        for top, v in enumerate(node.outputs):
            uses = len(readers[v]) + bool(weights[top])
            if uses < 2:
                continue
            split = _split(graph, node, top, v, uses, weights[top])
            weights[top] = 0.0
            first = uses - len(readers[v])
            for k, (reader, i) in enumerate(readers[v], first):
                renamed[reader.name, i, v] = split.outputs[k]
            shapes.update((out, graph.shapes[v]) for out in split.outputs if v in graph.shapes)
            added.append(split)
        nodes += [replace(node, inputs=inputs, loss_weights=tuple(weights)), *added]
    return graph.with_nodes(nodes, shapes=shapes)


def _split(graph: Graph, node: Node, top: int, v: Value, uses: int, weight: float) -> Node:
    name = split_name(v.name, node.name, top)
    tops = [f"{name}_{k}" for k in range(uses)]
    proto = pb.LayerParameter(name=name, type="Split", bottom=[v.name], top=tops)
    context = node.layer.context if node.layer else None
    return Node(
        name=name,
        type="Split",
        inputs=(v,),
        outputs=tuple(Value(t) for t in tops),
        proto=proto,
        loss_weights=(weight, *[0.0] * (uses - 1)),
        propagate=(None,),
        loc=node.loc,
        path=node.path,
        needs=(node.backward,),
        backward=node.backward,
        layer=make(proto, context, uses) if context else None,
    )
