"""Number types on the command line: what is shown, what is refused, what a machine without the type says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.engine import precision
from caffejacinto_py.schema.weights import read_model

Capture = pytest.CaptureFixture[str]
HALF = "default_forward_type: FLOAT16 default_backward_type: FLOAT16\n"


@pytest.fixture
def half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A net in FLOAT16, on a machine without it."""
    net = folder / "net.prototxt"
    net.write_text(HALF + net.read_text())
    monkeypatch.setattr(precision, "missing", lambda kind, device: "no way" if kind.endswith("16") else None)
    return net


def test_summary_shows_the_types(half: Path, capsys: Capture) -> None:
    assert main(["summary", "net.prototxt", "--precision"]) == 0
    out = capsys.readouterr().out
    assert "weights, history and inputs in FLOAT" in out
    assert "losses keep it" in out
    assert main(["summary", "net.prototxt", "--precision", "--json"]) == 0
    rows = {r["layer"]: r for r in json.loads(capsys.readouterr().out)["layers"]}
    assert (rows["conv"]["runs"], rows["loss"]["runs"]) == ("FLOAT16", "FLOAT")
    assert rows["conv"]["forward_math"] == "FLOAT16"
    assert main(["summary", "net.prototxt", "--precision", "--memory"]) == 2


def test_check_shows_them_where_they_are_not_float(half: Path, capsys: Capture) -> None:
    assert main(["check", "net.prototxt", "--phase", "train"]) == 0
    assert "FLOAT16: conv, relu, ip (types FLOAT16/FLOAT16" in capsys.readouterr().out
    half.write_text(half.read_text().removeprefix(HALF))
    assert main(["check", "net.prototxt", "--phase", "train"]) == 0
    assert "FLOAT" not in capsys.readouterr().out


def test_training_without_the_type_says_so(half: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt"]) == 0
    err = capsys.readouterr().err
    assert err.count("FLOAT16: no way; 3 layers run in FLOAT instead") == 1
    assert "Optimization Done." in err


def test_switches_of_cudnn_are_said_once(folder: Path, capsys: Capture) -> None:
    net = folder / "net.prototxt"
    net.write_text("default_cudnn_math_override: 1\n" + net.read_text())
    assert main(["train", "--solver", "solver.prototxt"]) == 0
    err = capsys.readouterr().err
    assert err.count("has no effect: torch chooses its algorithms itself") == 1
    assert "precision:" not in err
    assert main(["check", "net.prototxt", "--phase", "train"]) == 0
    assert "net.prototxt:1:1: 'default_cudnn_math_override' has no effect" in capsys.readouterr().out


def test_float64_from_the_command_line(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--precision", "fp64"]) == 0
    assert "weights, history and inputs in DOUBLE" in capsys.readouterr().err
    model = read_model("snap_iter_4.caffemodel")
    assert {str(b.dtype) for layer in model.layers for b in layer.blobs} == {"float64"}
    assert main(["test", "--model", "net.prototxt", "--weights", "snap_iter_4.caffemodel", "--iterations", "1"]) == 0
    assert main(["convert", "snap_iter_4.caffemodel", "half.caffemodel", "--half"]) == 0


def test_dry_run_shows_them(half: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--dry-run", "--precision", "bf16"]) == 0
    assert "BFLOAT16: conv, relu, ip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("default_forward_type: FLOT16\n", "net.prototxt:1:"),
        ("default_forward_type: INT\n", "layers do not compute in it"),
        ("global_grad_scale: -1\n" + HALF, "global_grad_scale must be positive"),
    ],
)
def test_bad_types_are_input_errors(folder: Path, capsys: Capture, line: str, words: str) -> None:
    net = folder / "net.prototxt"
    net.write_text(line + net.read_text())
    assert main(["train", "--solver", "solver.prototxt"]) == 3
    assert words in capsys.readouterr().err
    assert not list(folder.glob("snap*caffemodel"))


def test_an_unknown_precision_is_a_usage_error(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--precision", "fp8"]) == 2
    assert "fp32" in capsys.readouterr().err
