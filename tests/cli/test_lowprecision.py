"""lowprecision and export_nullhop: the files they write can be trained, tested and exported; bad input."""

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
from tests.cli.conftest import NET

Capture = pytest.CaptureFixture[str]
DEPLOY = """layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 5 kernel_size: 3 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 4 } }
"""
LP = ["lowprecision", "--model=net.prototxt", "--weights=w.caffemodel", "--log-level=warning"]


@pytest.fixture
def files(folder: Path) -> Path:
    (folder / "deploy.prototxt").write_text(DEPLOY)
    (folder / "other.prototxt").write_text(DEPLOY.replace('name: "conv"', 'name: "c"'))
    net = Net(prepare(load_net("net.prototxt"), phase="TRAIN"), seed=0)
    write_model("w.caffemodel", net.model())
    return folder


def test_from_a_plain_net_to_a_trained_one(files: Path, capsys: Capture) -> None:
    args = [*LP, "--output=out/low", "--bits=8", "--bits-weights=9", "--iterations=3", "--deploy=deploy.prototxt"]
    assert main([*args, "--tune-iterations=4"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["layer", "conv", "ip", "all"]
    assert "accuracy: float" in out
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "low.caffemodel", "low.prototxt", "low_deploy.prototxt", "low_solver.prototxt"
    ]  # fmt: skip
    assert [len(x.blobs) for x in read_model("out/low.caffemodel").layers if x.blobs] == [4, 4]
    command = next(line for line in out.splitlines() if line.startswith("Fine-tune: ")).split()[2:]
    assert main([*command, "--log-level=warning"]) == 0
    tuned = read_model("out/low_tuned_iter_4.caffemodel").layer("conv").blobs
    assert not np.array_equal(tuned[0], read_model("out/low.caffemodel").layer("conv").blobs[0])
    model, weights = "--model=out/low.prototxt", "--weights=out/low_tuned_iter_4.caffemodel"
    assert main(["test", model, weights, "--iterations=2", "--log-level=warning"]) == 0
    for form in ("out/low.prototxt", "out/low_deploy.prototxt"):
        assert main(["check", form]) == 0
    assert main(["test", "--model=net.prototxt", weights, "--iterations=1", "--log-level=warning"]) == 0  # the masters
    capsys.readouterr()
    assert main(["export-nullhop", "--model=out/low_deploy.prototxt", weights, "--output=x.cnn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["left_out"], found["pixels"], found["layers"][0]["outputs"]) == ("ip", "zeros", 5)
    assert Path("x.cnn").read_text().startswith("1 # num layers \n 0 #compression_enabled\n 3 #kernel_size \n")


def test_the_dialect_goes_with_the_net(files: Path, capsys: Capture) -> None:
    """lpfp_param shows ADaPTION, which does not know NVCaffe's BatchNorm."""
    norm = """layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }
    layer { name: "relu" """
    Path("net.prototxt").write_text(Path("net.prototxt").read_text().replace('layer { name: "relu" ', norm))
    assert main(["train", "--solver", "solver.prototxt", "--log-level", "error"]) == 0
    snapshot = next(Path().glob("*_iter_4.caffemodel"))
    assert main([*LP, "--weights", str(snapshot), "--output=low", "--iterations=2"]) == 0
    out, err = capsys.readouterr()
    assert "--dialect" not in out + err
    assert Path("low.prototxt").read_text().startswith("# dialect: nvcaffe\n")
    command = next(line for line in out.splitlines() if line.startswith("Fine-tune: ")).split()[2:]
    assert main([*command, "--log-level=error"]) == 0


def test_json_of_lowprecision(files: Path, capsys: Capture) -> None:
    assert main([*LP, "--output=low", "--json", "--criterion=mse", "--iterations=2", "--legacy-qmf"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["criterion"] == "legacy-qmf"
    assert [(x["name"], x["activations"]["rounded"]) for x in found["layers"]] == [("conv", True), ("ip", False)]
    conv = found["layers"][0]["activations"]
    assert conv["layer"] == "relu"
    assert 0.2 < conv["zeros"] <= conv["zeros_rounded"] < 0.8
    assert found["written"] == ["low.prototxt", "low_solver.prototxt", "low.caffemodel"]
    assert {o["name"] for o in found["outputs"]} == {"accuracy", "loss"}


def test_pixels(files: Path, capsys: Capture) -> None:
    export = ["export_nullhop", "--model=net.prototxt", "--weights=w.caffemodel", "--output=x.cnn"]
    assert main([*export, "--log-level=warning"]) == 0
    assert "image: the first of the net's data; left out: 'ip' and what follows" in capsys.readouterr().out
    np.save("p.npy", np.full((3, 8, 8), 0.5))
    assert main([*export, "--pixels=p.npy"]) == 0
    block = Path("x.cnn").read_text().split("#PIXELS#\n")[1].splitlines()
    assert block[:192] == ["128"] * 192
    Path("p.npy").write_text("no array")
    assert main([*export, "--pixels=p.npy"]) == 3
    assert "p.npy: error: no array of numbers can be read" in capsys.readouterr().err
    np.save("p.npy", np.zeros((1, 8, 8)))
    Path("x.cnn").unlink()
    assert main([*export, "--pixels=p.npy"]) == 3
    assert "the image has shape (1, 8, 8), layer 'conv' reads (3, 8, 8)" in capsys.readouterr().err
    assert not Path("x.cnn").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits=1"], 2, "1 bits; low-precision layers have 2 to 24"),
        (["--bits-weights=25"], 2, "25 bits"),
        (["--criterion=max"], 2, "unknown criterion 'max'"),
        (["--criterion=percentile", "--percentile=40"], 2, "percentile 40"),
        (["--iterations=0"], 2, "iterations"),
        (["--output=net"], 2, "--output net would replace net.prototxt, which is read"),
        (["--output=w.caffemodel"], 2, "would replace w.caffemodel, which is read"),
        (["--weights=none.caffemodel"], 3, "none.caffemodel"),
        (["--model=deploy.prototxt"], 3, "deploy.prototxt:1:1: error: layer 'data' (Input) has no data"),
        (["--deploy=none.prototxt"], 3, "none.prototxt"),
        (["--deploy=other.prototxt"], 2, "other.prototxt has no layer 'conv', which net.prototxt has"),
    ],
)
def test_bad_options(files: Path, capsys: Capture, options: list[str], code: int, words: str) -> None:
    assert main([*LP, "--output=out/low", *options]) == code
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_ending_of_the_output_is_dropped(files: Path, capsys: Capture) -> None:
    assert main([*LP, "--output=low.prototxt", "--iterations=1"]) == 0
    assert "Wrote low.prototxt, low_solver.prototxt, low.caffemodel" in capsys.readouterr().out


def test_bad_weights_and_nets(files: Path, capsys: Capture) -> None:
    model = read_model("w.caffemodel")
    blobs = model.layer("conv").blobs
    model.layer("conv").blobs = [np.where(np.arange(blobs[0].size).reshape(blobs[0].shape) == 3, np.nan, blobs[0]),
                                 blobs[1]]  # fmt: skip
    write_model("nan.caffemodel", model)
    assert main([*LP[:2], "--weights=nan.caffemodel", "--output=out/low"]) == 3
    assert "net.prototxt:6:1: error: layer 'conv': 1 of 135 weights are NaN or infinite" in capsys.readouterr().err
    assert not Path("out").exists()
    Path("bad.prototxt").write_text(NET.replace('"Convolution" bottom', '"LPConvolution" bottom'))
    assert main(["check", "bad.prototxt"]) == 3
    assert "bad.prototxt:6:1: error: layer 'conv' (LPConvolution): bd, the bits" in capsys.readouterr().out
    torch.set_num_threads(1)
