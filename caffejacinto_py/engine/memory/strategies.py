"""Ways to a schedule: rotor (see rotor.py), revolve, sequential, none; and what to say where a budget is too small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import sqrt

from caffejacinto_py.engine.memory import rotor
from caffejacinto_py.engine.memory.schedule import Again, Cost, Item, Schedule, keep_all, simulate
from caffejacinto_py.engine.memory.stages import Chain
from caffejacinto_py.errors import UsageError

NAMES = ("rotor", "revolve", "sequential", "none")


@dataclass(frozen=True)
class Strategy:
    """name: one of NAMES. segments: of sequential; 0: as many as the square root of the number of stages."""

    name: str = "rotor"
    segments: int = 0


@dataclass(frozen=True)
class Found:
    """A schedule with its cost. fits: whether that is within the budget; else it is the one with the lowest peak."""

    schedule: Schedule
    cost: Cost
    fits: bool


def parse(word: str) -> Strategy:
    """ "rotor", "revolve", "none", "sequential" or "sequential:S". Raises UsageError."""
    name, colon, number = word.partition(":")
    if name not in NAMES or (colon and (name != "sequential" or not number.isdecimal() or int(number) < 1)):
        hint = "rotor, revolve, sequential, sequential:S (S segments) or none"
        raise UsageError(f"memory strategy '{word}' is unknown", hint=hint)
    return Strategy(name, int(number) if colon else 0)


def find(chain: Chain, budget: int, strategy: Strategy) -> Found:
    """A schedule for this many bytes of activations and their gradients; the quickest that the strategy has."""
    if strategy.name == "rotor" and len(chain):
        table = rotor.solve(chain)
        best = rotor.within(table, budget)
        if best:
            return Found(*best, fits=True)
        schedule, cost = rotor.least(table)
        return Found(schedule, cost, fits=cost.peak <= budget)
    found = [(s, simulate(chain, s)) for s in _candidates(chain, strategy)]
    fitting = [x for x in found if x[1].peak <= budget]
    if fitting:
        return Found(*min(fitting, key=lambda x: x[1].seconds), fits=True)
    return Found(*min(found, key=lambda x: x[1].peak), fits=False)


def _candidates(chain: Chain, strategy: Strategy) -> Iterator[Schedule]:
    if strategy.name == "none" or not len(chain):
        yield keep_all(chain)
    elif strategy.name == "sequential":
        yield sequential(chain, strategy.segments or max(1, round(sqrt(len(chain)))))
    else:
        for slots in range(len(chain) + 1):
            yield revolve(chain, slots)


def sequential(chain: Chain, segments: int) -> Schedule:
    """torch.utils.checkpoint_sequential's: equal numbers of stages, the last segment takes the rest and is kept. What
    may not run again is kept, too. Source: Chen et al., arXiv 1604.06174."""
    size = len(chain) // max(1, segments)
    items: list[Item] = []
    for first in range(0, size * (segments - 1), size or 1):
        items += [Again(a, b, tuple(range(a, b))) if free else a for a, b, free in _runs(chain, first, first + size)]
    done = size * (segments - 1)
    return (*items, *range(done, len(chain)))


def revolve(chain: Chain, slots: int) -> Schedule:
    """The optimum for equal stages with so many checkpoints, one tape at a time (Griewank and Walther, ACM TOMS 26(1));
    applied to each run of stages that may run again."""
    items: list[Item] = []
    for a, b, free in _runs(chain, 0, len(chain)):
        items += _revolve(a, b, slots) if free else (a,)
    return tuple(items)


def _revolve(first: int, last: int, slots: int) -> Schedule:
    n = last - first
    if n <= 1:
        return tuple(range(first, last))
    if slots == 0:  # nothing but the input: everything up to the last stage is run for each
        return (Again(first, last - 1, _revolve(first, last - 1, 0)), last - 1)
    cut = first + _revolve_steps(n, slots)[1]
    return (Again(first, cut, _revolve(first, cut, slots)), *_revolve(cut, last, slots - 1))


@cache
def _revolve_steps(n: int, slots: int) -> tuple[int, int]:
    """(forwards to reverse n stages beyond one each, where the first checkpoint is)."""
    if n <= 1:
        return 0, 0
    if slots == 0:
        return n * (n - 1) // 2, n - 1
    costs = ((i + _revolve_steps(i, slots)[0] + _revolve_steps(n - i, slots - 1)[0], i) for i in range(1, n))
    return min(costs)


def _runs(chain: Chain, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
    """(from, to, True) for each run of stages that may run again, (k, k + 1, False) for each that may not."""
    start = first
    for k in range(first, last):
        if chain.stages[k].fixed:
            if start < k:
                yield start, k, True
            yield k, k + 1, False
            start = k + 1
    if start < last:
        yield start, last, True
