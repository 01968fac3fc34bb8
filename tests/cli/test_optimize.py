"""`caffejacinto optimize`: two files that compute the same, or none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model, write_model

Capture = pytest.CaptureFixture[str]
NET = """
name: "small"
layer { name: "data" type: "Input" top: "data" top: "label"
  input_param { shape { dim: 6 dim: 3 dim: 8 dim: 8 } shape { dim: 6 } } }
layer { name: "bn0" type: "BatchNorm" bottom: "data" top: "bn0" batch_norm_param { scale_bias: true } }
layer { name: "conv" type: "Convolution" bottom: "bn0" top: "conv"
  convolution_param { num_output: 5 kernel_size: 3 pad: 1 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.prototxt").write_text(NET)
    net = Net(prepare(load_net(tmp_path / "net.prototxt"), phase="TEST"), seed=0)
    rng = np.random.default_rng(0)
    for name in ("bn0", "bn"):
        for i in (0, 1, 3, 4):
            p = net.params[name][i].data
            p.copy_(torch.from_numpy(rng.uniform(0.5, 2, p.shape)))
    write_model(tmp_path / "net.caffemodel", net.model())
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGS = ["optimize", "--model", "net.prototxt", "--weights", "net.caffemodel"]


def test_two_files_and_what_is_said(small: Path, capsys: Capture) -> None:
    assert main([*ARGS, "--output_model=opt", "-gpu", "-1"]) == 0
    out = capsys.readouterr()
    assert "Optimizing Net small" in out.err
    assert "Optimizing layer: Convolution conv (bn)" in out.err
    assert "net.prototxt:5:1: Kept: BatchNorm bn0: 'data' (Input) before it" in out.err
    assert "Left out, do nothing in phase TEST: drop" in out.err
    assert "Snapshotting optimized caffemodel to file opt.caffemodel" in out.err
    assert "1 layers absorbed, 1 kept, 9 -> 7 layers" in out.out
    net = load_net("opt.prototxt").message
    assert [x.name for x in net.layer] == ["data", "bn0", "conv", "relu", "ip", "accuracy", "loss"]
    assert not any(x.blobs or x.include for x in net.layer)
    assert [x.name for x in read_model("opt.caffemodel").layers] == [x.name for x in net.layer]
    inputs = {"data": torch.randn(6, 3, 8, 8), "label": torch.arange(6.0) % 4}
    found = []
    for name in ("net", "opt"):
        made = Net(prepare(load_net(f"{name}.prototxt"), phase="TEST"))
        made.load(read_model(f"{name}.caffemodel"))
        found.append(made(inputs).outputs)
    torch.testing.assert_close(found[0]["loss"], found[1]["loss"], rtol=1e-5, atol=1e-6)


def test_caffes_form_and_json(small: Path, capsys: Capture) -> None:
    (small / "out").mkdir()
    assert main([*ARGS, "--output", "out/opt.caffemodel", "--keep-identity", "--json", "--log-level", "error"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["out/opt.prototxt", "out/opt.caffemodel"]
    assert result["layers"] == [9, 9]
    assert result["absorbed"] == [{"layer": "bn", "into": "conv", "before": False}]
    assert result["kept"][0]["layer"] == "bn0"
    assert result["difference"] < 1e-6
    blobs = read_model("out/opt.caffemodel").layer("bn").blobs
    assert [float(b[0]) for b in blobs] == [0, pytest.approx(1 - 1e-5), 1, 1, 0]


def test_the_data_layer_need_not_find_its_data(small: Path, capsys: Capture) -> None:
    source = 'type: "Data" data_param { source: "nowhere" batch_size: 2 backend: LMDB } top: "data" top: "label" '
    source += 'transform_param { mean_file: "nowhere" } }\n'
    lines = NET.split("\n")
    lines[2:4] = ['layer { name: "data" ' + source]
    (small / "data.prototxt").write_text("\n".join(lines))
    assert main(["optimize", "--model", "data.prototxt", *ARGS[3:], "--output", "x", "--data-shape", "3,8,8"]) == 0
    assert main(["optimize", "--model", "data.prototxt", *ARGS[3:], "--output", "y"]) == 3  # 224x224 does not fit ip
    assert "layer 'ip', blob 0: shape (4, 320) in the file" in capsys.readouterr().err
    assert not list(small.glob("y.*"))


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (["--weights", "broken.caffemodel"], 3, "broken.caffemodel: layer 'ip', blob 0: 1280 of 1280 values are NaN"),
        (["--weights", "less.caffemodel"], 3, "less.caffemodel: no weights for layer 'ip' (InnerProduct)"),
        (["--weights", "none.caffemodel"], 3, "no such weights file"),
        (["--weights", ""], 2, "names no file"),
        (["--output", "net"], 2, "would replace net.prototxt, which is read"),
        (["--output", "."], 2, "give DIR/NAME"),
        (["--output", "nowhere/opt"], 1, "does not exist"),
        (["--compat", "optimize=nonsense"], 2, "has no value 'nonsense'"),
        (
            ["--model", "shared.prototxt"],
            3,
            "shared.prototxt:6:68: error: cannot absorb: layer 'conv' shares its weights",
        ),
    ],
)
def test_bad_input_leaves_nothing(small: Path, capsys: Capture, change: list[str], code: int, text: str) -> None:
    model = read_model("net.caffemodel")
    blobs = model.layer("ip").blobs
    blobs[0] = np.full_like(blobs[0], np.nan)
    write_model("broken.caffemodel", model)
    model = read_model("net.caffemodel")
    model.layers = [e for e in model.layers if e.name != "ip"]
    write_model("less.caffemodel", model)
    twin = NET.replace('top: "conv"\n', 'top: "conv" param { name: "w" }\n', 1)
    more = 'layer { name: "twin" type: "Convolution" bottom: "bn0" top: "twin" param { name: "w" } '
    more += "convolution_param { num_output: 5 kernel_size: 3 bias_term: false } }\n"
    twin = twin.replace('layer { name: "accuracy"', more + 'layer { name: "accuracy"')
    (small / "shared.prototxt").write_text(twin)
    model = read_model("net.caffemodel")
    model.layers.append(type(model.layers[0])("twin", "Convolution", model.layer("conv").blobs))
    write_model("net.caffemodel", model)
    before = {p.name: p.read_bytes() for p in small.iterdir()}
    given = dict(zip([*ARGS[1::2], "--output"], [*ARGS[2::2], "opt"], strict=True)) | {change[0]: change[1]}
    assert main(["optimize", *(word for pair in given.items() for word in pair), "--log-level", "error"]) == code
    assert text in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in small.iterdir()} == before


def test_what_the_net_says_of_quantization_stays(small: Path, capsys: Capture) -> None:
    (small / "q.prototxt").write_text(NET + "quantize: true net_quantization_param { bitwidth_weights: 8 }")
    assert main(["optimize", "--model", "q.prototxt", *ARGS[3:], "--output", "opt", "--log-level", "error"]) == 0
    net = load_net("opt.prototxt").message
    assert net.quantize
    assert net.net_quantization_param.bitwidth_weights == 8


def test_neither_file_where_one_cannot_be_written(small: Path, capsys: Capture) -> None:
    (small / "opt.caffemodel").mkdir()
    assert main([*ARGS, "--output", "opt", "--log-level", "error"]) == 1
    assert "cannot write 'opt.caffemodel'" in capsys.readouterr().err
    assert not (small / "opt.prototxt").exists()
    assert not [p for p in small.iterdir() if p.name.endswith(".tmp")]


def test_keep_shared(small: Path, capsys: Capture) -> None:
    test_bad_input_leaves_nothing(small, capsys, ["--model", "shared.prototxt"], 3, "--keep-shared")
    args = ["optimize", "--model", "shared.prototxt", *ARGS[3:], "--output", "opt", "--keep-shared", "--json"]
    assert main(args) == 0
    kept = {k["layer"]: k["reason"] for k in json.loads(capsys.readouterr().out)["kept"]}
    assert kept["bn"].startswith("'conv' shares its weights with 'twin' by the name 'w'")


def test_a_wrong_result_is_not_written(small: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from caffejacinto_py.layers.norm import BatchNorm

    monkeypatch.setattr(BatchNorm, "_eps", 0.5)
    assert main([*ARGS, "--output", "opt"]) == 4
    assert "does not compute the same" in capsys.readouterr().err
    assert not list(small.glob("opt*"))
    assert main([*ARGS, "--output", "opt", "--no-verify"]) == 0
    assert main([*ARGS, "--output", "opt", "--compat", "optimize=binary"]) == 0
    assert "The nets differ, as asked for" in capsys.readouterr().err
