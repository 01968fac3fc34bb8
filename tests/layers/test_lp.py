"""LPConvolution, LPInnerProduct, LPAct: formats, gradients on masters, rounding schemes, blobs of files, bad fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from google.protobuf import text_format

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import LayerError, WeightsError
from caffejacinto_py.layers.base import Context
from caffejacinto_py.layers.dual import Precision
from caffejacinto_py.layers.lp import LPAct, LPConvolution, LPInnerProduct
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import BVLC
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model
from tests.conftest import shared
from tests.layers.harness import Case, build, check_layer, layer_of

Q = Precision(2, 3)
CONV = 'type: "LPConvolution" convolution_param { num_output: 4 kernel_size: 3 pad: 1 } lpfp_param { bd: 2 ad: 3 }'
IP = 'type: "LPInnerProduct" inner_product_param { num_output: 5 } lpfp_param { bd: 2 ad: 3 round_bias: true }'


def conv(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    return F.conv2d(*map(torch.from_numpy, (x, w, b)), padding=1).numpy()


def test_layers() -> None:
    check_layer(Case(CONV, [(2, 3, 5, 4)], oracle=lambda x, p: [conv(x[0], Q.round(p[0]), p[2])], gradient=False,
                     compiled=True))  # fmt: skip
    check_layer(
        Case(IP, [(2, 3, 2)], oracle=lambda x, p: [x[0].reshape(2, 6) @ Q.round(p[0]).T + Q.round(p[2])],
             gradient=False, compiled=True)
    )  # fmt: skip
    check_layer(Case(IP.replace("num_output: 5", "num_output: 5 transpose: true axis: 2"), [(2, 3, 2)], gradient=False,
                     oracle=lambda x, p: [x[0] @ Q.round(p[0]) + Q.round(p[2])]))  # fmt: skip
    check_layer(Case('type: "LPAct" lpfp_param { bd: 2 ad: 3 }', [(2, 3, 2, 2)], low=-4, high=4,
                     oracle=lambda x, p: [Q.round(x[0])], gradient=False))  # fmt: skip
    three = CONV.replace("kernel_size: 3 pad: 1", "kernel_size: 2 kernel_size: 1 kernel_size: 2 bias_term: false")
    check_layer(Case(three, [(1, 2, 3, 3, 3)], gradient=False))
    points = CONV.replace("kernel_size: 3 pad: 1", "axis: 1 bias_term: false")
    check_layer(Case(points, [(2, 3)], oracle=lambda x, p: [x[0] @ Q.round(p[0]).T], gradient=False))


def test_precision() -> None:
    assert (Precision(2, 2).limit, Precision(2, 2).step, str(Precision(2, 2))) == (1.75, 0.25, "Q2.2")
    grid = Precision(2, 2).round(np.linspace(-9, 9, 20001))
    assert len(np.unique(grid + 0.0)) == 15  # the most negative code is not used
    x = np.float32([0.125, -0.125, 0.12499999, 9, -np.inf, np.nan])
    np.testing.assert_array_equal(Precision(2, 2).round(x), np.float32([0.25, -0.25, 0, 1.75, -1.75, np.nan]))
    rng = np.random.default_rng(0)
    for bd, ad in ((1, 23), (12, 12), (24, 0), (2, 6)):
        layer = f'type: "LPAct" lpfp_param {{ bd: {bd} ad: {ad} }}'
        built = build(layer, [(4000,)], dtype=torch.float32)
        x = (rng.normal(0, 0.6, 4000) * 2.0 ** (bd - 1)).astype(np.float32)
        x[::3] = np.round(x[::3] * 2**ad * 2) / 2**ad / 2  # many ties
        np.testing.assert_array_equal(built(torch.from_numpy(x))[0].numpy(), Precision(bd, ad).round(x))


def test_gradients_land_on_the_masters_and_use_them() -> None:
    built = build(CONV, [(2, 3, 5, 4)])
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    (y,) = built(x)
    seed = torch.randn_like(y)
    y.backward(seed)
    plain = x.detach().clone().requires_grad_()
    w, b = (built.blobs[i].detach().clone().requires_grad_() for i in (0, 2))
    F.conv2d(plain, w, b, padding=1).backward(seed)  # the masters: not the weights of the forward pass
    for got, want in ((x.grad, plain.grad), (built.blobs[0].grad, w.grad), (built.blobs[2].grad, b.grad)):
        torch.testing.assert_close(got, want)
    assert built.blobs[1].grad is None
    assert built.blobs[3].grad is None
    act = build('type: "LPAct" lpfp_param { bd: 1 ad: 3 }', [(3,)])
    x = torch.tensor([-7.0, 0.01, 7.0], dtype=torch.float64, requires_grad=True)
    act(x)[0].backward(torch.tensor([1.0, 2, 3]).double())
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


def test_one_rounding_serves_all_bottoms() -> None:
    text = CONV.replace("bd: 2 ad: 3", "bd: 2 ad: 3 rounding_scheme: STOCHASTIC")
    built = build(text, [(1, 3, 4, 4)] * 2, tops=2)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    a, b = built(x, x)
    assert torch.equal(a, b)


def test_stochastic_rounding_keeps_the_mean_and_follows_the_seed() -> None:
    built = build('type: "LPAct" lpfp_param { bd: 2 ad: 2 rounding_scheme: STOCHASTIC }', [(40000,)])
    assert built.layer.stateful_forward
    x = torch.full((40000,), -0.3, dtype=torch.float64)
    torch.manual_seed(5)
    (first,), (second,) = built(x), built(x)
    torch.manual_seed(5)
    assert torch.equal(built(x)[0], first)
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {-0.5, -0.25}
    assert abs(float(first.mean()) + 0.3) < 0.002  # 3 sigma: 0.0006
    grid = torch.tensor([-1.75, -0.25, 0, 1.5, 1.75, 9]).double()
    assert built(grid)[0].tolist() == [-1.75, -0.25, 0, 1.5, 1.75, 1.75]


def module_of(text: str, *, inplace: bool = False, **compat: str) -> Any:
    proto = text_format.Parse(
        text + (' bottom: "x" top: "x"' if inplace else ' bottom: "x" top: "y"'), pb.LayerParameter()
    )
    layer = LPAct(proto, Context(dialect=replace(BVLC, compat=Compat(**compat))), 1)
    return layer, layer.module([(3,)], [])


def test_compat_switches() -> None:
    x = torch.tensor([0.2, -0.2, float("nan")])
    scheme = "lpfp_param { bd: 2 ad: 2 rounding_scheme: STOCHASTIC }"
    assert module_of(scheme, adaption="cpu")[1](x).tolist() == [0, -0.25, -1.75]
    assert torch.isnan(module_of("lpfp_param { bd: 2 ad: 2 }")[1](x)[2])  # so that it is found
    many = torch.full((1000,), 0.1)
    layer, out_of_place = module_of("lpfp_param { bd: 2 ad: 2 }", adaption="gpu")
    assert len(out_of_place(many).unique()) == 2
    assert layer.stateful_forward
    assert module_of("lpfp_param { bd: 2 ad: 2 }", inplace=True, adaption="gpu")[1](many).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        ("", ("lpfp_param", "bd"), "must be given"),
        ("lpfp_param { ad: 3 }", ("lpfp_param", "bd"), "must be given"),
        ("lpfp_param { bd: 0 ad: 8 }", ("lpfp_param", "bd"), "at least 1"),
        ("lpfp_param { bd: 2 ad: 23 }", ("lpfp_param", "ad"), "25 bits"),
        ("lpfp_param { bd: 25 }", ("lpfp_param", "bd"), "25 bits"),
        ("lpfp_param { bd: 1 ad: 4000000000 }", ("lpfp_param", "ad"), "at most 24"),
    ],
)
def test_bad_formats(text: str, at: tuple[str, ...], words: str) -> None:
    for rest, ins in (('type: "LPAct"', (2,)), (CONV.split("lpfp")[0], (1, 3, 4, 4)), (IP.split("lpfp")[0], (2, 3))):
        with pytest.raises(LayerError, match=words) as e:
            layer_of(f"{rest} {text}").shapes([ins])
        assert e.value.field == at


def test_bad_format_has_its_place() -> None:
    text = (
        'layer { name: "d" type: "Input" top: "d" input_param { shape { dim: 2 } } }\nlayer { name: "a" type: "LPAct"'
    )
    document = parse(text + ' bottom: "d" top: "e" lpfp_param { bd: 0 } }', "NetParameter", file="n")
    with pytest.raises(LayerError, match=r"n:2:67: layer 'a' \(LPAct\): bd must be at least 1"):
        prepare(document)
    with pytest.raises(LayerError, match="normalize"):
        layer_of(IP.replace("num_output: 5", "num_output: 5 normalize: true")).shapes([(2, 3)])


def test_messages_that_the_fork_never_reads_stand_in() -> None:
    layer = layer_of(
        CONV.split("lpfp")[0] + "lp_convolution_param { bd: 3 round_bias: true rounding_scheme: STOCHASTIC }"
    )
    assert isinstance(layer, LPConvolution)
    assert layer.precision() == Precision(3, 8, True, True)
    act = layer_of('type: "LPAct" lp_act_param { }')
    assert isinstance(act, LPAct)
    assert act.precision() == Precision(8, 8)
    ip = layer_of(IP + " lp_inner_product_param { bd: 9 }")
    assert isinstance(ip, LPInnerProduct)
    assert ip.precision() == Precision(2, 3, True)


# --- files ---------------------------------------------------------------------------------------------------------
HEAD = 'layer { name: "d" type: "Input" top: "d" input_param { shape { dim: 1 dim: 2 dim: 4 dim: 4 } } }'
BODY = """layer {{ name: "c" type: "{lp}Convolution" bottom: "d" top: "c" {form}
 convolution_param {{ num_output: 3 kernel_size: 3 bias_term: {bias} weight_filler {{ type: "xavier" }}
 bias_filler {{ type: "constant" value: 0.3 }} }} }}
