"""Small nets with stored quantization parameters, for the tests of integer programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from caffejacinto_py.compress import quantize
from caffejacinto_py.compress.integer import Built, build
from caffejacinto_py.compress.numerics import Format, QParams, make_qparams, per_channel
from caffejacinto_py.compress.qparams import write_qparams
from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.engine.net import Net
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.quantize import Settings, parts
from caffejacinto_py.schema import text

INPUT = 'layer {{ name: "in" type: "Input" top: "data" input_param {{ shape {{ {} }} }} }}\n'


def net_text(shape: tuple[int, ...], *layers: str) -> str:
    """A net of an Input `data` and more layers: "name Type bottom,bottom top fields" each."""
    lines = [INPUT.format(" ".join(f"dim: {d}" for d in shape))]
    for line in layers:
        name, kind, bottoms, top, *fields = line.split(" ", 4)
        reads = " ".join(f'bottom: "{b}"' for b in bottoms.split(","))
        lines.append(f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{top}" {" ".join(fields)} }}\n')
    return "".join(lines)


class _Ranges(Hook):
    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}

    def tops(self, node: Node, outs: Any) -> Any:
        self.found[node.name] = [(float(o.min()), float(o.max())) for o in outs]
        return outs


def quantized(
    source: Any, settings: Settings, *, seed: int = 0, batch: Any = None, model: Any = None
) -> tuple[Any, Net]:
    """The net (text or message) with the qparams of one pass over random data (or `batch`), and a float net with its
    weights, which are random unless there is a `model`."""
    graph = prepare(text.parse(source, "NetParameter") if isinstance(source, str) else source, phase="TEST")
    net = Net(graph, dtype=torch.float64, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for blobs in net.params.values():
            for blob in blobs:
                blob.copy_(torch.randn(blob.shape, generator=rng, dtype=torch.float64).float())
    if model is not None:
        net.load(model)
    net.hook = ranges = _Ranges()
    if batch is None:
        shapes = {top: shape for x in net.sources for top, shape in zip(x.tops, x.shapes)}
        batch = {t: torch.randn(s, generator=rng) * 3 if len(s) > 1 else torch.zeros(s) for t, s in shapes.items()}
    with torch.no_grad():
        net(batch)
    net.hook = None
    tables: dict[str, Any] = {}
    for name, part in parts(graph, settings).items():
        node = graph.node(name)
        axis = node.layer.output_axis([graph.shapes[v] for v in node.inputs])
        weights = [_weight(p.detach(), i, axis, settings) for i, p in enumerate(net.params.get(name, []))]
        form = Format(settings.bits_activations, settings.power2_activations, settings.offset_activations)
        outs = [make_qparams(low, high, form) for low, high in ranges.found[name]]
        tables[name] = (
            [],
            [replace(q, quantize=flag) for q, flag in zip(weights, part.weights)],
            [replace(q, quantize=flag) for q, flag in zip(outs, part.tops)],
        )
    return write_qparams(graph, tables, settings=settings, fixed=True), net


def _weight(blob: torch.Tensor, i: int, axis: int | None, s: Settings) -> QParams:
    form = Format(s.bits_bias if i else s.bits_weights, s.power2_weights, s.offset_weights)
    if s.per_channel and i == 0 and axis is not None:
        flat = blob.movedim(axis, 0).flatten(1)
        return per_channel(flat.amin(1), flat.amax(1), form)
    return make_qparams(float(blob.min()), float(blob.max()), form)


def blobs_of(net: Net) -> dict[str, list[np.ndarray]]:
    return {name: [p.detach().double().numpy() for p in params] for name, params in net.params.items()}


def simulation(message: Any, weights: Net, dtype: torch.dtype = torch.float64) -> Net:
    """The quantized net with its simulation."""
    net = Net(graph_of(message), dtype=dtype, seed=0)
    net.load(weights.model())
    quantize.attach(net)
    return net


def graph_of(message: Any) -> Graph:
    return prepare(message, phase="TEST")


def program_of(message: Any, weights: Net, **options: Any) -> Built:
    return build(graph_of(message), blobs_of(weights), **options)
