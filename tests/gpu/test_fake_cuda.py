"""The programs on a GPU that is not there (tests/gpu/fake.py): the same numbers as on the CPU, no mixed devices, and a
host that waits for the device only where it is said here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.compress.observe import observe
from caffejacinto_py.engine import precision
from caffejacinto_py.solver import Solver
from tests.gpu.fake import CUDA, Seen, fake_cuda
from tests.layers import test_sixteen_bits
from tests.solver import helpers
from tests.solver.test_quantize import SETTINGS

LOOK = ("tolist", "solver/progress.py")  # the losses, where they are shown, and every 20 iterations
JUDGE = ("__bool__", "solver/scaling.py")  # may the step be used?
SPARSE = """sparse_mode: SPARSE_UPDATE
sparsity_target: 0.5
sparsity_start_iter: 0
sparsity_step_iter: 1000
sparsity_start_factor: 0.3
"""
# name: (solver fields, options, waits that there are in two iterations)
RUNS: dict[str, tuple[str, dict[str, Any], set[tuple[str, str]]]] = {
    "SGD": ("", {}, set()),
    "iter_size and clipping": ("clip_gradients: 0.1\niter_size: 2", {}, set()),
    "iter_size": ("iter_size: 2", {}, set()),
    "L1": ('regularization_type: "L1"', {}, set()),
    "Nesterov": ('type: "Nesterov"', {}, set()),
    "AdaGrad": ('type: "AdaGrad"\nmomentum: 0\ndelta: 0.1', {}, set()),
    "RMSProp": ('type: "RMSProp"\nmomentum: 0\nrms_decay: 0.9', {}, set()),
    "AdaDelta": ('type: "AdaDelta"\ndelta: 1e-6', {}, set()),
    "Adam": ('type: "Adam"', {}, set()),
    "LARC": ("larc: true", {}, set()),
    "no momentum": ("momentum: 0", {}, set()),
    "fp16": ("", {"precision": "fp16"}, {JUDGE}),
    "bf16": ("", {"precision": "bf16"}, set()),
    "fp64": ("", {"precision": "fp64"}, set()),
    "bfloat16 history": ('history_type: "bfloat16"', {}, set()),
    "int8 history": ('type: "Adam"\nhistory_type: "int8"', {}, set()),
    "sparse": (SPARSE, {"dialect": "jacinto"}, set()),
}


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dropout, which draws otherwise on a GPU; 16 bits on this CPU too."""
    monkeypatch.setattr(helpers, "NET", re.sub(r".*Dropout.*\n", "", helpers.NET))
    monkeypatch.setattr(precision, "missing", lambda kind, device: None)


def params(solver: Solver) -> dict[str, np.ndarray]:
    return {f"{n}/{i}": p.detach().cpu().numpy() for n, ps in solver.net.params.items() for i, p in enumerate(ps)}


def waits(seen: Seen) -> set[tuple[str, str]]:
    return {(what, place.partition(":")[0]) for what, place in seen.waits}


def both(folder: Path, extra: str, *, far: float = 1e-5, **options: Any) -> tuple[Seen, set[tuple[str, str]]]:
    """Train on both devices, compare, and return the waits of iterations 2 and 3."""
    options["layout"] = "nchw"  # a bias under BatchNorm learns from rounding noise
    solver = helpers.make_solver(folder, extra, **options)
    solver.step(4)
    want = helpers.params(solver)
    with fake_cuda() as seen:
        other = helpers.make_solver(folder, extra, device=CUDA, **options)
        other.step(2)
        seen.forget()
        other.step(2)
        found = waits(seen)
        assert {p.device for p in other.net.parameters()} == {CUDA}
        got = params(other)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=far, err_msg=name)
    return seen, found


# --- the tool itself -------------------------------------------------------------------------------------------------
def test_books() -> None:
    with fake_cuda() as seen:
        host = torch.from_numpy(np.ones(3, np.float32))
        device = host.to(CUDA)
        assert host.device.type == "cpu"
        assert (device * 2).device == torch.zeros(2, device=CUDA).device == CUDA
        assert [w[0] for w in seen.waits] == ["to(cuda)"]
        host.pin_memory().to(CUDA, non_blocking=True)
        assert seen.uploads == ["to(cuda)"]
        with pytest.raises(RuntimeError, match="same device"):
            device + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            device.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            device.uniform_(generator=torch.Generator())
        assert (device * torch.tensor(2.0)).tolist() == [2, 2, 2]  # scalars of the host will do
        seen.forget()
        assert float(device.sum()) == 3
        assert device[device > 2].numel() == 0
        assert [w[0] for w in seen.waits] == ["__float__", "__getitem__ with a mask"]
        x = torch.ones(3, device=CUDA, requires_grad=True)
        (x.exp() * device).sum().backward()
        assert x.grad is not None
        assert x.grad.device == CUDA
    assert not torch.cuda.is_available() or torch.cuda.device_count()


