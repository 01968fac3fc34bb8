"""Nets that verbs write are read in the dialect that they were written in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model
from tests.cli.conftest import SOLVER

Capture = pytest.CaptureFixture[str]

NET = """
name: "tiny"
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param { shape { dim: 6 dim: 3 dim: 8 dim: 8 } shape { dim: 6 }
    data_filler { type: "gaussian" } data_filler { type: "constant" value: 2 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 5 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
  inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
FLOAT = ["--model=net.prototxt", "--weights=snap_iter_4.caffemodel"]
QUIET = ["--log-level=error"]
WRITERS = {
    "calibrate": ["--output=q", "--iterations=2", "--bits-activations=3", "--no-score"],
    "lowprecision": ["--output=q", "--iterations=2"],
    "quantize": ["--search", "--model_quantized=q.prototxt", "--iterations=2", "--error_margin=100"],
}


@pytest.fixture
def trained(folder: Path) -> Path:
    """A net of BVLC Caffe with statistics in its BatchNorm."""
    (folder / "net.prototxt").write_text(NET)
    (folder / "solver.prototxt").write_text(SOLVER)
    assert main(["train", "--solver=solver.prototxt", *QUIET]) == 0
    return folder


def scores(capsys: Capture, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["test", "--iterations=2", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {**{o["name"]: o["mean"] for o in found["outputs"]}, "loss": found["loss"]}


@pytest.mark.parametrize("verb", WRITERS)
def test_a_net_of_bvlc_caffe_stays_one(verb: str, trained: Path, capsys: Capture) -> None:
    """Read as another fork's its BatchNorm and its ties in Accuracy would be others. The right outputs are those that
    --dialect gives."""
    assert main([verb, *FLOAT, *WRITERS[verb], *QUIET]) == 0
    assert "--dialect" not in capsys.readouterr().err
    text = (trained / "q.prototxt").read_text()
    assert text.startswith("# dialect: bvlc\n")
    weights = "q.caffemodel" if verb != "quantize" else "snap_iter_4.caffemodel"
    args = ["--model=q.prototxt", f"--weights={weights}"]
    mine = scores(capsys, *args)
    assert mine == scores(capsys, *args, "--dialect=bvlc")
    (trained / "bare.prototxt").write_text(text.partition("\n")[2])
    assert resolve_dialect(load_net("bare.prototxt").message).name != "bvlc"
    if verb != "quantize":
        assert read_model("q.caffemodel").dialect == "bvlc"
        assert resolve_dialect(read_model("q.caffemodel").net()).name == "bvlc"
    assert main(["test", *args, "--iterations=1"]) == 0
    assert "Dialect: bvlc (the file says so)" in capsys.readouterr().err


def test_snapshots_and_what_is_made_of_them(trained: Path, capsys: Capture) -> None:
    """calibrate -> train -> test --output_model: bvlc all the way, in every file."""
    assert main(["calibrate", *FLOAT, *WRITERS["calibrate"], *QUIET]) == 0
    (trained / "s.prototxt").write_text(SOLVER.replace("net.prototxt", "q.prototxt").replace('"snap"', '"tuned"'))
    assert main(["train", "--solver=s.prototxt", "--weights=q.caffemodel"]) == 0
    assert "Dialect: bvlc (the file says so)" in capsys.readouterr().err
    assert read_model("tuned_iter_4.caffemodel").net().dialect == "bvlc"
    args = ["--model=q.prototxt", "--weights=tuned_iter_4.caffemodel"]
    mine = scores(capsys, *args, "--output_model=t", *QUIET)
    assert scores(capsys, "--model=t.prototxt", "--weights=t.caffemodel", *QUIET) == mine
    assert load_net("t.prototxt").message.dialect == "bvlc"


def test_a_dialect_that_no_field_shows(trained: Path, capsys: Capture) -> None:
    """Absorbing takes the last field away that showed it, or the user named it himself."""
    assert main(["optimize", *FLOAT, "--output=o", "--dialect=ssd", *QUIET]) == 0
    assert (trained / "o.prototxt").read_text().startswith("# dialect: ssd\n")
    assert read_model("o.caffemodel").dialect == "ssd"
    assert main(["optimize", *FLOAT, "--output=p", *QUIET]) == 0
    assert "dialect" not in (trained / "p.prototxt").read_text()  # bvlc is what it looks like
    assert main(["threshold", *FLOAT, "--output=z.prototxt", "--dialect=ssd", *QUIET]) == 0
    assert load_net("z.prototxt").message.dialect == "ssd"
    args = ["--model", "net.prototxt", "--bn=nvcaffe", "--model-out=n.prototxt"]
    assert main(["convert", "snap_iter_4.caffemodel", "n.caffemodel", *args]) == 0
    assert resolve_dialect(load_net("n.prototxt").message).batch_norm_ema
    assert "--dialect" not in capsys.readouterr().err
