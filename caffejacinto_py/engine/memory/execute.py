"""Runs a schedule: nested non-reentrant checkpoints over ranges of a net's fast steps.

What is run again leaves no trace: torch's generators are set back to what they were, statistics do not count
(`module.update` False), hooks are told (`Hook.repeating`). Loss, gradients, blobs and random state are bit for bit
those of a net without a schedule (tests/engine/test_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caffejacinto_py.engine.memory.schedule import Again, Schedule
from caffejacinto_py.engine.memory.stages import Chain
from caffejacinto_py.engine.plan import Step
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net

Slots = list[Tensor | None]


@dataclass(frozen=True)
class _Span:
    """Slots of a range of steps: read from outside, made and alive at its end, dead at its end."""

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    frees: tuple[int, ...]


def _span(steps: tuple[Step, ...]) -> _Span:
    reads: list[int] = []
    alive: dict[int, bool] = {}
    for step in steps:
        reads += [i for i in step.ins if i not in alive and i not in reads]
        alive.update(dict.fromkeys(step.outs, True))
        alive.update(dict.fromkeys(step.free, False))
    makes = tuple(i for i, there in alive.items() if there)
    return _Span(tuple(reads), makes, tuple(i for i, there in alive.items() if not there))


class Recompute:
    """Set as `net.recompute`; called in place of the steps of a pass that builds a graph.

    The net's hook must be set before: it decides which steps there are. Raises UsageError for a hook that must not see
    a blob twice.
    """

    def __init__(self, net: Net, chain: Chain, schedule: Schedule) -> None:
        if net.hook is not None and not net.hook.repeatable:
            hint = "train without a memory budget, or without what reproduces the C++ binary"
            raise UsageError("what simulates or observes this net cannot run layers a second time", hint=hint)
        self.net, self.plan = net, net.plan
        self.chain, self.schedule = chain, schedule
        self.switched = [m for m in net.layers.modules() if isinstance(getattr(m, "update", None), bool)]
        self.spans: dict[tuple[int, int], _Span] = {}
        self._prepare(schedule)

    def _prepare(self, schedule: Schedule) -> None:
        for item in schedule:
            if isinstance(item, Again):
                first, last = self._steps(item)
                self.spans[first, last] = _span(self.plan.fast[first:last])
                self._prepare(item.inner)

    def _steps(self, item: int | Again) -> tuple[int, int]:
        stages = self.chain.stages
        if isinstance(item, Again):
            return stages[item.first].first, stages[item.last - 1].last
        return stages[item].first, stages[item].last

    def __call__(self, slots: Slots) -> Tensor | None:
        """Run every step on the slots; returns the sum of the losses, None where there is none."""
        if self.net.plan is not self.plan:
            raise UsageError("the net's hook has changed since its memory was planned", hint="plan its memory again")
        return self._run(self.schedule, slots)

    def _run(self, schedule: Schedule, slots: Slots) -> Tensor | None:
        loss: Tensor | None = None
        for item in schedule:
            if isinstance(item, Again):
                self._again(item, slots)
            else:
                loss = self.net.steps(slots, *self._steps(item), loss)
        return loss

    def _again(self, item: Again, slots: Slots) -> None:
        span, count = self.spans[self._steps(item)], len(slots)

        def run(*tensors: Tensor) -> tuple[Any, ...]:
            local: Slots = [None] * count
            for slot, tensor in zip(span.reads, tensors, strict=True):
                local[slot] = tensor
            self._run(item.inner, local)
            return tuple(local[slot] for slot in span.makes)

        made = checkpoint(
            run,
            *(slots[slot] for slot in span.reads),
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=self._contexts,
        )
        for slot in span.frees:
            slots[slot] = None
        for slot, tensor in zip(span.makes, made, strict=True):
            slots[slot] = tensor

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.repeating()

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """While steps run a second time: nothing counts."""
        before: list[bool] = [m.update for m in self.switched]  # type: ignore[misc]
        hook = self.net.hook
        told = hook is not None and hook.repeating
        self._switch([False] * len(before), True)
        try:
            yield
        finally:
            self._switch(before, told)

    def _switch(self, updates: list[bool], repeating: bool) -> None:
        for module, update in zip(self.switched, updates, strict=True):
            module.update = update  # type: ignore[assignment]
        if self.net.hook is not None:
            self.net.hook.repeating = repeating
