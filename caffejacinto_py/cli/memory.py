"""`train --memory-budget`: the solver's `memory` fields from the command line, and the plan that a dry run shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caffejacinto_py.engine.memory import strategies
from caffejacinto_py.engine.memory.budget import make_plan, parse_bytes
from caffejacinto_py.errors import UsageError
from caffejacinto_py.solver.memory import limits, line

if TYPE_CHECKING:
    from caffejacinto_py.ir.graph import Graph

UNLIMITED = "none"


def set_limits(param: Any, given: Mapping[str, Any]) -> None:
    """--memory-budget and --memory-strategy into the solver, in place of what it says. Raises UsageError for words
    that say nothing."""
    budget, strategy = given["memory_budget"], given["memory_strategy"]
    if strategy is not None:
        strategies.parse(strategy)
        if budget == UNLIMITED or (budget is None and not param.memory.budget):
            raise UsageError("--memory-strategy goes with --memory-budget")
        param.memory.strategy = strategy
    if budget == UNLIMITED:
        param.ClearField("memory")
    elif budget is not None:
        parse_bytes(budget)
        param.memory.budget = budget


def planned(graph: Graph, param: Any, *, fused: bool) -> list[str]:
    """What `train --dry-run` prints of a solver's budget for its training net. Raises BudgetError."""
    found = limits(param)
    if found is None:
        return []
    kept = {"solver": param.type, "history": param.history_type}
    return [line(make_plan(graph, budget=found.budget, strategy=found.strategy, fused=fused, **kept))]
