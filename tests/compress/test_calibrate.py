"""Qparams from observed statistics: which blobs get which, and that the simulation uses them as they were chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from caffejacinto_py.compress.calibrate import (
    DEFAULTS,
    Calibration,
    Choice,
    calibrate,
    check_settings,
    initial_settings,
    wanted,
)
from caffejacinto_py.compress.document import float_document, quantized_document
from caffejacinto_py.compress.observe import observe
from caffejacinto_py.compress.quantize import attach
from caffejacinto_py.engine.hooks import Hook, Hooks
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, UsageError, WeightsError
from caffejacinto_py.ir.graph import Node
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.quantize import Settings
from caffejacinto_py.schema import text

NET = """
name: "mixed"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 6 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "up" type: "Deconvolution" bottom: "conv" top: "up"
        convolution_param { num_output: 4 kernel_size: 1 weight_filler { type: "xavier" } } }
layer { name: "side" type: "Convolution" bottom: "conv" top: "side"
        convolution_param { num_output: 4 kernel_size: 1 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "sum" type: "Eltwise" bottom: "up" bottom: "side" top: "sum" }
layer { name: "lrn" type: "LRN" bottom: "sum" top: "lrn" }
layer { name: "ip" type: "InnerProduct" bottom: "lrn" top: "ip"
        inner_product_param { num_output: 5 transpose: true weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""


class _Feed:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def next(self) -> Mapping[str, Tensor]:
        return {"data": torch.randn(4, 3, 8, 8, generator=self.generator)}


class _Keep(Hook):
    """Copies of all tops."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.seen[node.name] = outs[0].clone()
        return outs


def _net(head: str = "") -> tuple[Any, Net]:
    doc = text.parse(head + NET, "NetParameter")
    return doc.message, Net(prepare(doc, phase="TEST"), seed=1)


def _calibrate(net: Net, settings: Settings, choice: Choice | None = None, **options: Any) -> Calibration:
    names = wanted(net.graph, settings)
    observer = observe(net, _Feed(), 3, wanted=lambda n: n.name in names)
    return calibrate(net, observer, settings, choice or Choice(), **options)


def _q(done: Calibration) -> dict[tuple[str, str], Any]:
    return {(r.layer, r.kind): r.q for r in done.rows}


def test_which_blobs() -> None:
    _, net = _net()
    assert wanted(net.graph, DEFAULTS) == {"in", "conv", "relu", "up", "side", "sum", "lrn", "ip"}
    done = _calibrate(net, DEFAULTS)
    assert list(done.tables) == ["in", "conv", "relu", "up", "side", "sum", "ip"]
    assert [(r.layer, r.kind) for r in done.rows] == [
        ("in", "output"), ("conv", "weight"), ("conv", "bias"), ("relu", "output"), ("up", "weight"), ("up", "bias"),
        ("up", "output"), ("side", "weight"), ("side", "output"), ("sum", "output"), ("ip", "weight"), ("ip", "bias"),
        ("ip", "output"),
    ]  # fmt: skip
    for ins, weights, outs in done.tables.values():
        assert not any(q.quantize for q in ins)
        assert all(math.isfinite(float(q.scale)) for q in (*ins, *weights, *outs))
    # inputs are what their maker made of them; LRN stays float and tells its range
    assert done.tables["ip"][0][0].max > 0
    assert replace(done.tables["up"][0][0], quantize=True) == done.tables["relu"][2][0]
    assert _q(done)["relu", "output"].unsigned


@pytest.mark.parametrize("choice", [Choice("min-max"), Choice("mse"), Choice("percentile", None, 99.9), Choice("kl")])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_simulation_computes_with_these_numbers(choice: Choice, per_channel: bool) -> None:
    message, net = _net()
    settings = replace(DEFAULTS, per_channel=per_channel)
    done = _calibrate(net, settings, choice)
    document = quantized_document(message, net.graph, net.graph, done.tables, settings)
    simulated = Net(prepare(text.parse(text.dumps(document), "NetParameter"), phase="TEST"), share=net)
    attach(simulated)
    keep = _Keep()
    assert simulated.hook is not None
    simulated.hook = Hooks(simulated.hook, keep)
    inputs = _Feed().next()
    with torch.no_grad():
        simulated(inputs)
        net.hook = plain = _Keep()
        net(inputs)
    error = (plain.seen["ip"] - keep.seen["ip"]).square().mean()
    assert 0 < float(error) < float(plain.seen["ip"].square().mean()) / 100
    for (layer, kind), q in _q(done).items():
        if kind == "output":
            n = keep.seen[layer].double() * float(q.scale) + float(q.offset)
            assert float((n - n.round()).abs().max()) < 1e-3
            assert q.limits[0] <= float(n.min().round())
            assert float(n.max().round()) <= q.limits[1]


def test_scales_per_channel_follow_the_output_axis() -> None:
    _, net = _net()
    q = _q(_calibrate(net, replace(DEFAULTS, per_channel=True)))
    counts = {layer: value.channels for (layer, kind), value in q.items() if kind == "weight"}
    assert counts == {"conv": 6, "up": 4, "side": 4, "ip": 5}
    weight = net.params["ip"][0].detach()  # transposed: (K, 5)
    assert q["ip", "weight"].scale.tolist() == pytest.approx((127 / weight.abs().amax(0)).tolist(), rel=1e-5)
    with torch.no_grad():
        for layer, axis in (("conv", 0), ("up", 1), ("side", 0), ("ip", 1)):
            param = net.params[layer][0]
            sizes = torch.logspace(-1, 1, param.shape[axis])
            param.mul_(sizes.reshape([-1 if a == axis else 1 for a in range(param.dim())]))
    whole, single = (_calibrate(net, replace(DEFAULTS, per_channel=p), Choice("mse")) for p in (False, True))
    better = {r.layer: r.sqnr for r in single.rows if r.kind == "weight"}
    for r in whole.rows:
        if r.kind == "weight":
            assert better[r.layer] > r.sqnr + 0.5


def test_powers_of_two_of_activations_are_ratios() -> None:
    _, net = _net()
    settings = replace(DEFAULTS, power2_activations=True)
    for method in ("min-max", "mse"):
        done = _calibrate(net, settings, Choice(method))
        q = _q(done)
        ratio = q["ip", "output"].scale / (done.tables["ip"][0][0].applied * q["ip", "weight"].scale)
        assert math.log2(ratio) == pytest.approx(round(math.log2(ratio)), abs=1e-6)
        assert math.frexp(float(q["in", "output"].scale))[0] == 0.5


def test_settings_of_single_layers() -> None:
    _, net = _net()
    q = _q(_calibrate(net, DEFAULTS, special={"ip": replace(DEFAULTS, bits_weights=4, bits_activations=16)}))
    assert _q(_calibrate(net, replace(DEFAULTS, bits_bias=32)))["ip", "bias"].bits == 32
    assert (q["ip", "weight"].bits, q["ip", "output"].bits, q["conv", "weight"].bits) == (4, 16, 8)


def test_kl_leaves_weights_their_range() -> None:
    _, net = _net()
    q = _q(_calibrate(net, DEFAULTS, Choice("kl")))
    assert q["conv", "weight"].max == pytest.approx(float(net.params["conv"][0].detach().max()))


def test_initial_settings() -> None:
    assert initial_settings(_net()[0]) == replace(DEFAULTS, update=False)
    found = initial_settings(_net("net_quantization_param { bitwidth_weights: 6 precision: "
                                  "QuantizationParameter_Precision_FLOAT }")[0])  # fmt: skip
    assert (found.bits_weights, found.bits_activations, found.offset_weights, found.float_only) == (6, 8, True, False)


def test_a_float_document_quantizes_nothing() -> None:
    message, net = _net()
    done = _calibrate(net, DEFAULTS)
    document = quantized_document(message, net.graph, net.graph, done.tables, DEFAULTS)
    assert document.quantize
    plain = float_document(document)
    assert attach(Net(prepare(text.parse(text.dumps(plain), "NetParameter"), phase="TEST"))) is None
    assert [layer.name for layer in plain.layer] == [layer.name for layer in message.layer]


def test_bad_requests() -> None:
    _, net = _net()
    with pytest.raises(UsageError, match="neither"):
        check_settings(replace(DEFAULTS, weights=False, activations=False), Choice())
    with pytest.raises(UsageError, match="2 to 16"):
        check_settings(replace(DEFAULTS, bits_weights=17), Choice())
    with pytest.raises(UsageError, match="2 to 32"):
        check_settings(replace(DEFAULTS, bits_bias=33), Choice())
    with pytest.raises(UsageError, match="kl needs"):
        check_settings(replace(DEFAULTS, per_channel=True), Choice("mse", "kl"))
    observer = observe(net, _Feed(), 1, wanted=lambda n: n.name != "sum")
    with pytest.raises(CaffeError, match="layer 'sum': no value of blob 'sum' was observed"):
        calibrate(net, observer, DEFAULTS, Choice())
    with torch.no_grad():
        net.params["side"][0][0] = math.inf
    with pytest.raises(WeightsError, match="layer 'side': 6 of 24 values of blob 0 are NaN or infinite"):
        calibrate(net, observer, DEFAULTS, Choice())
