"""Schedules: which ranges of a chain keep what they make for backward, and which are run again; what that costs.

A schedule is a sequence of items that cover the chain in order. An int k: stage k keeps its tape. An `Again`: its
stages first..last-1 keep only what lives before them; backward runs them again, as its own `inner` schedule says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from caffejacinto_py.engine.memory.stages import Chain
from caffejacinto_py.ir.graph import Value


@dataclass(frozen=True)
class Again:
    first: int
    last: int
    inner: Schedule


RANDOM_STATE = 5056  # bytes of torch's generator on a CPU, kept for every range that is run again
Item: TypeAlias = "int | Again"
Schedule: TypeAlias = tuple[Item, ...]
_Taken: TypeAlias = tuple[frozenset[Value], int]


@dataclass(frozen=True)
class Cost:
    """peak: bytes of activations, their gradients, and gradients of weights that are there by then, at the fullest
    moment; stage: where that is. kept: bytes that are held when backward begins. seconds: of one pass. forwards: stage
    forwards, L where nothing is run again."""

    peak: int
    stage: int
    kept: int
    seconds: float
    forwards: int


def keep_all(chain: Chain) -> Schedule:
    return tuple(range(len(chain)))


def simulate(chain: Chain, schedule: Schedule) -> Cost:
    """Walk through a pass and its backward as autograd does, with what is alive at every moment."""
    return _Walk(chain).run(schedule)


class _Walk:
    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.held: Counter[Value] = Counter()
        self.held_bytes = 0
        self.extra = 0
        self.peak = self.stage = self.forwards = 0
        self.seconds = 0.0

    def run(self, schedule: Schedule) -> Cost:
        taken = self.forward(schedule, 0)
        kept = self.held_bytes + self.extra
        self.backward(schedule, taken)
        return Cost(self.peak, self.stage, kept, self.seconds, self.forwards)

    def hold(self, values: Iterable[Value], sign: int = 1) -> None:
        for v in values:
            before = self.held[v] > 0
            self.held[v] += sign
            self.held_bytes += self.chain.sizes[v] * ((self.held[v] > 0) - before)

    def see(self, k: int, more: Iterable[Value], count: int) -> None:
        """A moment in stage k: beside what is held, `more` lives, and `count` bytes."""
        fresh = sum(self.chain.sizes[v] for v in more if not self.held[v])
        total = self.held_bytes + self.extra + fresh + count
        if total > self.peak:
            self.peak, self.stage = total, k

    def step(self, k: int, gradient: int) -> None:
        """Run stage k forward, keeping nothing."""
        chain, stage = self.chain, self.chain.stages[k]
        self.see(k, chain.frontiers[k] | chain.frontiers[k + 1], stage.transient + gradient)
        self.seconds += stage.forward
        self.forwards += 1

    def forward(self, schedule: Schedule, gradient: int) -> list[_Taken]:
        """Run forward, keeping as the schedule says; returns what each item holds."""
        chain, taken = self.chain, []
        for item in schedule:
            if isinstance(item, int):
                stage = chain.stages[item]
                more = chain.frontiers[item] | chain.frontiers[item + 1] | stage.keeps
                self.see(item, more, stage.extra + stage.transient + gradient)
                self.seconds += stage.forward
                self.forwards += 1
                keeps, extra = stage.keeps, stage.extra
            else:
                keeps, extra = chain.frontiers[item.first], RANDOM_STATE
                self.hold(keeps)
                for k in range(item.first, item.last):
                    self.step(k, gradient)
                self.hold(keeps, -1)
            self.hold(keeps)
            self.extra += extra
            taken.append((keeps, extra))
        return taken

    def backward(self, schedule: Schedule, taken: Sequence[_Taken]) -> None:
        chain = self.chain
        for item, (keeps, extra) in zip(reversed(schedule), reversed(taken), strict=True):
            if isinstance(item, int):
                self.see(item, (), chain.back(item))
                self.seconds += chain.stages[item].backward
            else:
                again = self.forward(item.inner, chain.behind(item.last))
                self.backward(item.inner, again)
            self.hold(keeps, -1)
            self.extra -= extra


def text(chain: Chain, schedule: Schedule) -> str:
    """A schedule in one line: stage numbers, ranges of those that keep; [...] is run again. [3-7 [8-9] 10] 11-20"""
    words: list[str] = []
    run: list[int] = []

    def flush() -> None:
        if run:
            words.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run.clear()

    for item in schedule:
        if isinstance(item, int):
            run.append(item)
        else:
            flush()
            words.append(f"[{text(chain, item.inner)}]")
    flush()
    return " ".join(words)
