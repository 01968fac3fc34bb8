"""Whether a net's quantization settings make sense, with the place of each that does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from caffejacinto_py.errors import CaffeError, PrototxtError, near, raise_all
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.quantize import Part, is_float, is_stored, plan
from caffejacinto_py.schema.compat import SOUND

PARAM = "net_quantization_param"
MAX_BITS, MAX_BITS_BIAS = 16, 32
WIDTHS = {"bitwidth_weights": MAX_BITS, "bitwidth_activations": MAX_BITS, "bitwidth_bias": MAX_BITS_BIAS}
OLD = {
    "insert_quantization_param": "update_quantization_param",
    "power2_range": "power2_scale_weights and power2_scale_activations",
}


def check(graph: Graph) -> Graph:
    """The graph of a shaped net, with a notice for each old spelling. Raises PrototxtError or ManyErrors."""
    net = graph.proto
    quantize = bool(net is not None and net.quantize)
    errors: list[CaffeError] = []
    notices: list[str] = []
    if quantize:
        errors += _settings(graph, net.net_quantization_param)
        notices += _notices(graph, net.net_quantization_param)
    stored = [n for n in graph.nodes if is_stored(n.proto)]
    for node in stored:
        errors += _stored(graph, node)
    if any(q.HasField("scale") for n in stored for q in n.proto.quantization_param.qparam_out):
        notices.append("'scale' of stored qparams is caffe-jacinto 0.16's name: taken as scale_target")
    scheme = None if errors else plan(graph)
    if scheme is not None and scheme.fixed:
        for part in scheme.parts.values():
            node = graph.nodes[part.number]
            if scheme.simulated and not scheme.settings.float_only and not is_float(node.proto):
                errors += _missing(graph, node, part)
    raise_all(errors)
    return replace(graph, notices=(*graph.notices, *notices))


def _settings(graph: Graph, param: Any) -> list[CaffeError]:
    found: list[CaffeError] = []

    def wrong(text: str, *field: str | int, hint: str | None = None) -> None:
        loc = graph.locate((PARAM, *field)) if graph.locate else None
        found.append(PrototxtError(f"{PARAM}: {text}", loc=loc, hint=hint))

    for name, most in WIDTHS.items():
        if not 2 <= getattr(param, name) <= most:
            wrong(f"{name} is 2 to {most} bits, not {getattr(param, name)}", name)
    if not 0 < param.range_update_factor <= 1:
        hint = "it is the weight of the newest batch in the running range; 1 takes the newest range alone"
        wrong(
            f"range_update_factor lies in (0, 1], not {param.range_update_factor:g}", "range_update_factor", hint=hint
        )
    if not 1 <= param.range_expansion_factor < math.inf:
        text = f"range_expansion_factor is at least 1, not {param.range_expansion_factor:g}"
        wrong(text, "range_expansion_factor", hint="1 takes ranges as they are measured")
    if param.quantization_start < 0:
        hint = "the pass (from 0) that is quantized first; 0 switches quantization off"
        wrong(f"quantization_start is not negative: {param.quantization_start}", "quantization_start", hint=hint)
    names = {layer.name for layer in graph.proto.layer}  # layers of the other phase may be named too
    for i, name in enumerate(param.ignored_layer_names):
        if name not in names:
            wrong(f"ignored_layer_names: there is no layer '{name}'", "ignored_layer_names", i, hint=near(name, names))
    return found


def _notices(graph: Graph, param: Any) -> list[str]:
    found = []

    def note(field: str, text: str) -> None:
        loc = graph.locate((PARAM, field)) if graph.locate else None
        found.append((f"{loc}: " if loc else "") + f"'{field}' {text}")

    if param.quantization_start == 0:
        note("quantization_start", "is 0: nothing is quantized, as in caffe-jacinto")
    for field, today in OLD.items():
        if param.HasField(field):
            note(field, f"is caffe-jacinto 0.16's name: taken as {today}")
    return found


def _stored(graph: Graph, node: Node) -> list[CaffeError]:
    """What is wrong with the numbers of stored qparams."""
    found: list[CaffeError] = []
    param = node.proto.quantization_param
    axis = node.layer.output_axis([graph.shapes[v] for v in node.inputs])
    blobs = node.layer.blobs([graph.shapes[v] for v in node.inputs])
    for field in ("qparam_in", "qparam_w", "qparam_out"):
        for i, q in enumerate(getattr(param, field)):

            def wrong(text: str, name: str, field: str = field, i: int = i) -> None:
                loc = graph.where(node, "quantization_param", field, i, name)
                found.append(PrototxtError(f"layer '{node.name}': {field} {i}: {text}", loc=loc))

            if not q.quantize:
                continue
            most = MAX_BITS_BIAS if field == "qparam_w" and i else MAX_BITS
            if not 2 <= q.bitwidth <= most:
                wrong(f"bitwidth is 2 to {most}, not {q.bitwidth}", "bitwidth")
            name = "scale" if q.HasField("scale") and not q.HasField("scale_target") else "scale_target"
            sound = graph.dialect.compat.quantization == SOUND  # the binary writes infinite scales itself
            if sound and not (0 < getattr(q, name) < math.inf and math.isfinite(q.offset)):
                wrong(f"{name} {getattr(q, name):g} with offset {q.offset:g} describes no numbers", name)
            if q.channel_scale:
                want = None if axis is None or field != "qparam_w" or i else blobs[0].shape[axis]
                if len(q.channel_scale) != want:
                    text = f"{len(q.channel_scale)} channel_scale values for {want or 'no'} output channels"
                    wrong(text, "channel_scale")
                elif q.channel_offset and len(q.channel_offset) != want:
                    wrong(f"{len(q.channel_offset)} channel_offset values for {want} channels", "channel_offset")
                elif not all(0 < s < math.inf for s in q.channel_scale):
                    wrong("channel_scale values are positive and finite", "channel_scale")
    return found


def _missing(graph: Graph, node: Node, part: Part) -> list[CaffeError]:
    """Blobs that the net's settings quantize and for which no qparams are stored."""
    param = node.proto.quantization_param
    wanted = {
        "qparam_w": len(part.weights) if any(part.weights) else 0,
        # caffe-jacinto's files need not say anything of an Input
        "qparam_out": len(part.tops) if any(part.tops) and part.role != "input" else 0,
    }
    found: list[CaffeError] = []
    for field, count in wanted.items():
        have = len(getattr(param, field))
        if have < count:
            text = f"layer '{node.name}': update_quantization_param is false, but it has {have} {field} of {count}"
            hint = "run `caffejacinto calibrate`, or let the ranges be found: update_quantization_param: true"
            found.append(PrototxtError(text, loc=graph.where(node, "quantization_param"), hint=hint))
    return found
