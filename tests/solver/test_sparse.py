"""Sparse training: caffe-jacinto's runs, the schedule, and resuming in the middle of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.compress import sparsity
from caffejacinto_py.errors import ManyErrors, PrototxtError
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_solver, upgrade_solver
from caffejacinto_py.schema.weights import read_model
from caffejacinto_py.solver import Solver, find_latest
from tests.conftest import shared
from tests.solver.helpers import assert_equal, make_db, params

CASES = ("bn_net", "caps_default_l1", "factor_float_edge", "factor_limit", "freeze_only", "reach_target")


def events(lines: list[str]) -> list[str]:
    """What a log says of sparsity, in its order, between the numbers of the iterations."""
    found: list[str] = []
    for line in lines:
        if " lr = " in line:
            found.append(line.split(",")[0])
        elif not line.startswith(("    Train net", "Learning Rate", "Iteration", "Test", "Snapshot", "Optimization")):
            found.append(line)
    return [x for x in found if x.startswith("Iteration") or "Solving" in x or _about_sparsity(x)]


def _about_sparsity(line: str) -> bool:
    words = ("parsity", "ZeroWeights", " ni=", "frozen", "_param_")
    return any(word in line for word in words)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shared(f"golden/jacinto/sparsity/{case}")
    torch.set_num_threads(1)
    monkeypatch.chdir(folder)
    doc = load_solver("solver.prototxt")
    doc.message.snapshot_prefix = str(tmp_path / "snap")
    solver = Solver(doc, weights="init.caffemodel", device="cpu", workers=0)
    assert solver.dialect.name == "jacinto"
    with caplog.at_level("INFO", logger="caffejacinto_py"):
        solver.solve()
    table = np.load("vectors.npz")
    layers = table["zero_fraction_layers"].tolist()
    for i, want in enumerate(table["zero_fraction"], 1):
        saved = read_model(tmp_path / f"snap_iter_{i}.caffemodel")
        shares = [float((np.asarray(saved.layer(name).blobs[0]) == 0).mean()) for name in layers]
        np.testing.assert_array_equal(shares, want)
    for n, i in enumerate(table["after_iters"]):
        saved = read_model(tmp_path / f"snap_iter_{i}.caffemodel")
        for key in (k for k in table.files if k.startswith("after/")):
            _, layer, index = key.split("/")
            agree(np.asarray(saved.layer(layer).blobs[int(index)]), table[key][n], key)
    after = params(solver)
    for key in (k for k in table.files if k.startswith("final/") and "bn" not in k):  # bn: one pass more, to display
        agree(after[key[6:]], table[key], key)
    mine = events([r.getMessage() for r in caplog.records if r.levelno == logging.INFO])
    assert mine == events(Path("log.txt").read_text().split("\n"))


def agree(mine: np.ndarray, want: np.ndarray, key: str) -> None:
    """Weights to 1e-5 of the largest, zeros exactly."""
    scale = max(float(np.abs(want).max()), 1e-30)
    assert float(np.abs(mine.reshape(want.shape) - want).max()) / scale < 1e-5, key
    np.testing.assert_array_equal(mine.reshape(want.shape) == 0, want == 0, err_msg=key)


# --- small runs of our own -------------------------------------------------------------------------------------------
NET = """
name: "tiny"
layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ mirror: true crop_size: 8 scale: 0.01 }}
  data_param {{ source: "{folder}/db" batch_size: 4 backend: LMDB }} }}
