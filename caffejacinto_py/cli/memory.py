"""`train --memory-budget`: the solver's `memory` fields from the command line, and the plan that a dry run shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from caffejacinto_py.engine.memory import strategies
from caffejacinto_py.engine.memory.budget import Beside, BudgetError, make_plan, on_device, parse_bytes
from caffejacinto_py.errors import UsageError
from caffejacinto_py.passes.precision import resolve
from caffejacinto_py.passes.storages import Numbers, asked
from caffejacinto_py.solver.memory import limits, line, of_teachers

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


def planned(
    graph: Graph,
    param: Any,
    given: Mapping[str, Any],
    teachers: Callable[[], Mapping[str, Graph]],
    assumed: tuple[int, ...] | None = None,
) -> list[str]:
    """What `train --dry-run` prints of a solver's budget for its training net. given: --precision and --gpu, which
    decide what it runs in here. teachers: what they run. assumed: shape of the data where nothing says it. Raises
    BudgetError, but not for data of an assumed shape."""
    found = limits(param)
    if found is None:
        return []
    numbers = numbers_here(graph, given["precision"], gpu=_on_gpu(param, given["gpu"]))
    kept = {"solver": param.type, "history": param.history_type, "beside": beside(param, teachers())}
    kept["numbers"] = replace(numbers, adds=param.iter_size > 1)
    try:
        return [line(make_plan(graph, budget=found.budget, strategy=found.strategy, **kept))]
    except BudgetError as e:
        if assumed is None:
            raise
        return [f"With data as assumed here: {e.text}"]


def beside(param: Any, teachers: Mapping[str, Graph]) -> Beside:
    """Bytes of a solver's teachers, in the types that they or their nets ask for. teachers: what they run, by name."""
    wanted = {t.name: t.precision or None for t in param.teacher}
    return of_teachers([(graph, asked(graph, wanted[name])) for name, graph in teachers.items()])


def numbers_here(graph: Graph, precision: str | None = None, *, gpu: bool = False) -> Numbers:
    """What a net runs in on this machine's CPU, where types without instructions fall back; gpu: on some GPU."""
    import torch

    from caffejacinto_py.engine.precision import fit

    table, device = resolve(graph, precision), torch.device("cuda" if gpu else "cpu")
    return on_device(asked(graph, types=table if gpu else fit(table, device)[0]), device)


def _on_gpu(param: Any, gpu: str | None) -> bool:
    """Whether training would run on a GPU."""
    import torch

    if gpu is not None:
        return gpu != "-1"
    return type(param).SolverMode.Name(param.solver_mode) == "GPU" and torch.cuda.is_available()
