"""What a test run says of a net, layer by layer: sparsity, ranges, scales, and how much of the signal is noise.

Measured while the net is scored. Where the net is simulated a float twin sees the same batches beside it. The tables
are data; `report_html` makes a page of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress import quantize, sparsity
from caffejacinto_py.compress.numerics import QParams, over_axis, simulate
from caffejacinto_py.compress.observe import Observer, Stats, measure
from caffejacinto_py.engine.hooks import Hook, Hooks
from caffejacinto_py.engine.net import Net
from caffejacinto_py.ir.graph import Node, Value

BARS = 48  # of a histogram in the report
_SAMPLE = 8  # items of a batch that are compared with the float twin


@dataclass(frozen=True)
class Row:
    """One blob. kind: "weight" (blob 0 of a product or the like), "blob" (other learnable ones) or "top".

    zeros: fraction of exact zeros. rms: root of the mean square. hist: counts of the non-zero values in equal bins over
    [min, max]. low, high: what the integers can express; bits, scale, offset (lists where channels have their own),
    unsigned; None where it is not quantized. sqnr: signal to quantization noise in dB, of all noise up to this blob for
    tops; None where nothing was simulated, infinite where there is no noise. float_zeros: zeros in the float twin.
    """

    layer: str
    type: str
    kind: str
    name: str
    shape: tuple[int, ...]
    count: int
    zeros: float
    min: float
    max: float
    rms: float
    hist: tuple[int, ...] = ()
    bits: int | None = None
    unsigned: bool | None = None
    scale: Any = None
    offset: Any = None
    low: float | None = None
    high: float | None = None
    sqnr: float | None = None
    float_zeros: float | None = None
    counted: bool = False  # part of the total sparsity
    several: bool = False  # a top, and its layer has more
    bad: int = 0  # NaN and infinite values, which nothing else counts


@dataclass(frozen=True)
class Report:
    """facts: what was run (names, iterations, ...). outputs: {"name", "index", "mean", "loss_weight", "float"}; ranks:
    {"scores", "k", "value", "float"}; "float" is None where nothing is simulated. sparsity: {"zeros", "count",
    "fraction"} of the weights that Caffe counts."""

    facts: Mapping[str, Any]
    outputs: Sequence[Mapping[str, Any]] = ()
    ranks: Sequence[Mapping[str, Any]] = ()
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[Row] = ()
    tops: Sequence[Row] = ()

    @property
    def simulated(self) -> bool:
        return any(r.bits is not None for r in (*self.weights, *self.tops))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that JSON does not know are strings: "inf", "nan"."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class _Sampler(Hook):
    """Keeps the first items of every blob of a pass."""

    def __init__(self) -> None:
        self.blobs: dict[Value, Tensor] = {}

    def begin(self, net: Net) -> None:
        self.blobs = {}

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for v, out in zip(node.outputs, outs, strict=True):
            self.blobs[v] = (out[:_SAMPLE] if out.dim() else out).detach().clone()
        return outs


class Meter:
    """Measures a net while somebody runs batches through it.

    twin: the same net and weights in float, for a net that is simulated; call `after` when both have seen a batch.
    leave_out: layers that are not of the net itself. The hooks that the nets have stay, and run first.
    """

    def __init__(self, net: Net, twin: Net | None = None, *, leave_out: Sequence[str] = ()) -> None:
        self.net, self.twin = net, twin
        self.simulation = quantize.find(net)
        self._left_out = frozenset(leave_out)
        self.observer = Observer(wanted=self._wanted, bins=4096)
        self.float_observer = Observer(wanted=self._wanted, bins=0)
        self._samplers = (_Sampler(), _Sampler())
        self._signal: dict[Value, float] = {}
        self._noise: dict[Value, float] = {}
        mine = [h for h in (net.hook, self.observer) if h is not None]
        if twin is None:
            net.hook = Hooks(*mine)
        else:
            net.hook = Hooks(*mine, self._samplers[0])
            twin.hook = Hooks(self.float_observer, self._samplers[1])

    def _wanted(self, node: Node) -> bool:
        return node.name not in self._left_out

    def after(self) -> None:
        """Both nets have seen the same batch."""
        if self.twin is None or self.simulation is None or not self.simulation.active:
            return
        for v, a in self._samplers[1].blobs.items():
            b = self._samplers[0].blobs.get(v)
            if b is not None and a.shape == b.shape:
                x, y = a.double(), b.double()
                self._signal[v] = self._signal.get(v, 0.0) + float(x.square().sum())
                self._noise[v] = self._noise.get(v, 0.0) + float((x - y).square().sum())

    # --- tables
    def report(self, facts: Mapping[str, Any], sparse: Sequence[sparsity.Row], **results: Any) -> Report:
        """What was measured. sparse: from `compress.sparsity.measure`. results: outputs and ranks of a Report."""
        end = sparsity.total(sparse)
        total = {"zeros": end.zeros, "count": end.count, "fraction": end.fraction}
        counted = {r.name for r in sparse}
        return Report(facts, sparsity=total, weights=self._weights(counted), tops=self._tops(), **results)

    def _weights(self, counted: set[str]) -> list[Row]:
        rows = []
        tables = self.simulation.tables if self.simulation else {}
        for node in self._nodes():
            for i, param in enumerate(self.net.params.get(node.name, [])):
                stats = measure(param, bins=4096)
                shape = tuple(self.net.blob_shapes[node.name][i])
                product = node.layer.quantizes == "product" and i == 0
                row = _row(node, "weight" if product else "blob", str(i), shape, stats)
                row = replace(row, counted=product and node.name in counted)
                q = tables[node.name][1][i] if node.name in tables and i < len(tables[node.name][1]) else None
                if q is not None and q.quantize:
                    row = replace(row, **_expressed(q), sqnr=self._weight_sqnr(node, i, param, q))
                rows.append(row)
        return rows

    def _weight_sqnr(self, node: Node, i: int, param: Tensor, q: QParams) -> float:
        """Of the weights in use against the float ones (the binary's simulation overwrites its weights)."""
        axis = node.layer.output_axis([self.net.graph.shapes[v] for v in node.inputs]) if q.channels else None
        used = simulate(param.detach(), q if axis is None else over_axis(q, param.dim(), axis))
        exact = (self.twin.params[node.name][i] if self.twin else param).detach()
        return decibels(float(exact.double().square().sum()), float((exact - used).double().square().sum()))

    def _tops(self) -> list[Row]:
        rows = []
        tables = self.simulation.tables if self.simulation else {}
        seen, seen_float = self.observer.stats, self.float_observer.stats
        for node in self._nodes():
            exact = seen_float.get(node.name)
            for k, stats in enumerate(seen.get(node.name, ())):
                value = node.outputs[k]
                row = _row(node, "top", value.name, self.net.graph.shapes[value], stats)
                row = replace(row, several=len(node.outputs) > 1)
                q = tables[node.name][2][k] if node.name in tables and k < len(tables[node.name][2]) else None
                if q is not None and q.quantize:
                    row = replace(row, **_expressed(q))
                if value in self._signal:
                    row = replace(row, sqnr=decibels(self._signal[value], self._noise[value]))
                if exact is not None:
                    row = replace(row, float_zeros=exact[k].sparsity)
                rows.append(row)
        return rows

    def _nodes(self) -> list[Node]:
        return [n for n in self.net.graph.nodes if self._wanted(n)]


def _row(node: Node, kind: str, name: str, shape: tuple[int, ...], stats: Stats) -> Row:
    return Row(node.name, node.type, kind, name, shape, stats.count, stats.sparsity, stats.min, stats.max,
               math.sqrt(stats.power), rebin(stats), bad=stats.bad)  # fmt: skip


def _expressed(q: QParams) -> dict[str, Any]:
    """The fields of a row that qparams give."""
    scale, offset = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (q.scale, q.offset))
    ends = [(n - offset) / scale for n in q.limits]
    plain = [x.tolist() if len(x) > 1 else float(x[0]) for x in (scale, offset)]
    return {"bits": q.bits, "unsigned": q.unsigned, "scale": plain[0], "offset": plain[1],
            "low": float(ends[0].min()), "high": float(ends[1].max())}  # fmt: skip


def decibels(signal: float, noise: float) -> float:
    """10 log10 of signal over noise; infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def rebin(stats: Stats, bars: int = BARS) -> tuple[int, ...]:
    """The histogram over [min, max] in few bins; none where all values are equal or zero."""
    if not len(stats.hist) or not stats.limit or stats.max <= stats.min:
        return ()
    middle = (stats.edges[:-1] + stats.edges[1:]) / 2
    place = (middle - stats.min) / (stats.max - stats.min) * bars
    found = np.bincount(np.clip(place, 0, bars - 1).astype(int), weights=stats.hist, minlength=bars)
    return tuple(int(n) for n in found)
