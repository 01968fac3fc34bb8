"""Snapshots are written blob by blob: the same bytes as of copies, in the memory of one blob."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.engine.memory.measure import peak_bytes
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.schema.lazy import LazyArray
from caffejacinto_py.schema.state import SolverStateFile, write_state
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, write_model
from caffejacinto_py.solver import Solver
from caffejacinto_py.solver.history import PIECES
from tests.solver.helpers import make_files, make_solver

KINDS = {
    "plain": "",
    "adam": 'type: "Adam"\nbase_lr: 0.001',
    "bfloat16": 'history_type: "bfloat16"',
    "int8": 'history_type: "int8"',
}


@pytest.fixture(params=KINDS)
def solver(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Solver]:
    """After two steps, in channels_last, with history in pieces that are small beside its blobs."""
    monkeypatch.setitem(PIECES, "cpu", 1024)
    make_files(tmp_path)
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text().replace("num_output: 6", "num_output: 160"))
    made = make_solver(tmp_path, KINDS[request.param] + "\nsnapshot_diff: true\nmax_iter: 2")
    made.step(2)
    yield made
    made.close()


@pytest.mark.parametrize("form", ["binaryproto", "hdf5"])
def test_the_same_bytes(solver: Solver, tmp_path: Path, form: str) -> None:
    assert any(not p.is_contiguous() for blobs in solver.net.params.values() for p in blobs)  # channels_last
    for diffs in (False, True):
        for lazy in (False, True):
            write_model(tmp_path / f"{lazy}", solver.net.model(diffs=diffs, lazy=lazy), format=form, diffs=diffs)
        assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
    for name, history in (("eager", solver.rule.export()), ("lazy", solver.rule.blobs())):
        write_state(tmp_path / name, SolverStateFile(2, "net", 1, list(history)), format=form)
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "eager").read_bytes()


def test_memory_of_one_blob(solver: Solver) -> None:
    largest = max(b.param.nbytes for b in solver.net.learnable)
    assert peak_bytes(solver.snapshot) < 1.3 * largest


def test_shapes_that_differ_are_seen() -> None:
    lazy = LazyArray((2, 3), np.float32, lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="announced"):
        np.asarray(lazy)


def test_nothing_is_half_written(tmp_path: Path) -> None:
    """An array that cannot be made ends the write: the old file stays."""

    def fail() -> np.ndarray:
        raise CaffeError("the device is gone")

    path = tmp_path / "x.caffemodel"
    path.write_bytes(b"old")
    layers = [LayerBlobs("a", "InnerProduct", [np.ones(5), LazyArray((4,), np.float32, fail)])]
    with pytest.raises(CaffeError, match="gone"):
        write_model(path, ModelFile("net", layers))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.caffemodel"]


def test_lazy_array_copies_when_asked() -> None:
    memory = torch.zeros(3)
    lazy = LazyArray((3,), np.float32, lambda: memory.numpy())
    copy, view = np.array(lazy), np.asarray(lazy)
    memory += 1
    assert copy.tolist() == [0, 0, 0]
    assert view.tolist() == [1, 1, 1]
