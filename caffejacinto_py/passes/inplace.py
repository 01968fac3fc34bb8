"""Where a module may overwrite an input: the prototxt's in-place layers are only a hint, this pass decides.

Legal when nobody else reads the input, its maker does not need it for its own backward, and it is not a view of another
blob. Only `Net.forward` works in place; `Net.run` keeps every blob for whoever looks at them.
"""

from __future__ import annotations

from dataclasses import replace

from caffejacinto_py.ir.graph import Graph, Node, Value


def mark(graph: Graph) -> Graph:
    """The graph with `inplace` on every node whose module may overwrite one of its inputs."""
    maker: dict[Value, Node] = {v: n for n in graph.nodes for v in n.outputs}
    readers = graph.readers()

    def dead(v: Value) -> bool:
        made_by = maker[v]
        if made_by.layer.source or made_by.layer.is_view or made_by.layer.saves_output or len(readers[v]) != 1:
            return False
        return not any(w for w, out in zip(made_by.loss_weights, made_by.outputs, strict=True) if out == v)

    def choose(node: Node) -> int | None:
        for i in node.layer.inplace_inputs():
            v = node.inputs[i]
            if graph.shapes[v] == graph.shapes[node.outputs[0]] and dead(v):
                return i
        return None

    return graph.with_nodes([replace(n, inplace=choose(n)) for n in graph.nodes])
