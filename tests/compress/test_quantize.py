"""The sound simulation: float masters, ranges before quantization, gradients straight through, saving and reloading."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import caffejacinto_py.pycaffe as caffe
from caffejacinto_py.compress import quantize
from caffejacinto_py.compress.numerics import from_message, simulate
from caffejacinto_py.compress.qparams import SUFFIX
from caffejacinto_py.compress.sound import Sound
from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.ir.graph import Node
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.quantize import is_float
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import dumps, parse
from caffejacinto_py.schema.weights import read_model, write_model

NET = """
name: "small"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 6 dim: 6 } } }
layer { name: "lab" type: "Input" top: "label" input_param { shape { dim: 4 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 4 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "deconv" type: "Deconvolution" bottom: "conv" top: "deconv"
        convolution_param { num_output: 2 kernel_size: 2 weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "deconv" top: "ip"
        inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""


def make(more: str = "", *, quantized: bool = True, phase: str = "TEST", net: str = NET, seed: int = 1) -> Net:
    text = net + (f"quantize: true net_quantization_param {{ {more} }}" if quantized else "")
    made = Net(prepare(parse(text, "NetParameter"), phase=phase), seed=seed)
    quantize.attach(made)
    return made


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"data": torch.randn(4, 3, 6, 6, generator=rng), "label": torch.randint(3, (4,), generator=rng).float()}


def run(net: Net, seed: int = 0) -> dict[str, torch.Tensor]:
    blobs = batch(seed)
    with torch.no_grad():
        for _ in net.run(blobs):
            pass
    return blobs


def outputs(net: Net, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return net(batch(seed)).loss


def simulation(net: Net) -> Sound:
    hook = quantize.find(net)
    assert isinstance(hook, Sound)
    return hook


def test_first_pass_is_float_then_weights_and_blobs_are_on_their_grids() -> None:
    net, plain = make(), make(quantized=False)
    assert plain.hook is None
    assert torch.equal(run(net)["ip"], run(plain)["ip"])
    masters = [p.detach().clone() for p in net.parameters()]
    blobs = run(net)
    tables = simulation(net).tables
    for layer, name in (("in", "data"), ("relu", "conv"), ("deconv", "deconv"), ("ip", "ip")):
        q = tables[layer][2][0]
        assert q.quantize
        n = blobs[name] * q.scale
        assert torch.allclose(n, n.round(), atol=1e-3), name
        assert q.limits[0] <= n.round().min() <= n.round().max() <= q.limits[1]
    assert not tables["conv"][2][0].quantize  # merged into the ReLU
    assert torch.equal(blobs["label"], batch()["label"])
    assert not tables["lab"][2][0].quantize
    # the weights take part at once, and their masters are untouched
    assert all(torch.equal(p, m) for p, m in zip(net.parameters(), masters, strict=True))
    w, b = (simulate(p.detach(), q) for p, q in zip(net.params["ip"], tables["ip"][1], strict=True))
    want = torch.nn.functional.linear(blobs["deconv"].flatten(1), w, b)
    torch.testing.assert_close(blobs["ip"], simulate(want, tables["ip"][2][0]))
    assert not torch.equal(w, net.params["ip"][0])


def test_ranges_follow_update_and_expansion_factors() -> None:
    net = make("range_update_factor: 0.25 range_expansion_factor: 1.5 quantization_start: 2")
    hook = simulation(net)
    highs = []
    for k in range(2):
        highs.append(float(run(net, k)["ip"].max()))
    row = hook.rows["ip", 0]
    want = 1.5 * (0.75 * highs[0] + 0.25 * highs[1])
    assert hook.ranges[row, 1] == pytest.approx(want, rel=1e-6)
    assert hook.tables == {}
    run(net, 2)
    assert hook.tables["ip"][2][0].max == pytest.approx(want, rel=1e-6)


def test_ranges_are_measured_before_quantization() -> None:
    """Otherwise they could grow through the expansion only."""
    net = make("range_update_factor: 1 range_expansion_factor: 1 bitwidth_activations: 4")
    run(net)
    blobs = batch()
    blobs["data"] *= 100
    with torch.no_grad():
        net(blobs)
    hook = simulation(net)
    assert hook.ranges[hook.rows["in", 0], 1] == blobs["data"].max()


def test_the_fast_road_the_slow_one_and_pycaffe_agree(tmp_path: Path) -> None:
    fast, slow = make(), make()
    (tmp_path / "net.prototxt").write_text(NET + "quantize: true")
    third = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    for name, params in fast.params.items():
        for mine, theirs in zip(third.params[name], params, strict=True):
            mine.data[...] = theirs.detach().numpy()
    for k in range(3):
        for name, value in batch(k).items():
            third.blobs[name].data[...] = value.numpy()
        a, b, c = outputs(fast, k), run(slow, k)["loss"], third.forward()["loss"]
        torch.testing.assert_close(a, b)
        np.testing.assert_allclose(c, a.numpy(), rtol=1e-5)
    assert simulation(fast).tables.keys() == simulation(slow).tables.keys()


@pytest.mark.parametrize("more", ["", "apply_offset_activations: true", "power2_scale_weights: true"])
def test_zeros_survive(more: str) -> None:
    net = make(more)
    with torch.no_grad():
        net.params["ip"][0][:, ::2] = 0
    for _ in range(2):
        blobs = run(net)
    hook = simulation(net)
    w = simulate(net.params["ip"][0].detach(), hook.tables["ip"][1][0])
    assert (w[:, ::2] == 0).all()
    zero = run(make(quantized=False))["conv"] == 0
    assert (blobs["conv"][zero] == 0).float().mean() > 0.9  # the weights' error moves a few across zero


def test_ranges_of_zero_are_harmless() -> None:
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    for _ in range(2):
        blobs = run(net)
    assert (blobs["ip"] == 0).all()
    assert all(torch.isfinite(b).all() for b in blobs.values())


def test_gradients_go_straight_through() -> None:
    """The gradient of the simulated net at the masters is the gradient of the float net that has the simulated weights
    and, as its blobs, the simulated blobs; for a product: grad w = grad top x simulated bottom."""
    net = make(phase="TRAIN", more="bitwidth_activations: 4 bitwidth_weights: 4")
    net(batch())
    blobs = batch()
    tops = {}
    for node, outs in net.run(blobs):
        for v, out in zip(node.outputs, outs, strict=True):
            if out.requires_grad and v.name == "ip":
                out.retain_grad()
                tops[v.name] = out
    blobs["loss"].backward()
    weight = net.params["ip"][0]
    grad = tops["ip"].grad
    assert grad is not None
    torch.testing.assert_close(weight.grad, grad.T @ blobs["deconv"].detach().flatten(1))
    assert weight.grad is not None
    assert net.params["conv"][0].grad is not None
    assert net.params["conv"][0].grad.abs().sum() > 0


def test_stochastic_rounding_is_the_fields_choice_and_torch_s_generator() -> None:
    def losses(more: str, seed: int) -> list[float]:
        net = make(more, phase="TRAIN")
        torch.manual_seed(seed)
        return [float(net(batch(k)).loss.detach()) for k in range(3)]

    draw = "rounding_scheme: QuantizationParameter_Rounding_STOCHASTIC"
    assert losses(draw, 5) == losses(draw, 5) != losses(draw, 6)
    assert losses("", 5) == losses("", 6)  # TRAIN alone is no reason to draw


@pytest.mark.parametrize("more", ["", "per_channel_weights: true", "power2_scale_weights: true bitwidth_weights: 6",
                                  "per_channel_weights: true apply_offset_weights: false",
                                  "apply_offset_activations: true bitwidth_bias: 8"])  # fmt: skip
def test_a_dumped_net_gives_the_same_outputs(tmp_path: Path, more: str) -> None:
    net = make(more)
    for k in range(3):
        run(net, k)
    (tmp_path / "net.prototxt").write_text(dumps(quantize.dump(net, fixed=True)))
    write_model(tmp_path / "net.caffemodel", net.model())
    text = (tmp_path / "net.prototxt").read_text()
    again = Net(prepare(parse(text, "NetParameter"), phase="TEST"), seed=9)
    hook = quantize.attach(again)
    assert hook is not None
    assert hook.scheme.fixed
    again.load(read_model(tmp_path / "net.caffemodel"))
    for k in (3, 4):
        mine = run(again, k)
        if k == 3:  # the ranges of the running net move on
            theirs = run(net, k)
            for name in ("data", "conv", "deconv", "ip", "loss"):
                assert torch.equal(mine[name], theirs[name]), name


def test_weights_files_carry_the_qparams(tmp_path: Path) -> None:
    net = make("bitwidth_weights: 7 per_channel_weights: true")
    write_model(tmp_path / "early.caffemodel", net.model())
    early = read_model(tmp_path / "early.caffemodel")
    assert early.net().quantize
    assert not early.layer("conv").proto.HasField("quantization_param")  # nothing is known yet
    run(net)
    run(net, 1)
    write_model(tmp_path / "net.caffemodel", net.model())
    model = read_model(tmp_path / "net.caffemodel")
    found = model.net()
    assert found.name == model.name == "small" + SUFFIX
    assert found.quantize
    assert found.net_quantization_param.bitwidth_weights == 7
    param = model.layer("conv").proto.quantization_param
    assert [q.bitwidth for q in param.qparam_w] == [7, 16]
    assert len(param.qparam_w[0].channel_scale) == 4
    assert len(model.layer("deconv").proto.quantization_param.qparam_w[0].channel_scale) == 2
    assert param.quantized_infer_count == 0  # float weights: C++ is to quantize them
    q = from_message(param.qparam_w[0])
    assert q.channels == 4
    assert not net.graph.node("conv").proto.HasField("quantization_param")  # a node's message stays as it was


def test_stored_qparams_work_without_the_nets_field() -> None:
    net = make()
    run(net)
    message = quantize.dump(net, fixed=True)
    message.ClearField("quantize")
    again = Net(prepare(message, phase="TEST"), seed=1)
    assert quantize.attach(again) is not None
    assert torch.equal(run(again, 1)["ip"], run(net, 1)["ip"])


@pytest.mark.parametrize("compat", ["sound", "cpu"])
def test_a_layer_of_precision_float_keeps_its_qparams_and_does_not_use_them(compat: str) -> None:
    net = make()
    run(net)
    run(net)
    message = quantize.dump(net, fixed=True)
    layer = next(x for x in message.layer if x.name == "ip")
    layer.quantization_param.precision = pb.QuantizationParameter.QuantizationParameter_Precision_FLOAT
    bare = type(message)()
    bare.CopyFrom(message)
    layer = next(x for x in bare.layer if x.name == "ip")
    for field in ("qparam_in", "qparam_w", "qparam_out"):
        layer.quantization_param.ClearField(field)
    dialect = resolve_dialect(message, None, "jacinto", compat=Compat(quantization=compat))
    made = [Net(prepare(m, phase="TEST", dialect=dialect), seed=1) for m in (message, bare)]
    assert all(quantize.attach(m) is not None for m in made)
    outs = [run(m, 1) for m in made]
    assert torch.equal(outs[0]["ip"], outs[1]["ip"])
    assert not torch.equal(outs[0]["ip"], run(net, 1)["ip"])
    saved = made[0].model().layer("ip").proto.quantization_param
    assert is_float(next(x for x in quantize.dump(made[0]).layer if x.name == "ip"))
    assert len(saved.qparam_w) == 2
    assert saved.precision == pb.QuantizationParameter.QuantizationParameter_Precision_FLOAT


def test_settings_that_switch_off() -> None:
    want = run(make(quantized=False))["ip"]
    for more in (
        "quantization_start: 0",
        "precision: QuantizationParameter_Precision_FLOAT",
        "quantize_weights: false quantize_activations: false",
    ):
        net = make(more)
        run(net)
        assert torch.equal(run(net)["ip"], want), more
    assert make("quantization_start: 0").hook is None


def test_ignored_layers_stay_float() -> None:
    net = make("ignored_layer_names: 'ip'")
    for _ in range(2):
        run(net)
    ins, weights, outs = simulation(net).tables["ip"]
    assert ins[0].scale == simulation(net).tables["deconv"][2][0].scale
    assert not any(q.quantize for q in (*weights, *outs))


def test_nan_weights_are_refused() -> None:
    net = make()
    with torch.no_grad():
        net.params["ip"][1][0] = torch.nan
    with pytest.raises(CaffeError, match="layer 'ip': blob 1 has 1 values that are NaN"):
        run(net)
    net = make()
    run(net)
    with torch.no_grad():
        net.params["conv"][0][0] = torch.inf
    with pytest.raises(CaffeError, match="layer 'conv': blob 0"):
        run(net)


def test_a_bad_batch_does_not_spoil_the_ranges() -> None:
    net, other = make(), make()
    run(net)
    run(other)
    bad = batch()
    bad["data"][0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        net(bad)
    assert torch.isfinite(simulation(net).ranges).all()
    first = make()
    with torch.no_grad():
        first(bad)
    with pytest.raises(CaffeError, match="layer 'in': top 0 never had finite values"):
        run(first)


def test_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    net = make("display_quantization: 2")
    with caplog.at_level(logging.INFO, logger="caffejacinto_py"):
        for k in range(4):
            run(net, k)
    heads = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Quantizing the net")]
    assert heads == ["Quantizing the net: small Test"]  # passes 1 to 3 are quantized, 2 is due
    lines = [r.getMessage() for r in caplog.records if "Name:conv," in r.getMessage()]
    assert lines[0].startswith(" Q weights: [2] Name:conv, bitwidth=12, fracbits=0, scale=")
    assert lines[1].startswith(" Q bias: [2] Name:conv, bitwidth=16")


def test_float_nets_have_no_hook_and_ristretto_s_message_is_none_of_ours() -> None:
    assert make(quantized=False).hook is None
    message = parse(NET, "NetParameter").message
    message.layer[2].quantization_param.bw_params = 8
    assert quantize.attach(Net(prepare(message, phase="TEST"), seed=1)) is None


def test_another_hook_comes_after_the_simulation() -> None:
    class Look(Hook):
        def tops(self, node: Node, outs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen[node.name] = outs
            return outs

    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    net = Net(prepare(parse(NET + "quantize: true", "NetParameter"), phase="TEST"), seed=1)
    net.hook = Look()
    hook = quantize.attach(net)
    assert quantize.find(net) is hook is not None
    for _ in range(2):
        blobs = run(net)
    assert seen["ip"][0] is blobs["ip"]
    n = blobs["ip"] * hook.tables["ip"][2][0].scale
    assert torch.allclose(n, n.round(), atol=1e-3)


def test_scales_pass_through_layers_that_only_hand_on() -> None:
    flat = 'layer { name: "flat" type: "Flatten" bottom: "deconv" top: "flat" }\nlayer { name: "ip"'
    net = make(
        net=NET.replace('layer { name: "ip"', flat).replace('bottom: "deconv" top: "ip"', 'bottom: "flat" top: "ip"')
    )
    for _ in range(2):
        run(net)
    tables = simulation(net).tables
    assert tables["ip"][0][0] == tables["flat"][0][0] == tables["flat"][2][0]
    assert tables["ip"][0][0].scale == tables["deconv"][2][0].scale != 1
    assert not tables["flat"][2][0].quantize
