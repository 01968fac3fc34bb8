"""A quantized graph back in the document that it was made from, with the layers of its other phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caffejacinto_py.compress.qparams import Table, stamp_layer, stamp_net, write_settings
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.ir.build import build
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.layers import registry
from caffejacinto_py.passes.quantize import Settings, is_stored
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.schema.mark import mark


def float_document(message: Any) -> Any:
    """A copy of a NetParameter that quantizes nothing: without `quantize` and qparams, its settings kept."""
    net = type(message)()
    net.CopyFrom(message)
    net.ClearField("quantize")
    for layer in net.layer:
        if is_stored(layer):
            layer.ClearField("quantization_param")
    return net


def quantized_document(
    message: Any, before: Graph, after: Graph, tables: Mapping[str, Table], settings: Settings
) -> Any:
    """A NetParameter usable like `message`, with fixed qparams.

    message: what graph `before` was made from. after: `before`, or what a pass made of it by taking out or changing
    layers; layers taken out leave all phases. tables: qparams by layer of `after`. Layers of other phases are kept; a
    source among them gets the qparams of the source that it stands for: of the same name, or with the same tops.
    """
    net = type(message)()
    net.CopyFrom(message)
    seen = {_place(n) for n in before.nodes}
    gone = seen - {_place(n) for n in after.nodes}
    sources: dict[tuple[str, ...], str] = {}
    for node in after.nodes:
        layer = net.layer[_place(node)]
        layer.CopyFrom(node.proto)
        layer.bottom[:] = [v.name for v in node.inputs]
        layer.top[:] = [v.name for v in node.outputs if v.name != "(automatic)"]
        if not node.inputs:
            sources[tuple(layer.top)] = node.name
        if node.name in tables:
            stamp_layer(layer, tables[node.name], settings=settings)
    for i, layer in enumerate(net.layer):
        if i in seen or layer.bottom:
            continue
        stands_for = str(layer.name) if layer.name in sources.values() else sources.get(tuple(layer.top), "")
        if stands_for in tables and len(layer.top) == len(tables[stands_for][2]):
            stamp_layer(layer, tables[stands_for], settings=settings)
    for i in sorted(gone, reverse=True):
        del net.layer[i]
    stamp_net(net, message, fixed=True)
    param = net.net_quantization_param
    param.ClearField("power2_range")  # of caffe-jacinto 0.16; `settings` has it
    if param.quantization_start <= 0:  # would switch the simulation off
        param.ClearField("quantization_start")
    if not settings.float_only:
        param.ClearField("precision")
    write_settings(param, settings)
    return mark(net, before.dialect.name)


def _place(node: Node) -> int:
    """The number of a node's layer in the document."""
    return int(node.path[1])


def breaks_training(before: Any, after: Any, dialect: Dialect) -> str | None:
    """Why the names of a NetParameter do not resolve in phase TRAIN, where those of the one before did."""
    try:
        build(before, registry.find, phase="TRAIN", dialect=dialect)
    except CaffeError:
        return None
    try:
        build(after, registry.find, phase="TRAIN", dialect=dialect)
    except CaffeError as e:
        return e.text
    return None