layer {{ name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param {{ num_output: 32 kernel_size: 3 stride: 2 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }}
layer {{ name: "up" type: "Deconvolution" bottom: "conv1" top: "up"
  convolution_param {{ num_output: 32 kernel_size: 3 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "drop" type: "Dropout" bottom: "up" top: "up" }}
layer {{ name: "ip" type: "InnerProduct" bottom: "up" top: "ip"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
"""
SOLVER = """net: "{folder}/net.prototxt" base_lr: 0.05 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.001
solver_mode: CPU random_seed: 7 max_iter: 12 snapshot_prefix: "{folder}/snap"
regularization_type: "L1"
"""
SPARSE = """sparse_mode: SPARSE_UPDATE
sparsity_target: 0.8
sparsity_start_factor: 0.2
sparsity_step_factor: 0.1
sparsity_step_iter: 2
sparsity_threshold_maxratio: 1
sparsity_threshold_value_max: 10
"""
ALSO = 'sparsity_layer_type: "InnerProduct"\nsparsity_layer_type: "Deconvolution"\n'


def document(folder: Path, extra: str) -> Any:
    if not (folder / "net.prototxt").exists():
        make_db(folder / "db")
        (folder / "net.prototxt").write_text(NET.format(folder=folder))
    late = "" if "snapshot_after_train" in extra else "snapshot_after_train: false\n"
    doc = parse(SOLVER.format(folder=folder) + extra + late, "SolverParameter", file="solver.prototxt")
    upgrade_solver(doc.message, doc.locs)
    return doc


def make(folder: Path, extra: str = SPARSE, **options: Any) -> Solver:
    torch.set_num_threads(1)
    return Solver(document(folder, extra), **{"device": "cpu", "workers": 0, **options})


def zeros(solver: Solver) -> list[int]:
    return [r.zeros for r in sparsity.measure(solver.net, also=solver.sparse.also)]


@pytest.mark.parametrize("at", [4, 5, 8])
@pytest.mark.parametrize("extra", [SPARSE, SPARSE + ALSO, SPARSE + "sparsity_itr_increment_bfr_applying: true\n"])
def test_resume_in_the_middle(tmp_path: Path, at: int, extra: str) -> None:
    """Weights, masks, factor: bit for bit those of the run that was not interrupted."""
    whole = make(tmp_path, extra + f"snapshot: {at}\n")
    whole.solve()
    again = make(tmp_path, extra)
    again.solve(resume=tmp_path / f"snap_iter_{at}.solverstate")
    assert_equal(params(again), params(whole))
    assert whole.sparse.factor == again.sparse.factor > 0.5
    assert whole.sparse.masks is not None
    assert again.sparse.masks is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.sparse.masks, again.sparse.masks))
    assert min(zeros(again)) > 0


def test_masks_are_not_the_zeros_of_the_weights(tmp_path: Path) -> None:
    """A weight that is zero by chance may move: after a resume too."""
    solver = make(tmp_path, "sparse_mode: SPARSE_UPDATE\n")
    solver.step(2)
    with torch.no_grad():
        solver.net.params["conv1"][0][0, 0, 0, 0] = 0
    solver.snapshot()
    again = make(tmp_path, "sparse_mode: SPARSE_UPDATE\n")
    again.restore(tmp_path / "snap_iter_2.solverstate")
    again.step(1)
    assert again.net.params["conv1"][0][0, 0, 0, 0] != 0


def test_without_side_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The factor goes on where the schedule says; C++ would begin anew and lose the zeros."""
    solver = make(tmp_path, SPARSE + "snapshot: 7\n")
    solver.step(7)
    (tmp_path / "snap_iter_7.solverstate.extra").unlink()
    again = make(tmp_path)
    again.restore(tmp_path / "snap_iter_7.solverstate")
    assert again.sparse.factor == solver.sparse.factor
    assert "the sparsity factor is not in this state: going on with 0.6" in caplog.text
    before = zeros(again)
    again.step(2)
    assert min(b - a for a, b in zip(before, zeros(again))) > 0


def test_sparse_stage_after_a_dense_one(tmp_path: Path) -> None:
    """A state of a run without sparse_mode: factor and masks begin anew."""
    make(tmp_path, "snapshot: 3\n").step(3)
    solver = make(tmp_path)
    solver.restore(tmp_path / "snap_iter_3.solverstate")
    solver.step(2)
    assert solver.sparse.factor == np.float32(0.2) + np.float32(0.1)
    assert min(zeros(solver)) > 0


def test_a_finished_run_is_not_pruned_again(tmp_path: Path) -> None:
    extra = SPARSE + "snapshot_after_train: true\n"
    whole = make(tmp_path, extra)
    whole.solve()
    assert whole.sparse.last_event == 12
    again = make(tmp_path, extra)
    again.solve(resume=find_latest(str(tmp_path / "snap")))
    assert_equal(params(again), params(whole))


@pytest.mark.parametrize(
    ("dialect", "field", "compat", "first"),
    [
        ("jacinto", "", Compat(), 0),
        (None, "", Compat(), 0),
        ("jacinto-0.16", "", Compat(), 2),
        ("jacinto", "true", Compat(), 2),
        ("jacinto-0.16", "false", Compat(), 0),
        ("jacinto-0.16", "true", Compat(sparsity="0.17"), 0),
    ],
)
def test_both_orders(tmp_path: Path, dialect: str | None, field: str, compat: Compat, first: int) -> None:
    extra = SPARSE + (f"sparsity_itr_increment_bfr_applying: {field}\n" if field else "")
    solver = make(tmp_path, extra, dialect=dialect, compat=compat)
    seen = []
    for _ in range(5):
        solver.step(1)
        seen.append(solver.sparse.last_event)
    assert seen == ([0, 0, 2, 2, 4] if first == 0 else [-1, 2, 2, 4, 4])


def test_start_iter_and_target(tmp_path: Path) -> None:
    """Nothing before start_iter; nothing after the target is reached."""
    solver = make(tmp_path, SPARSE.replace("0.8", "0.3") + "sparsity_start_iter: 3\n")
    seen = []
    for _ in range(12):
        solver.step(1)
        seen.append(solver.sparse.last_event)
    assert seen[:5] == [-1, -1, -1, -1, 4]
    assert seen[-1] == 8  # conv1 is of the low class: its zeros are half of 0.2, 0.3, 0.4; the limit is 0.45


def test_shared_and_frozen_layers(tmp_path: Path) -> None:
    """A layer that does not learn is thresholded too, and one mask serves all users of a shared weight."""
    document(tmp_path, "")
    text = (tmp_path / "net.prototxt").read_text()
    text = text.replace('top: "conv1"\n', 'top: "conv1" param { lr_mult: 0 }\n', 1)
    (tmp_path / "net.prototxt").write_text(text)
    solver = make(tmp_path)
    solver.step(3)
    assert zeros(solver) == [32 * 4]  # floor(0.15 * 27)


def test_off_changes_nothing(tmp_path: Path) -> None:
    a = make(tmp_path, "")
    a.step(4)
    b = make(tmp_path, "display_sparsity: 2\nsparsity_start_factor: 0.5\n")
    b.step(4)
    assert_equal(params(a), params(b))
    assert b.sparse.state() == ({}, {})


def test_display_without_sparse_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = make(tmp_path, "display_sparsity: 2\n")
    with caplog.at_level("INFO", logger="caffejacinto_py"):
        solver.step(3)
    assert caplog.text.count("Total Sparsity (zero_weights/count) =  (0/864) 0") == 2
    assert "frozen" not in caplog.text


def test_unreachable_target_is_said_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    assert "sparsity_target 0.8 will not be reached: of the counted weights at most 0.475 can" in caplog.text
    assert "solver.prototxt:5" in caplog.text
    caplog.clear()
    make(tmp_path, SPARSE.replace("0.8", "0.1"))
    assert "will not be reached" not in caplog.text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("sparsity_target: 1", "sparsity_target must be in"),
        ("sparsity_target: -0.1", "sparsity_target must be in"),
        ("sparsity_target: nan", "sparsity_target must be in"),
        ("sparsity_step_iter: 0", "sparsity_step_iter must be at least 1"),
        ("sparsity_start_factor: -1", "sparsity_start_factor cannot be negative"),
        ("sparsity_step_factor: -0.1", "sparsity_step_factor cannot be negative"),
        ("sparsity_start_iter: -1", "sparsity_start_iter cannot be negative"),
        ("sparsity_threshold_maxratio: -1", "sparsity_threshold_maxratio cannot be negative"),
        ("sparsity_threshold_value_max: -1", "sparsity_threshold_value_max cannot be negative"),
        ("display_sparsity: -2", "display_sparsity cannot be negative"),
        ('sparsity_layer_type: "InnerProdukt"', "no layer of type 'InnerProdukt'"),
        ('sparsity_layer_type: "ReLU"', "no layer of type 'ReLU'"),
    ],
)
def test_bad_fields(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(PrototxtError, match=text) as error:
        make(tmp_path, f"sparse_mode: SPARSE_UPDATE\n{line}\n")
    assert error.value.loc is not None
    assert (error.value.loc.file, error.value.loc.line) == ("solver.prototxt", 5)


def test_all_bad_fields_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as error:
        make(tmp_path, "sparsity_target: 2\nsparsity_step_iter: -3\n")
    assert len(error.value.errors) == 2


def test_a_start_factor_beyond_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "sparse_mode: SPARSE_UPDATE\nsparsity_target: 0.5\nsparsity_start_factor: 0.8\n")
    assert "'sparsity_target' has no effect: sparsity_start_factor starts above 0.65" in caplog.text


def test_target_without_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = make(tmp_path, "sparsity_target: 0.5\nsparsity_step_iter: 1\n")
    assert "'sparsity_target' has no effect: sparse_mode is not set" in caplog.text
    assert "'sparsity_step_iter'" not in caplog.text
    solver.step(2)
    assert zeros(solver) == [0]


def test_more_layers_from_a_snapshot_on(tmp_path: Path) -> None:
    make(tmp_path, SPARSE + "snapshot: 5\n").step(5)
    solver = make(tmp_path, SPARSE + ALSO)
    solver.restore(tmp_path / "snap_iter_5.solverstate")
    solver.step(2)
    assert min(zeros(solver)) > 0
    assert solver.sparse.last_event == 6


def test_damaged_masks(tmp_path: Path) -> None:
    solver = make(tmp_path)
    solver.step(3)
    numbers, arrays = solver.sparse.state()
    again = make(tmp_path)
    with pytest.raises(ValueError, match="the mask of layer 'conv1' has another size"):
        again.sparse.restore(numbers, {"mask/conv1": arrays["mask/conv1"][:5]})
    assert again.sparse.masks is None
