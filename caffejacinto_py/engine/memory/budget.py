"""From a number of bytes to a planned net: what is left for activations, a schedule for it, or what would be enough."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from caffejacinto_py.engine import precision
from caffejacinto_py.engine.memory import strategies
from caffejacinto_py.engine.memory.execute import Recompute
from caffejacinto_py.engine.memory.schedule import Cost, Schedule, keep_all, simulate
from caffejacinto_py.engine.memory.stages import Chain, chain_of
from caffejacinto_py.engine.memory.strategies import Strategy
from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.passes.memory import Memory, account, batch_of, updating, with_batch
from caffejacinto_py.passes.precision import WIDTHS
from caffejacinto_py.passes.storages import PLAIN, Numbers, simulated

if TYPE_CHECKING:
    import torch

    from caffejacinto_py.engine.net import Net

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMG", 1)} | {f"{p}iB": 1024**i for i, p in enumerate("KMG", 1)}
_SPELT = {unit.upper(): factor for unit, factor in _UNITS.items()}


class BudgetError(CaffeError):
    """No schedule of the strategy fits the budget. Exit code 1: the files are in order, this machine is too small.

    least: bytes that would be enough. batch: the largest batch size that fits, 0 where none does. stage: the last layer
    of the stage that needs most.
    """

    def __init__(self, text: str, *, least: int, batch: int, stage: str, hint: str | None = None) -> None:
        super().__init__(text, hint=hint)
        self.least, self.batch, self.stage = least, batch, stage


class Beside(NamedTuple):
    """Bytes beside the net that is trained.

    weights: of teachers; passing: more, at most, while they run, before the pass of the other begins. sending: of
    gradients on their way to other ranks.
    """

    weights: int = 0
    passing: int = 0
    sending: int = 0


ALONE = Beside()
_TRIES = 6  # batches that are planned to find the largest one that fits


@dataclass(frozen=True)
class MemoryPlan:
    """A schedule of a net with what it costs. budget: bytes, None: no limit. memory: of the unplanned net; cost and
    plain: activations and gradients with and without the schedule. batch: images of a pass. updating: bytes that the
    update rule works in. adds: gradients of weights are there all the time (iter_size)."""

    chain: Chain
    schedule: Schedule
    cost: Cost
    plain: Cost
    memory: Memory
    batch: int
    budget: int | None
    beside: Beside = ALONE
    updating: int = 0
    adds: bool = False

    @property
    def fixed(self) -> int:
        """Bytes that are there all the time: weights (teachers' too), history, and with `adds` gradients of weights,
        which else come one by one in backward and are part of `cost`."""
        memory, beside = self.memory, self.beside
        return memory.params + memory.history + beside.weights + beside.sending + self.adds * memory.gradients

    @property
    def update(self) -> int:
        """Bytes while weights are updated: all gradients are there, and no activations."""
        gradients = 0 if self.adds else self.memory.gradients
        return self.fixed + gradients + self.updating

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of training."""
        return max(self.update, self.fixed + self.passing)

    @property
    def passing(self) -> int:
        """Bytes beside `fixed` at the fullest moment of a pass."""
        return max(self.cost.peak, self.beside.passing)

    @property
    def ratio(self) -> float:
        """Time of a pass against that of one with nothing run twice."""
        return self.cost.seconds / self.plain.seconds if self.plain.seconds else 1.0


def parse_bytes(text: str) -> int:
    """ "1.5GiB", "512MiB", "800MB", "1000000" -> bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
    factor = _SPELT.get(found[2].upper()) if found else None
    count = round(float(found[1]) * factor) if found and factor else 0
    if count < 1:
        hint = "a number of bytes, or with a unit: 1.5GiB, 512MiB, 800MB"
        raise UsageError(f"memory budget '{text}' is no number of bytes", hint=hint)
    return count


def in_units(count: int) -> str:
    """Bytes for people, rounded up, so that what is said to be enough is enough."""
    mib = -(-count * 10 // 1024**2) / 10
    return f"{mib:.1f}MiB"


def make_plan(
    graph: Graph,
    *,
    budget: int | None = None,
    strategy: Strategy = Strategy(),  # noqa: B008  # frozen
    solver: str = "SGD",
    history: str = "float32",
    numbers: Numbers = PLAIN,
    beside: Beside = ALONE,
    refine: Callable[[Chain], Chain] | None = None,
) -> MemoryPlan:
    """The plan of a TRAIN graph. budget: bytes for weights, gradients, history and activations; None: unlimited.

    Without `Numbers.adds` a pass must begin with no gradients (`grad` None), as the solver's do with iter_size 1.
    solver, history, numbers: see `account`. refine: replaces estimates of the chain (profile). Raises BudgetError.
    """
    memory = account(graph, solver=solver, history=history, numbers=numbers)
    chain = chain_of(graph, numbers=numbers)
    chain = refine(chain) if refine else chain
    plain = simulate(chain, keep_all(chain))
    works = updating(graph, solver=solver, history=history, numbers=numbers)
    made = MemoryPlan(
        chain, keep_all(chain), plain, plain, memory, batch_of(graph), budget, beside, works, numbers.adds
    )
    if budget is None and strategy.name in ("rotor", "none"):
        return made
    left = plain.peak if budget is None else budget - made.fixed
    found = strategies.find(chain, left, strategy)
    made = replace(made, schedule=found.schedule, cost=found.cost)
    if budget is not None and made.peak > budget:
        raise _too_small(graph, made, strategy, numbers)
    return made


def attach(
    net: Net,
    budget: int,
    *,
    strategy: Strategy = Strategy(),  # noqa: B008  # frozen
    solver: str = "SGD",
    history: str = "float32",
    beside: Beside = ALONE,
    adds: bool = False,
) -> MemoryPlan:
    """Plan a net that is to be trained, and let it run as planned. solver, history: see `account`; adds: see `Numbers`.

    Raises BudgetError, UsageError.
    """
    numbers = replace(numbers_of(net), adds=adds)
    kept: dict[str, Any] = {"solver": solver, "history": history, "beside": beside}
    made = make_plan(net.graph, budget=budget, strategy=strategy, numbers=numbers, **kept)
    net.recompute = Recompute(net, made.chain, made.schedule)
    return made


def numbers_of(net: Net) -> Numbers:
    """What a net runs in. A net with a hook runs in its base type, and simulates what its graph asks for."""
    base = "DOUBLE" if net.dtype.itemsize == WIDTHS["DOUBLE"] else "FLOAT"
    if net.hook is None:
        return on_device(Numbers(base, net.types), net.device)
    return on_device(Numbers(base, None, simulated(net.graph), fused=False), net.device)


def on_device(numbers: Numbers, device: torch.device) -> Numbers:
    """With what is known of a device: which types it has no kernels for, and that a CPU works in pieces."""
    cpu = device.type == "cpu"
    unfolds = frozenset(k for k in WIDTHS if cpu and (k == "DOUBLE" or precision.missing(k, device)))
    return replace(numbers, unfolds=unfolds, pieces=cpu)


def _too_small(graph: Graph, best: MemoryPlan, strategy: Strategy, numbers: Numbers) -> BudgetError:
    """The error for the schedule with the lowest peak, which is still too high."""
    assert best.budget is not None
    budget, stage = best.budget, best.chain.stages[best.cost.stage].name
    text = f"a memory budget of {in_units(budget)} is too small: "
    if budget < best.update:
        text += f"weights, gradients and history alone take {in_units(best.update)}"
        text += f" when the update runs ({in_units(best.updating)} to work in)" if best.updating else ""
        text += f"; a pass needs most at layer '{stage}'"
    elif best.beside.passing > best.cost.peak:
        text += f"where teachers run it takes {in_units(best.peak)}"
    else:
        what = "weights, gradients and history" if best.adds else "weights and history"
        text += f"with '{strategy.name}' and batch {best.batch} the least is {in_units(best.peak)}"
        text += f" ({in_units(best.fixed)} of it {what}); most is needed at layer '{stage}'"
    several = _largest_batch(graph, best, strategy, replace(numbers, adds=True))
    batch = several if best.adds else max(several, _largest_batch(graph, best, strategy, numbers))
    hint = f"give it at least {in_units(best.peak)}"
    divisor = 0
    if several:
        divisor = max(b for b in range(1, several + 1) if best.batch % b == 0)
        times = best.batch // divisor
        hint += f", or batch_size {divisor} with {times} times the iter_size (the same update, but for BatchNorm)"
    if not batch:
        hint += "; no batch_size fits"
    elif batch != divisor:
        hint += f"; the largest batch that fits is {batch}"
    return BudgetError(text, least=best.peak, batch=batch, stage=stage, hint=hint)


def _largest_batch(graph: Graph, best: MemoryPlan, strategy: Strategy, numbers: Numbers) -> int:
    """The largest batch below the plan's that fits; what a pass takes beside gradients of weights grows with it in
    proportion. 0: none does, or the net has no other batch. numbers: with `adds` in several passes."""
    assert best.budget is not None
    left = best.budget - replace(best, adds=numbers.adds).fixed
    before, batch = (0, 0), min(best.batch - 1, left * best.batch // max(1, best.passing))
    for _ in range(_TRIES if best.budget >= best.update else 0):
        if batch < 1:
            return 0
        try:
            smaller = with_batch(graph, batch)
        except UsageError:
            return 0
        found = strategies.find(chain_of(smaller, numbers=numbers), left, strategy)
        if found.fits:
            return batch
        peak = found.cost.peak
        each = (peak - before[1]) / (batch - before[0])
        before, batch = (batch, peak), batch - max(1, ceil((peak - left) / each) if each > 0 else 1)
    return 0
