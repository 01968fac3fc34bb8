"""test, time, summary and device_query."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from caffejacinto_py.cli import main
from tests.conftest import shared

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def trained(folder: Path, capsys: Capture) -> Path:
    assert main(["train", "--solver", "solver.prototxt", "--log-level", "error"]) == 0
    capsys.readouterr()
    return folder


def test_test_prints_batches_and_means(trained: Path, capsys: Capture) -> None:
    args = ["test", "-model", "net.prototxt", "-weights", "snap_iter_4.caffemodel", "-iterations", "3"]
    assert main(args) == 0
    out = capsys.readouterr()
    assert re.search(r"\] Batch 2, accuracy = [\d.]+$", out.err, re.MULTILINE)
    assert re.search(r"^accuracy = [\d.]+$", out.out, re.MULTILINE)
    assert re.search(r"^loss = ([\d.e-]+) \(\* 1 = \1 loss\)$", out.out, re.MULTILINE)
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [o["name"] for o in result["outputs"]] == ["accuracy", "loss"]
    assert len(result["outputs"][0]["per_iteration"]) == result["iterations"] == 3
    assert result["images"] == 12
    assert result["outputs"][1]["mean"] == pytest.approx(result["loss"])


def test_test_refuses_weights_of_another_net(trained: Path, capsys: Capture) -> None:
    text = (trained / "net.prototxt").read_text()
    (trained / "other.prototxt").write_text(text.replace("num_output: 5", "num_output: 6"))
    assert main(["test", "--model", "other.prototxt", "--weights", "snap_iter_4.caffemodel"]) == 3
    err = capsys.readouterr().err
    assert "layer 'conv', blob 0: shape (5, 3, 3, 3) in the file, (6, 3, 3, 3) in the net" in err
    assert "rename the layer" in err


def test_test_refuses_a_truncated_file(trained: Path, capsys: Capture) -> None:
    data = (trained / "snap_iter_4.caffemodel").read_bytes()
    (trained / "cut.caffemodel").write_bytes(data[: len(data) // 2])
    assert main(["test", "--model", "net.prototxt", "--weights", "cut.caffemodel"]) == 3
    assert "cut.caffemodel" in capsys.readouterr().err


def test_solver_given_as_net(folder: Path, capsys: Capture) -> None:
    assert main(["test", "--model", "solver.prototxt", "--weights", "x"]) == 3
    assert "--solver" in capsys.readouterr().err
    assert main(["summary", "solver.prototxt"]) == 3
    assert "--solver" in capsys.readouterr().err


def test_time(folder: Path, capsys: Capture) -> None:
    args = ["time", "-solver", "solver.prototxt", "-iterations", "2"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert re.search(r"^conv +Convolution +[\d.]+ +[\d.]+ +[\d.]+% +19,440$", out, re.MULTILINE)
    assert re.search(r"^Average Forward-Backward: [\d.]+ ms", out, re.MULTILINE)
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in result["layers"]] == ["conv", "relu", "ip", "loss"]
    assert sum(r["share"] for r in result["layers"]) == pytest.approx(1)
    assert all(r["backward_ms"] > 0 for r in result["layers"])
    assert result["random_inputs"] is False
    assert result["batch"] == 4


def test_time_compares_number_types(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from caffejacinto_py.engine import precision

    args = ["time", "--model", "net.prototxt", "--iterations", "2", "--precision"]
    monkeypatch.setattr(precision, "missing", lambda kind, device: None)
    assert main([*args, "fp32,bf16,fp64", "--json"]) == 0
    rows = {r["precision"]: r for r in json.loads(capsys.readouterr().out)["precisions"]}
    assert [rows[k]["runs"] for k in ("fp32", "bf16", "fp64")] == ["FLOAT", "FLOAT/BFLOAT16", "DOUBLE"]
    assert rows["fp32"]["ratio"] == 1
    assert 0 < rows["bf16"]["kept_bytes"] < rows["fp32"]["kept_bytes"] < rows["fp64"]["kept_bytes"]
    monkeypatch.setattr(precision, "missing", lambda kind, device: "no way" if kind == "FLOAT16" else None)
    assert main([*args, "fp32,fp16"]) == 0
    out = capsys.readouterr()
    assert re.search(r"^fp16 +FLOAT +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ KiB$", out.out, re.MULTILINE)
    assert "FLOAT16: no way" in out.err
    assert main([*args, "fp64"]) == 0
    assert "Average Forward-Backward" in capsys.readouterr().out
    assert main([*args, "fp32,fp8"]) == 2
    assert "one of fp64, fp32, tf32, fp16, bf16" in capsys.readouterr().err


def test_time_works_without_data(folder: Path, capsys: Capture) -> None:
    text = (folder / "net.prototxt").read_text()
    data = 'layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "absent" batch_size: 2 } }'
    (folder / "net.prototxt").write_text(
        re.sub(r"layer \{ name: \"data\".*?\} \}\n(?=layer)", data + "\n", text, flags=re.S)
    )
    assert main(["time", "--model", "net.prototxt", "--iterations", "1", "--json"]) == 0
    out = capsys.readouterr()
    assert "Random inputs of 3x224x224" in out.err
    assert "absent" in out.err
    assert json.loads(out.out)["random_inputs"] is True
    assert main(["time", "--model", "net.prototxt", "--iterations", "1", "--data-shape", "3,8,8"]) == 0
    assert main(["train", "--solver", "solver.prototxt"]) == 3
    assert "absent" in capsys.readouterr().err


def test_time_needs_one_net(folder: Path, capsys: Capture) -> None:
    assert main(["time"]) == 2
    assert main(["time", "--model", "net.prototxt", "--solver", "solver.prototxt"]) == 2
    assert capsys.readouterr().err.count("--model or --solver") == 2


def test_summary(folder: Path, capsys: Capture) -> None:
    assert main(["summary", "net.prototxt", "-phase", "test"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^conv +Convolution +4x5x6x6 +140 +19,440$", out, re.MULTILINE)
    assert re.search(r"^total +6 layers +864 +22,320$", out, re.MULTILINE)
    assert main(["summary", "--model=net.prototxt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["phase"], found["params"], found["macs"]) == ("tiny", "TRAIN", 864, 22320)
    assert found["layers"][0]["shapes"] == [[4, 3, 8, 8], [4]]
    assert found["layers"][-1]["shapes"] == [[]]


def test_device_query(capsys: Capture) -> None:
    assert main(["device_query", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"torch", "cuda", "cpu_threads", "devices"}
    assert main(["device-query"]) == 0
    assert "PyTorch" in capsys.readouterr().out


def test_lenet_weights_score_as_in_caffe(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of C++ Caffe on the MNIST test images: 0.9914."""
    mnist, weights = shared("data/mnist"), shared("caffemodels/lenet_mnist/lenet_iter_10000.caffemodel")
    monkeypatch.chdir(tmp_path)
    names = [str(mnist / f"t10k-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")]
    assert main(["convert_mnist_data", *names, "lmdb"]) == 0
    net = (Path(__file__).parents[2] / "models/lenet/train_val.prototxt").read_text()
    (tmp_path / "net.prototxt").write_text(re.sub(r'source: "[^"]*"', 'source: "lmdb"', net))
    capsys.readouterr()
    args = ["test", "--model", "net.prototxt", "--weights", str(weights), "--iterations", "100", "--log-level=error"]
    assert main(args) == 0
    assert "accuracy = 0.9914\n" in capsys.readouterr().out
