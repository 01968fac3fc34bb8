"""Layers on a device: against float64 on the CPU, and against the vectors of the C++ binaries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.engine import gpu
from tests.gpu.cases import MODULES, cases
from tests.layers import harness, test_golden_bvlc
from tests.solver import test_golden

QUICK = ("test_linear", "test_elementwise", "test_loss_more")  # of the normal run, where check_layer does the same


@pytest.fixture(autouse=True)
def _float_is_float(device: str) -> None:
    if device != "cpu":
        gpu.allow(tf32=False, search=False)


def both(quick: Iterable[str], names: Iterable[str]) -> Any:
    """(name, device): `quick` on the CPU, all on a GPU."""
    rows = [pytest.param(n, "cpu") for n in quick]
    rows += [pytest.param(n, "gpu", marks=pytest.mark.gpu) for n in names]
    return pytest.mark.parametrize(("name", "device"), rows, indirect=["device"])


@both(QUICK, MODULES)
def test_layers_as_in_float64_on_a_cpu(name: str, device: str) -> None:
    """Tops and gradients of every case of tests/layers; layers that draw numbers only run."""
    found = cases(name)
    assert found
    for case in found:
        bottoms = harness._bottoms(case, case.ins)
        got = harness._passes(case, [torch.tensor(b, dtype=torch.float32, device=device) for b in bottoms], device)
        assert {t.device.type for t in got} <= {torch.device(device).type}
        want = harness._passes(case, harness._tensors(bottoms), "cpu", dtype=torch.float64)
        if not case.phases_agree and case.oracle is None:
            continue
        for a, b in zip(got, want, strict=True):
            # float32 sums in another order; measured on a CPU: 2e-5
            words = f"{case.text}: {{}}".format
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4, equal_nan=True, msg=words)


@both(test_golden_bvlc.RUN[:3], test_golden_bvlc.RUN)
def test_layers_agree_with_caffe(name: str, device: str) -> None:
    """Vectors of the C++ binary, with the tolerance of their README: 1e-4 of the value and 1e-5."""
    test_golden_bvlc.agrees(name, device)


@both(["sgd_fixed"], test_golden.BVLC)
def test_trajectories_agree_with_caffe(name: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """20 iterations of every solver type; the README asks for 2e-4."""
    folder = test_golden.shared(f"golden/bvlc_solvers/{name}")
    table = np.load(folder / "trajectory.npz")
    solver = test_golden.build(folder, monkeypatch, tmp_path, device=device)
    solver.step(20)
    assert test_golden.difference(solver, test_golden.at(table, 20)) < 2e-4
