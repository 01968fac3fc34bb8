"""Training: schedules, update rules, the loop, snapshots and logs."""

from __future__ import annotations

from typing import Any

__all__ = ["Solver", "find_latest"]


def __getattr__(name: str) -> Any:  # lazy: `solver.logs` and `solver.signals` are of use without torch
    if name == "Solver":
        from caffejacinto_py.solver.loop import Solver

        return Solver
    if name == "find_latest":
        from caffejacinto_py.solver.snapshot import find_latest

        return find_latest
    raise AttributeError(name)
