"""convert: formats of weights, and BatchNorm from one family's form into the other's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import DIALECTS
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model
from tests.conftest import shared

Capture = pytest.CaptureFixture[str]
HEAD = """name: "bn"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 5 dim: 5 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
"""
BVLC = (
    HEAD
    + """
layer { name: "bn1" type: "BatchNorm" bottom: "conv" top: "conv"
  batch_norm_param { use_global_stats: true eps: 0.001 } }
layer { name: "sc1" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "bn2" type: "BatchNorm" bottom: "conv" top: "bn2" }
layer { name: "sc2" type: "Scale" bottom: "bn2" top: "sc2" }
layer { name: "bn3" type: "BatchNorm" bottom: "sc2" top: "bn3" }
layer { name: "sc4" type: "Scale" bottom: "conv" top: "sc4" scale_param { bias_term: true } }
layer { name: "sum" type: "Eltwise" bottom: "bn3" bottom: "sc4" top: "sum" }
"""
)
NV = (
    HEAD
    + """
layer { name: "bn1" type: "BatchNorm" bottom: "conv" top: "conv"
  batch_norm_param { scale_bias: true use_global_stats: false moving_average_fraction: 0.9 eps: 0.0001 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "bn2" type: "BatchNorm" bottom: "conv" top: "bn2" batch_norm_param { eps: 1e-7 } }
layer { name: "bn1_scale" type: "Power" bottom: "bn2" top: "out" }
"""
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def trained(text: str, factor: float) -> None:
    """net.prototxt and w.caffemodel with random blobs; the statistics are sums with this factor."""
    Path("net.prototxt").write_text(text)
    net = Net(prepare(load_net("net.prototxt"), phase="TEST"), seed=1)
    rng = np.random.default_rng(3)
    model = net.model()
    for layer in model.layers:
        layer.blobs = [rng.uniform(0.5, 2, b.shape).astype(np.float32) for b in layer.blobs]
        if len(layer.blobs) >= 3:
            layer.blobs[2][:] = factor
    write_model("w.caffemodel", model)


def outputs(net: str, weights: str) -> dict[str, np.ndarray]:
    built = Net(prepare(load_net(net), phase="TEST"), seed=7)
    report = built.load(read_model(weights))
    assert not report.untouched
    assert not report.ignored
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype(np.float32))
    with torch.no_grad():
        return {name: value.numpy() for name, value in built({"data": data}).outputs.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    for x, y in zip(a.values(), b.values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_bvlc_to_nvcaffe_and_back(capsys: Capture) -> None:
    trained(BVLC, factor=0.4)
    args = ["--model", "net.prototxt", "--model-out"]
    assert main(["convert", "w.caffemodel", "nv.caffemodel", "--bn", "nvcaffe", *args, "nv.prototxt"]) == 0
    out = capsys.readouterr()
    assert "3 BatchNorm layers in the form of nvcaffe; 2 Scale layers merged into them" in out.out
    assert "use_global_stats is not read by NVCaffe" in out.err
    net = load_net("nv.prototxt").message
    assert [layer.name for layer in net.layer] == ["in", "conv", "bn1", "relu", "bn2", "bn3", "sc4", "sum"]
    assert [layer.batch_norm_param.scale_bias for layer in net.layer if layer.type == "BatchNorm"] == [
        True,
        True,
        False,
    ]
    nv, old = read_model("nv.caffemodel"), read_model("w.caffemodel")
    assert [b.shape for b in nv.layer("bn1").blobs] == [(4,), (4,), (1,), (4,), (4,)]
    np.testing.assert_allclose(
        nv.layer("bn1").blobs[0], np.array(old.layer("bn1").blobs[0]) / np.float32(0.4), rtol=1e-6
    )
    assert np.array(nv.layer("bn1").blobs[2])[0] == 1
    assert not np.array(nv.layer("bn2").blobs[4]).any()
    want = outputs("net.prototxt", "w.caffemodel")
    same(want, outputs("nv.prototxt", "nv.caffemodel"))
    args = ["--model", "nv.prototxt", "--model-out"]
    assert main(["convert", "nv.caffemodel", "b.caffemodel", "--bn", "bvlc", *args, "b.prototxt"]) == 0
    assert "2 Scale layers split off" in capsys.readouterr().out
    same(want, outputs("b.prototxt", "b.caffemodel"))
    assert not any(layer.batch_norm_param.HasField("scale_bias") for layer in load_net("b.prototxt").message.layer)


def test_nvcaffe_to_bvlc(capsys: Capture) -> None:
    trained(NV, factor=1.0)
    want_net = Path("net.prototxt").read_text()
    assert main(["convert", "w.caffemodel", "b.caffemodel", "--bn", "bvlc", "--model", "net.prototxt",
                 "--model-out", "b.prototxt"]) == 0  # fmt: skip
    net = load_net("b.prototxt").message
    assert [layer.name for layer in net.layer] == ["in", "conv", "bn1", "bn1_scale_", "relu", "bn2", "bn1_scale"]
    assert not net.layer[2].batch_norm_param.HasField("use_global_stats")
    assert net.layer[5].batch_norm_param.eps == pytest.approx(1e-5)
    assert Path("net.prototxt").read_text() == want_net
    blobs = read_model("b.caffemodel")
    assert [len(blobs.layer(n).blobs) for n in ("bn1", "bn1_scale_", "bn2")] == [3, 2, 3]
    assert np.array_equal(
        np.array(blobs.layer("bn1").blobs[0]), np.array(read_model("w.caffemodel").layer("bn1").blobs[0])
    )
    same(outputs("net.prototxt", "w.caffemodel"), outputs("b.prototxt", "b.caffemodel"))


def test_five_blobs_with_sums() -> None:
    """A factor other than 1 is applied, as where such a file is loaded."""
    trained(NV, factor=3.0)
    assert main(["convert", "w.caffemodel", "b.caffemodel", "--bn", "bvlc", "--model-out", "b.prototxt"]) == 0
    same(outputs("net.prototxt", "w.caffemodel"), outputs("b.prototxt", "b.caffemodel"))


def test_the_net_inside_the_caffemodel_will_do() -> None:
    trained(BVLC, factor=2.0)
    assert main(["convert", "w.caffemodel", "nv.caffemodel", "-bn", "nvcaffe", "-model_out", "nv.prototxt"]) == 0
    same(outputs("net.prototxt", "w.caffemodel"), outputs("nv.prototxt", "nv.caffemodel"))
    inside = pb.NetParameter.FromString(Path("nv.caffemodel").read_bytes())
    assert "sc1" not in [layer.name for layer in inside.layer]


def test_untrained_statistics_and_the_order_of_digits() -> None:
    trained(BVLC, factor=0.0)
    assert main(["convert", "w.caffemodel", "nv.caffemodel", "--bn", "nvcaffe"]) == 0
    assert not np.array(read_model("nv.caffemodel").layer("bn1").blobs[1]).any()
    trained(NV, factor=1.0)
    model = read_model("w.caffemodel")
    mean, variance, one, scale, shift = model.layer("bn1").blobs
    model.layer("bn1").blobs = [scale, shift, mean, variance, one]
    write_model("digits.caffemodel", model)
    for source, target in (("w", "a"), ("digits", "b")):
        assert main(["convert", f"{source}.caffemodel", f"{target}.caffemodel", "--bn", "bvlc"]) == 0
    assert Path("a.caffemodel").read_bytes() == Path("b.caffemodel").read_bytes()


def test_formats_keep_every_value(capsys: Capture) -> None:
    trained(BVLC, factor=0.4)
    want = read_model("w.caffemodel")
    steps = ["w.caffemodel", "a.npz", "b.h5", "c.npz", "d.caffemodel"]
    for source, target in pairwise(steps):
        model = ["--model", "net.prototxt"] if target == "d.caffemodel" else []
        assert main(["convert", source, target, *model]) == 0
        assert "Wrote" in capsys.readouterr().out
    arrays = np.load("a.npz")
    assert "conv/0" in arrays
    assert np.array_equal(arrays["sc1/1"], np.array(want.layer("sc1").blobs[1]))
    got = read_model("d.caffemodel")
    assert got.layer("conv").type == "Convolution"
    assert [layer.name for layer in got.layers] == [layer.name for layer in want.layers if layer.blobs]
    for layer in got.layers:
        for x, y in zip(layer.blobs, want.layer(layer.name).blobs, strict=True):
            assert x.shape == y.shape
            assert np.array_equal(np.array(x), np.array(y))
    same(outputs("net.prototxt", "w.caffemodel"), outputs("net.prototxt", "d.caffemodel"))


def test_v1_becomes_v2(capsys: Capture) -> None:
    source = shared("caffemodels/mtcnn_det1/det1.caffemodel")
    assert main(["convert", str(source), "new.caffemodel"]) == 0
    net = pb.NetParameter.FromString(Path("new.caffemodel").read_bytes())
    assert not net.layers
    old, new = read_model(source), read_model("new.caffemodel")
    for layer in old.current_layers():
        for x, y in zip(layer.blobs, new.layer(layer.name).blobs, strict=True):
            assert np.array_equal(np.array(x).reshape(-1), np.array(y).reshape(-1))


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["w.caffemodel", "x.onnx"], 2, "unknown format '.onnx'"),
        (["w.caffemodel", "x.npz", "--bn", "caffe"], 2, "--bn"),
        (["w.caffemodel", "x.npz", "--model-out", "y.prototxt"], 2, "goes with --bn"),
        (["w.caffemodel", "x.npz", "--bn", "bvlc", "--model", "net.prototxt"], 2, "--model-out"),
        (["w.caffemodel", "x.npz", "--model", "other.prototxt"], 2, "has no layer 'bn1'"),
        (["absent.caffemodel", "x.npz"], 3, "no such weights file"),
        (["net.prototxt", "x.npz"], 3, "net prototxt"),
        (["cut.npz", "x.caffemodel"], 3, "damaged numpy archive"),
        (["odd.npz", "x.caffemodel"], 3, "is no blob of a layer"),
        (["int.npz", "x.caffemodel"], 3, "blobs hold floats"),
        (["a.npz", "x.caffemodel", "--bn", "nvcaffe"], 2, "--model NET.prototxt"),
        (["plain.caffemodel", "x.caffemodel", "--bn", "nvcaffe"], 2, "no BatchNorm layers"),
        (["four.caffemodel", "x.caffemodel", "--bn", "nvcaffe"], 3, "has 4 blobs"),
        (
            ["w.caffemodel", "x.caffemodel", "--bn", "bvlc", "--model", "named.prototxt", "--model-out", "y"],
            3,
            "shares",
        ),
    ],
)
def test_refusals(args: list[str], code: int, words: str, capsys: Capture) -> None:
    trained(BVLC, factor=1.0)
    Path("other.prototxt").write_text(HEAD)
    Path("named.prototxt").write_text(BVLC.replace('top: "bn2" }', 'top: "bn2" param { name: "m" lr_mult: 0 } }'))
    assert main(["convert", "w.caffemodel", "a.npz"]) == 0
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:-30])
    np.savez("odd.npz", weights=np.ones(3, np.float32))
    np.savez("int.npz", **{"ip/0": np.ones(3, np.int32)})
    write_model("plain.caffemodel", ModelFile("n", [LayerBlobs("ip", "InnerProduct", [np.ones(3, np.float32)])]))
    write_model("four.caffemodel", ModelFile("n", [LayerBlobs("b", "BatchNorm", [np.ones(3, np.float32)] * 4)]))
    before = {p.name for p in Path().iterdir()}
    capsys.readouterr()
    assert main(["convert", *args]) == code
    assert words in capsys.readouterr().err
    assert {p.name for p in Path().iterdir()} == before


def test_a_net_of_caffe_jacinto() -> None:
    """JacintoNet and weights written by the C++ program: the same outputs in BVLC's form."""
    folder = shared("golden/e2e/jacintonet_tiny")
    net, weights = folder / "net.prototxt", folder / "init.caffemodel"
    args = ["--bn", "bvlc", "--model", str(net), "--model-out", "b.prototxt"]
    assert main(["convert", str(weights), "b.caffemodel", *args]) == 0
    found = []
    inputs = {
        "data": torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255,
        "label": torch.zeros(50),
    }
    for path, file, dialect in ((net, weights, "jacinto"), ("b.prototxt", "b.caffemodel", "bvlc")):
        built = Net(prepare(load_net(path), phase="TEST", dialect=DIALECTS[dialect], data_shape=(3, 32, 32)), seed=0)
        built.load(read_model(file))
        with torch.no_grad():
            found.append({k: v.numpy() for k, v in built(inputs).outputs.items()})
    assert found[0].keys() == found[1].keys()
    same(*found)


def test_halves_and_back(capsys: Capture) -> None:
    """As a snapshot of NVCaffe's FLOAT16 layers: raw_data with its type; it loads into float32 nets, and goes back."""
    trained(BVLC, 1.0)
    assert main(["convert", "w.caffemodel", "half.caffemodel", "--half"]) == 0
    assert "2 blobs in float16" in capsys.readouterr().out
    message = pb.NetParameter.FromString(Path("half.caffemodel").read_bytes())
    stored = {layer.name: [b.raw_data_type for b in layer.blobs] for layer in message.layer if layer.blobs}
    assert stored["conv"] == [pb.FLOAT16, pb.FLOAT16]
    assert set(stored["bn1"]) == {pb.FLOAT}
    assert main(["convert", "half.caffemodel", "full.caffemodel"]) == 0
    old, half, full = ({x.name: x for x in read_model(f"{f}.caffemodel").layers} for f in ("w", "half", "full"))
    for name, layer in old.items():
        for a, b, c in zip(layer.blobs, half[name].blobs, full[name].blobs, strict=True):
            want = a.astype(np.float16) if name == "conv" else a
            assert b.dtype == want.dtype
            assert c.dtype == np.float32
            np.testing.assert_array_equal(b, want)
            np.testing.assert_array_equal(c, want.astype(np.float32))
    assert not any(
        b.raw_data for x in pb.NetParameter.FromString(Path("full.caffemodel").read_bytes()).layer for b in x.blobs
    )
    net = Net(prepare(load_net("net.prototxt"), phase="TEST"))
    report = net.load(read_model("half.caffemodel"))
    assert "conv" in report.loaded
    np.testing.assert_array_equal(net.params["conv"][0].detach().numpy(), half["conv"].blobs[0].astype(np.float32))


def test_halves_that_do_not_fit(capsys: Capture) -> None:
    trained(BVLC, 1.0)
    model = read_model("w.caffemodel")
    conv = next(x for x in model.layers if x.name == "conv")
    conv.blobs = [np.full_like(conv.blobs[0], 7e4), np.full_like(conv.blobs[1], 1e-9)]
    write_model("big.caffemodel", model)
    assert main(["convert", "big.caffemodel", "half.caffemodel", "--half"]) == 0
    text = capsys.readouterr()
    assert "1 blobs in float16" in text.out
    assert "layer 'conv', blob 0 stays in float32" in text.err
    assert "4 weights are below 6e-8 and became zero" in text.err
    assert main(["convert", "w.caffemodel", "half.h5", "--half"]) == 2
    assert ".caffemodel" in capsys.readouterr().err
