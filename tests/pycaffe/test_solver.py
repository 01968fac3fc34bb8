from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe

NET = """
layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 4 dim: 2 } shape { dim: 4 dim: 1 } } }
layer { name: "ip" type: "InnerProduct" bottom: "x" top: "y" inner_product_param { num_output: 1 } }
layer { name: "loss" type: "EuclideanLoss" bottom: "y" bottom: "t" top: "loss" }
"""
SOLVER = """
net: "n.prototxt" test_iter: 1 test_interval: 100 base_lr: 0.1 lr_policy: "fixed" max_iter: 50 snapshot_prefix: "s"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "n.prototxt").write_text(NET)
    (tmp_path / "s.prototxt").write_text(SOLVER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_input_blobs_feed_the_steps(folder: Path) -> None:
    """A linear problem through Input layers: the weights converge to its solution."""
    solver = caffe.SGDSolver("s.prototxt")
    x = np.array([[1, 0], [0, 1], [1, 1], [-1, 1]], np.float32)
    solver.net.blobs["x"].data[...] = x
    solver.net.blobs["t"].data[...] = x @ np.array([[2], [-3]], np.float32) + 1
    weight = solver.net.params["ip"][0].data
    solver.step(1)
    first = float(solver.net.blobs["loss"].data)
    solver.step(799)
    assert solver.iter == 800
    assert float(solver.net.blobs["loss"].data) < 1e-4 * first
    np.testing.assert_allclose(weight, [[2, -3]], atol=1e-2)
    np.testing.assert_allclose(solver.net.blobs["y"].data, solver.net.blobs["t"].data, atol=2e-2)


def test_test_nets_share_the_weights(folder: Path) -> None:
    solver = caffe.get_solver("s.prototxt")
    (test,) = solver.test_nets
    solver.net.params["ip"][0].data[...] = [[5, 6]]
    np.testing.assert_array_equal(test.params["ip"][0].data, [[5, 6]])
    test.forward(x=np.ones((4, 2)), t=np.zeros((4, 1)))
    np.testing.assert_allclose(test.blobs["y"].data, 11)


def test_apply_update(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    weight, diff = solver.net.params["ip"][0].data, solver.net.params["ip"][0].diff
    weight[...] = 0
    diff[...] = 1
    solver.apply_update()
    np.testing.assert_allclose(weight, -0.1)
    assert solver.lr == pytest.approx(0.1)


def test_snapshot_and_restore(folder: Path) -> None:
    solver = caffe.NesterovSolver("s.prototxt")
    solver.snapshot()
    assert {"s_iter_0.caffemodel", "s_iter_0.solverstate"} <= {p.name for p in folder.iterdir()}
    solver.step(3)
    solver.snapshot()
    other = caffe.NesterovSolver("s.prototxt")
    other.restore("s_iter_3.solverstate")
    assert other.iter == 3
    np.testing.assert_array_equal(other.net.params["ip"][0].data, solver.net.params["ip"][0].data)
    other.solve("s_iter_3.solverstate")
    assert other.iter == 50


@pytest.mark.parametrize("name", ["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"])
def test_every_class_sets_its_type(name: str, folder: Path) -> None:
    (folder / "n.prototxt").write_text(NET.replace("num_output: 1", 'num_output: 1 weight_filler { type: "xavier" }'))
    solver = getattr(caffe, f"{name}Solver")("s.prototxt")
    assert solver.param.type == name
    before = solver.net.params["ip"][0].data.copy()
    solver.net.blobs["x"].data[...] = 1
    solver.step(1)
    assert (solver.net.params["ip"][0].data != before).all()
