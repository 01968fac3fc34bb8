"""From what was observed in a float net to fixed quantization parameters, without a running average.

Which blobs are quantized is `passes/quantize.py`; which range a blob gets is `compress/ranges.py`. Every range is
chosen for its blob alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from caffejacinto_py.compress import ranges
from caffejacinto_py.compress.numerics import Format, QParams, make_qparams, over_axis, per_channel, simulate
from caffejacinto_py.compress.observe import Observer, Stats
from caffejacinto_py.compress.qparams import Table
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, UsageError, WeightsError
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.quantize import Part, Place, Settings, parts, settings_of

# what a net gets that says nothing itself: signed or unsigned numbers without offset, so that zero stays zero
DEFAULTS = Settings(bits_weights=8, bits_activations=8, bits_bias=16, offset_weights=False, offset_activations=False)
_MOST = 2.0**100  # scales handed on through layers that stay float end here


@dataclass(frozen=True)
class Choice:
    """How ranges are chosen. weights: the method for blob 0 of products; None: `method`, and min-max for kl, which is
    meant for activations. Biases always keep their whole range."""

    method: str = "min-max"
    weights: str | None = None
    percentile: float = 99.99

    @property
    def of_weights(self) -> str:
        return self.weights or ("min-max" if self.method == "kl" else self.method)


@dataclass(frozen=True)
class Row:
    """One quantized blob. kind: "weight", "bias" or "output"; index: its number among the blobs or tops; name: of the
    top. sqnr: dB, of this blob alone, in an otherwise float net."""

    layer: str
    kind: str
    index: int
    name: str
    q: QParams
    sqnr: float


@dataclass(frozen=True)
class Calibration:
    """tables: layer name -> qparams of its bottoms, blobs and tops, for `write_qparams`. rows: the quantized blobs."""

    tables: dict[str, Table]
    rows: tuple[Row, ...]


def initial_settings(net: Any) -> Settings:
    """Where the options of a calibration start: the NetParameter's net_quantization_param, or DEFAULTS without one."""
    found = settings_of(net) if net.HasField("net_quantization_param") else DEFAULTS
    start = Settings().start if found.start <= 0 else found.start
    return replace(found, float_only=False, update=False, start=start)


def check_settings(settings: Settings, choice: Choice) -> None:
    """Raises UsageError for widths, methods and percentiles that do not exist, and where nothing would be quantized."""
    if not settings.weights and not settings.activations:
        raise UsageError("neither weights nor activations are to be quantized")
    for bits in (settings.bits_weights, settings.bits_activations):
        ranges.check(choice.method, Format(bits), choice.percentile)
    if not 2 <= settings.bits_bias <= 32:
        raise UsageError(f"{settings.bits_bias} bits for biases; their widths are 2 to 32")
    ranges.check(choice.of_weights, Format(), choice.percentile)
    if settings.per_channel and choice.of_weights == "kl":
        raise UsageError("kl needs more values than a channel has", hint="choose mse or min-max for the weights")


def check_weights(net: Net) -> None:
    """Raises WeightsError naming the first layer with weights that are NaN or infinite."""
    for name, blobs in net.params.items():
        for i, x in enumerate(blobs):
            bad = x.numel() - int(torch.isfinite(x).sum())
            if bad:
                text = f"layer '{name}': {bad} of {x.numel()} values of blob {i} are NaN or infinite"
                raise WeightsError(
                    text, loc=net.graph.node(name).loc, hint="take an earlier snapshot; these cannot be used"
                )


def wanted(graph: Graph, settings: Settings) -> set[str]:
    """Layers whose tops a calibration must have observed: those that take part, and what these read."""
    found = _parts(graph, settings)
    own = {name for name, part in found.items() if part.role is not None}
    return own | {place[0] for name in own for place in found[name].inputs if place is not None}


