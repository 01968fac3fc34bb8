"""The 20-iteration trajectories of the C++ binary, through pycaffe, and going on from its own snapshot.

Parameters and losses agree to 2e-4 relative (with 1e-6 absolute, for values near zero).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from tests.conftest import SHARED, shared

FOLDER = SHARED / "golden/bvlc_solvers"
CASES = sorted(p.parent.name for p in FOLDER.glob("*/solver.prototxt"))
RTOL, ATOL = 2e-4, 1e-6


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A writable copy of a case; the data file is named relative to it."""
    folder = tmp_path / request.param
    shutil.copytree(FOLDER / request.param, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    shutil.copyfile(FOLDER / "data.h5", tmp_path / "data.h5")
    monkeypatch.chdir(folder)
    return folder


def compare(solver: caffe.SGDSolver, trajectory: dict[str, np.ndarray], iteration: int) -> None:
    for key, want in trajectory.items():
        if key.startswith(f"params/{iteration}/"):
            layer, i = key.split("/")[2:]
            np.testing.assert_allclose(solver.net.params[layer][int(i)].data, want, RTOL, ATOL, err_msg=key)


def load(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "trajectory.npz") as z:
        return {k: z[k] for k in z.files}


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_trajectory(case: Path) -> None:
    want = load(case)
    solver = caffe.get_solver("solver.prototxt")
    solver.net.copy_from("init.caffemodel")
    for iteration in range(1, 21):
        solver.step(1)
        assert solver.iter == iteration
        loss = float(solver.net.blobs["loss"].data)
        np.testing.assert_allclose(loss, want["last_minibatch_loss"][iteration - 1], RTOL, ATOL, err_msg=str(iteration))
        compare(solver, want, iteration)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_going_on_from_caffes_own_snapshot(case: Path) -> None:
    solver = caffe.get_solver("solver.prototxt")
    solver.restore("snap_iter_10.solverstate")
    assert solver.iter == 10
    compare(solver, load(case), 10)
    solver._loop.feed.rewind(
        {"data": 10 * solver.param.iter_size}
    )  # Caffe starts its data anew; the trajectory goes on
    solver.step(10)
    compare(solver, load(case), 20)


def test_the_cases_are_there() -> None:
    shared("golden/bvlc_solvers")
    assert len(CASES) == 9
