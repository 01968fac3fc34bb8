"""Training and programs on a device, against the CPU. The net has batch norm and no dropout, which draws otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.engine import gpu
from caffejacinto_py.engine import precision as types
from caffejacinto_py.engine.memory.measure import peak_bytes
from caffejacinto_py.solver import Solver
from tests.cli.conftest import NET, SOLVER
from tests.solver import helpers

LENET = """
name: "lenet"
layer {{ name: "data" type: "Data" top: "data" top: "label"
  transform_param {{ scale: 0.00390625 }} data_param {{ source: "{folder}/db" batch_size: 16 backend: LMDB }} }}
layer {{ name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param {{ num_output: 20 kernel_size: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param {{ pool: MAX kernel_size: 2 stride: 2 }} }}
layer {{ name: "conv2" type: "Convolution" bottom: "pool1" top: "conv2"
  convolution_param {{ num_output: 40 kernel_size: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "bn2" type: "BatchNorm" bottom: "conv2" top: "bn2" batch_norm_param {{ scale_bias: true }} }}
layer {{ name: "relu2" type: "ReLU" bottom: "bn2" top: "bn2" }}
layer {{ name: "pool2" type: "Pooling" bottom: "bn2" top: "pool2"
  pooling_param {{ pool: MAX kernel_size: 2 stride: 2 }} }}
layer {{ name: "ip1" type: "InnerProduct" bottom: "pool2" top: "ip1"
  inner_product_param {{ num_output: 60 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "relu1" type: "ReLU" bottom: "ip1" top: "ip1" }}
layer {{ name: "ip2" type: "InnerProduct" bottom: "ip1" top: "ip2"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "accuracy" type: "Accuracy" bottom: "ip2" bottom: "label" top: "accuracy" include {{ phase: TEST }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label" top: "loss" }}
"""
FIELDS = {"base_lr": "0.01", "random_seed": "3", "solver_mode": "GPU"}
SPARSE = "sparse_mode: SPARSE_UPDATE\nsparsity_target: 0.3\nsparsity_start_iter: 2\nsparsity_step_iter: 5\n"
SPARSE += "sparsity_start_factor: 0.4\nsparsity_step_factor: 0.1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    helpers.make_db(tmp_path / "db", count=64, size=28)
    (tmp_path / "net.prototxt").write_text(LENET.format(folder=tmp_path))
    return tmp_path


def make(folder: Path, device: str, extra: str = "", **options: Any) -> Solver:
    usual = "".join(f"{k}: {v}\n" for k, v in FIELDS.items() if f"{k}:" not in extra)
    return helpers.make_solver(folder, usual + extra, device=device, **options)


def curve(solver: Solver, iterations: int) -> list[float]:
    losses = []
    for _ in range(iterations):
        solver.step(1)
        losses += solver.losses.values()
    return losses


def values(solver: Solver) -> dict[str, np.ndarray]:
    return {f"{n}/{i}": p.detach().cpu().numpy() for n, ps in solver.net.params.items() for i, p in enumerate(ps)}


# --- the same training -----------------------------------------------------------------------------------------------
def test_the_loss_curve_is_the_cpus(folder: Path, device: str) -> None:
    """50 iterations in float32: the curves part slowly, by rounding."""
    count = 50 if device != "cpu" else 12
    want, got = curve(make(folder, "cpu", precision="fp64"), count), curve(make(folder, device), count)
    np.testing.assert_allclose(got[:10], want[:10], rtol=1e-3)
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.01)
    assert got[-1] < got[0]


def test_float64_is_exact(folder: Path, device: str) -> None:
    want, got = (curve(make(folder, d, precision="fp64"), 5) for d in ("cpu", device))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "tf32"])
def test_fewer_bits_learn_as_well(kind: str, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(types, "missing", lambda kind, device: None)
    count = 40 if device != "cpu" else 8
    want, solver = curve(make(folder, device), count), make(folder, device, precision=kind)
    got = curve(solver, count)
    assert np.mean(got[-5:]) < np.mean(want[-5:]) + 0.05
    assert solver.scaling.skipped <= 10
    assert {p.dtype for p in solver.net.parameters()} == {torch.float32}
    if device != "cpu" and solver.net.types is not None:
        assert kind != "tf32" or solver.net.types.tf32


def test_quantized_training(folder: Path, device: str) -> None:
    net = folder / "net.prototxt"
    net.write_text(net.read_text() + "quantize: true\nnet_quantization_param { per_channel_weights: true }\n")
    want, got = (curve(make(folder, d), 8) for d in ("cpu", device))
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.02)


def test_sparse_training(folder: Path, device: str) -> None:
    (folder / "net.prototxt").write_text(LENET.format(folder=folder).replace("num_output: 20", "num_output: 32"))
    solvers = [make(folder, d, SPARSE, dialect="jacinto") for d in ("cpu", device)]
    for s in solvers:
        s.step(8)
    cpu, other = ({n: float((v == 0).mean()) for n, v in values(s).items() if n == "conv2/0"} for s in solvers)
    assert cpu["conv2/0"] > 0.2
    assert other == pytest.approx(cpu, abs=0.01)
    before = values(solvers[1])["conv2/0"] == 0
    solvers[1].step(2)
    assert (values(solvers[1])["conv2/0"][before] == 0).all()


@pytest.mark.parametrize("kind", ["Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"])
def test_update_rules(kind: str, folder: Path, device: str) -> None:
    extra = f'type: "{kind}"\nmomentum: {0 if kind in ("AdaGrad", "RMSProp") else 0.9}\ndelta: 0.001\nbase_lr: 0.001\n'
    extra += "rms_decay: 0.9\n" if kind == "RMSProp" else ""
    want, got = (curve(make(folder, d, extra, precision="fp64"), 8) for d in ("cpu", device))
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- snapshots -------------------------------------------------------------------------------------------------------
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, device: str) -> None:
    """Bit for bit, with kernels that allow it; with dropout, whose generator is restored."""
    if device != "cpu":
        gpu.reproducible()
    net = folder / "net.prototxt"
    drop = 'layer { name: "drop" type: "Dropout" bottom: "ip1" top: "ip1" }\nlayer { name: "ip2"'
    net.write_text(net.read_text().replace('layer { name: "ip2"', drop))
    whole = make(folder, device, "snapshot: 5\nmax_iter: 10\n")
    whole.solve()
    again = make(folder, device, "snapshot: 5\nmax_iter: 10\n")
    again.solve(resume=folder / "snap_iter_5.solverstate")
    helpers.assert_equal(values(whole), values(again))


def test_a_snapshot_goes_on_on_the_other_device(folder: Path, device: str) -> None:
    first = make(folder, device, "snapshot: 5\n")
    first.step(5)
    want, there = curve(first, 3), make(folder, "cpu")
    there.restore(folder / "snap_iter_5.solverstate")
    np.testing.assert_allclose(curve(there, 3), want, rtol=1e-3)
    there.step(2)
    there.snapshot()
    back = make(folder, device)
    back.restore(folder / "snap_iter_10.solverstate")
    helpers.assert_equal(values(back), values(there))


# --- memory and waits ------------------------------------------------------------------------------------------------
def test_little_memory_changes_nothing(folder: Path, device: str) -> None:
    if device != "cpu":
        gpu.reproducible()
    plain = make(folder, device)
    tight = make(folder, device, 'memory { budget: "1GB" strategy: "sequential:3" }')
    assert tight.memory is not None
    for s in (plain, tight):
        s.step(3)
    helpers.assert_equal(values(plain), values(tight))


def test_little_memory_is_little(only_gpu: str, folder: Path) -> None:
    """What the allocator of the GPU counts stays below the plan of weights, gradients and activations."""
    (folder / "net.prototxt").write_text(LENET.format(folder=folder).replace("batch_size: 16", "batch_size: 512"))
    peaks = []
    for extra in ("", 'memory { budget: "1GB" strategy: "sequential:3" }'):
        solver = make(folder, only_gpu, extra)
        solver.step(2)
        peaks.append(peak_bytes(lambda s=solver: s.step(1), only_gpu))  # type: ignore[misc]
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("kind", [None, "bf16"])
def test_nobody_waits_for_the_device(kind: str | None, only_gpu: str, folder: Path) -> None:
    """As tests/gpu/test_fake_cuda.py, by CUDA's own books."""
    solver = make(folder, only_gpu, "clip_gradients: 10\niter_size: 2\n", precision=kind)
    solver.step(3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            solver.clear_grads()
            solver.forward_backward()
            solver.apply_update()
            solver.iter += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- programs --------------------------------------------------------------------------------------------------------
def test_programs(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    where = ["--gpu", device.partition(":")[2] or "-1", "--log-level", "error", "--json"]
    assert main(["train", "--solver", "solver.prototxt", *where]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["test", "--model", "net.prototxt", "--weights", trained["model"], "--iterations", "2", *where]) == 0
    tested = json.loads(capsys.readouterr().out)
    assert tested["loss"] == pytest.approx(trained["tests"][0]["loss"], rel=0.3)  # other random images
    kinds = "fp32,tf32,bf16,fp16" if device != "cpu" else "fp32,fp64"
    args = ["time", "--model", "net.prototxt", "--iterations", "2", "--precision", kinds]
    assert main([*args, *where]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["device"] == device
    assert all(r["total_ms"] > 0 for r in timed["precisions"])
    assert main(["device_query", "--json"]) == 0
    assert bool(json.loads(capsys.readouterr().out)["devices"]) == torch.cuda.is_available()


def test_memory_that_is_not_there(only_gpu: str, tmp_path: Path, capsys: Any) -> None:
    text = NET.replace("dim: 4 dim: 3 dim: 8 dim: 8", "dim: 64 dim: 64 dim: 224 dim: 224").replace(
        "dim: 4 }", "dim: 64 }"
    )
    (tmp_path / "net.prototxt").write_text(text)
    torch.ones(1, device=only_gpu)
    free, _ = torch.cuda.mem_get_info(only_gpu)
    filled = torch.empty(free - (256 << 20), dtype=torch.uint8, device=only_gpu)
    args = ["time", "--model", str(tmp_path / "net.prototxt"), "--iterations", "1", "--gpu", only_gpu.partition(":")[2]]
    try:
        assert main(args) == 1
        assert "iter_size" in capsys.readouterr().err
    finally:
        del filled
        torch.cuda.empty_cache()


def test_a_label_out_of_range_is_said(only_gpu: str, tmp_path: Path) -> None:
    """In a process of its own: CUDA is lost behind a failed assertion."""
    (tmp_path / "net.prototxt").write_text(NET.replace("value: 2", "value: 9"))
    (tmp_path / "solver.prototxt").write_text(SOLVER)
    code = """
        import sys
        from caffejacinto_py.cli import main
        sys.exit(main(["train", "--solver", "solver.prototxt", "--gpu", sys.argv[1]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), only_gpu.partition(":")[2]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 3)
    assert "label" in done.stderr.splitlines()[-2] + done.stderr.splitlines()[-1]
