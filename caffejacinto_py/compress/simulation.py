"""The state machine of quantization simulation that both its forms share: passes, activity, saving, log lines.

Source: caffe-jacinto 0.17 net.cpp (StartQuantization, FinishQuantization, DisplayQuantizationParams), quantized_layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress.numerics import QParams, simulate, straight_through
from caffejacinto_py.compress.qparams import Table, read_table, stamp_layer, stamp_net, write_qparams
from caffejacinto_py.engine.hooks import Hook, Module
from caffejacinto_py.errors import WeightsError
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.quantize import Part, Scheme, is_float
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net

log = logging.getLogger(__name__)


class Simulation(Hook):
    """Base of the sound simulation and of the binary's.

    count: passes done. tables: qparams per layer, of the last pass or (`Scheme.fixed`) for all. active: those in use in
    the current pass; empty while the net still runs in float.
    """

    def __init__(self, graph: Graph, scheme: Scheme) -> None:
        self.graph = graph
        self.scheme = scheme
        self.count = 0
        stored = [p for p in scheme.parts.values() if p.stored and not is_float(graph.nodes[p.number].proto)]
        self.tables: dict[str, Table] = {p.name: read_table(p.stored) for p in stored}
        self.active: Mapping[str, Table] = {}
        self.checked = False

    @property
    def started(self) -> bool:
        """Whether the current pass computes qparams: from pass `quantization_start` on."""
        return not self.scheme.fixed and self.count >= self.scheme.settings.start

    def compute(self, net: Net) -> dict[str, Table]:
        """The qparams of the next pass, from ranges and weights as they are."""
        raise NotImplementedError

    def rounding(self, part: Part) -> Callable[[Tensor], Tensor]:
        """How numbers of this layer are rounded."""
        raise NotImplementedError

    def begin(self, net: Net) -> None:
        if not self.checked:
            self.check_weights(net)
            self.checked = True
        if self.started:
            self.tables = self.compute(net)
        self.active = {} if self.scheme.settings.float_only and not self.scheme.fixed else self.tables

    def advance(self) -> None:
        """At the end of a pass: count it, and print the qparams where that is due."""
        every = self.scheme.settings.display
        if self.started and every > 0 and self.count % every == 0:
            for line in self.lines():
                log.info("%s", line)
        self.count += 1

    def check_weights(self, net: Net) -> None:
        """Raises WeightsError for a NaN or an infinity in weights that are about to be quantized."""
        for part in self.scheme.parts.values():
            blobs = net.params.get(part.name, [])
            for i, (param, wanted) in enumerate(zip(blobs, part.weights, strict=False)):
                if wanted and not bool(torch.isfinite(param.detach()).all()):
                    bad = int((~torch.isfinite(param.detach())).sum())
                    text = f"layer '{part.name}': blob {i} has {bad} values that are NaN or infinite"
                    hint = "weights like that cannot be quantized: look at the file they came from"
                    raise WeightsError(text, loc=self.node(part.name).loc, hint=hint)

    def node(self, name: str) -> Node:
        return self.graph.nodes[self.scheme.parts[name].number]

    # --- saving ------------------------------------------------------------------------------------------------------
    @property
    def infer_count(self) -> int:
        """quantized_infer_count of saved layers: 0 tells caffe-jacinto that the weights in the file are float."""
        return 0

    def final_tables(self, net: Net) -> dict[str, Table]:
        """What a saved net carries: the qparams that its next pass would use; empty before quantization starts."""
        if self.scheme.fixed:
            return self.tables
        return self.compute(net) if self.started else {}

    def dump(self, net: Net, *, fixed: bool = False) -> Any:
        """The net as a NetParameter with its qparams. fixed: with update_quantization_param: false."""
        tables = self.final_tables(net)
        return write_qparams(self.graph, tables, settings=self.scheme.settings, fixed=fixed, count=self.infer_count)

    def saving(self, net: Net, model: Any) -> None:
        tables = self.final_tables(net)
        for entry in model.layers:
            if entry.name in tables:
                proto = pb.LayerParameter()
                proto.CopyFrom(entry.proto)
                stamp_layer(proto, tables[entry.name], settings=self.scheme.settings, count=self.infer_count)
                entry.proto = proto
        head = pb.NetParameter.FromString(model.head)
        head.name = model.name
        stamp_net(head, self.graph.proto)
        model.name = head.name
        head.ClearField("name")
        model.head = head.SerializeToString(deterministic=True)

    def state(self) -> dict[str, np.ndarray]:
        return {"count": np.asarray(self.count, np.int64)}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.count = int(arrays["count"])

    # --- the operator ------------------------------------------------------------------------------------------------
    def numbers(self, x: Tensor, q: QParams, part: Part, *, clip: bool = True) -> Tensor:
        """x as the fixed-point numbers of `q` express it; its gradient is that of x."""
        y = simulate(x.detach(), q, rounding=self.rounding(part), clip=clip, clip_first=self.scheme.compat == "cpu")
        return straight_through(x, y) if x.requires_grad and torch.is_grad_enabled() else y

    # --- log ---------------------------------------------------------------------------------------------------------
    def lines(self) -> Iterator[str]:
        """The qparams in use, as display_quantization prints them."""
        yield f"Quantizing the net: {self.graph.name} {self.graph.phase.capitalize()}"
        for number, node in enumerate(self.graph.nodes):
            if node.name not in self.tables:
                continue
            ins, weights, outs = self.tables[node.name]
            words = [("weights:" if i == 0 else "bias:", q) for i, q in enumerate(weights)]
            words += [("input :", q) for q in ins] + [("output:", q) for q in outs]
            for word, q in words:
                known = q.quantize or isinstance(q.min, Tensor) or q.min != q.max  # a merged layer's top has no range
                if known and (q.quantize or (word == "input :" and any(o.quantize for o in outs))):
                    yield f" Q {word} {_words(number, node.name, q)}"


def _words(number: int, name: str, q: QParams) -> str:
    scale, offset = q.scale, q.offset
    if isinstance(scale, Tensor):
        q = replace(q, min=float(torch.as_tensor(q.min).min()), max=float(torch.as_tensor(q.max).max()))
        scale, offset = float(scale.min()), float(torch.as_tensor(offset).flatten()[0])
    relative = float(scale) / q.applied if q.applied else 0.0
    return (
        f"[{number}] Name:{name}, bitwidth={q.bits}, fracbits=0, scale={relative:g}, offset={offset:g}, "
        f"unsigned_data={int(q.positive)}, min={q.min:g}, max={q.max:g}, scale_applied={q.applied:g}, "
        f"scale_target={scale:g}"
    )


def wrap(module: Module, values: Mapping[str, Tensor]) -> Module:
    """The module with other tensors in place of its parameters, for one call."""

    def call(*args: Tensor) -> Any:
        return torch.func.functional_call(module, values, args)  # type: ignore[arg-type]

    return call
