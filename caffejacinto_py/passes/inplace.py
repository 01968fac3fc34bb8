"""Where a module may overwrite its input: the prototxt's in-place layers are only a hint, this pass decides.

Legal when nobody else reads the input, its maker does not need it for its own backward, and it is not a view of
another blob.
"""

from __future__ import annotations

from dataclasses import replace

from caffejacinto_py.ir.graph import Graph, Node, Value


def mark(graph: Graph) -> Graph:
    """The graph with `inplace` on every node whose module may overwrite its first input."""
    maker: dict[Value, Node] = {v: n for n in graph.nodes for v in n.outputs}
    readers = graph.readers()
    kept = set(graph.outputs)

    def legal(node: Node) -> bool:
        if not node.layer.may_inplace or not node.inputs:
            return False
        v = node.inputs[0]
        made_by = maker[v].layer
        if made_by.source or made_by.is_view or made_by.saves_output or v in kept or len(readers[v]) != 1:
            return False
        if any(w for w, out in zip(maker[v].loss_weights, maker[v].outputs, strict=True) if out == v):
            return False
        return v.name == node.outputs[0].name and graph.shapes[v] == graph.shapes[node.outputs[0]]

    return graph.with_nodes([replace(n, inplace=legal(n)) for n in graph.nodes])
