"""Layers become those of Ristretto that compute in short words: in a graph, and in the file that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from caffejacinto_py.errors import LayerError
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.layers import registry
from caffejacinto_py.passes import finish
from caffejacinto_py.schema.mark import mark

SCHEME = "ristretto"
FIELD = "quantization_param"
Fields = Mapping[str, int | str]  # of quantization_param; enum values by name


def shorten(graph: Graph, words: Mapping[str, Fields]) -> Graph:
    """The graph with the layers named in `words` replaced, whose quantization_param then has just these fields.

    Blobs, names and order stay. Raises LayerError for a layer that has no such form, or fields that it refuses.
    """
    return finish(graph.with_nodes([_shorten(graph, n, words[n.name]) if n.name in words else n for n in graph.nodes]))


def _shorten(graph: Graph, node: Node, fields: Fields) -> Node:
    ins = [graph.shapes[v] for v in node.inputs]
    made = node.layer.replacement(SCHEME, ins)
    if made is None:
        raise LayerError(f"layer '{node.name}': Ristretto has no form of a {node.type}", loc=node.loc)
    made.ClearField(FIELD)
    set_words(getattr(made, FIELD), fields)
    layer = registry.make(made, node.layer.context, len(node.outputs), node.loc)
    try:
        layer.shapes(ins)
    except LayerError as e:
        e.loc = e.loc or graph.where(node, *e.field)
        raise
    return replace(node, type=made.type, proto=made, layer=layer)


def set_words(param: Any, fields: Fields) -> None:
    """Set fields of a QuantizationParameter."""
    for name, value in fields.items():
        if isinstance(value, str):
            value = param.DESCRIPTOR.fields_by_name[name].enum_type.values_by_name[value].number
        setattr(param, name, value)


def shortened_document(message: Any, before: Graph, after: Graph) -> Any:
    """A copy of the NetParameter that graph `before` was made from, with the layers that `shorten` replaced in `after`.

    include and exclude rules stay. A layer of the same name and type in another phase is replaced as well.
    """
    net = type(message)()
    net.CopyFrom(message)
    for old, new in zip(before.nodes, after.nodes, strict=True):
        if old.proto is new.proto:
            continue
        for index, layer in enumerate(net.layer):
            if index == old.path[1]:
                layer.CopyFrom(new.proto)
            elif layer.name == old.name and layer.type == old.type:
                layer.type = new.type
                getattr(layer, FIELD).CopyFrom(getattr(new.proto, FIELD))
    return mark(net, before.dialect.name)
