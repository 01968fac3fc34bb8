"""Formats from statistics, the rewritten net and its weights, ADaPTION's own rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.compress.legacy_qmf import ACTIVATIONS, WEIGHTS, Counts
from caffejacinto_py.compress.lowprecision import LayerFormats, Settings, analyse, pick, products, rounded_at, watch
from caffejacinto_py.compress.lp_net import act_name, convert, rewrite, tuning_solver
from caffejacinto_py.compress.observe import measure
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, LayerError, UsageError
from caffejacinto_py.layers.dual import Precision
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile

FILL = 'weight_filler { type: "xavier" }'
PARAMS = "param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }"
TEXT = f"""
name: "plain"
layer {{ name: "in" type: "Input" top: "data" input_param {{ shape {{ dim: 8 dim: 2 dim: 9 dim: 9 }} }} }}
layer {{ name: "c1" type: "Convolution" bottom: "data" top: "c1" {PARAMS}
  convolution_param {{ num_output: 6 kernel_size: 3 {FILL} }} }}
layer {{ name: "r1" type: "ReLU" bottom: "c1" top: "c1" }}
layer {{ name: "c2" type: "Convolution" bottom: "c1" top: "c2"
  convolution_param {{ num_output: 4 kernel_size: 3 bias_term: false {FILL} }} }}
layer {{ name: "r2" type: "ReLU" bottom: "c2" top: "c2" relu_param {{ negative_slope: 0.1 }} }}
layer {{ name: "dw" type: "DepthwiseConvolution" bottom: "c2" top: "dw"
  convolution_param {{ num_output: 4 kernel_size: 3 {FILL} }} }}
layer {{ name: "side" type: "InnerProduct" bottom: "c2" top: "side" inner_product_param {{ num_output: 3 {FILL} }} }}
layer {{ name: "fc" type: "InnerProduct" bottom: "dw" top: "fc" inner_product_param {{ num_output: 3 {FILL} }} }}
layer {{ name: "train" type: "InnerProduct" bottom: "dw" top: "x" inner_product_param {{ num_output: 3 {FILL} }}
  include {{ phase: TRAIN }} }}
