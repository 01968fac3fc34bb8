"""A net with ADaPTION's low-precision layers, made from a plain one and formats: prototxt, weights, tuning solver.

The prototxt is rewritten as a message, so that the layers of all phases stay. Behind every product but the last ones
comes an LPAct, in place, before whatever follows (a ReLU), as ADaPTION's generator has it.
Source: ADaPTION python/caffe/quantization (create_prototxt.py, convert_weights.py, README).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caffejacinto_py.compress.lowprecision import SCHEME, LayerFormats
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.dual import Precision
from caffejacinto_py.layers.lp import LPAct
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.mark import mark
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile

ACT = "_act"  # ending of the names of the new layers


def rewrite(net: Any, graph: Graph, formats: Sequence[LayerFormats]) -> Any:
    """A NetParameter with low-precision layers in place of the products of `formats`, which are looked up by name.

    graph: the net the formats were made for. Layers of other phases are rewritten where they bear the same name.
    """
    wanted = {f.layer: f for f in formats}
    names = {layer.name for layer in net.layer}
    made = pb.NetParameter()
    made.CopyFrom(net)
    del made.layer[:]
    for layer in net.layer:
        chosen = wanted.get(layer.name)
        new = _replaced(layer, graph) if chosen else None
        if chosen is None or new is None:
            made.layer.add().CopyFrom(layer)
            continue
        _write(new.lpfp_param, chosen.weights)
        _spread(new)
        made.layer.add().CopyFrom(new)
        for k, top in enumerate(() if chosen.last else layer.top):
            act = made.layer.add(name=act_name(layer.name, names, k), type=LPAct.type, bottom=[top], top=[top])
            act.include.extend(layer.include)
            act.exclude.extend(layer.exclude)
            _write(act.lpfp_param, chosen.activations)
    return mark(made, graph.dialect.name)


def act_name(layer: str, names: set[str], top: int = 0) -> str:
    """The name of the LPAct behind a layer, unlike all `names` of the plain net."""
    name = f"{layer}{ACT}{top + 1 if top else ''}"
    while name in names:
        name += "_"
    return name


def convert(low: ModelFile, *plain: ModelFile) -> ModelFile:
    """The weights of a low-precision net (phase TEST), with what else the plain files hold: layers of other phases."""
    there = {entry.name for entry in low.layers}
    others: dict[str, LayerBlobs] = {}
    for model in plain:
        others.update({e.name: e for e in model.layers if e.blobs and e.name not in there})
    return ModelFile(low.name, [*low.layers, *others.values()], dialect=low.dialect, head=low.head)


def tuning_solver(net: str, prefix: str, *, test_iter: int, max_iter: int) -> str:
    """Text of a solver that fine-tunes the net with the values of ADaPTION's README."""
    param = pb.SolverParameter(
        net=net,
        test_iter=[test_iter],
        test_interval=max(1, max_iter // 5),
        base_lr=2e-5,
        lr_policy="fixed",
        max_iter=max_iter,
        display=max(1, max_iter // 50),
        momentum=0.9,
        momentum2=0.999,
        type="Adam",
        snapshot_prefix=prefix,
    )
    from caffejacinto_py.schema.text import dumps

    return (
        "# Fine-tuning of a low-precision net: Adam, fixed rate, 1 to 5 passes over the data (set max_iter to that).\n"
        + dumps(param)
    )


def _replaced(layer: Any, graph: Graph) -> Any:
    node = next((n for n in graph.nodes if n.name == layer.name), None)
    if node is None or not registry.known(layer.type):
        return None
    shapes = [graph.shapes[v] for v in node.inputs]
    return registry.make(layer, node.layer.context, len(layer.top)).replacement(SCHEME, shapes)


def _write(param: Any, precision: Precision) -> None:
    param.bd, param.ad = precision.bd, precision.ad
    if precision.round_bias:
        param.round_bias = True
    if precision.stochastic:
        param.rounding_scheme = type(param).STOCHASTIC


def _spread(layer: Any) -> None:
    """Two entries of `param` become four, which every reading takes for the four blobs (see LPConvolution).

    ADaPTION computes no gradient of the bias where the second has lr_mult 0, so that one gets the bias's rate; with
    decay_mult 0 it moves nothing.
    """
    if len(layer.param) < 2:
        return
    if len(layer.param) > 2:
        raise CaffeError(f"layer '{layer.name}': {len(layer.param)} param entries for weights and bias")
    weight, bias = pb.ParamSpec(), pb.ParamSpec()
    weight.CopyFrom(layer.param[0])
    bias.CopyFrom(layer.param[1])
    rate = bias.lr_mult if bias.HasField("lr_mult") else 1.0
    del layer.param[:]
    for spec in (weight, pb.ParamSpec(lr_mult=rate, decay_mult=0), bias, pb.ParamSpec(lr_mult=0, decay_mult=0)):
        layer.param.add().CopyFrom(spec)
