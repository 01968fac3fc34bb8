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


def problem(solver: caffe.SGDSolver) -> None:
    solver.net.blobs["x"].data[...] = [[1, 0], [0, 1], [1, 1], [-1, 1]]
    solver.net.blobs["t"].data[...] = [[1], [2], [3], [4]]


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_of_blobs_after_step(steps: int, folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    problem(solver)
    solver.step(steps)
    blobs = solver.net.blobs
    np.testing.assert_allclose(blobs["y"].diff, (blobs["y"].data - blobs["t"].data) / 4, rtol=1e-5)
    assert float(blobs["loss"].diff) == 1


def test_steps_one_by_one_and_together_agree(folder: Path) -> None:
    ends = []
    for parts in ([6], [1] * 6, [2, 4]):
        solver = caffe.AdamSolver("s.prototxt")
        problem(solver)
        for n in parts:
            solver.step(n)
        ends.append(solver.net.params["ip"][0].data.copy())
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-5)
    np.testing.assert_allclose(ends[2], ends[0], rtol=1e-5)


def test_gradient_arrays_stay_live_over_steps(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    problem(solver)
    diff = solver.net.params["ip"][1].diff
    seen = []
    for n in (1, 2):
        solver.step(n)
        seen.append(float(diff[0]))
        np.testing.assert_array_equal(diff, solver.net.params["ip"][1].diff)
    assert seen[0] < 0
    assert seen[1] not in (0, seen[0])


def test_callbacks(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    problem(solver)
    seen: list[tuple[str, int]] = []

    def clip() -> None:
        seen.append(("gradients", solver.iter))
        for blobs in solver.net.params.values():
            for blob in blobs:
                blob.diff[...] = 1

    solver.add_callback(lambda: seen.append(("start", solver.iter)), clip)
    solver.step(2)
    assert seen == [("start", 0), ("gradients", 0), ("start", 1), ("gradients", 1)]
    np.testing.assert_allclose(solver.net.params["ip"][0].data, -0.2, rtol=1e-6)


def test_callbacks_of_the_training_net(folder: Path) -> None:
    """Whoever follows the layers sees every iteration of a step."""
    plain, followed = caffe.SGDSolver("s.prototxt"), caffe.SGDSolver("s.prototxt")
    layers: list[int] = []
    followed.net.after_backward(layers.append)
    for solver in (plain, followed):
        problem(solver)
        solver.step(3)
    assert layers == [2, 1] * 3
    np.testing.assert_allclose(followed.net.params["ip"][0].data, plain.net.params["ip"][0].data, rtol=1e-6)


def test_learning_rate_can_be_set(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    solver.param.base_lr = 0.5
    assert solver.lr == pytest.approx(0.5)
    solver.net.params["ip"][0].diff[...] = 1
    solver.apply_update()
    np.testing.assert_allclose(solver.net.params["ip"][0].data, -0.5)
    assert solver.param.lr_policy == "fixed"


def test_inputs_may_be_reshaped(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    solver.net.blobs["x"].reshape(2, 2)
    solver.net.blobs["t"].reshape(2, 1)
    solver.net.blobs["x"].data[...] = np.eye(2)
    solver.net.blobs["t"].data[...] = 1
    solver.step(400)
    assert solver.net.blobs["y"].shape == (2, 1)
    np.testing.assert_allclose(solver.net.blobs["y"].data, 1, atol=1e-3)


def test_callbacks_see_the_blobs_of_their_iteration(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    problem(solver)
    losses: list[float] = []
    solver.add_callback(lambda: None, lambda: losses.append(float(solver.net.blobs["loss"].data)))
    solver.step(4)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


def test_share_weights(folder: Path) -> None:
    solver = caffe.SGDSolver("s.prototxt")
    other = caffe.Net("n.prototxt", caffe.TEST)
    solver.share_weights(other)
    solver.net.params["ip"][1].data[...] = 9
    assert (other.params["ip"][1].data == 9).all()
    problem(solver)
    solver.step(1)
    np.testing.assert_array_equal(other.params["ip"][1].data, solver.net.params["ip"][1].data)


def test_passes_that_are_shown_are_not_in_a_memory_budget(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They run layer by layer and keep everything: said once."""
    Path("s.prototxt").write_text(SOLVER + 'memory { budget: "1MiB" }')
    solver = caffe.get_solver("s.prototxt")
    solver.step(2)
    assert [r.message for r in caplog.records if "layer by layer" in r.message] == [
        "Memory: pycaffe runs passes that it shows layer by layer, and keeps everything then"
    ]
