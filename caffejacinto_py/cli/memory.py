"""`train --memory-budget`: plans the training net of a solver, and says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from caffejacinto_py.cli import options
from caffejacinto_py.engine.memory import strategies
from caffejacinto_py.engine.memory.budget import MemoryPlan, attach, make_plan, parse_bytes
from caffejacinto_py.errors import UsageError
from caffejacinto_py.passes.memory import account

if TYPE_CHECKING:
    from caffejacinto_py.ir.graph import Graph
    from caffejacinto_py.solver import Solver


class Limits(NamedTuple):
    """What the options say."""

    budget: int
    strategy: strategies.Strategy


def limits(given: Mapping[str, Any]) -> Limits | None:
    """--memory-budget and --memory-strategy; None: no budget. Raises UsageError for words that say nothing."""
    budget, strategy = given["memory_budget"], given["memory_strategy"]
    if budget is None:
        if strategy is not None:
            raise UsageError("--memory-strategy goes with --memory-budget")
        return None
    return Limits(parse_bytes(budget), strategies.parse(strategy or "rotor"))


def attach_to(run: Solver, found: Limits | None, log: logging.Logger) -> None:
    """Let a solver train within its budget; None: as ever. Raises BudgetError, UsageError."""
    if found is None:
        return
    made = attach(run.net, found.budget, strategy=found.strategy, solver=run.param.type)
    log.info("%s", line(made))
    for i, net in enumerate(run.test_nets):
        need = made.fixed - made.memory.gradients + account(net.graph, item=net.dtype.itemsize).live
        if need > found.budget:
            text = "Memory: test net #%d takes %s, more than the budget: give it a smaller batch_size"
            log.warning(text, i, options.size(need))
    if run.net.hook is not None:
        log.warning("Memory: copies that the simulation of this net makes are not in the plan")


def planned(graph: Graph, found: Limits | None, *, solver: str, fused: bool) -> list[str]:
    """What `train --dry-run` prints of it for a training net. Raises BudgetError."""
    if found is None:
        return []
    return [line(make_plan(graph, budget=found.budget, strategy=found.strategy, solver=solver, fused=fused))]


def line(made: MemoryPlan) -> str:
    """A plan in one line."""
    names = ("planned", "weights, gradients, history", "activations", "unplanned")
    sizes = (made.peak, made.fixed, made.cost.peak, made.plain.peak)
    peak, fixed, acts, plain = (f"{name} {options.size(n)}" for name, n in zip(names, sizes, strict=True))
    return f"Memory: {peak}: {fixed}, {acts} ({plain}); {made.ratio:.3f} of the time of a pass"
