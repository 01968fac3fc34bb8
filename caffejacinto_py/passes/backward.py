"""Which gradients backward must compute: Caffe's rules of Net::Init (propagate_down, lr_mult 0, blobs under a loss,
force_backward)."""

from __future__ import annotations

from dataclasses import replace

from caffejacinto_py.ir.graph import Graph, Node, Value


def mark(graph: Graph) -> Graph:
    """The graph with `needs` and `backward` on every node."""
    learns = {u[0] for p in graph.params if p.lr_mult for u in p.users}
    wanted: dict[Value, bool] = {}
    nodes = []
    for node in graph.nodes:
        needs = tuple(_need(node, i, wanted[v], graph.force_backward) for i, v in enumerate(node.inputs))
        backward = (
            any(needs) or node.name in learns or (graph.force_backward and bool(node.inputs or node.layer.source))
        )
        wanted.update((v, backward) for v in node.outputs)
        nodes.append(replace(node, needs=needs, backward=backward and not node.layer.source))
    if graph.force_backward:
        return graph.with_nodes(nodes)
    return graph.with_nodes(_under_loss(nodes))


def _need(node: Node, i: int, produced: bool, force: bool) -> bool:
    if not node.layer.differentiable(i):
        return False
    if force:
        return produced or node.layer.force_backward(i)
    return produced if node.propagate[i] is None else bool(node.propagate[i])


def _under_loss(nodes: list[Node]) -> list[Node]:
    """Drop from backward what no loss depends on."""
    under: set[Value] = set()
    result = []
    for node in reversed(nodes):
        contributes = any(w for w in node.loss_weights) or any(v in under for v in node.outputs)
        if contributes and node.backward:
            under.update(v for v, need in zip(node.inputs, node.needs, strict=True) if need)
            result.append(node)
        else:
            result.append(replace(node, backward=False, needs=(False,) * len(node.inputs)))
    return result[::-1]
