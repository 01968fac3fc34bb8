"""threshold: zeros in a weights file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model
from tests.conftest import shared

Capture = pytest.CaptureFixture[str]
NET = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 12 dim: 12 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 32 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "conv2" type: "Convolution" bottom: "conv1" top: "conv2"
  convolution_param { num_output: 32 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "one" type: "Convolution" bottom: "conv2" top: "one"
  convolution_param { num_output: 32 kernel_size: 1 weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "one" top: "ip"
  inner_product_param { num_output: 40 weight_filler { type: "xavier" } } }
"""
ARGS = ["threshold", "--model", "net.prototxt", "--weights", "w.caffemodel", "--log-level", "error"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    (tmp_path / "net.prototxt").write_text(NET)
    write_model("w.caffemodel", Net(prepare(parse(NET, "NetParameter"), phase="TEST"), seed=1).model())
    return tmp_path


def run(capsys: Capture, *args: str) -> dict[str, Any]:
    assert main([*ARGS, "--json", *args]) == 0
    return dict(json.loads(capsys.readouterr().out))


def zeros(path: str, layer: str) -> float:
    return float((np.asarray(read_model(path).layer(layer).blobs[0]) == 0).mean())


def test_the_tools_own_run(capsys: Capture) -> None:
    """caffe-jacinto's documented settings, per layer: its very zeros, and its table in the log."""
    folder = shared("golden/jacinto/sparsity")
    before = np.load(folder / "threshold_before.npz")
    net = Net(prepare(load_net(folder / "threshold_net.prototxt"), phase="TEST"), seed=0)
    with torch.no_grad():
        for key in before.files:
            net.params[key[7:]][0].copy_(torch.from_numpy(before[key]))
    write_model("golden.caffemodel", net.model())
    table = np.load(folder / "threshold_net_documented.npz")
    flags = ["fraction_low", "fraction_mid", "fraction_high", "value_maxratio", "value_max", "step_factor"]
    names = [f"-threshold_{name}={value:g}" for name, value in zip(flags, table["settings"])]
    files = ["--model", str(folder / "threshold_net.prototxt"), "--weights", "golden.caffemodel"]
    assert main(["threshold", *files, "--output", "out", *names]) == 0
    printed = capsys.readouterr()
    assert "Total Sparsity (zero_weights/count) =  (9833/22740) 0.432" in printed.err
    assert "mid MaxAbsWeight=0.942738 MaxThreshold=0.188548 SelectedThreshold=0.18854" in printed.err
    assert "last (not counted)" in printed.out
    stored = read_model("out.caffemodel")
    for key in before.files:
        want = before[key]
        if f"zeroed/{key[7:]}" in table.files:
            bits = np.unpackbits(table[f"zeroed/{key[7:]}"])[: want.size].reshape(want.shape)
            want = np.where(bits, np.float32(0), want)
        np.testing.assert_array_equal(np.asarray(stored.layer(key[7:]).blobs[0]), want)
    assert [x.name for x in load_net("out.prototxt").message.layer][:2] == ["in_data", "first"]


def test_defaults_are_those_of_the_tool(capsys: Capture, here: Path) -> None:
    found = run(capsys)
    assert found["output"] == ["w_threshold.caffemodel"]
    assert found["fractions"] == {"low": 0.4, "mid": 0.8, "high": 0.9}
    assert found["after"] < 0.01 * found["count"]
    assert [x["class"] for x in found["layers"]] == ["low", "mid", None]
    assert sorted(p.name for p in here.iterdir()) == ["net.prototxt", "w.caffemodel", "w_threshold.caffemodel"]


def test_other_layers_stay_bit_for_bit(capsys: Capture) -> None:
    run(capsys, "--target", "0.5", "--output", "out.caffemodel")
    before, after = read_model("w.caffemodel"), read_model("out.caffemodel")
    assert [x.name for x in before.layers] == [x.name for x in after.layers]
    for a, b in zip(before.layers, after.layers):
        for i, (x, y) in enumerate(zip(a.blobs, b.blobs)):
            kept = np.asarray(y) != 0 if (a.name, i) in (("conv1", 0), ("conv2", 0)) else np.ones(y.shape, bool)
            np.testing.assert_array_equal(np.asarray(x)[kept], np.asarray(y)[kept])


@pytest.mark.parametrize("mode", [[], ["--per-channel"]])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.8])
def test_target(capsys: Capture, mode: list[str], target: float) -> None:
    found = run(capsys, "--target", str(target), "--output", "out.h5", *mode)
    share = found["after"] / found["count"]
    assert target <= share < target + 0.02  # a step of one weight in each row
    low, mid = (zeros("out.h5", name) for name in ("conv1", "conv2"))
    assert low == pytest.approx(mid / 2, abs=0.04)
    assert zeros("out.h5", "one") == zeros("out.h5", "ip") == 0