layer {{ name: "f" type: "{lp}InnerProduct" bottom: "c" top: "f" {form} inner_product_param {{ num_output: 2
 weight_filler {{ type: "xavier" }} }} }}"""


def net(lp: bool, *, bias: bool = True, seed: int = 0) -> Net:
    form = "lpfp_param { bd: 1 ad: 4 }" if lp else ""
    body = BODY.format(lp="LP" if lp else "", form=form, bias=str(bias).lower())
    return Net(prepare(parse(HEAD + body, "NetParameter")), seed=seed)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_go_both_ways(bias: bool) -> None:
    plain, low = net(False, bias=bias), net(True, bias=bias, seed=1)
    low.load(plain.model())
    master = plain.params["c"][0].detach()
    assert [tuple(p.shape) for p in low.params["c"]] == [(3, 2, 3, 3)] * 2 + [(3,)] * 2 * bias
    assert torch.equal(low.params["c"][0], master)
    np.testing.assert_array_equal(low.params["c"][1].detach().numpy(), Precision(1, 4).round(master.numpy()))
    if bias:
        assert all(torch.equal(low.params["c"][i], plain.params["c"][1]) for i in (2, 3))
    again = net(False, bias=bias, seed=2)
    again.load(low.model())
    for name in ("c", "f"):
        for a, b in zip(again.params[name], plain.params[name], strict=True):
            assert torch.equal(a, b)  # the masters


def test_old_shapes_and_files(tmp_path: Any) -> None:
    low = net(True)
    w, b = np.ones((2, 12), np.float32), np.ones(2, np.float32)
    entry = LayerBlobs("f", "InnerProduct", [w.reshape(1, 1, 2, 12), b.reshape(1, 1, 1, 2)], legacy=[True, True])
    low.load(ModelFile("old", [entry]))
    assert [tuple(p.shape) for p in low.params["f"]] == [(2, 12), (2, 12), (2,), (2,)]
    assert low.params["f"][1].detach().unique().tolist() == [0.9375]
    assert float(low.params["f"][2].detach()[1]) == 1
    for path, form in ((tmp_path / "a.caffemodel", "binaryproto"), (tmp_path / "a.h5", "hdf5")):
        write_model(path, low.model(), format=form)
        other = net(True, seed=3)
        other.load(read_model(path))
        assert all(torch.equal(p, q) for n in ("c", "f") for p, q in zip(low.params[n], other.params[n], strict=True))
    with pytest.raises(WeightsError, match="layer 'f', blob 0"):
        low.load(ModelFile("bad", [LayerBlobs("f", "", [np.ones((3, 12), np.float32), b])]))
    with pytest.raises(WeightsError, match="layer 'f' has 3 blobs"):
        low.load(ModelFile("bad", [LayerBlobs("f", "", [w, w, b])]))


def test_masters_and_fillers_do_not_depend_on_copies() -> None:
    plain, low = net(False), net(True)
    assert torch.equal(plain.params["c"][0], low.params["c"][0])
    assert not low.params["c"][1].any()
    low(dict(d=torch.ones(1, 2, 4, 4)))
    assert low.params["c"][1].any()


def test_the_published_bit_map() -> None:
    """ADaPTION's VGG16 with 16 bits: what its prototxt says is what the layers use."""
    folder = "prototxt/NeuromorphicProcessorProject_ADaPTION/examples/low_precision/imagenet/models"
    graph = prepare(load_net(shared(f"{folder}/LP_VGG16_16_bit_train.prototxt")), phase="TEST")
    found: dict[type, list[tuple[int, int]]] = {}
    for node in graph.nodes:
        if isinstance(node.layer, (LPConvolution, LPInnerProduct, LPAct)):
            p = node.layer.precision()
            assert p.stochastic
            found.setdefault(type(node.layer), []).append((p.bd, p.ad))
    assert found[LPConvolution] == [(3, 13)] + [(1, 15)] * 11 + [(5, 11)]
    assert found[LPInnerProduct] == [(1, 15), (2, 14), (1, 15)]
    assert [bd for bd, _ in found[LPAct]] == [7, 9, 10, 10, 11, 11, 11, 10, 9, 8, 8, 7, 5, 4, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("text", [CONV, IP, 'type: "LPAct" lpfp_param { bd: 2 ad: 11 }'])
def test_a_gpu_rounds_to_the_same_values(text: str) -> None:
    """Rounded blobs and activations are equal; sums agree to rounding."""
    shape = (2, 3, 5, 4) if "Conv" in text else (4, 30)
    built = build(text, [shape], dtype=torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    (cpu,) = built(x)
    copies = [p.detach().clone() for p in built.blobs[1::2]]
    built.module.cuda()
    (gpu,) = built(x.cuda())
    for before, now in zip(copies, built.blobs[1::2], strict=True):
        assert torch.equal(before, now.detach().cpu())
    if built.blobs:
        torch.testing.assert_close(gpu.detach().cpu(), cpu.detach(), rtol=1e-3, atol=1e-3)  # TF32 may be on
    else:
        assert torch.equal(gpu.cpu(), cpu)
