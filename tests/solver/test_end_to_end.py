"""Training on real images against C++ Caffe's losses. Tolerances: the README beside the reference runs.

The layout is nchw, whose sums run in the order of Caffe's. With channels_last the LeNet run equals its own float64 run
to 1e-8 for 30 iterations, and just for that departs from Caffe's at iteration 3: there one activation of relu1 is so
near to zero that exact and float32 arithmetic see another sign. Both are right; the test of channels_last says how far
it goes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.compress import sparsity
from caffejacinto_py.data.datasets import convert_mnist, write_arrays
from caffejacinto_py.schema.upgrade import load_solver
from caffejacinto_py.solver import Solver
from tests.conftest import shared


def mnist(folder: Path, train: int | None, test: int | None) -> None:
    source = shared("data/mnist")
    for part, name, limit in (("train", "train", train), ("t10k", "test", test)):
        images, labels = source / f"{part}-images-idx3-ubyte.gz", source / f"{part}-labels-idx1-ubyte.gz"
        convert_mnist(str(images), str(labels), str(folder / f"mnist_{name}_lmdb"), limit=limit)


def start(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
    layout: str = "nchw",
    file: str = "solver.prototxt",
    **fields: Any,
) -> Solver:
    """The solver of a reference run, in a folder with its data."""
    torch.set_num_threads(1)
    for source in (shared("golden/e2e/lenet_mnist"), shared(f"golden/e2e/{name}")):
        for path in source.iterdir():
            shutil.copy(path, folder / path.name)
    monkeypatch.chdir(folder)
    doc = load_solver(file)
    for field, value in {"display": 0, **fields}.items():
        setattr(doc.message, field, value)
    return Solver(doc, weights=weights, device="cpu", layout=layout)


def losses(solver: Solver, n: int) -> np.ndarray:
    found = []
    for _ in range(n):
        solver.step(1)
        found += solver.losses.values()
    return np.array(found)


def agree(mine: np.ndarray, folder: Path, key: str = "loss", first: float = 1e-5, later: float = 1e-4) -> None:
    """Every loss within what equally right float32 runs differ by, until they may differ by 5 percent.

    first: for the first ten iterations. later: the least that is allowed after them.
    """
    want, noise = np.load(folder / "result.npz")[key], np.load(folder / "noise.npz")[key]
    allowed = np.maximum(5 * np.maximum.accumulate(noise.max(0)), later)
    allowed[:10] = first
    error = np.abs(mine - want[: len(mine)]) / np.abs(want[: len(mine)])
    sure = allowed[: len(mine)] < 5e-2
    assert (error <= allowed[: len(mine)])[sure].all(), f"{error[sure]} > {allowed[: len(mine)][sure]}"
    if not sure.all():
        assert abs(mine[-50:].mean() / want[-50:].mean() - 1) < 0.02


def scores(solver: Solver) -> dict[str, float]:
    return {o.name: o.value for o in solver.test_all()[0].outputs}


def test_lenet_begins_as_caffe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, 64 * 30, 100)
    solver = start("lenet_mnist", tmp_path, monkeypatch, "init.caffemodel")
    # 2e-3: what one early flip did in a variant of the reference (its README); measured here 3e-4 and, below, 5e-4
    agree(losses(solver, 20), tmp_path, later=2e-3)
    solver = start("lenet_mnist", tmp_path, monkeypatch, "init.caffemodel", layout="channels_last")
    agree(losses(solver, 20), tmp_path, first=1e-4, later=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("lenet_mnist", "init.caffemodel"),
        ("lenet_adam", "init.caffemodel"),
        ("lenet_nesterov_step", "init.caffemodel"),
        ("finetune", "iter_300.caffemodel,ip2_new.caffemodel"),
        ("resume", "init.caffemodel"),
    ],
)
def test_mnist(name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, 64 * 300, None)
    solver = start(name, tmp_path, monkeypatch, weights)
    table = np.load(tmp_path / "result.npz")
    # a sign that flips early moves the chaotic runs by up to 1e-2 (see above); the others have no such place
    agree(losses(solver, len(table["loss"])), tmp_path, later=2e-2 if name in ("lenet_mnist", "lenet_adam") else 1e-4)
    found = scores(solver)
    assert abs(found["accuracy"] - table["test0/accuracy"].mean()) <= 0.005
    assert abs(found["loss"] - table["test0/loss"].mean()) <= 5e-3
    if name == "resume":
        again = start(name, tmp_path, monkeypatch, "")
        again.restore("snap_iter_50.solverstate")  # Caffe's own, copied over ours
        shutil.rmtree(tmp_path / "mnist_train_lmdb")
        agree(losses(again, 50), tmp_path, "resumed_loss")
        assert abs(scores(again)["accuracy"] - table["resumed_test0/accuracy"].mean()) <= 0.005


def cifar(folder: Path) -> None:
    script = shared("data/unpack_cifar10.py")
    subprocess.run([sys.executable, str(script), str(folder / "bin")], check=True, capture_output=True)
    for batch, name, count in (("data_batch_1", "train", 10000), ("test_batch", "test", 1000)):
        records = np.fromfile(folder / "bin" / f"{batch}.bin", np.uint8).reshape(-1, 3073)[:count]
        write_arrays(str(folder / f"cifar_{name}_lmdb"), records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].tolist())


@pytest.mark.slow
def test_cifar10_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path)
    solver = start("cifar10_quick", tmp_path, monkeypatch, "init.caffemodel")
    agree(losses(solver, 150), tmp_path, first=1e-3)
    found, table = scores(solver), np.load(tmp_path / "result.npz")
    assert abs(found["accuracy"] - table["test0/accuracy"].mean()) <= 0.03


@pytest.mark.slow
def test_jacintonet_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path)
    solver = start("jacintonet_tiny", tmp_path, monkeypatch, "init.caffemodel")
    assert solver.dialect.name == "jacinto" or solver.dialect.batch_norm_ema
    table = np.load(tmp_path / "result.npz")
    solver.test_all()  # one batch, as caffe-jacinto before the first iteration
    agree(losses(solver, 60), tmp_path, first=5e-3)
    found = scores(solver)
    assert abs(found["accuracy"] - table["test0/accuracy"][1]) <= 0.03


@pytest.mark.slow
def test_jacintonet_tiny_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse stage, from the weights of the reference's dense stage."""
    cifar(tmp_path)
    solver = start("jacintonet_tiny", tmp_path, monkeypatch, "", file="solver_sparse.prototxt", snapshot=0)
    begin, table = np.load("params_60.npz"), np.load("result.npz")
    with torch.no_grad():
        for key in begin.files:
            name, i = key.rsplit("/", 1)
            solver.net.params[name][int(i)].copy_(torch.from_numpy(begin[key]))
    solver.test_all()  # one batch, as caffe-jacinto before the first iteration
    found, applied, achieved = [], [], []
    for _ in range(40):
        before = solver.sparse.last_event
        rows = sparsity.measure(solver.net)
        solver.step(1)
        found += solver.losses.values()
        if solver.sparse.last_event != before:
            applied.append((solver.sparse.last_event, float(solver.sparse.factor)))
            achieved.append(sparsity.total(rows).fraction)
    solver.sparse.after_training(solver.iter)
    assert [i for i, _ in applied] == table["sparse_applied/iter"].tolist()
    # the factor has grown since
    np.testing.assert_allclose([f - 0.1 for _, f in applied], table["sparse_applied/sparsity_factor"], rtol=1e-5)
    np.testing.assert_allclose(achieved, table["sparse_applied/sparsity_achieved"], atol=2e-3)
    # equally right runs end between 0.4420 and 0.4427
    assert sparsity.total(sparsity.measure(solver.net)).fraction == pytest.approx(0.442, abs=2e-3)
    agree(np.array(found), tmp_path, "sparse_loss", first=1e-3)  # up to 8e-3 in the reference's variants; here 3e-6
    want = np.load("sparse_params_40.npz")
    other = sum(
        int(((solver.net.params[n.name][0].detach().numpy() == 0) != (want[f"{n.name}/0"] == 0)).sum())
        for n in sparsity.weights(solver.net)
    )
    assert other <= 184, "weights that are zero in only one of the two: more than between equally right runs"  # here 0
    assert abs(scores(solver)["accuracy"] - table["sparse_test0/accuracy"][1]) <= 0.03