def test_unreachable_target(capsys: Capture, here: Path) -> None:
    assert main([*ARGS, "--target", "0.95"]) == 1
    error = capsys.readouterr().err
    assert "a sparsity of 0.95 cannot be reached" in error
    assert "gives 0.86" in error
    assert "2 of 3 counted layers can be thresholded" in error
    assert sorted(p.name for p in here.iterdir()) == ["net.prototxt", "w.caffemodel"]
    assert main([*ARGS, "--target", "0.5", "--threshold_value_max", "0.001"]) == 1
    assert "the limits of the threshold" in capsys.readouterr().err


def test_more_layer_types(capsys: Capture) -> None:
    found = run(capsys, "--layer-type", "InnerProduct", "--target", "0.9", "--output", "out")
    assert found["output"] == ["out.caffemodel", "out.prototxt"]
    assert found["layers"][-1]["name"] == "ip"
    assert zeros("out.caffemodel", "ip") > 0.85
    assert main([*ARGS, "--layer-type", "InnerProdukt"]) == 2
    assert "did you mean 'InnerProduct'?" in capsys.readouterr().err


def test_shared_weights(capsys: Capture) -> None:
    """Both layers of a shared weight get the same zeros."""
    text = NET.replace('top: "conv2"\n', 'top: "conv2" param { name: "w" }\n')
    text += """layer { name: "conv3" type: "Convolution" bottom: "conv1" top: "conv3" param { name: "w" }
      convolution_param { num_output: 32 kernel_size: 3 } }"""
    Path("net.prototxt").write_text(text)
    write_model("w.caffemodel", Net(prepare(parse(text, "NetParameter"), phase="TEST"), seed=1).model())
    found = run(capsys, "--target", "0.5", "--output", "out.caffemodel")
    a, b = (np.asarray(read_model("out.caffemodel").layer(name).blobs[0]) for name in ("conv2", "conv3"))
    np.testing.assert_array_equal(a, b)
    assert 0.4 < (a == 0).mean() < 0.7
    sizes = {row["name"]: row["count"] for row in found["layers"]}
    assert sizes["conv3"] == sizes["conv2"] == a.size
    assert found["count"] == sum(sizes.values()) - a.size  # the shared weight is there once
    assert found["after"] == sum(
        int((np.asarray(read_model("out.caffemodel").layer(n).blobs[0]) == 0).sum()) for n in sizes if n != "conv3"
    )
    assert found["after"] / found["count"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(capsys: Capture, here: Path, value: float) -> None:
    model = read_model("w.caffemodel")
    array = np.array(model.layer("conv2").blobs[0])
    array[3, 4, 1, 1] = value
    model.layer("conv2").blobs[0] = array
    write_model("bad.caffemodel", model)
    assert main([*ARGS[:3], "--weights", "bad.caffemodel", "--output", "out"]) == 3
    assert "layer 'conv2': 1 of 9216 weights are NaN or infinite" in capsys.readouterr().err
    assert not list(here.glob("out*"))


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--target", "1"], 2, "target"),
        (["--target", "nan"], 2, "nan"),
        (["--target", "0.5", "--threshold_fraction_mid", "0.3"], 2, "not both"),
        (["--threshold_fraction_low", "1.5"], 2, "threshold_fraction_low"),
        (["--threshold_value_max", "-1"], 2, "threshold_value_max"),
        (["--threshold_step_factor", "0"], 2, "threshold_step_factor"),
        (["--output", "missing/out"], 1, "does not exist"),
        (["--output", "."], 2, "directory"),
        (["--output", "w.caffemodel"], 2, "would replace w.caffemodel, which is read"),
        (["--output", "net"], 2, "would replace net.prototxt, which is read"),
    ],
)
def test_bad_options(capsys: Capture, here: Path, args: list[str], code: int, text: str) -> None:
    assert main([*ARGS, *args]) == code
    assert text in capsys.readouterr().err
    assert sorted(p.name for p in here.iterdir()) == ["net.prototxt", "w.caffemodel"]


