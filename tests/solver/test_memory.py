"""The solver's `memory` field: the same as --memory-budget, and its errors with their places."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.engine.memory.budget import BudgetError
from caffejacinto_py.engine.memory.measure import peak_bytes
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import dumps, parse
from caffejacinto_py.schema.weights import write_model
from caffejacinto_py.solver import Solver, memory
from tests.engine.test_memory import NET
from tests.solver.helpers import assert_equal, document, make_files, make_solver, params
from tests.solver.test_memory_exact import SOLVER, STUDENT


def field(budget: str, strategy: str = "") -> str:
    more = f' strategy: "{strategy}"' if strategy else ""
    return f'memory {{ budget: "{budget}"{more} }}'


def with_memory(folder: Path, text: str, **options: Any) -> Solver:
    """A solver document with the field as its last line."""
    if not (folder / "net.prototxt").exists():
        make_files(folder)
    doc = document(folder)
    whole = parse(f"{doc.text}{text}\n", "SolverParameter", file="solver.prototxt")
    return Solver(whole, device="cpu", workers=0, **options)


@pytest.mark.parametrize("strategy", ["", "revolve", "sequential:2"])
def test_a_solver_trains_within_its_budget(tmp_path: Path, strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    plain = make_solver(tmp_path)
    plain.step(6)
    with pytest.raises(BudgetError) as caught:
        with_memory(tmp_path, field("1kB", strategy))
    least = caught.value.least
    caplog.set_level(logging.INFO)
    s = with_memory(tmp_path, field(f"{least}", strategy))
    assert s.memory is not None
    assert not strategy or s.memory.cost.forwards > len(s.memory.chain)  # here nothing is quicker than keeping all
    assert s.memory.peak <= least
    assert any(line.startswith("Memory: planned") for line in caplog.messages)
    s.step(6)
    assert_equal(params(plain), params(s))
    assert plain.losses.values() == s.losses.values()


def test_without_the_field_nothing_is_planned(tmp_path: Path) -> None:
    s = make_solver(tmp_path)
    assert s.memory is None
    assert s.net.recompute is None


@pytest.mark.parametrize(
    ("text", "message", "hint", "column"),
    [
        (field("lots"), "'lots' is no number of bytes", "1.5GiB", 10),
        (field("0"), "no number of bytes", "1.5GiB", 10),
        (field("-1GiB"), "no number of bytes", "1.5GiB", 10),
        (field("1GB", "roter"), "'roter' is unknown", "sequential:S", 24),
        (field("1GB", "sequential:0"), "'sequential:0' is unknown", "sequential:S", 24),
        ('memory { strategy: "rotor" }', "memory has no budget", "budget:", 1),
        ("memory { }", "memory has no budget", "budget:", 1),
    ],
)
def test_bad_words_have_a_place(tmp_path: Path, text: str, message: str, hint: str, column: int) -> None:
    with pytest.raises(PrototxtError, match=message) as caught:
        with_memory(tmp_path, text)
    loc = caught.value.loc
    assert loc is not None
    assert (loc.file, loc.col) == ("solver.prototxt", column)
    assert loc.line is not None
    assert loc.line > 1
    assert hint in str(caught.value.hint)


def test_what_the_plan_does_not_hold_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_memory(tmp_path, field("1GB") + " debug_info: true display: 1")
    assert "debug_info shows run layer by layer" in caplog.text


def test_a_budget_that_is_high_enough_changes_nothing(tmp_path: Path) -> None:
    s = with_memory(tmp_path, field("1GB"))
    assert s.memory is not None
    assert s.memory.ratio == 1
    assert memory.line(s.memory).endswith("1.000 of the time of a pass")


# --- teachers ---------------------------------------------------------------------------------------------------------
LARGE = ("dim: 16 dim: 16", "dim: 48 dim: 48")


def taught(more: str, wide: int, precision: str = "fp32") -> Any:
    """A solver message with a teacher whose convolutions are so many times as wide; files in the current directory."""
    text = NET.replace(*LARGE).replace("num_output: 8", f"num_output: {8 * wide}")
    graph = prepare(parse(text, "NetParameter").message, phase="TEST")
    write_model("teacher.caffemodel", Net(graph, seed=9).model())
    Path("teacher.prototxt").write_text(text)
    entry = f"teacher {{ net: 'teacher.prototxt' weights: 'teacher.caffemodel' precision: '{precision}' }} "
    message = parse(SOLVER + entry + more, "SolverParameter").message
    student = STUDENT.split('layer { name: "hint"')[0].replace(' top: "teacher/pool"', "").replace(*LARGE)
    message.net_param.CopyFrom(parse(student, "NetParameter").message)
    return message


@pytest.mark.parametrize(("wide", "precision"), [(1, "fp32"), (8, "fp32"), (8, "fp16")])
def test_teachers_are_in_the_plan(
    wide: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their weights, and their pass, which comes before that of the student: measured, in two passes an iteration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caffejacinto_py.engine.precision.missing", lambda kind, device: None)
    caplog.set_level(logging.INFO)
    s = Solver(taught(f"iter_size: 2 {field('1GB')}", wide, precision), device="cpu")
    assert s.memory is not None
    made = s.memory
    assert made.beside.weights == sum(4 * p.numel() for p in s.feed.derive.parts["teacher"].net.parameters())  # type: ignore[union-attr]
    assert made.fixed == made.memory.params + made.memory.gradients + made.memory.history + made.beside.weights
    assert "teachers" in next(line for line in caplog.messages if line.startswith("Memory: planned"))

    def run() -> None:
        s.clear_grads()
        s.forward_backward()

    run()
    run()
    s.clear_grads()
    measured = peak_bytes(run)
    # a 16-bit type that this processor has no kernel for needs the matrices of slow ones, which nobody would train with
    if precision == "fp32":
        assert measured <= made.peak - made.fixed + made.memory.gradients + (1 << 15)
        assert made.peak - made.fixed + made.memory.gradients <= 1.3 * measured
    assert (made.beside.passing > made.cost.peak) == (wide == 8 and precision == "fp32")
    s.close()


def test_a_budget_below_what_teachers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = taught(field("1GB"), 8)
    Path("solver.prototxt").write_text(dumps(message))
    assert main(["train", "--solver=solver.prototxt", "--dry-run"]) == 0
    assert "teachers" in capsys.readouterr().out
    assert main(["plan", "--solver=solver.prototxt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    s = Solver(taught(field("1GB"), 8), device="cpu")
    assert s.memory is not None
    assert (found["teachers"]["weights"], found["fixed"]) == (s.memory.beside.weights, s.memory.fixed)
    least = s.memory.peak
    s.close()
    assert least == s.memory.fixed + s.memory.beside.passing
    with pytest.raises(BudgetError, match="where teachers run it takes") as caught:
        Solver(taught(field(f"{least - 1}"), 8), device="cpu")
    assert caught.value.least == least
    assert 0 < caught.value.batch < 8
    assert main(["train", "--solver=solver.prototxt", f"--memory-budget={least - 1}"]) == 1
    assert "where teachers run" in capsys.readouterr().err
