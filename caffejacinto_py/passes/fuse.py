"""Layers that the layer before does in the same pass over memory: a per-channel Scale behind a BatchNorm.

The names, blobs and files stay what they are; only `Net.forward` runs the pair as one.
"""

from __future__ import annotations

from dataclasses import replace

from caffejacinto_py.ir.graph import Graph, Node, Value


def mark(graph: Graph) -> Graph:
    """The graph with `absorbed` on every node whose work the maker of its only input takes over."""
    maker: dict[Value, Node] = {v: n for n in graph.nodes for v in n.outputs}
    readers = graph.readers()

    def absorbed(node: Node) -> bool:
        if (
            len(node.inputs) != 1
            or any(s.permissive for s in node.specs)
            or not node.layer.is_affine([graph.shapes[node.inputs[0]]])
        ):
            return False
        v = node.inputs[0]
        before = maker[v]
        if not before.layer.absorbs_affine() or len(before.outputs) != 1 or any(before.loss_weights):
            return False
        return len(readers[v]) == 1

    return graph.with_nodes([replace(n, absorbed=absorbed(n)) for n in graph.nodes])