def test_files_that_do_not_fit(capsys: Capture) -> None:
    weights = [LayerBlobs("conv1", "Convolution", [np.zeros((32, 3, 5, 5), np.float32)])]
    write_model("w.caffemodel", ModelFile("other", weights))
    assert main(ARGS) == 3
    assert "layer 'conv1': shape (32, 3, 5, 5) in the file, (32, 3, 3, 3) in the net" in capsys.readouterr().err
    write_model("w.caffemodel", ModelFile("other", [LayerBlobs("konv1", "Convolution", [np.zeros(3, np.float32)])]))
    assert main(ARGS) == 3
    assert "has no weights for layer 'conv1'" in capsys.readouterr().err


FED = """
layer { name: "data" type: "HDF5Data" top: "data" hdf5_data_param { source: "list.txt" batch_size: 2 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 32 kernel_size: 3 } }
"""
HALF = """
layer { name: "half" type: "Python" bottom: "conv" top: "half" python_param { module: "halved" layer: "Half" } }
"""
HALVED = """
import caffe
class Half(caffe.Layer):
    def setup(self, bottom, top): pass
    def reshape(self, bottom, top): top[0].reshape(*bottom[0].data.shape)
    def forward(self, bottom, top): top[0].data[...] = bottom[0].data / 2
    def backward(self, top, down, bottom): pass
"""


def test_the_data_say_their_shape(capsys: Capture, here: Path) -> None:
    """As for optimize: a data layer that can be opened need not be described with --data-shape."""
    with h5py.File("one.h5", "w") as f:
        f["data"] = np.zeros((4, 5, 9, 9), np.float32)
    (here / "list.txt").write_text("one.h5\n")
    (here / "net.prototxt").write_text(FED)
    weights = np.random.default_rng(0).normal(size=(32, 5, 3, 3)).astype(np.float32)
    layers = [LayerBlobs("conv", "Convolution", [weights, np.zeros(32, np.float32)])]
    write_model("w.caffemodel", ModelFile("n", layers))
    assert run(capsys, "--target", "0.4")["after"] >= 0.4 * weights.size
    (here / "list.txt").unlink()
    assert main([*ARGS, "--target", "0.4"]) == 3
    assert run(capsys, "--target", "0.4", "--data-shape", "5,9,9")["after"] >= 0.4 * weights.size


def test_python_layers_need_leave(capsys: Capture, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(here))
    (here / "halved.py").write_text(HALVED)
    data = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 5 dim: 9 dim: 9 } } }'
    (here / "net.prototxt").write_text(data + FED.partition("batch_size: 2 } }")[2] + HALF)
    weights = [np.ones((32, 5, 3, 3), np.float32), np.zeros(32, np.float32)]
    write_model("w.caffemodel", ModelFile("n", [LayerBlobs("conv", "Convolution", weights)]))
    assert main(ARGS) == 3
    assert "--allow-python-layers" in capsys.readouterr().err
    assert main([*ARGS, "--allow-python-layers"]) == 0
