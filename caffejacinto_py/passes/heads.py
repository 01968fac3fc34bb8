"""Accuracy layers for a classifier that has none for the wanted ranks: `test` prints top-1 and top-5 of every one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.layers.base import Head
from caffejacinto_py.layers.registry import make
from caffejacinto_py.passes import finish, shapes
from caffejacinto_py.schema import pb

RANKS = (1, 5)


@dataclass(frozen=True)
class TopK:
    """The share of labels among the `k` best of blob `scores`: output `output` of the net; added: by this pass."""

    scores: str
    k: int
    output: str
    added: bool


def score(graph: Graph, ranks: tuple[int, ...] = RANKS) -> tuple[Graph, tuple[TopK, ...]]:
    """The net with an output for every rank of every classifier in it, and which they are.

    A classifier is a blob of scores with one label an item that an accuracy or a softmax loss reads; where accuracies
    do, blobs that only losses read are left out (auxiliary heads). Ranks that are no less than the number of classes
    are left out.
    """
    found: list[TopK] = []
    nodes = list(graph.nodes)
    names = {v.name for n in graph.nodes for v in n.outputs} | {n.name for n in graph.nodes}
    heads = _heads(graph)
    counted = {scores for (scores, _), layers in heads.items() if any(h.top_k for _, h in layers)}
    for (scores, labels), layers in heads.items():
        if counted and scores not in counted:
            continue
        have = {head.top_k: node.outputs[0].name for node, head in layers if head.top_k}
        for k in ranks:
            if k in have:
                found.append(TopK(scores.name, k, have[k], added=False))
            elif k < graph.shapes[scores][layers[0][1].axis]:
                name = _free(f"top-{k}" if len(counted or heads) == 1 else f"{scores.name} top-{k}", names)
                nodes.append(_accuracy(layers[0], scores, labels, k, name))
                found.append(TopK(scores.name, k, name, added=True))
    if len(nodes) == len(graph.nodes):
        return graph, tuple(found)
    return finish(shapes.reshape(graph.with_nodes(nodes), {})), tuple(found)


def _heads(graph: Graph) -> dict[tuple[Value, Value], list[tuple[Node, Head]]]:
    """By (scores, labels): the layers that compare them."""
    found: dict[tuple[Value, Value], list[tuple[Node, Head]]] = {}
    for node in graph.nodes:
        ins = [graph.shapes[v] for v in node.inputs]
        head = node.layer.head(ins) if len(ins) == 2 else None
        if head is not None and ins[0] and prod(ins[0]) == ins[0][0] * ins[0][head.axis] and head.axis != 0:
            found.setdefault((node.inputs[0], node.inputs[1]), []).append((node, head))
    return found


def _accuracy(like: tuple[Node, Head], scores: Value, labels: Value, k: int, name: str) -> Node:
    node, head = like
    proto = pb.LayerParameter(name=name, type="Accuracy", bottom=[scores.name, labels.name], top=[name])
    proto.accuracy_param.top_k, proto.accuracy_param.axis = k, head.axis
    if head.ignore is not None:
        proto.accuracy_param.ignore_label = head.ignore
    layer = make(proto, node.layer.context, 1)
    return Node(name, proto.type, (scores, labels), (Value(name),), proto, loss_weights=(0.0,), propagate=(None, None),
                loc=node.loc, path=node.path, layer=layer)  # fmt: skip


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "'"
    taken.add(name)
    return name
