"""Training with `quantize: true`: it learns, its masters are float, and a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import caffejacinto_py.pycaffe as caffe
from caffejacinto_py.compress import quantize
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.weights import read_model, write_model
from caffejacinto_py.solver.snapshot import load_extra
from tests.solver.helpers import assert_equal, make_files, make_solver, params, solver_text

FULL = "iter_size: 2\naverage_loss: 3\ntest_iter: 2\ntest_interval: 4\nsnapshot: 5\n"
TESTS = "test_iter: 2\ntest_interval: 100\n"
SETTINGS = {
    "default": "",
    "late": "quantization_start: 7",
    "stochastic": "rounding_scheme: QuantizationParameter_Rounding_STOCHASTIC bitwidth_activations: 6",
    "channels": "per_channel_weights: true apply_offset_activations: true",
}


def files(folder: Path, settings: str = "") -> None:
    make_files(folder)
    net = folder / "net.prototxt"
    # the binary makes NaN of biases that are all zero
    text = net.read_text().replace("weight_filler", 'bias_filler { type: "gaussian" std: 0.1 } weight_filler')
    net.write_text(text + f"quantize: true\nnet_quantization_param {{ {settings} }}\n")


@pytest.mark.parametrize(("kind", "compat"), [*((k, "sound") for k in SETTINGS), ("default", "cpu")])
def test_bit_exact(tmp_path: Path, kind: str, compat: str) -> None:
    files(tmp_path, SETTINGS[kind])
    options = {"compat": Compat(quantization=compat)}
    whole = make_solver(tmp_path, FULL, **options)
    whole.solve()
    first = params(whole)
    again = make_solver(tmp_path, FULL, **options)
    again.solve(resume=tmp_path / "snap_iter_5.solverstate")
    assert_equal(params(again), first)
    assert again.losses.values() == whole.losses.values()
    for a, b in zip([again.net, *again.test_nets], [whole.net, *whole.test_nets], strict=True):
        mine, theirs = a.hook.state(), b.hook.state()  # type: ignore[union-attr]
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[k], theirs[k]) for k in mine)
        assert mine["count"] > 0


def test_it_learns_on_the_grid_with_float_masters(tmp_path: Path) -> None:
    files(tmp_path, "bitwidth_weights: 6 bitwidth_activations: 6")
    solver = make_solver(tmp_path, "max_iter: 120")
    start = []
    for _ in range(5):
        solver.step(1)
        start.append(solver.losses.values()[-1])
    solver.step(115)
    end = [solver.losses.values()[-1] for _ in range(5) if solver.step(1) is None]
    assert np.mean(end) < 0.7 * np.mean(start)
    hook = quantize.find(solver.net)
    assert hook is not None
    assert hook.count == 125
    for param, q in zip(solver.net.params["ip"], hook.tables["ip"][1], strict=True):
        n = param.detach() * q.scale + q.offset
        assert not torch.allclose(n, n.round(), atol=1e-2)  # a master is anywhere


def test_the_binary_snaps_once_and_its_test_net_too(tmp_path: Path) -> None:
    files(tmp_path, "apply_offset_weights: false")
    solver = make_solver(tmp_path, TESTS, compat=Compat(quantization="cpu"))
    before = params(solver)
    solver.test_nets[0](solver.test_feeds[0].next())
    assert_equal(params(solver), before)
    solver.test_nets[0](solver.test_feeds[0].next())
    after = params(solver)
    assert any(not np.array_equal(before[k], after[k]) for k in before)
    sound = make_solver(tmp_path, TESTS)
    before = params(sound)
    for _ in range(3):
        sound.test_nets[0](sound.test_feeds[0].next())
    assert_equal(params(sound), before)


def test_snapshots_carry_qparams_of_the_train_net(tmp_path: Path) -> None:
    files(tmp_path)
    solver = make_solver(tmp_path, "snapshot: 3")
    solver.step(3)
    model = read_model(tmp_path / "snap_iter_3.caffemodel")
    assert model.name.endswith("___QUANTIZED__SEE_END_OFTHE_FILE")
    assert model.net().quantize
    assert [q.quantize for q in model.layer("ip").proto.quantization_param.qparam_w] == [True, True]
    arrays = load_extra(str(tmp_path / "snap_iter_3.solverstate")).arrays
    assert arrays["hook/0/count"] == 3
    assert np.isfinite(arrays["hook/0/ranges"]).all()


def test_a_float_state_goes_on_quantized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path)
    make_solver(tmp_path, "snapshot: 3", dialect="jacinto").step(3)
    text = (tmp_path / "net.prototxt").read_text()
    (tmp_path / "net.prototxt").write_text(text + "quantize: true")
    solver = make_solver(tmp_path, "")
    solver.restore(tmp_path / "snap_iter_3.solverstate")
    assert "no ranges for net 0" in caplog.text
    solver.step(3)


def test_a_state_of_another_net_is_refused(tmp_path: Path) -> None:
    files(tmp_path)
    make_solver(tmp_path, "snapshot: 3").step(3)
    text = (tmp_path / "net.prototxt").read_text()
    (tmp_path / "net.prototxt").write_text(
        text.replace("net_quantization_param {", 'net_quantization_param { ignored_layer_names: "ip"')
    )
    solver = make_solver(tmp_path, "")
    with pytest.raises(CaffeError, match="does not fit this net: ranges of"):
        solver.restore(tmp_path / "snap_iter_3.solverstate")


def test_nan_weights_stop_a_training_at_its_start(tmp_path: Path) -> None:
    files(tmp_path)
    solver = make_solver(tmp_path, "")
    model = solver.net.model()
    model.layer("ip").blobs[1][2] = np.nan
    write_model(tmp_path / "bad.caffemodel", model)
    again = make_solver(tmp_path, "", weights=str(tmp_path / "bad.caffemodel"))
    with pytest.raises(CaffeError, match="layer 'ip': blob 1 has 1 values that are NaN or infinite"):
        again.step(1)
    assert again.iter == 0


def test_pycaffe_trains_the_same(tmp_path: Path) -> None:
    """Its last step runs layer by layer, over Split layers, with the solver's own ranges."""
    files(tmp_path, "bitwidth_weights: 6")
    (tmp_path / "solver.prototxt").write_text(solver_text(tmp_path))
    caffe.set_mode_cpu()
    theirs = caffe.SGDSolver(str(tmp_path / "solver.prototxt"))
    for n in (2, 1, 3):
        theirs.step(n)
    mine = make_solver(tmp_path, "", layout="nchw")  # seeds the generators anew
    mine.step(6)
    for name, blobs in params(mine).items():
        layer, i = name.rsplit("/", 1)
        np.testing.assert_allclose(theirs.net.params[layer][int(i)].data, blobs, rtol=1e-4, atol=1e-5)
    a, b = quantize.find(theirs._loop.net), quantize.find(mine.net)
    assert a is not None
    assert b is not None
    assert a.count == b.count == 6
    np.testing.assert_allclose(a.state()["ranges"], b.state()["ranges"], rtol=1e-3, atol=1e-5)