def calibrate(
    net: Net,
    observer: Observer,
    settings: Settings,
    choice: Choice,
    *,
    special: Mapping[str, Settings] | None = None,
) -> Calibration:
    """Qparams of every layer that takes part.

    net: the float net. observer: of the same net, see `observe` and `wanted`. special: settings of single layers in
    place of `settings`. Raises UsageError (see `check_settings`), WeightsError for weights that are NaN or infinite,
    CaffeError for a blob that nobody observed.
    """
    check_settings(settings, choice)
    check_weights(net)
    found, stats = _parts(net.graph, settings), observer.stats
    tops: dict[Place, QParams] = {}
    tables: dict[str, Table] = {}
    rows: list[Row] = []
    for node in net.graph.nodes:
        part, own = found[node.name], (special or {}).get(node.name, settings)
        weights = _weights(net, node, part, own, choice, rows)
        ins = [tops.get(place) if place else None for place in part.inputs]
        applied = max((q.applied for q in ins if q is not None), default=1.0)
        if part.role == "product" and weights:
            applied *= float(torch.as_tensor(weights[0].scale).max())
        if not settings.activations or applied > _MOST:
            applied = 1.0  # nothing divides it out again
        for k, s in enumerate(stats.get(node.name, ())):
            q = tops[node.name, k] = _activation(s, own, choice, quantize=part.tops[k], applied=applied)
            if q.quantize:
                rows.append(Row(node.name, "output", k, s.blob, q, ranges.sqnr(s.power, ranges.noise(s, q))))
        if part.role is not None:
            # never quantized as inputs: they are what their maker made of them
            read = zip(part.inputs, node.inputs, strict=True)
            inputs = [replace(_known(tops, place, v.name), quantize=False) for place, v in read]
            outs = [_known(tops, (node.name, k), v.name) for k, v in enumerate(node.outputs)]
            tables[node.name] = (inputs, weights, outs)
    return Calibration(tables, tuple(rows))


def _parts(graph: Graph, settings: Settings) -> dict[str, Part]:
    return parts(graph, settings, graph.dialect.compat.quantization)


def _known(tops: Mapping[Place, QParams], place: Place | None, blob: str) -> QParams:
    if place is None or place not in tops:
        maker = f"layer '{place[0]}': " if place else ""
        raise CaffeError(f"{maker}no value of blob '{blob}' was observed, so it has no range")
    return tops[place]


def _activation(s: Stats, settings: Settings, choice: Choice, *, quantize: bool, applied: float) -> QParams:
    """Of a top. One that stays float only tells its range. applied: what the sums behind it are scaled by, input times
    weights: where scales are powers of two, it is the ratio to this that is one."""
    form = Format(settings.bits_activations, settings.power2_activations, settings.offset_activations)
    method = choice.method if quantize else "min-max"
    applied_here = applied if form.power2 else 1.0
    low, high = ranges.choose(s, method, form=form, percentile=choice.percentile, applied=applied_here)
    q = make_qparams(low, high, form, applied=applied_here)
    return replace(q, quantize=quantize, applied=float(q.scale) if quantize else applied)


def _weights(net: Net, node: Node, part: Part, settings: Settings, choice: Choice, rows: list[Row]) -> list[QParams]:
    """Of all blobs of a layer, in order; adds the quantized ones to `rows`."""
    found: list[QParams] = []
    if part.role is None:
        return found
    axis = node.layer.output_axis([net.graph.shapes[v] for v in node.inputs])
    for i, (quantize, x) in enumerate(zip(part.weights, net.params.get(node.name, []), strict=True)):
        q = _blob(x, i, part, settings, choice, axis=axis)
        found.append(replace(q, quantize=quantize))
        if quantize:
            exact = x.detach().double()
            wide = q if axis is None else over_axis(q, x.dim(), axis)
            error = float((simulate(exact, wide) - exact).square().mean())
            kind = "bias" if i else "weight"
            rows.append(Row(node.name, kind, i, "", found[-1], ranges.sqnr(float(exact.square().mean()), error)))
    return found


def _blob(x: Tensor, i: int, part: Part, settings: Settings, choice: Choice, *, axis: int | None) -> QParams:
    if i or part.role != "product":
        form = Format(settings.bits_bias, settings.power2_weights)
        ends = [float(v) for v in torch.aminmax(x.detach())] if x.numel() else [0.0, 0.0]
        return make_qparams(ends[0], ends[1], form)
    form = Format(settings.bits_weights, settings.power2_weights, settings.offset_weights)
    if not settings.per_channel or axis is None:
        return make_qparams(*ranges.choose_tensor(x, choice.of_weights, form=form, percentile=choice.percentile), form)
    low, high = ranges.choose_channels(x, choice.of_weights, form=form, percentile=choice.percentile, axis=axis)
    q = per_channel(low, high, form)
    # one axis, as messages have it
    return replace(q, **{name: getattr(q, name).flatten() for name in ("scale", "offset", "min", "max")})
