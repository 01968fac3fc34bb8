"""calibrate: files that `test` scores as printed, that `train` fine-tunes, and that appear together or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.compress.qparams import SUFFIX
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model, write_model
from tests.cli.conftest import SOLVER

Capture = pytest.CaptureFixture[str]

NET = """
name: "tiny"
layer { name: "train-data" type: "DummyData" top: "data" top: "label" include { phase: TRAIN }
  dummy_data_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } shape { dim: 4 }
    data_filler { type: "gaussian" } data_filler { type: "constant" value: 2 } } }
layer { name: "test-data" type: "DummyData" top: "data" top: "label" include { phase: TEST }
  dummy_data_param { shape { dim: 6 dim: 3 dim: 8 dim: 8 } shape { dim: 6 }
    data_filler { type: "gaussian" } data_filler { type: "constant" value: 2 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 5 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" include { phase: TRAIN } }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
ARGS = ["calibrate", "--model", "net.prototxt", "--weights", "snap_iter_4.caffemodel", "--output", "q", "--iterations",
        "3", "--log-level", "error"]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A few iterations of training: BatchNorm has statistics."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.prototxt").write_text(NET)
    (folder / "solver.prototxt").write_text(SOLVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--solver", "solver.prototxt", "--log-level", "error"]) == 0
    return (folder / "snap_iter_4.caffemodel").read_bytes()


@pytest.fixture
def trained(folder: Path, weights: bytes) -> Path:
    (folder / "net.prototxt").write_text(NET)
    (folder / "snap_iter_4.caffemodel").write_bytes(weights)
    return folder


def _json(args: list[str], capsys: Capture) -> dict[str, Any]:
    assert main([*args, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--method", "mse", "--per-channel", "--bits-weights", "4"],
        ["--method", "kl", "--optimize"],
        ["--method", "percentile", "--percentile", "99", "--offset-activations", "--offset-weights"],
        ["--method", "mse", "--power2"],
    ],
    ids=" ".join,
)
def test_test_scores_what_calibrate_printed(trained: Path, capsys: Capture, more: list[str]) -> None:
    told = _json([*ARGS, *more], capsys)
    simulated = told["score"]["simulated"]
    args = ["test", "--model", "q.prototxt", "--weights", "q.caffemodel", "--iterations", "3", "--log-level", "error"]
    scored = _json(args, capsys)
    assert scored["loss"] == pytest.approx(simulated["loss"], abs=1e-6)
    assert scored["loss"] != pytest.approx(told["score"]["float"]["loss"], abs=1e-7)
    assert [o["mean"] for o in scored["outputs"]] == pytest.approx([o["mean"] for o in simulated["outputs"]], abs=1e-6)
    kinds = {(b["layer"], b["kind"]) for b in told["blobs"]}
    assert {("test-data", "output"), ("conv", "weight"), ("ip", "bias"), ("ip", "output")} <= kinds
    assert ("conv", "output") not in kinds  # merged into what follows


def test_a_net_of_bvlc_caffe_stays_one(trained: Path, capsys: Capture) -> None:
    """Statistics are sums with a factor there, and ties in Accuracy count otherwise than with caffe-jacinto."""
    bn = 'layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { scale_bias: true } }'
    assert bn in NET
    bvlc = NET.replace(bn, 'layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }')
    (trained / "net.prototxt").write_text(bvlc)
    assert main(["train", "--solver", "solver.prototxt", "--log-level", "error"]) == 0
    assert float(read_model(trained / "snap_iter_4.caffemodel").layer("bn").blobs[2][0]) != 1
    capsys.readouterr()
    told = _json([*ARGS, "--bits-activations", "3"], capsys)
    scored = _json(["test", "--model", "q.prototxt", "--weights", "q.caffemodel", "--iterations", "3"], capsys)
    assert scored["loss"] == pytest.approx(told["score"]["simulated"]["loss"], abs=1e-6)
    means = {o["name"]: o["mean"] for o in scored["outputs"]}
    assert means["accuracy"] == pytest.approx(told["score"]["simulated"]["outputs"][0]["mean"])
    assert told["score"]["float"]["loss"] == pytest.approx(scored["loss"], abs=0.3)


def test_the_prototxt_keeps_its_phases_and_trains(trained: Path, capsys: Capture) -> None:
    told = _json([*ARGS, "--method", "mse"], capsys)
    net = load_net(trained / "q.prototxt").message
    assert net.name == "tiny" + SUFFIX
    assert net.quantize
    assert not net.net_quantization_param.update_quantization_param
    assert net.net_quantization_param.bitwidth_weights == 8
    assert [layer.name for layer in net.layer] == [
        layer.name for layer in load_net(trained / "net.prototxt").message.layer
    ]
    layers = {layer.name: layer for layer in net.layer}
    assert layers["train-data"].quantization_param == layers["test-data"].quantization_param
    assert layers["train-data"].quantization_param.qparam_out[0].quantize
    assert not layers["test-data"].quantization_param.qparam_out[1].quantize  # labels
    conv = layers["conv"].quantization_param
    assert ([q.quantize for q in conv.qparam_w], [q.bitwidth for q in conv.qparam_w]) == ([True, True], [8, 16])
    assert [q.quantize for q in conv.qparam_in] == [False]
    assert conv.qparam_in[0].scale_target == layers["test-data"].quantization_param.qparam_out[0].scale_target
    assert not layers["loss"].HasField("quantization_param")
    (scale,) = {b["scale"] for b in told["blobs"] if (b["layer"], b["kind"]) == ("conv", "weight")}
    assert conv.qparam_w[0].scale_target == pytest.approx(scale)
    old, new = read_model(trained / "snap_iter_4.caffemodel"), read_model(trained / "q.caffemodel")
    for entry in old.layers:
        for a, b in zip(entry.blobs, [] if not entry.blobs else new.layer(entry.name).blobs, strict=True):
            assert np.array_equal(a, b)  # float masters
    assert new.layer("conv").proto.quantization_param == conv
    (trained / "fine.prototxt").write_text((trained / "solver.prototxt").read_text().replace("net.proto", "q.proto"))
    args = ["train", "--solver", "fine.prototxt", "--weights", "q.caffemodel", "--log-level", "error"]
    assert main(args) == 0


def test_calibrating_twice_starts_from_the_float_net(trained: Path, capsys: Capture) -> None:
    first = _json([*ARGS, "--bits-weights", "5"], capsys)
    again = [*ARGS]
    again[2], again[6] = "q.prototxt", "r"
    second = _json(again, capsys)  # the width comes from the file
    assert second["blobs"] == first["blobs"]
    assert second["settings"]["bits_weights"] == 5
    assert (trained / "r.prototxt").read_text() == (trained / "q.prototxt").read_text()


def test_the_net_gives_the_defaults(trained: Path, capsys: Capture) -> None:
    text = "net_quantization_param { bitwidth_activations: 6 ignored_layer_names: 'ip' quantization_start: 0 }\n"
    (trained / "net.prototxt").write_text(text + NET)
    told = _json([*ARGS, "--no-offset-weights", "--bits-bias", "12"], capsys)
    settings = told["settings"]
    assert (settings["bits_weights"], settings["bits_activations"], settings["bits_bias"]) == (12, 6, 12)
    assert not settings["offset_weights"]
    assert {b["layer"] for b in told["blobs"]} == {"test-data", "conv", "relu"}
    param = load_net(trained / "q.prototxt").message.net_quantization_param
    assert (param.bitwidth_activations, param.apply_offset_weights, param.quantization_start) == (6, False, 1)


def test_per_channel_scales(trained: Path, capsys: Capture) -> None:
    told = _json([*ARGS, "--per-channel", "--no-score", "--method", "mse"], capsys)
    assert told["score"] is None
    (weight,) = (b for b in told["blobs"] if b["layer"] == "conv" and b["kind"] == "weight")
    assert len(weight["scale"]) == len(weight["offset"]) == 5
    stored = load_net(trained / "q.prototxt").message.layer[2].quantization_param.qparam_w
    assert list(stored[0].channel_scale) == pytest.approx(weight["scale"])
    assert not stored[1].channel_scale


def test_the_table(trained: Path, capsys: Capture) -> None:
    assert main([*ARGS, "--method", "percentile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "blob", "bits", "low", "high", "scale", "offset", "SQNR", "dB"]
    assert any(line.startswith("relu       top conv    8u  ") for line in lines)
    assert any(line.startswith("accuracy  ") for line in lines)
    assert lines[-1] == "Wrote q.prototxt and q.caffemodel"


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--bits-weights", "17"], 2, "2<=x<=16"),
        (["--bits-activations", "1"], 2, "2<=x<=16"),
        (["--method", "percentile", "--percentile", "50"], 2, "percentile 50 is not above 50"),
        (["--method", "minmax"], 2, "min-max"),
        (["--iterations", "0"], 2, "iterations"),
        (["--per-channel", "--method-weights", "kl"], 2, "kl needs more values"),
        (["--output", "absent/q"], 1, "mkdir -p 'absent'"),
        (["--weights", "absent.caffemodel"], 3, "absent.caffemodel"),
    ],
)
def test_bad_requests(trained: Path, capsys: Capture, more: list[str], code: int, words: str) -> None:
    assert main([*ARGS, *more]) == code
    assert words in capsys.readouterr().err
    assert not list(trained.glob("*q.*"))


def test_nan_names_its_layer_and_leaves_no_file(trained: Path, capsys: Capture) -> None:
    model = read_model(trained / "snap_iter_4.caffemodel")
    entry = model.layer("ip")
    entry.blobs[0] = np.array(entry.blobs[0])
    entry.blobs[0][1, 1] = np.nan
    write_model(trained / "snap_iter_4.caffemodel", model)
    assert main(ARGS) == 3
    assert "layer 'ip': 1 of 720 values of blob 0 are NaN or infinite" in capsys.readouterr().err
    assert not list(trained.glob("*q.*"))


def test_no_data_of_its_own(trained: Path, capsys: Capture) -> None:
    start = NET.index('layer { name: "test-data"')
    end = NET.index('layer { name: "conv"')
    source = 'layer { name: "test-data" type: "Input" top: "data" top: "label" include { phase: TEST } input_param {'
    source += " shape { dim: 6 dim: 3 dim: 8 dim: 8 } shape { dim: 6 } } }\n"
    (trained / "net.prototxt").write_text(NET[:start] + source + NET[end:])
    assert main(ARGS) == 2
    assert "no data of its own in phase TEST" in capsys.readouterr().err


def test_optimize_warns_where_training_is_lost(trained: Path, capsys: Capture) -> None:
    lost = """layer { name: "bn2" type: "BatchNorm" bottom: "conv" top: "bn2" batch_norm_param { scale_bias: true } }
    layer { name: "watch" type: "Silence" bottom: "%s" include { phase: TRAIN } }
    layer { name: "ip" """
    for blob, warned in (("conv", True), ("bn2", False)):
        net = NET.replace('layer { name: "ip" ', lost % blob).replace(
            'bottom: "conv" top: "ip"', 'bottom: "bn2" top: "ip"'
        )
        net = net.replace('layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }', "")
        net = net.replace(
            'layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" include { phase: TRAIN } }', ""
        )
        (trained / "net.prototxt").write_text(net)
        assert main(["train", "--solver", "solver.prototxt", "--log-level", "error"]) == 0
        assert main([*ARGS[:-1], "warning", "--optimize", "--no-score"]) == 0
        assert ("works in phase TEST only" in capsys.readouterr().err) is warned


def test_an_output_that_cannot_be_written_leaves_nothing(trained: Path, capsys: Capture) -> None:
    (trained / "q.caffemodel").mkdir()  # found only when the second file is written
    assert main(ARGS) != 0
    assert not (trained / "q.prototxt").exists()


def test_optimize_leaves_shared_weights_as_they_are(trained: Path, capsys: Capture) -> None:
    """What absorbing refuses is said with its place; `calibrate` has no option to ask for that."""
    net = NET.replace(
        "convolution_param { num", 'param { name: "w" } param { name: "b" } convolution_param { pad: 1 num'
    )
    second = net[net.index('layer { name: "conv"') : net.index('layer { name: "relu"')]
    for old, new in (('"conv"', '"conv2"'), ('"bn"', '"bn2"'), ('bottom: "data"', 'bottom: "half"')):
        second = second.replace(old, new)
    halves = 'layer { name: "half" type: "Power" bottom: "data" top: "half" power_param { scale: 0.5 } }\n'
    both = 'layer { name: "sum" type: "Eltwise" bottom: "conv" bottom: "conv2" top: "sum" }\nlayer { name: "ip" '
    net = net.replace('layer { name: "relu"', halves + second + 'layer { name: "relu"')
    net = net.replace('bottom: "conv" top: "ip"', 'bottom: "sum" top: "ip"').replace('layer { name: "ip" ', both)
    (trained / "net.prototxt").write_text(net)
    assert main(["train", "--solver", "solver.prototxt", "--log-level", "error"]) == 0
    assert main([*ARGS[:-1], "info", "--optimize", "--no-score"]) == 0
    err = capsys.readouterr().err
    assert "net.prototxt:11:1: Kept: BatchNorm bn: " in err
    assert "'conv2'" in err
    assert "--keep-shared" not in err
    assert "bn2" in (trained / "q.prototxt").read_text()
