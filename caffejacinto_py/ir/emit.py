"""From a Graph back to a NetParameter, as `caffe` would write it after filtering."""

from __future__ import annotations

from typing import Any

from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.schema import pb


def emit(graph: Graph) -> Any:
    """A NetParameter with the graph's layers in order; include/exclude rules are gone, since they have been applied."""
    message = pb.NetParameter(name=graph.name)
    if graph.force_backward:
        message.force_backward = True
    for node in graph.nodes:
        layer = message.layer.add()
        layer.CopyFrom(node.proto)
        del layer.include[:]
        del layer.exclude[:]
        layer.bottom[:] = [v.name for v in node.inputs]
        layer.top[:] = [v.name for v in node.outputs if v.name != "(automatic)"]
    return message
