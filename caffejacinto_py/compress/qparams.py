"""Quantization parameters in and out of nets: `quantization_param` of layers, and what a quantized net says of itself.

Source: caffe-jacinto 0.17 net.cpp (ToProto, GetQuantizationParam).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caffejacinto_py.compress.numerics import QParams, from_message, to_message
from caffejacinto_py.ir.emit import emit
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.passes.quantize import Settings
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.mark import mark

Table = tuple[Sequence[QParams], Sequence[QParams], Sequence[QParams]]  # of the bottoms, of the blobs, of the tops
SUFFIX = "___QUANTIZED__SEE_END_OFTHE_FILE"


def write_qparams(
    graph: Graph, tables: Mapping[str, Table], *, settings: Settings | None = None, fixed: bool = False, count: int = 0
) -> Any:
    """The graph's NetParameter, quantized: layers named in `tables` get these qparams, and their old ones are replaced.

    settings: what the net was quantized with, where it differs from the graph's own net_quantization_param. fixed: the
    qparams are final (update_quantization_param: false), so a net made from the result uses them from its first pass.
    count: quantized_infer_count; 0 tells caffe-jacinto that the weights are not quantized yet. Raises KeyError for a
    layer that is not in the graph.
    """
    net = emit(graph)
    layers = {layer.name: layer for layer in net.layer}
    for name, table in tables.items():
        stamp_layer(layers[name], table, settings=settings or Settings(), count=count)
    stamp_net(net, graph.proto, fixed=fixed)
    if settings is not None:
        write_settings(net.net_quantization_param, settings)
    return mark(net, graph.dialect.name)


def stamp_layer(layer: Any, table: Table, *, settings: Settings, count: int = 0) -> None:
    """Put qparams into a LayerParameter."""
    q = pb.QuantizationParameter
    new = q(
        precision=q.QuantizationParameter_Precision_FLOAT
        if settings.float_only
        else q.QuantizationParameter_Precision_DYNAMIC_FIXED_POINT,
        rounding_scheme=q.QuantizationParameter_Rounding_STOCHASTIC
        if settings.stochastic
        else q.QuantizationParameter_Rounding_NEAREST,
        power2_scale_weights=settings.power2_weights,
        power2_scale_activations=settings.power2_activations,
        quantized_infer_count=count,
    )
    for field, params in zip(("qparam_in", "qparam_w", "qparam_out"), table, strict=True):
        getattr(new, field).extend(to_message(p) for p in params)
    layer.quantization_param.CopyFrom(new)


def stamp_net(net: Any, original: Any = None, *, fixed: bool = False) -> None:
    """Mark a NetParameter as quantized: name, `quantize`, and the net_quantization_param of the net it comes from."""
    if not net.name.endswith(SUFFIX):
        net.name += SUFFIX
    net.quantize = True
    if original is not None and original.HasField("net_quantization_param"):
        net.net_quantization_param.CopyFrom(original.net_quantization_param)
    if fixed:
        net.net_quantization_param.ClearField("insert_quantization_param")
        net.net_quantization_param.update_quantization_param = False


def read_table(stored: Any) -> Table:
    """The qparams of a quantization_param message."""
    fields = (stored.qparam_in, stored.qparam_w, stored.qparam_out)
    return tuple([from_message(q) for q in field] for field in fields)  # type: ignore[return-value]


def write_settings(param: Any, s: Settings) -> None:
    """Set the fields in which these settings differ from what the message says."""
    wanted: dict[str, Any] = {
        "quantize_weights": s.weights,
        "quantize_activations": s.activations,
        "bitwidth_weights": s.bits_weights,
        "bitwidth_activations": s.bits_activations,
        "bitwidth_bias": s.bits_bias,
        "power2_scale_weights": s.power2_weights,
        "power2_scale_activations": s.power2_activations,
        "apply_offset_weights": s.offset_weights,
        "apply_offset_activations": s.offset_activations,
        "per_channel_weights": s.per_channel,
    }
    for name, value in wanted.items():
        if getattr(param, name) != value:
            setattr(param, name, value)
    if list(param.ignored_layer_names) != list(s.ignored):
        param.ignored_layer_names[:] = s.ignored
