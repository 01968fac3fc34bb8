"""Every verb that takes --gpu, on a GPU that is not there: it ends well and says what it says on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import caffejacinto_py.pycaffe as caffe
from caffejacinto_py.cli import main
from caffejacinto_py.pycaffe import mode
from caffejacinto_py.schema.weights import read_model
from tests.cli.conftest import NET, SOLVER
from tests.cli.test_calibrate import NET as BATCH_NORM
from tests.gpu.fake import CUDA, fake_cuda
from tests.solver import test_teacher
from tests.solver.helpers import make_solver

Capture = pytest.CaptureFixture[str]
QUIET = ["--log-level", "error"]
W = ["--weights", "w.caffemodel"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.prototxt").write_text(BATCH_NORM)
    (folder / "solver.prototxt").write_text(SOLVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--solver", "solver.prototxt", *QUIET]) == 0
    return (folder / "snap_iter_4.caffemodel").read_bytes()


@pytest.fixture
def folder(tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.prototxt").write_text(BATCH_NORM)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    (tmp_path / "w.caffemodel").write_bytes(weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(text: str, value: Any) -> None:
    """Equal JSON, but for device and times; numbers to float32."""
    assert _plain(json.loads(text), float) == _plain(value, lambda x: pytest.approx(x, rel=1e-4, abs=1e-6))


def _plain(value: Any, number: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v, number) for k, v in value.items() if k not in ("device", "seconds")}
    if isinstance(value, list):
        return [_plain(v, number) for v in value]
    return number(value) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "line",
    [
        "test --model net.prototxt --weights w.caffemodel --iterations 2",
        "calibrate --model net.prototxt --weights w.caffemodel --output q --iterations 2",
        "calibrate --model net.prototxt --weights w.caffemodel --output q --iterations 2 --per-channel --method kl",
        "quantize --model net.prototxt --weights w.caffemodel --model_quantized q.prototxt --iterations 1 "
        "--trimming_mode minifloat --search --error_margin 100",
        "threshold --model net.prototxt --weights w.caffemodel --output s.caffemodel --target 0.3 "
        "--layer-type InnerProduct",
    ],
)
def test_says_the_same(line: str, folder: Path, capsys: Capture) -> None:
    args = [*line.split(), *QUIET, "--json"]
    assert main(args) == 0
    want = json.loads(capsys.readouterr().out)
    with fake_cuda():
        assert main([*args, "--gpu", "0"]) == 0
    same(capsys.readouterr().out, want)


def test_training_and_resuming_across_devices(folder: Path, capsys: Capture) -> None:
    args = ["train", "--solver", "solver.prototxt", *W, *QUIET, "--json"]
    (folder / "net.prototxt").write_text(NET)  # no dropout
    with fake_cuda():
        assert main([*args, "--gpu", "0", "--precision", "fp32"]) == 0
        found = json.loads(capsys.readouterr().out)
        snapshot = (folder / "snap_iter_4.caffemodel").read_bytes()
    assert main(args) == 0
    same(capsys.readouterr().out, found)
    there, here = read_model(folder / "snap_iter_4.caffemodel"), snapshot
    assert len(here) == (folder / "snap_iter_4.caffemodel").stat().st_size
    assert there.layers
    with fake_cuda():  # from the CPU's snapshot
        on = ["train", "--solver", "solver.prototxt", "--snapshot", "auto", "--iterations", "6", "--gpu", "0"]
        assert main([*on, *QUIET]) == 0


def test_time(folder: Path, capsys: Capture) -> None:
    with fake_cuda() as seen:
        args = ["time", "--model", "net.prototxt", "--iterations", "2", "--gpu", "0", "--json", *QUIET]
        assert main([*args]) == 0
        assert json.loads(capsys.readouterr().out)["device"] == "cuda:0"
        assert main([*args, "--precision", "fp32,bf16,fp16"]) == 0
        assert len(json.loads(capsys.readouterr().out)["precisions"]) == 3
        assert seen.synchronized > 20  # before each look at the clock


def test_devices(capsys: Capture) -> None:
    with fake_cuda():
        assert main(["device_query", "--json"]) == 0
        (device,) = json.loads(capsys.readouterr().out)["devices"]
        assert device["capability"] == "9.0"
        assert main(["device_query", "--gpu", "1"]) != 0


def test_teachers(tmp_path: Path) -> None:
    test_teacher.make_db(tmp_path / "db")
    test_teacher.make_teacher(tmp_path)
    test_teacher.student(tmp_path)
    with fake_cuda() as seen:
        solver = test_teacher.solver(tmp_path, device=CUDA)
        solver.step(2)
        seen.forget()
        solver.step(2)
        assert {place.partition(":")[0] for _, place in seen.waits} == {"solver/progress.py"}
        assert solver.feed.last["teacher/ip"].device == CUDA


def test_pycaffe(folder: Path, tmp_path: Path) -> None:
    """Blobs can be read and written, solvers step, on both roads."""
    with fake_cuda():
        try:
            caffe.set_mode_gpu()
            net = caffe.Net("net.prototxt", "w.caffemodel", caffe.TEST)
            first = net.forward()["loss"].copy()
            net.params["conv"][0].data[...] *= 2
            assert net.forward()["loss"] != first
            net = caffe.Net("net.prototxt", "w.caffemodel", caffe.TRAIN)
            net.forward()
            net.backward()
            assert abs(net.params["conv"][0].diff).max() > 0
            solver = caffe.SGDSolver("solver.prototxt")
            solver.step(2)
            assert solver.net.blobs["loss"].data.shape == ()
        finally:
            mode.set_mode_cpu()


def test_one_solver_on_each_device(tmp_path: Path) -> None:
    with fake_cuda():
        make_solver(tmp_path, device=CUDA).step(1)
    make_solver(tmp_path).step(1)
