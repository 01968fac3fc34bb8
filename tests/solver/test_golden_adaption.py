"""A training trajectory of the ADaPTION binary: all four blobs, losses, history, and its own files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.engine.net import Net
from caffejacinto_py.layers.dual import Precision
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.state import read_state
from caffejacinto_py.schema.upgrade import load_net, load_solver
from caffejacinto_py.schema.weights import read_model
from caffejacinto_py.solver import Solver
from tests.conftest import shared
from tests.solver.test_golden import at, difference


def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compat: Compat) -> Solver:
    torch.set_num_threads(1)
    monkeypatch.chdir(shared("golden/adaption/trajectory"))
    doc = load_solver("solver.prototxt")
    doc.message.snapshot, doc.message.snapshot_prefix = 0, str(tmp_path / "snap")
    return Solver(doc, weights="init.caffemodel", device="cpu", workers=0, compat=compat)


def test_trajectory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = build(monkeypatch, tmp_path, Compat(lp_param="physical"))
    assert "net.prototxt:3:71: layer 'conv': 2 param entries for the 4 blobs" in caplog.text
    assert solver.dialect.name == "adaption"
    table = np.load("trajectory.npz")
    losses = []
    for _ in range(20):
        solver.step(1)
        losses += solver.losses.values()
        if want := at(table, solver.iter):
            assert len(want) == 12
            assert difference(solver, want) < 2e-6
    np.testing.assert_allclose(losses, table["last_minibatch_loss"], rtol=2e-6)
    solver.snapshot()
    ours, forks = read_state(tmp_path / "snap_iter_20.solverstate"), read_state("snap_iter_20.solverstate")
    assert [h.shape for h in ours.history] == [h.shape for h in forks.history]
    assert len(ours.history) == 12
    for a, b in zip(ours.history, forks.history):
        np.testing.assert_allclose(a, b, atol=1e-6)
    os.chdir(tmp_path)
    written, wrote = read_model("snap_iter_20.caffemodel"), solver.net.params
    assert written.dialect == "adaption"
    assert written.layer("conv").proto.lpfp_param.ad == 7
    assert b"\x9a\t\x04\x08\x01\x10\x07" in Path("snap_iter_20.caffemodel").read_bytes()  # field 147, as the fork's
    for name, params in wrote.items():
        for blob, param in zip(written.layer(name).blobs, params, strict=True):
            np.testing.assert_array_equal(blob, param.detach().numpy())


def test_goes_on_from_the_forks_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    solver = build(monkeypatch, tmp_path, Compat(lp_param="physical"))
    solver.restore("snap_iter_10.solverstate")
    solver.feed.rewind(dict.fromkeys(solver.feed.positions(), 10))
    solver.step(10)
    assert difference(solver, at(np.load("trajectory.npz"), 20)) < 2e-6


def test_logical_entries_move_masters_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The default: entry 1 is the bias's, rounded copies stay what the last forward pass made of the masters."""
    solver = build(monkeypatch, tmp_path, Compat())
    rates = {(b.node, b.index): (b.lr_mult, b.decay_mult) for b in solver.net.learnable}
    assert [rates["conv", i] for i in range(4)] == [(1, 1), (0, 0), (2, 0), (0, 0)]
    assert [rates["ip1", i] for i in range(4)] == [(1, 1), (0, 0), (1, 1), (0, 0)]
    assert [rates["ip2", i] for i in range(4)] == [(1, 1), (0, 0), (2, 0), (0, 0)]  # four entries: one for each blob
    start = solver.net.params["ip2"][2].detach().clone()
    solver.step(3)
    before = solver.net.params["ip1"][0].detach().numpy().copy()
    solver.step(1)
    np.testing.assert_array_equal(solver.net.params["ip1"][1].detach().numpy(), Precision(1, 6).round(before))
    assert not torch.equal(start, solver.net.params["ip2"][2])  # its own entry has lr 2
    solver.restore("snap_iter_10.solverstate")  # 12 history blobs fit as well
    solver.snapshot()
    assert len(read_state(tmp_path / "snap_iter_10.solverstate").history) == 12


def test_the_forks_weights_give_its_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass from the fork's snapshot makes the rounded weights anew: the loss of the next iteration."""
    folder = shared("golden/adaption/trajectory")
    monkeypatch.chdir(folder)
    from caffejacinto_py.data import probe
    from caffejacinto_py.solver.feed import Feed

    net = Net(prepare(load_net("net.prototxt"), phase="TRAIN", probe=probe), seed=0)
    net.load(read_model("snap_iter_10.caffemodel"))
    feed = Feed(net, seed=0, workers=0)
    feed.rewind(dict.fromkeys(feed.positions(), 10))
    loss = float(net(feed.next()).loss.detach())
    feed.close()
    np.testing.assert_allclose(loss, np.load("trajectory.npz")["last_minibatch_loss"][10], rtol=2e-6)


STOCHASTIC = """
layer { name: "data" type: "DummyData" top: "x" top: "label" dummy_data_param { shape { dim: 4 dim: 6 } shape { dim: 4 }
  data_filler { type: "gaussian" } data_filler { type: "constant" value: 1 } } }
layer { name: "a" type: "LPInnerProduct" bottom: "x" top: "a" lpfp_param { bd: 1 ad: 4 rounding_scheme: STOCHASTIC }
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "act" type: "LPAct" bottom: "a" top: "a" lpfp_param { bd: 2 ad: 4 rounding_scheme: STOCHASTIC } }
layer { name: "b" type: "LPInnerProduct" bottom: "a" top: "b" lpfp_param { bd: 1 ad: 4 }
  inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "b" bottom: "label" top: "loss" }
"""


def test_stochastic_training_repeats_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(STOCHASTIC)
    text = 'net: "net.prototxt" base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 random_seed: 7 snapshot_prefix: "s"'
    Path("solver.prototxt").write_text(text + " max_iter: 8")

    def run(*, stop: int = 8, resume: str | None = None) -> list[np.ndarray]:
        solver = Solver(load_solver("solver.prototxt"), device="cpu", workers=0)
        if resume:
            solver.restore(resume)
        solver.step(stop - solver.iter)
        if stop < 8:
            solver.snapshot()
        return [p.detach().numpy().copy() for params in solver.net.params.values() for p in params]

    whole, again = run(), run()
    run(stop=3)
    resumed = run(resume="s_iter_3.solverstate")
    for a, b, c in zip(whole, again, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
