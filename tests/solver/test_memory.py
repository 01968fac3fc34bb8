"""The solver's `memory` field: the same as --memory-budget, and its errors with their places."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.engine.memory.budget import BudgetError
from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema.text import parse
from caffejacinto_py.solver import Solver, memory
from tests.solver.helpers import assert_equal, document, make_files, make_solver, params


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
