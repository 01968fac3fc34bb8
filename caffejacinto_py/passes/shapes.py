"""Shape inference: integers only, from the registry. Fills `graph.shapes` and each node's Layer object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from caffejacinto_py.errors import CaffeError, DataError, LayerError, misplaced, raise_all
from caffejacinto_py.ir.graph import Graph, Node, Shape, Value
from caffejacinto_py.layers.base import Context, Layer
from caffejacinto_py.layers.registry import make


def infer(graph: Graph, context: Context, *, given: Mapping[str, Shape] | None = None) -> Graph:
    """The graph with shapes. `given`: shapes of source tops by name that replace what the source says (reshape).

    Where `context.probe` is None, data is not opened: sources answer from their fields, and a top that they cannot know
    (labels) takes the shape that its first consumer expects. Raises LayerError or ManyErrors with locations.
    """
    shapes: dict[Value, Shape | None] = {}
    fallback: dict[Value, Shape] = {}
    nodes: list[Node] = []
    errors: list[CaffeError] = []
    for node in graph.nodes:
        layer = node.layer
        if layer is None or not layer.lasting:
            layer = make(node.proto, context, len(node.outputs), node.loc)
        nodes.append(replace(node, layer=layer))
        if any(v not in shapes for v in node.inputs):
            continue  # an earlier layer failed: its error is enough
        try:
            if layer.source:
                outs = _source(layer, node, context, given or {}, fallback)
            else:
                outs = list(layer.shapes(_decide(node, layer, shapes, fallback)))
        except LayerError as e:
            e.loc = e.loc or graph.where(node, *e.field)
            errors.append(e)
            continue
        except DataError as e:
            e.loc = e.loc or graph.where(node, *([layer.field] if layer.field else []), "source")
            if e.missing is not None and e.loc is not None:
                e.hint = misplaced(e.missing, e.loc.file) or e.hint
            raise
        if len(outs) != len(node.outputs):
            raise AssertionError(f"{node}: {len(outs)} shapes for {len(node.outputs)} tops")
        shapes.update(zip(node.outputs, outs, strict=True))
    raise_all(errors)
    known: dict[Value, Shape] = {v: s if s is not None else fallback.get(v, (1,)) for v, s in shapes.items()}
    return graph.with_nodes(nodes, shapes=known)


def _source(
    layer: Layer, node: Node, context: Context, given: Mapping[str, Shape], fallback: dict[Value, Shape]
) -> list[Shape | None]:
    if any(v.name in given for v in node.outputs) and all(v.name in given for v in node.outputs):
        return [tuple(given[v.name]) for v in node.outputs]
    outs: list[Shape | None] = list(layer.shapes([])) if context.probe else layer.assumed(len(node.outputs))
    first = next((s for s in outs if s), None)
    for v in node.outputs:
        fallback[v] = layer.fallback() or (first[0] if first else 1,)
    return [given.get(v.name, s) for v, s in zip(node.outputs, outs, strict=True)]


def _decide(
    node: Node, layer: Layer, shapes: dict[Value, Shape | None], fallback: Mapping[Value, Shape]
) -> Sequence[Shape]:
    """Input shapes of a node; those left open by a source are settled now."""
    ins: list[Shape | None] = [shapes[v] for v in node.inputs]
    for i, v in enumerate(node.inputs):
        if ins[i] is None:
            shapes[v] = ins[i] = layer.expects(i, ins) or fallback.get(v, (1,))
    return [s for s in ins if s is not None]


def reshape(graph: Graph, given: Mapping[str, Shape]) -> Graph:
    """The same graph for other input shapes (blob names -> shapes). Learnable blobs must keep their shapes.

    Tops of sources that are not named keep the shapes they have.
    """
    context: Any = graph.nodes[0].layer.context
    keep = {v.name: graph.shapes[v] for n in graph.nodes if n.layer.source for v in n.outputs}
    return infer(graph, context, given={**keep, **given})
