"""The optimal persistent schedule of a heterogeneous chain under a byte budget, by dynamic programming.

C(i, j, m): least seconds to run stages i..j forward and backward in m bytes, beside what lives before i:
    keep i:         f_i + b_i + C(i+1, j, m - tape_i)
    run i..k-1 again: f_i + ... + f_{k-1} + C(k, j, m - new(i, k)) + C(i, k-1, m)
each where its fullest moment fits. new(i, k): bytes that live before k and not before i; live sets overlap, so this is
less than the payload of the cut. Persistent: what is checkpointed stays until its backward. Gradients of weights behind
j are there whatever is chosen, when i runs backward those of i+1..j as well: numbers known before, which raise what
must fit and leave m as it is. Bytes are rounded up to slots; what `solve` answers is checked again by
`schedule.simulate`, to the byte.
Source: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, arXiv 1911.13214 (rotor).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from caffejacinto_py.engine.memory.schedule import Again, Cost, Item, Schedule, keep_all, simulate
from caffejacinto_py.engine.memory.stages import Chain

SLOTS = 1000
_TIGHTEST = 20  # schedules that `least` compares: slots are rounded, so the first need not be the lowest


@dataclass(frozen=True)
class Table:
    """C and what attains it: 0: keep; d > 0: run d stages again. slot: bytes of a slot."""

    chain: Chain
    sizes: _Sizes
    best: np.ndarray
    choice: np.ndarray

    def schedule(self, slots: int) -> Schedule:
        """The best schedule in that many slots; only where `best` is finite."""
        return self._part(0, len(self.chain) - 1, slots)

    def _part(self, i: int, j: int, m: int) -> Schedule:
        items: list[Item] = []
        while i <= j:
            d = int(self.choice[i, j, m])
            if d == 0:
                items.append(i)
                m -= int(self.sizes.tape[i])
                i += 1
            else:
                items.append(Again(i, i + d, self._part(i, i + d - 1, m)))
                m -= int(self.sizes.new[i, i + d])
                i += d
        return tuple(items)


class _Sizes:
    """The chain's bytes in slots, rounded up."""

    def __init__(self, chain: Chain, slot: float) -> None:
        n = len(chain)
        self.slot = slot

        def up(count: int) -> int:
            return int(np.ceil(count / slot))

        self.tape = np.array([up(chain.tape(k)) for k in range(n)])
        self.tape_run = [chain.tape(k) + chain.stages[k].transient for k in range(n)]
        self.back = np.array([up(chain.tape(k) + chain.back(k)) for k in range(n)])
        self.gradient = [chain.behind(k) for k in range(n + 1)]
        self.new = np.zeros((n + 1, n + 1), dtype=np.int64)
        self.run = np.zeros((n, n), dtype=np.int64)  # bytes of running stage q in a range that begins at i
        for i in range(n):
            before = chain.frontiers[i]
            for k in range(i, n):
                self.new[i, k + 1] = up(chain.bytes(chain.frontiers[k + 1] - before))
                alive = (chain.frontiers[k] | chain.frontiers[k + 1]) - before
                self.run[i, k] = chain.bytes(alive) + chain.stages[k].transient
        self.run = np.maximum.accumulate(self.run, axis=1)


def solve(chain: Chain, *, slots: int = SLOTS) -> Table:
    """The table for every budget up to what keeping everything takes."""
    n = len(chain)
    top = max(1, simulate(chain, keep_all(chain)).peak - chain.bytes(chain.frontiers[0]))
    # rounding up costs half a slot a stage: room for it, so that the whole chain fits
    slot = top / slots
    width = slots + n + 2
    sizes = _Sizes(chain, slot)
    best = np.full((n, n, width), np.inf, dtype=np.float32)
    choice = np.zeros((n, n, width), dtype=np.int16)
    forward = np.concatenate([[0.0], np.cumsum([s.forward for s in chain.stages])])
    own = [s.forward + s.backward for s in chain.stages]
    # the first stage from i on that must not be run again
    stop = [next((k for k in range(i, n) if chain.stages[k].fixed), n) for i in range(n)]
    for span in range(n):
        for i in range(n - span):
            j = i + span
            gradient = sizes.gradient[j + 1]
            floor = max(int(np.ceil((sizes.tape_run[i] + gradient) / slot)), int(sizes.back[i]))
            row, picked = best[i, j], choice[i, j]
            if floor < width:
                rest = np.zeros(width, np.float32) if i == j else _shifted(best[i + 1, j], int(sizes.tape[i]))
                row[floor:] = own[i] + rest[floor:]
            for k in range(i + 1, min(j, stop[i]) + 1):
                floor = int(np.ceil((sizes.run[i, k - 1] + gradient) / slot))
                if floor >= width:
                    break
                other = _shifted(best[k, j], int(sizes.new[i, k])) + best[i, k - 1]
                other += np.float32(forward[k] - forward[i])
                other[:floor] = np.inf
                better = other < row
                row[better] = other[better]
                picked[better] = k - i
    return Table(chain, sizes, best, choice)


def _shifted(row: np.ndarray, by: int) -> np.ndarray:
    """row[m - by]; infinite below."""
    if by == 0:
        return row
    found = np.full_like(row, np.inf)
    if by < len(row):
        found[by:] = row[: len(row) - by]
    return found


def within(table: Table, budget: int) -> tuple[Schedule, Cost] | None:
    """The quickest schedule whose simulated peak is within the budget (bytes); None: there is none."""
    chain = table.chain
    everything = simulate(chain, keep_all(chain))
    if everything.peak <= budget:
        return keep_all(chain), everything
    row = table.best[0, len(chain) - 1]
    free = budget - chain.bytes(chain.frontiers[0])
    # slots are rounded up, so that a little more than fits often fits all the same
    high = min(len(row) - 1, int(free / table.sizes.slot * 1.25) + 2)
    last = np.inf
    found: tuple[Schedule, Cost] | None = None
    for m in range(high, -1, -1):
        if not np.isfinite(row[m]):
            break
        if row[m] == last:
            continue
        last = row[m]
        schedule = table.schedule(m)
        cost = simulate(chain, schedule)
        if cost.peak <= budget:
            found = schedule, cost
            break
    return found


def least(table: Table) -> tuple[Schedule, Cost]:
    """The schedule with the lowest simulated peak among the table's tightest ones, or keeping everything."""
    chain, row = table.chain, table.best[0, len(table.chain) - 1]
    finite = np.flatnonzero(np.isfinite(row) & (row != np.concatenate([[np.inf], row[:-1]])))
    schedules = [keep_all(chain), *(table.schedule(int(m)) for m in finite[:_TIGHTEST])]
    costs = [(s, simulate(chain, s)) for s in schedules]
    return min(costs, key=lambda x: (x[1].peak, x[1].seconds))