# --- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_training(tmp_path: Path, name: str) -> None:
    extra, options, expected = RUNS[name]
    far = 1e-2 if "history" in name else 1e-5  # rounded stochastically, in larger pieces on a GPU
    seen, found = both(tmp_path, extra, far=far, **options)
    assert found == expected | {LOOK}
    assert seen.waits.count(("tolist", next(p for w, p in seen.waits if w == "tolist"))) == 1  # at the end of `step`
    assert len(seen.uploads) == 4 * (2 if "iter_size" in extra else 1)  # data and labels, through pinned memory


def test_every_layer_in_16_bits() -> None:
    for kind, fields in test_sixteen_bits.CASES:
        with fake_cuda() as seen:
            loss, grad, runs = test_sixteen_bits.run(kind, fields, "bf16", device=CUDA)
            assert loss.device == grad.device == CUDA
            assert {what for what, _ in seen.waits} <= {"to(cuda)"}, kind  # weights and the input, once
        assert runs != "FLOAT"


@pytest.mark.parametrize("kind", [k for k in SETTINGS if k != "stochastic"])
def test_quantized_training(tmp_path: Path, kind: str) -> None:
    """One look at the device in a pass: all ranges at once."""
    helpers.make_files(tmp_path)
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text() + f"quantize: true\nnet_quantization_param {{ {SETTINGS[kind]} }}\n")
    seen, found = both(tmp_path, "")
    ranges = [w for w in seen.waits if "compress" in w[1]]
    assert len(ranges) == (0 if kind == "late" else 2), ranges
    assert found - {w for w in found if "compress" in w[1]} == {LOOK}


def test_stochastic_rounding_stays_on_the_device(tmp_path: Path) -> None:
    helpers.make_files(tmp_path)
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text() + f"quantize: true\nnet_quantization_param {{ {SETTINGS['stochastic']} }}\n")
    with fake_cuda():
        helpers.make_solver(tmp_path, device=CUDA).step(3)


def test_dropout_and_a_whole_solve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests, displays, snapshots, debug_info, and a resume that is the uninterrupted run."""
    text = helpers.NET.replace('layer {{ name: "ip"', 'layer {{ name: "d" type: "Dropout" bottom: "bn" top: "bn" }}\n'
                               'layer {{ name: "ip"')  # fmt: skip
    monkeypatch.setattr(helpers, "NET", text)
    extra = "test_iter: 2\ntest_interval: 4\ndisplay: 3\ndebug_info: true\nsnapshot: 5\naverage_loss: 3\n"
    extra += "snapshot_diff: true"
    with fake_cuda():
        whole = helpers.make_solver(tmp_path, extra, device=CUDA)
        whole.solve()
        want = params(whole)
        again = helpers.make_solver(tmp_path, extra, device=CUDA)
        again.solve(resume=tmp_path / "snap_iter_5.solverstate")
        helpers.assert_equal(params(again), want)
        assert again.losses.values() == whole.losses.values()
    there = helpers.make_solver(tmp_path, extra)  # and on a machine without a GPU
    there.restore(tmp_path / "snap_iter_10.solverstate")
    there.step(1)


def test_little_memory(tmp_path: Path) -> None:
    helpers.make_files(tmp_path)
    budget = 'memory { budget: "1GB" strategy: "sequential:3" }'
    with fake_cuda() as seen:
        solvers = [helpers.make_solver(tmp_path, extra, device=CUDA) for extra in ("", budget)]
        for s in solvers:
            s.step(2)
        seen.forget()
        for s in solvers:
            s.step(2)
        assert waits(seen) == {LOOK}
        helpers.assert_equal(params(solvers[0]), params(solvers[1]))


def test_one_layer_at_a_time(tmp_path: Path) -> None:
    with fake_cuda() as seen:
        solver = helpers.make_solver(tmp_path, device=CUDA)
        batch = solver.feed.next()
        want = solver.net(batch).loss
        seen.forget()
        blobs = {top: solver.net.feed(top, batch) for source in solver.net.sources for top in source.tops}
        for _ in solver.net.run(blobs):
            pass
        assert not seen.waits
        torch.testing.assert_close(blobs["loss"], want)


def test_observers_and_test_nets(tmp_path: Path) -> None:
    with fake_cuda():
        solver = helpers.make_solver(tmp_path, "test_iter: 3\ntest_interval: 100", device=CUDA)
        scores = solver.test_all()
        stats = observe(solver.test_nets[0], solver.test_feeds[0], 2).stats
    solver = helpers.make_solver(tmp_path, "test_iter: 3\ntest_interval: 100")
    for got, want in zip(scores, solver.test_all(), strict=True):
        assert [o.value for o in got.outputs] == pytest.approx([o.value for o in want.outputs])
    assert stats["ip"][0].count == 30
