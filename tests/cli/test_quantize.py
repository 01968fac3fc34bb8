"""`caffejacinto quantize`: the file it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model, write_model

Capture = pytest.CaptureFixture[str]
ARGS = ["quantize", "--model", "net.prototxt", "--weights", "w.caffemodel", "--model_quantized", "q.prototxt",
        "--iterations", "2", "--range-iterations", "1", "--log-level", "error"]  # fmt: skip


@pytest.fixture
def trained(folder: Path, capsys: Capture) -> Path:
    """The tiny net with weights that score 1.0."""
    assert main(["train", "--solver", "solver.prototxt", "--set", "base_lr=0.1", "--log-level", "error"]) == 0
    (folder / "snap_iter_4.caffemodel").rename(folder / "w.caffemodel")
    capsys.readouterr()
    return folder


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("dynamic_fixed_point", "DYNAMIC_FIXED_POINT"), ("mini_floating_point", "MINIFLOAT"),
     ("integer_power_of_2_weights", "INTEGER_POWER_OF_2_WEIGHTS")],
)  # fmt: skip
def test_writes_a_net_that_scores_and_trains(trained: Path, capsys: Capture, mode: str, precision: str) -> None:
    assert main([*ARGS, "-trimming_mode", mode, "--search", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "accuracy"
    assert result["baseline"] == 1.0
    assert result["passed"] is True
    assert result["margin"] == 2
    assert {t["step"] for t in result["trials"]} <= {"sweep", "joint"}
    assert [(x["name"], x["type"], x["precision"]) for x in result["layers"]] == [
        ("conv", "ConvolutionRistretto", precision), ("ip", "FcRistretto", precision),
    ]  # fmt: skip
    text = (trained / "q.prototxt").read_text()
    assert f"precision: {precision}" in text
    before, after = load_net("net.prototxt").message, load_net("q.prototxt").message
    assert [layer.include for layer in after.layer] == [layer.include for layer in before.layer]
    assert main(["check", "q.prototxt"]) == 0
    capsys.readouterr()
    scored = ["test", "--model", "q.prototxt", "--weights", "w.caffemodel", "--iterations", "2", "--json"]
    assert main([*scored, "--log-level", "error"]) == 0
    outputs = {o["name"]: o["mean"] for o in json.loads(capsys.readouterr().out)["outputs"]}
    assert outputs["accuracy"] == pytest.approx(result["score"])
    solver = (trained / "solver.prototxt").read_text().replace("net.prototxt", "q.prototxt").replace('"snap"', '"fine"')
    (trained / "fine.prototxt").write_text(solver)
    fine = ["train", "--solver", "fine.prototxt", "--weights", "w.caffemodel", "--log-level", "error"]
    assert main([*fine, "--set", "base_lr=0.01"]) == 0
    tuned, plain = read_model("fine_iter_4.caffemodel"), read_model("w.caffemodel")
    assert tuned.dialect == "bvlc"
    for name in ("conv", "ip"):
        for new, old in zip(tuned.layer(name).blobs, plain.layer(name).blobs, strict=True):
            assert new.shape == old.shape
            assert np.isfinite(new).all()
        moved = tuned.layer(name).blobs[0] - plain.layer(name).blobs[0]
        assert 0 < np.abs(moved).max() < 0.1


def test_the_table(trained: Path, capsys: Capture) -> None:
    assert main([*ARGS, "--trimming_mode", "dynamic_fixed_point", "--error_margin", "100"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["sweep", "conv_params", "conv_params=1"] in [line[:3] for line in lines]
    assert ["joint", "all", "conv_params=1", "fc_params=1", "activations=1"] in [line[:5] for line in lines]
    assert "within 100 points" in out
    assert out.endswith("Wrote q.prototxt\n")


def test_the_dialect_goes_with_the_net(trained: Path) -> None:
    assert main([*ARGS, "--trimming_mode", "minifloat", "--dialect", "nvcaffe"]) == 0
    assert load_net("q.prototxt").message.dialect == "nvcaffe"


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ([], 2, "quantize needs --search"),
        (["--solver", "solver.prototxt"], 2, "caffejacinto train --solver solver.prototxt"),
        (["--trimming_mode", "int8"], 2, "'int8' is not one of"),
        (["--trimming_mode", "minifloat", "--error_margin", "-1"], 2, "not in the range"),
        (["--trimming_mode", "minifloat", "--per-layer"], 2, "goes with dynamic_fixed_point"),
        (["--trimming_mode", "minifloat", "--score", "ip"], 2, "--score ip: no such output"),
        (["--trimming_mode", "minifloat", "--model_quantized", "net.prototxt"], 2, "would replace a file"),
        (["--trimming_mode", "minifloat", "--model_quantized", "w.caffemodel"], 2, "would replace a file"),
        (["--trimming_mode", "minifloat", "--model_quantized", "no/q.prototxt"], 1, "'no': it does not exist"),
        (["--trimming_mode", "minifloat", "--model_quantized", "."], 2, "a directory"),
        (["--trimming_mode", "minifloat", "--weights", "none.caffemodel"], 3, "none.caffemodel"),
        (["--trimming_mode", "minifloat", "--model", "solver.prototxt"], 3, "a net has no field 'net'"),
    ],
)
def test_refusals(trained: Path, capsys: Capture, more: list[str], code: int, words: str) -> None:
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    assert main([*ARGS, *more]) == code
    assert words in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def change(path: str, *pairs: tuple[str, str]) -> None:
    text = Path(path).read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    Path(path).write_text(text)


@pytest.mark.parametrize(
    ("pair", "code", "words"),
    [
        (('layer { name: "accuracy" type: "Accuracy"', 'layer { name: "accuracy" type: "Silence"'), 3, "top"),
        (("include { phase: TEST }", "include { phase: TRAIN }"), 2, "no accuracy among its TEST outputs"),
        (('name: "tiny"', 'name: "tiny" quantize: true'), 2, "quantizes by itself"),
        (('"InnerProduct"', '"FcRistretto"'), 0, ""),  # what is short already is left alone
    ],
)
def test_nets_that_do_not_fit(trained: Path, capsys: Capture, pair: tuple[str, str], code: int, words: str) -> None:
    change("net.prototxt", pair)
    assert main([*ARGS, "--trimming_mode", "dynamic_fixed_point"]) == code
    assert words in capsys.readouterr().err
    assert (trained / "q.prototxt").exists() == (code == 0)


def test_search_alone_means_dynamic_fixed_point(trained: Path, capsys: Capture) -> None:
    assert main([*ARGS, "--search", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "dynamic_fixed_point"


def test_weights_that_are_no_numbers(trained: Path, capsys: Capture) -> None:
    model = read_model("w.caffemodel")
    blob = np.array(model.layer("ip").blobs[0])
    blob[0, 0] = np.nan
    model.layer("ip").blobs[0] = blob
    write_model("nan.caffemodel", model)
    args = ["--trimming_mode", "minifloat", "--weights", "nan.caffemodel"]
    assert main([*ARGS, *args]) == 3
    err = capsys.readouterr().err
    assert re.search(r"net.prototxt:\d+:1: error: layer 'ip'", err)
    assert "NaN" in err
    assert not (trained / "q.prototxt").exists()
