"""Solver states, binary and HDF5."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from caffejacinto_py.errors import UsageError, WeightsError
from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.state import SolverStateFile, read_state, write_state
from tests.conftest import SHARED, shared
from tests.schema.weights_helpers import saved

REAL = sorted(str(p.relative_to(SHARED)) for p in SHARED.glob("golden/**/*.solverstate"))


@pytest.mark.parametrize("name", REAL)
def test_real_states_read_and_rewrite_byte_for_byte(name: str, tmp_path: Path) -> None:
    path = shared(name)
    state = read_state(path)
    theirs = pb.SolverState.FromString(path.read_bytes())
    assert (state.iter, state.learned_net, state.current_step) == (theirs.iter, theirs.learned_net, theirs.current_step)
    for array, blob in zip(state.history, theirs.history, strict=True):
        assert array.shape == tuple(blob.shape.dim)
        assert np.array_equal(array.reshape(-1), np.array(blob.data, np.float32))
    write_state(tmp_path / "a", state)
    assert (tmp_path / "a").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["binaryproto", "hdf5"])
def test_round_trip(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    history = [rng.normal(size=s).astype(np.float32) for s in ((2, 3), (4,), ())] + [rng.normal(size=(2, 2))]
    state = SolverStateFile(7, "snap/é_iter_7.caffemodel", 3, history)
    write_state(tmp_path / "a.bin", state, format=form)
    back = read_state(tmp_path / "a.bin")  # by content, not by name
    assert (back.iter, back.learned_net, back.current_step) == (7, "snap/é_iter_7.caffemodel", 3)
    for a, b in zip(history, back.history, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)


def test_hdf5_layout_is_what_caffe_reads(tmp_path: Path) -> None:
    """One-element int datasets, a NUL-terminated string, float datasets (H5LTmake_dataset_*)."""
    write_state(tmp_path / "a", SolverStateFile(7, "net", 3, [np.ones((2, 3), np.float32)]), format="hdf5")
    with h5py.File(tmp_path / "a", "r") as file:
        assert file["iter"].shape == (1,)
        assert file["iter"].dtype == np.dtype("<i4")
        assert file["current_step"][0] == 3
        kind = file["learned_net"].id.get_type()
        assert (kind.get_size(), kind.get_strpad(), kind.is_variable_str()) == (4, h5py.h5t.STR_NULLTERM, False)
        assert file["history/0"].dtype == np.float32


def test_nothing_learned_yet(tmp_path: Path) -> None:
    write_state(tmp_path / "a", SolverStateFile(0))
    assert (tmp_path / "a").read_bytes() == wire.uint(1, 0) + wire.uint(4, 0)
    assert read_state(tmp_path / "a").iter == 0


def test_legacy_history_and_fields_of_other_forks(tmp_path: Path) -> None:
    blob = b"".join(wire.uint(i, d) for i, d in enumerate((1, 1, 1, 2), 1)) + wire.block(5, bytes(8))
    data = wire.uint(1, 5) + wire.block(3, blob) + wire.tag(5, wire.I32) + b"\0\0\0\0" + wire.uint(6, 4)
    state = read_state(saved(tmp_path / "a", data))
    assert state.history[0].shape == (1, 1, 1, 2)
    assert state.legacy == [True]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (wire.string(2, "x"), "no iteration count"),
        (wire.string(1, "net") + wire.block(100, wire.string(1, "a")), "a net"),
        (b"net: 'x'\nbase_lr: 1\n", "solver prototxt"),
        (wire.uint(1, 5) + wire.block(3, wire.block(5, bytes(8))), "history blob 0: shape"),
        (wire.uint(1, 5) + wire.header(3, 500), "claims 500 bytes where 0 are left"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_what_is_not_a_state(data: bytes, text: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=text):
        read_state(saved(tmp_path / "a", data))


def test_weights_given_as_hdf5_state(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a", "w") as file:
        file.create_group("data")
    with pytest.raises(WeightsError, match="no /iter"):
        read_state(tmp_path / "a")
    with pytest.raises(UsageError):
        write_state(tmp_path / "b", SolverStateFile(0), format="x")