"""


class Feeds:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def next(self) -> dict[str, torch.Tensor]:
        return {"data": torch.randn(8, 2, 9, 9, generator=self.generator)}


def plain() -> Net:
    return Net(prepare(parse(TEXT, "NetParameter"), phase="TEST"), seed=0)


def test_pick() -> None:
    def bits(x: Any, n: int = 16, **how: Any) -> tuple[int, int]:
        p = pick(measure(torch.as_tensor(x, dtype=torch.float32)), n, **{"criterion": "abs-max", **how})
        return p.bd, p.ad

    assert [bits([v, -v / 2]) for v in (0.3, 1.01, 5.0, 100.0)] == [(1, 15), (2, 14), (4, 12), (8, 8)]
    assert bits([-5.0, 0.1]) == (4, 12)  # the sign counts for nothing
    assert bits([1.0]) == (2, 14)
    assert bits([1 - 2**-16]) == (1, 15)  # half a step beyond the limit rounds to it
    assert bits([0.0]) == (1, 15)
    assert bits([1e6], 8) == (8, 0)  # clipped
    tail = np.random.default_rng(0).normal(0, 0.2, 100_000).clip(-0.99, 0.99)
    tail[:5] = 7.5
    assert bits(tail, 8) == (4, 4)
    assert bits(tail, 8, criterion="percentile", percentile=99.9) == (1, 7)
    assert bits(tail, 8, criterion="mse") == (4, 4)  # five values far away weigh more than fine steps
    tail[:5] = 1.7
    assert bits(tail, 8, criterion="mse") == (2, 6)
    best = min(((Precision(b, 8 - b).round(tail) - tail) ** 2).mean() for b in range(1, 9))
    found = Precision(*bits(tail, 8, criterion="mse"))
    assert ((found.round(tail) - tail) ** 2).mean() == pytest.approx(best)


@pytest.mark.parametrize(
    ("value", "format"), [(0.3, (1, 15)), (1.01, (2, 14)), (5.0, (4, 12)), (100.0, (8, 8)), (1e6, (16, 0))]
)
def test_adaptions_rule_for_weights(value: float, format: tuple[int, int]) -> None:
    """One bit more than needed above 1; only the signed maximum counts."""
    x = torch.cat([torch.full((1,), value), torch.full((9,), -200.0)])
    p = Counts(16).add(x).format(WEIGHTS)
    assert (p.bd, p.ad) == format


def test_adaptions_rule_for_activations() -> None:
    """The clip level is the first at which at least 1 % of the values are cut off."""
    x = torch.linspace(0, 100, 10001)
    p = Counts(16).add(x[:5000]).add(x[5000:]).format(ACTIVATIONS)
    assert (p.bd, p.ad) == (6, 10)  # 2^7 - 1 cuts nothing, 2^6 - 1 cuts 37 %; with sign 2^5 is the largest
    small = Counts(16).add(torch.tensor([0.2, -0.1, 0.0])).format(ACTIVATIONS)
    assert (small.bd, small.ad) == (1, 15)


def test_which_layers_and_where() -> None:
    graph = plain().graph
    found = products(graph)
    assert [(n.name, last) for n, last in found] == [
        ("c1", False), ("c2", False), ("dw", False), ("side", True), ("fc", True)
    ]  # fmt: skip
    assert [rounded_at(graph, n).name for n, _ in found] == ["r1", "c2", "dw", "side", "fc"]  # r2 has a slope


def converted(settings: Settings) -> tuple[Net, list[LayerFormats], Any]:
    net = plain()
    formats, _ = analyse(net, Feeds(), 3, settings)
    return net, formats, rewrite(parse(TEXT, "NetParameter").message, net.graph, formats)


def test_the_rewritten_net() -> None:
    net, formats, message = converted(Settings(10, 9, round_bias=True, stochastic=True))
    assert [(layer.name, layer.type) for layer in message.layer] == [
        ("in", "Input"), ("c1", "LPConvolution"), ("c1_act", "LPAct"), ("r1", "ReLU"), ("c2", "LPConvolution"),
        ("c2_act", "LPAct"), ("r2", "ReLU"), ("dw", "LPConvolution"), ("dw_act", "LPAct"), ("side", "LPInnerProduct"),
        ("fc", "LPInnerProduct"), ("train", "InnerProduct"),
    ]  # fmt: skip
    layers = {layer.name: layer for layer in message.layer}
    act = layers["c1_act"]
    assert (list(act.bottom), list(act.top)) == (["c1"], ["c1"])
    assert act.lpfp_param.bd + act.lpfp_param.ad == 9
    assert act.lpfp_param.rounding_scheme == act.lpfp_param.STOCHASTIC
    assert not act.lpfp_param.round_bias
    c1 = layers["c1"].lpfp_param
    assert c1.bd + c1.ad == 10
    assert c1.round_bias
    assert layers["dw"].convolution_param.group == 4
    assert layers["train"].include
    # 4 entries mean the same to every reader: nothing moves the copies, the bias keeps its rates
    specs = [(p.lr_mult, p.decay_mult) for p in layers["c1"].param]
    assert specs == [(1, 1), (2, 0), (2, 0), (0, 0)]
    assert act_name("c1", {"c1_act"}) == "c1_act_"
    for mode in ("logical", "physical"):
        dialect = resolve_dialect(message, compat=Compat(lp_param=mode))
        graph = prepare(message, phase="TRAIN", dialect=dialect)
        rates = {(p.node, p.index): (p.lr_mult, p.decay_mult) for p in graph.params}
        assert rates["c1", 0] == (1, 1)
        assert rates["c1", 2] == (2, 0)
    assert formats[0].weights.stochastic
    assert net.graph.node("c1").type == "Convolution"  # the plain net is untouched


def test_the_low_precision_net_computes_nearly_the_same() -> None:
    net, formats, message = converted(Settings(16, 16))
    low = Net(prepare(message, phase="TEST"), seed=1)
    low.load(net.model())
    x = Feeds().next()
    with torch.no_grad():
        a, b = net(x).outputs["fc"], low(x).outputs["fc"]
    assert 0 < float((a - b).abs().max()) < 0.02
    assert [a > 40 and b > 40 for a, b in (f.quality() for f in formats)] == [True] * 5
    seen, score = watch(low, Feeds(), 3, ["c1_act", "r1"])
    assert seen["c1_act"].count == seen["r1"].count == 3 * 8 * 6 * 49
    assert seen["r1"].sparsity > 0.3
    assert score.iterations == 3
    extra = LayerBlobs("train", "InnerProduct", [np.ones((3, 36), np.float32), np.ones(3, np.float32)])
    model = convert(low.model(), net.model(), ModelFile("more", [extra]))
    assert [len(model.layer(n).blobs) for n in ("c1", "c2", "train")] == [4, 2, 2]
    assert model.layer("c1").type == "LPConvolution"
    np.testing.assert_array_equal(model.layer("c1").blobs[1], formats[0].weights.round(model.layer("c1").blobs[0]))


def test_legacy_takes_the_bits_of_the_bias() -> None:
    net = plain()
    with torch.no_grad():
        net.params["c1"][0].fill_(0.1)
        net.params["c1"][1].fill_(-9)
        net.params["c1"][1][0] = 5.0
    formats, _ = analyse(net, Feeds(), 1, Settings(legacy=True))
    assert (formats[0].weights.bd, formats[0].weights.ad) == (4, 12)
    assert all(f.activations.bd + f.activations.ad == 16 for f in formats)


def test_errors() -> None:
    for bad, words in (
        (Settings(1, 8), "1 bits"), (Settings(8, 25), "25 bits"), (Settings(criterion="ms"), "unknown criterion 'ms'"),
        (Settings(percentile=12), "percentile 12"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            bad.check()
    net = plain()
    with torch.no_grad():
        net.params["c2"][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(LayerError, match="layer 'c2': 1 of 216 weights are NaN or infinite"):
        analyse(net, Feeds(), 1, Settings())
    net = plain()
    with torch.no_grad():
        net.params["fc"][0][0, 0] = float("inf")
    with pytest.raises(LayerError, match="layer 'fc'"):
        analyse(net, Feeds(), 1, Settings())
    text = 'layer { name: "in" type: "Input" top: "d" input_param { shape { dim: 1 } } }'
    with pytest.raises(CaffeError, match="no layer with a low-precision form"):
        analyse(Net(prepare(parse(text, "NetParameter"), phase="TEST")), Feeds(), 1, Settings())


def test_solver() -> None:
    message = parse(tuning_solver("a/b.prototxt", "a/b_tuned", test_iter=7, max_iter=50), "SolverParameter").message
    assert (message.type, message.base_lr, message.lr_policy) == ("Adam", pytest.approx(2e-5), "fixed")
    assert (message.net, message.max_iter, list(message.test_iter), message.test_interval) == (
        "a/b.prototxt",
        50,
        [7],
        10,
    )
