"""Quantization simulation as it should be: the default.

Weights are float masters that nobody overwrites; every forward computes with their fixed-point images, and the gradient
goes straight through to the masters. Ranges are measured on values as layers make them, before they are quantized. Zero
stays zero, and a range of zero is no hazard. Fields as in caffe-jacinto 0.17; the straight-through gradient: Bengio et
al. 2013.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress.numerics import (
    Format,
    QParams,
    half_away,
    in_memory_order,
    make_qparams,
    over_axis,
    per_channel,
    stochastic,
)
from caffejacinto_py.compress.qparams import Table
from caffejacinto_py.compress.simulation import Simulation, wrap
from caffejacinto_py.engine.hooks import Module
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.quantize import Part, Place, Scheme

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net


_MOST = 2.0**100


class Sound(Simulation):
    """ranges: low and high of every top that is to be quantized, one row a top; NaN until it is known."""

    repeatable = True

    def __init__(self, graph: Graph, scheme: Scheme) -> None:
        super().__init__(graph, scheme)
        parts = scheme.parts.values() if not scheme.fixed else ()
        places = [(p.name, k) for p in parts for k, wanted in enumerate(p.tops) if wanted]
        self.rows: dict[Place, int] = {place: row for row, place in enumerate(places)}
        self.ranges = torch.full((len(places), 2), torch.nan)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._net: Net | None = None
        s = scheme.settings
        self.form = Format(s.bits_activations, s.power2_activations, s.offset_activations)

    # --- a pass ------------------------------------------------------------------------------------------------------
    def begin(self, net: Net) -> None:
        self._net = net
        self._seen = {}
        super().begin(net)

    def rounding(self, part: Part) -> Callable[[Tensor], Tensor]:
        return stochastic if self.scheme.settings.stochastic else half_away

    def module(self, node: Node, module: Module) -> Module:
        table, part = self.active.get(node.name), self.scheme.parts.get(node.name)
        if table is None or part is None or not any(q.quantize for q in table[1]):
            return module
        assert self._net is not None
        names = {id(p): name for name, p in module.named_parameters()}  # type: ignore[attr-defined]
        values = {}
        for i, (param, q) in enumerate(zip(self._net.params[node.name], table[1], strict=False)):
            if q.quantize:
                values[names[id(param)]] = self.numbers(param, self._spread(node, i, q), part)
        return wrap(module, values)

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part, table = self.scheme.parts.get(node.name), self.active.get(node.name)
        if part is None:
            return outs
        made = list(outs)
        for k, out in enumerate(outs):
            row = self.rows.get((node.name, k))
            if row is not None and out.numel() and not self.repeating:
                self._seen[row] = torch.aminmax(in_memory_order(out.detach()))
            if table is not None and k < len(table[2]) and table[2][k].quantize:
                made[k] = self.numbers(out, table[2][k], part)
        return tuple(made)

    def end(self, net: Net) -> None:
        if self._seen:
            s = self.scheme.settings
            rows = sorted(self._seen)
            lows, highs = zip(*(self._seen[r] for r in rows), strict=True)
            ends = self.ranks.least(torch.stack([torch.stack(lows), -torch.stack(highs)], 1).float())
            new = torch.stack([ends[:, 0], -ends[:, 1]], 1) * s.expansion
            old = self.ranges.to(new.device)
            whole = len(rows) == len(old)  # nearly always; a list of places would make the host wait for a GPU
            before = old if whole else old[rows]
            mean = torch.lerp(before, new, 1.0 if self.count == 0 else s.rate)
            mean = torch.where(torch.isnan(before) | (self.count == 0), new, mean)
            # one bad pass does not spoil the range for ever
            mean = torch.where(torch.isfinite(mean), mean, before)
            if not whole:
                old[rows] = mean
            self.ranges = mean if whole else old
            self._seen = {}
        self.advance()

    def _spread(self, node: Node, i: int, q: QParams) -> QParams:
        axis = node.layer.output_axis([self.graph.shapes[v] for v in node.inputs]) if q.channels else None
        assert self._net is not None
        return q if axis is None else over_axis(q, self._net.params[node.name][i].dim(), axis)

    # --- qparams -----------------------------------------------------------------------------------------------------
    def compute(self, net: Net) -> dict[str, Table]:
        weights = {(p.name, i): None for p in self.scheme.parts.values() for i, w in enumerate(p.weights) if w}
        blobs = [net.params[name][i].detach() for name, i in weights]
        pairs = [torch.stack(torch.aminmax(in_memory_order(b))).float() for b in blobs]
        channels = self._channels(net, weights)
        # one look at the device for all numbers of the net
        seen = torch.cat([self.ranges.to(net.device), *(p[None] for p in pairs), *channels.values()]).cpu()
        numbers = seen[: len(self.rows) + len(pairs)].tolist()
        spans = dict(zip(weights, numbers[len(self.rows) :], strict=True))
        rest = seen[len(numbers) :].split([len(c) for c in channels.values()])
        edges = dict(zip(channels, rest, strict=True))
        tables: dict[str, Table] = {}
        bare = QParams(self.form.bits)
        for node in self.graph.nodes:
            part = self.scheme.parts[node.name]
            places = [(node.name, i) for i in range(len(part.weights))]
            ws = [self._weight(node, i, spans.get(p), edges.get(p)) for i, p in enumerate(places)]
            ins = [replace(tables[p[0]][2][p[1]], quantize=False) if p else bare for p in part.inputs]
            applied = max((float(q.applied) for q in ins), default=1.0)
            if part.role == "product":
                applied *= float(torch.as_tensor(ws[0].scale).max()) if ws else 1.0
            if not self.scheme.settings.activations or applied > _MOST:
                applied = 1.0  # nothing divides it out again
            same = part.role is None and (node.layer.keeps_memory() or node.layer.hands_through())
            # layers that only hand on what they read: the scale of the one before holds for the one behind
            outs = [ins[0] if same else self._top(node, k, applied, numbers) for k in range(len(part.tops))]
            tables[node.name] = (ins, ws, outs)
        return tables

    def _channels(self, net: Net, weights: Iterable[Place]) -> dict[Place, Tensor]:
        """(channels, 2), lowest and highest, of each weight that has a scale per channel."""
        found = {}
        for name, i in weights if self.scheme.settings.per_channel else ():
            node = self.node(name)
            axis = node.layer.output_axis([self.graph.shapes[v] for v in node.inputs])
            if i == 0 and axis is not None:
                rows = net.params[name][0].detach().movedim(axis, 0).flatten(1)
                found[name, i] = torch.stack(torch.aminmax(rows, dim=1), 1).float()
        return found

    def _weight(self, node: Node, i: int, span: list[float] | None, edges: Tensor | None) -> QParams:
        s = self.scheme.settings
        form = Format(s.bits_bias if i else s.bits_weights, s.power2_weights, s.offset_weights)
        if span is None:
            return QParams(form.bits)
        if not all(map(np.isfinite, span)):
            text = f"layer '{node.name}': blob {i} has values that are NaN or infinite and cannot be quantized"
            raise CaffeError(text, loc=node.loc)
        if edges is not None:
            return replace(per_channel(edges[:, 0], edges[:, 1], form), quantize=True)
        return replace(make_qparams(span[0], span[1], form), quantize=True)

    def _top(self, node: Node, k: int, applied: float, numbers: list[list[float]]) -> QParams:
        row = self.rows.get((node.name, k))
        if row is None:
            return QParams(self.form.bits, applied=applied)
        low, high = numbers[row]
        if low != low or high != high:
            text = f"layer '{node.name}': top {k} never had finite values, so there is no range to quantize it by"
            raise CaffeError(text, loc=node.loc)
        q = make_qparams(low, high, self.form, applied=applied if self.form.power2 else 1.0)
        return replace(q, quantize=True, applied=float(q.scale))

    # --- saving ------------------------------------------------------------------------------------------------------
    def final_tables(self, net: Net) -> dict[str, Table]:
        tables = super().final_tables(net)
        return {name: (ins, self._whole(net, name, ws), outs) for name, (ins, ws, outs) in tables.items()}

    def _whole(self, net: Net, name: str, weights: Sequence[QParams]) -> Sequence[QParams]:
        """The weights' qparams with ranges for blobs that are not quantized too: C++ expects an entry for each."""
        if self.scheme.fixed:
            return weights
        s = self.scheme.settings
        found = []
        for q, param in zip(weights, net.params.get(name, []), strict=False):
            if not q.quantize and param.numel():
                low, high = torch.stack(torch.aminmax(param.detach())).tolist()
                form = Format(q.bits, s.power2_weights, s.offset_weights)
                q = make_qparams(low, high, form) if np.isfinite([low, high]).all() else q
            found.append(q)
        return found

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "ranges": self.ranges.cpu().numpy().copy()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load_state(arrays)
        ranges = torch.from_numpy(np.array(arrays["ranges"], np.float32))
        if ranges.shape != self.ranges.shape:
            raise ValueError(f"ranges of {len(ranges)} blobs, this net quantizes {len(self.ranges)}")
        self.ranges = ranges
