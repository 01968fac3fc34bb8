"""A resumed run is the uninterrupted run, bit for bit; and what is resumed when files are missing or damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.errors import CaffeError, WeightsError
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.state import read_state
from caffejacinto_py.solver import find_latest
from caffejacinto_py.solver.snapshot import load_extra
from tests.solver.helpers import assert_equal, make_files, make_solver, params

FULL = """
iter_size: 2
average_loss: 3
test_iter: 2
test_interval: 4
snapshot: 5
display: 1
"""
KINDS = {
    "SGD": "",
    "SGD-larc": "larc: true",
    "Nesterov": 'type: "Nesterov"',
    "AdaGrad": 'type: "AdaGrad"\nmomentum: 0',
    "RMSProp": 'type: "RMSProp"\nmomentum: 0',
    "AdaDelta": 'type: "AdaDelta"\nmomentum: 0.95\ndelta: 1e-6',
    "Adam": 'type: "Adam"\nbase_lr: 0.001',
    "L1-clip": 'regularization_type: "L1"\nclip_gradients: 0.5',
    "hdf5": "snapshot_format: HDF5",
    "multistep": 'lr_policy: "multistep"\nstepvalue: 3\nstepvalue: 7',
}


@pytest.mark.parametrize("kind", KINDS)
def test_bit_exact(tmp_path: Path, kind: str) -> None:
    extra = FULL + KINDS[kind]
    whole = make_solver(tmp_path, extra, metrics=tmp_path / "whole.jsonl")
    whole.solve()
    first = params(whole)
    end = ".h5" if kind == "hdf5" else ""
    again = make_solver(tmp_path, extra, workers=2)
    again.solve(resume=tmp_path / f"snap_iter_5.solverstate{end}")
    assert again.iter == whole.iter == 12
    assert_equal(params(again), first)
    for a, b in zip(again.rule.export(), whole.rule.export()):
        np.testing.assert_array_equal(a, b)
    assert again.losses.values() == whole.losses.values()
    assert again.feed.positions() == whole.feed.positions()
    assert [f.positions() for f in again.test_feeds] == [f.positions() for f in whole.test_feeds]


def test_snapshot_changes_nothing(tmp_path: Path) -> None:
    plain = make_solver(tmp_path, "snapshot: 0")
    plain.step(6)
    often = make_solver(tmp_path, "snapshot: 1")
    often.step(6)
    assert_equal(params(plain), params(often))


def test_without_side_file_as_caffe(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "snapshot: 5")
    solver.step(5)
    saved, history = params(solver), solver.rule.export()
    os.unlink(tmp_path / "snap_iter_5.solverstate.extra")
    again = make_solver(tmp_path)
    again.restore(tmp_path / "snap_iter_5.solverstate")
    assert again.iter == 5
    assert again.feed.positions() == {"data": 0}
    assert_equal(params(again), saved)
    for a, b in zip(again.rule.export(), history):
        np.testing.assert_array_equal(a, b)


def test_foreign_side_file_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_solver(tmp_path, "snapshot: 3").step(3)
    extra = tmp_path / "snap_iter_3.solverstate.extra"
    kept = extra.read_bytes()
    make_solver(tmp_path, "snapshot: 3\nbase_lr: 0.01").step(3)
    extra.write_bytes(kept)
    again = make_solver(tmp_path)
    again.restore(tmp_path / "snap_iter_3.solverstate")
    assert "belongs to another run" in caplog.text
    assert again.iter == 3
    assert again.feed.positions() == {"data": 0}


def test_moved_snapshot(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "snapshot: 3")
    solver.step(3)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in os.listdir(tmp_path):
        if name.startswith("snap_"):
            os.rename(tmp_path / name, moved / name)
    again = make_solver(tmp_path)
    again.restore(moved / "snap_iter_3.solverstate")
    assert_equal(params(again), params(solver))
    os.unlink(moved / "snap_iter_3.caffemodel")
    with pytest.raises(WeightsError, match="not found"):
        make_solver(tmp_path).restore(moved / "snap_iter_3.solverstate")


def test_wrong_state(tmp_path: Path) -> None:
    make_solver(tmp_path, "snapshot: 3").step(3)
    adam = make_solver(tmp_path, 'type: "Adam"')
    before = params(adam)
    with pytest.raises(WeightsError, match="history blobs"):
        adam.restore(tmp_path / "snap_iter_3.solverstate")
    assert_equal(params(adam), before)
    with pytest.raises(WeightsError, match="no such"):
        adam.restore(tmp_path / "nothing.solverstate")


def test_files_are_caffes(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "snapshot: 4\nsnapshot_diff: true")
    before = None
    for _ in range(4):
        before = params(solver)
        solver.step(1)
    after = params(solver)
    state = pb.SolverState.FromString((tmp_path / "snap_iter_4.solverstate").read_bytes())
    assert (state.iter, state.current_step) == (4, 0)
    assert state.learned_net == str(tmp_path / "snap_iter_4.caffemodel")
    blobs = solver.net.learnable
    assert [list(h.shape.dim) for h in state.history] == [list(b.param.shape) for b in blobs]
    model = pb.NetParameter.FromString((tmp_path / "snap_iter_4.caffemodel").read_bytes())
    for layer in model.layer:
        for i, blob in enumerate(layer.blobs):
            name = f"{layer.name}/{i}"
            np.testing.assert_array_equal(np.array(blob.data, np.float32), after[name].ravel())
            assert before is not None
            if layer.name == "bn":
                continue
            np.testing.assert_array_equal(np.array(blob.diff, np.float32), (before[name] - after[name]).ravel())
    # the history is Caffe's v: what was subtracted from the weights in the last update
    for blob, history in zip(blobs, state.history):
        if blob.lr_mult:
            step = before[f"{blob.node}/{blob.index}"] - after[f"{blob.node}/{blob.index}"]
            np.testing.assert_allclose(np.array(history.data, np.float32), step.ravel(), rtol=1e-3, atol=1e-7)


# --- the newest whole snapshot ---------------------------------------------------------------------------------------
def _three(tmp_path: Path) -> str:
    make_solver(tmp_path, "snapshot: 2").step(6)
    return str(tmp_path / "snap")


def test_latest(tmp_path: Path) -> None:
    assert find_latest(str(tmp_path / "snap")) is None
    prefix = _three(tmp_path)
    assert find_latest(prefix) == f"{prefix}_iter_6.solverstate"


@pytest.mark.parametrize("what", ["caffemodel", "solverstate", "solverstate.extra"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone", "empty"])
def test_latest_skips_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, how: str) -> None:
    prefix = _three(tmp_path)
    path = Path(f"{prefix}_iter_6.{what}")
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "gone": b"", "empty": b""}[how])
    if how == "gone":
        path.unlink()
    assert find_latest(prefix) == f"{prefix}_iter_4.solverstate"
    if how != "gone":
        assert "skipping snapshot" in caplog.text


def test_latest_of_caffes_own(tmp_path: Path) -> None:
    prefix = _three(tmp_path)
    for path in tmp_path.glob("*.extra"):
        path.unlink()
    Path(f"{prefix}_iter_6.caffemodel").write_bytes(b"\x0a\xff")
    assert find_latest(prefix) == f"{prefix}_iter_4.solverstate"


def test_prefix_of_another(tmp_path: Path) -> None:
    _three(tmp_path)
    assert find_latest(str(tmp_path / "sna")) is None
    assert find_latest(str(tmp_path / "s[n]ap")) is None


def test_snapshot_directory(tmp_path: Path) -> None:
    make_solver(tmp_path, f'snapshot: 2\nsnapshot_prefix: "{tmp_path}/new/snap"')
    assert (tmp_path / "new").is_dir(), "a missing folder is made before training"
    (tmp_path / "file").write_text("")
    with pytest.raises(CaffeError, match="not a directory") as error:
        make_solver(tmp_path, f'snapshot: 2\nsnapshot_prefix: "{tmp_path}/file/snap"')
    assert error.value.loc is not None
    assert error.value.loc.line
    with pytest.raises(CaffeError, match="cannot create"):
        make_solver(tmp_path, f'snapshot: 2\nsnapshot_prefix: "{tmp_path}/file/deeper/snap"')


def test_read_back(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, 'lr_policy: "multistep"\nstepvalue: 2\nsnapshot: 4')
    solver.step(4)
    state = read_state(tmp_path / "snap_iter_4.solverstate")
    assert (state.iter, state.current_step) == (4, 1)


@pytest.mark.parametrize("write", [1, 2, 3], ids=["weights", "state", "side file"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """A disk that fills up during a snapshot: a clear error, the snapshot before it is whole, nothing half-written."""
    solver = make_solver(tmp_path, "snapshot: 2")
    solver.step(3)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        if os.path.isfile(f"/proc/self/fd/{handle}"):
            calls.append(handle)
            if len(calls) == write:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CaffeError, match="No space left") as error:
        solver.step(1)
    assert "free" in str(error.value.hint)
    assert find_latest(str(tmp_path / "snap")) == str(tmp_path / "snap_iter_2.solverstate")
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "snap_iter_4.solverstate.extra").exists()


def test_leftovers_of_killed_snapshots_go(tmp_path: Path) -> None:
    make_files(tmp_path)
    mine = tmp_path / ".snap_iter_4.caffemodel.0123456789ab.tmp"
    others = [tmp_path / ".other_iter_4.caffemodel.0123456789ab.tmp", tmp_path / "snap_iter_4.caffemodel.tmp"]
    for path in (mine, *others):
        path.write_bytes(b"half")
    make_solver(tmp_path, "max_iter: 1").solve()
    assert not mine.exists()
    assert all(path.exists() for path in others)


def test_a_damaged_header_in_the_side_file_is_a_weights_error(tmp_path: Path) -> None:
    """numpy's reader of headers raises whatever Python's tokenizer raises."""
    make_files(tmp_path)
    make_solver(tmp_path, "max_iter: 1\nsnapshot: 1").solve()
    path = tmp_path / "snap_iter_1.solverstate.extra"
    whole = path.read_bytes()
    close = whole.index(b"}", whole.index(b"'descr'"))
    path.write_bytes(whole[:close] + b"{" + whole[close + 1 :])
    with pytest.raises(WeightsError, match="damaged"):
        load_extra(str(tmp_path / "snap_iter_1.solverstate"))


def test_resuming_a_finished_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path)
    make_solver(tmp_path, "max_iter: 1\nsnapshot: 1").solve()
    again = make_solver(tmp_path, "max_iter: 1\nsnapshot: 1")
    with caplog.at_level("INFO", logger="caffejacinto_py"):
        again.solve(tmp_path / "snap_iter_1.solverstate")
    assert "Nothing is left to train: iteration 1, max_iter 1" in caplog.text
