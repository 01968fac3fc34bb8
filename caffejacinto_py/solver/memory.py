"""`memory { budget strategy }` and `history_type` of a solver: training within so many bytes. Ours; docs/memory.md."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from caffejacinto_py.engine.memory import strategies
from caffejacinto_py.engine.memory.budget import Beside, MemoryPlan, attach, in_units, numbers_of, parse_bytes
from caffejacinto_py.errors import PrototxtError, UsageError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.passes.memory import HISTORY_TYPES, account
from caffejacinto_py.passes.storages import Numbers
from caffejacinto_py.solver.lr import Where, nowhere

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.solver.loop import Solver

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What the fields say. budget: bytes."""

    budget: int
    strategy: strategies.Strategy


def limits(param: Any, where: Where = nowhere) -> Limits | None:
    """None: the solver has no budget. Raises PrototxtError for words that say nothing."""
    if not param.HasField("memory"):
        return None
    spec = param.memory
    if not spec.budget:
        raise PrototxtError("memory has no budget", loc=where("memory"), hint='add: budget: "1.5GiB"')
    field = "budget"
    try:
        budget = parse_bytes(spec.budget)
        field = "strategy"
        return Limits(budget, strategies.parse(spec.strategy or strategies.NAMES[0]))
    except UsageError as e:
        raise PrototxtError(e.text, loc=where("memory", field), hint=e.hint) from e


def plan_solver(solver: Solver) -> MemoryPlan | None:
    """Let the training net run within the solver's budget and log the plan; None: there is no budget.

    Raises BudgetError, UsageError, PrototxtError (also for a history_type that the net has no use for).
    """
    param, net = solver.param, solver.net
    _check_history(param, net, solver.where)
    found = limits(param, solver.where)
    if found is None:
        return None
    lesson = solver.feed.derive
    parts = [(p.net.graph, numbers_of(p.net)) for p in getattr(lesson, "parts", {}).values()]
    kept: dict[str, Any] = {"solver": param.type, "history": param.history_type, "adds": param.iter_size > 1}
    buckets = [sum(p.nbytes for p in bucket.params) for bucket in solver.reducer.buckets]
    beside = of_teachers(parts)._replace(sending=max(buckets, default=0))  # a bucket is a copy until it is complete
    made = attach(net, found.budget, strategy=found.strategy, beside=beside, **kept)
    log.info("%s", line(made))
    for i, test in enumerate(solver.test_nets):
        need = made.update - made.updating - made.memory.gradients + account(test.graph, numbers=numbers_of(test)).live
        if need > found.budget:
            text = "Memory: test net #%d takes %s, more than the budget: give it a smaller batch_size"
            log.warning(text, i, in_units(need))
    if param.debug_info and param.display:
        log.warning("Memory: iterations that debug_info shows run layer by layer and keep everything")
    return made


def _check_history(param: Any, net: Net, where: Where) -> None:
    if param.history_type == HISTORY_TYPES[0]:
        return
    if net.dtype.itemsize > 4:
        text = f"history_type '{param.history_type}' is for nets in float32, and this one is in double precision"
        raise PrototxtError(text, loc=where("history_type"), hint="remove history_type, or train with --precision fp32")
    log.info("History of %s in %s", param.type, param.history_type)


def of_teachers(parts: Sequence[tuple[Graph, Numbers]]) -> Beside:
    """Bytes of teachers: all weights; one runs after the other, and what they make stays."""
    found = [account(graph, numbers=numbers) for graph, numbers in parts]
    tops = sum(prod(graph.shapes[v]) * numbers.item for graph, numbers in parts for v in graph.outputs)
    return Beside(sum(m.params for m in found), tops + max((m.live for m in found), default=0))


def line(made: MemoryPlan) -> str:
    """A plan in one line."""
    kinds = ("weights, gradients, history", "activations") if made.adds else ("weights, history", "all else")
    names = ("planned", *kinds, "unplanned")
    sizes = (made.peak, made.fixed - made.beside.weights, made.cost.peak, made.plain.peak)
    peak, fixed, acts, plain = (f"{name} {in_units(n)}" for name, n in zip(names, sizes, strict=True))
    if made.beside.weights:
        fixed += f", teachers {in_units(made.beside.weights)} ({in_units(made.beside.passing)} more while they run)"
    if made.update > made.fixed + made.passing:
        plain += f"; most at the update, with gradients of {in_units(made.memory.gradients)}"
    return f"Memory: {peak}: {fixed}, {acts} ({plain}); {made.ratio:.3f} of the time of a pass"
