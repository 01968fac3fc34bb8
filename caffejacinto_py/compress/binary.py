"""Quantization simulation as caffe-jacinto's binary does it (`compat quantization=cpu` or `gpu`), hazards included.

Weights are overwritten once, at the end of each layer's first quantized forward; ranges are measured on blobs as they
lie in memory after the pass; a range of zero gives an infinite scale. Source: caffe-jacinto 0.17 net.cpp,
quantized_layer.cpp, quantized_layer.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress.numerics import Format, QParams, half_away, half_even, make_qparams, simulate, stochastic
from caffejacinto_py.compress.qparams import Table
from caffejacinto_py.compress.simulation import Simulation
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.quantize import Part, Scheme, is_stochastic

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net

Range = tuple[float, float]


class Binary(Simulation):
    """The hook of the compat modes. ranges: per piece of memory (named after its first blob), and per (layer, blob) of
    the parameters."""

    def __init__(self, graph: Graph, scheme: Scheme) -> None:
        super().__init__(graph, scheme)
        self.memory = memories(graph)
        self.ranges: dict[str, Range] = {}
        self.weights: dict[tuple[str, int], Range] = {}
        self.applied: dict[tuple[str, int], float] = {}  # scale_applied of each top, kept from pass to pass
        self._seen: dict[str, Tensor] = {}
        self._net: Net | None = None

    # --- a pass ------------------------------------------------------------------------------------------------------
    def begin(self, net: Net) -> None:
        self._net = net
        self._seen = {}
        super().begin(net)

    def check_weights(self, net: Net) -> None:
        """The binary does not look."""

    def rounding(self, part: Part) -> Callable[[Tensor], Tensor]:
        stored = part.stored if self.scheme.fixed else None
        if is_stochastic(stored) if stored is not None else self._draws:
            return stochastic
        return half_away if self.scheme.compat == "cpu" else half_even

    @property
    def _draws(self) -> bool:
        return self.graph.phase == "TRAIN" or self.scheme.settings.stochastic

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part, table = self.scheme.parts.get(node.name), self.active.get(node.name)
        if part is None:
            return outs
        if table is not None and (self.scheme.fixed or not self.scheme.settings.float_only):
            _, weights, tops = table
            if self._infer_count(part) == 0:
                self._snap(part, weights)
            outs = tuple(self.numbers(o, q, part) if q.quantize else o for o, q in zip(outs, tops, strict=False))
        if not self.scheme.fixed:
            for v, out in zip(node.outputs, outs, strict=True):
                if out.numel():
                    # now, since the engine's in-place layers would overwrite it; what is written later counts
                    self._seen[self.memory[v.name]] = torch.stack(torch.aminmax(out.detach()))
        return outs

    def _infer_count(self, part: Part) -> int:
        if self.started:
            return self.count - self.scheme.settings.start
        return int(part.stored.quantized_infer_count) if part.stored is not None else 0

    def _snap(self, part: Part, weights: Sequence[QParams]) -> None:
        """Overwrite the layer's blobs. `.data`: the backward pass uses the new values, as in the binary."""
        assert self._net is not None
        first = self.scheme.compat == "cpu"
        for i, (param, q) in enumerate(zip(self._net.params.get(part.name, []), weights, strict=False)):
            if q.quantize:
                new = simulate(param.detach(), q, rounding=self.rounding(part), clip=i == 0, clip_first=first)
                param.data.copy_(new)

    def end(self, net: Net) -> None:
        if not self.scheme.fixed:
            self._measure(net)
        self.advance()

    def _measure(self, net: Net) -> None:
        blobs = {(name, i): p.detach() for name, ps in net.params.items() for i, p in enumerate(ps) if p.numel()}
        pairs = [*self._seen.values(), *(torch.stack(torch.aminmax(t)) for t in blobs.values())]
        rows = torch.stack(pairs).tolist() if pairs else []
        s = self.scheme.settings
        for key, (low, high) in zip(self._seen, rows, strict=False):
            low, high = low * s.expansion, high * s.expansion
            old = self.ranges.get(key)
            if self.count and old is not None:
                low, high = (a * (1 - s.rate) + b * s.rate for a, b in zip(old, (low, high), strict=True))
            self.ranges[key] = (low, high)
        self.weights = dict(zip(blobs, map(tuple, rows[len(self._seen) :]), strict=True))  # type: ignore[arg-type]
        self._seen = {}

    # --- qparams -----------------------------------------------------------------------------------------------------
    @property
    def infer_count(self) -> int:
        return max(self.count - 1 - self.scheme.settings.start, 0)  # of the last pass

    def final_tables(self, net: Net) -> dict[str, Table]:
        return self.tables

    def compute(self, net: Net) -> dict[str, Table]:
        s = self.scheme.settings
        activation = Format(s.bits_activations, s.power2_activations, s.offset_activations)
        tables: dict[str, Table] = {}
        for node in self.graph.nodes:
            part = self.scheme.parts[node.name]
            weights = [self._weight(part, i) for i in range(len(part.weights))]
            ins = []
            for v, place, alone in zip(node.inputs, part.inputs, part.alone, strict=True):
                # a blob with several readers passes through a Split, which hands no scale on
                applied = tables[place[0]][2][place[1]].applied if place and alone else 1.0
                ins.append(self._blob(v.name, activation, applied))
            outs: list[QParams] = []
            for k, v in enumerate(node.outputs):
                applied = self.applied.get((node.name, k), 1.0)
                if part.role == "product":
                    applied = max(float(q.applied) * float(weights[0].scale) for q in ins)
                q = self._blob(v.name, activation, applied)
                if part.role == "product" and k > 0:  # sic
                    q = replace(q, scale=float(outs[0].scale) * float(weights[0].scale))
                if part.tops[k]:
                    q = replace(q, quantize=True, applied=float(q.scale))
                self.applied[node.name, k] = q.applied
                outs.append(q)
            tables[node.name] = (ins, weights, outs)
        return tables

    def _weight(self, part: Part, i: int) -> QParams:
        s = self.scheme.settings
        bits = s.bits_bias if i or part.role == "norm" else s.bits_weights
        low, high = self.weights.get((part.name, i), (0.0, 0.0))
        q = make_qparams(low, high, Format(bits, s.power2_weights, s.offset_weights), sound=False)
        return replace(q, quantize=part.weights[i])

    def _blob(self, name: str, form: Format, applied: float) -> QParams:
        low, high = self.ranges.get(self.memory[name], (0.0, 0.0))
        return make_qparams(low, high, form, applied=applied, sound=False)

    # --- resuming ----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, np.ndarray]:
        def pack(table: Mapping[Any, Any]) -> dict[str, Any]:
            return {"|".join(map(str, k if isinstance(k, tuple) else (k,))): v for k, v in table.items()}

        found = {f"range/{k}": np.asarray(v) for k, v in pack(self.ranges).items()}
        found |= {f"weight/{k}": np.asarray(v) for k, v in pack(self.weights).items()}
        found |= {f"applied/{k}": np.asarray(v) for k, v in pack(self.applied).items()}
        return {**super().state(), **found}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load_state(arrays)
        for name, value in arrays.items():
            kind, _, key = name.partition("/")
            layer, _, index = key.rpartition("|")
            if kind == "range":
                self.ranges[key] = (float(value[0]), float(value[1]))
            elif kind == "weight":
                self.weights[layer, int(index)] = (float(value[0]), float(value[1]))
            elif kind == "applied":
                self.applied[layer, int(index)] = float(value)


def memories(graph: Graph) -> dict[str, str]:
    """Blob name -> the name that stands for its memory. In-place layers write into the same, and so do layers that keep
    their bottom's memory."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for node in graph.nodes:
        for v in node.outputs:
            top = v.name if v.name != "(automatic)" else str(v)
            find(top)
            if node.inputs and node.layer.keeps_memory():
                root[find(top)] = find(node.inputs[0].name)
    return {name: find(name) for name in root} | {"(automatic)": "(automatic)"}
