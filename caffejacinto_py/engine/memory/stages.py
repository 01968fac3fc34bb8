"""A net as a chain of stages, for the planners: where it can be cut, what lives across each cut, what each stage keeps.

A cut lies between two fast steps and is legal where no later step overwrites (in place) what lives across it. Its
payload is the live set: nets with branches need no articulation points. Sizes come from shapes; times from
multiply-accumulates and bytes, or from `profile.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

from caffejacinto_py.engine.plan import Plan, Step, plan
from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.passes.memory import has_gradient
from caffejacinto_py.passes.storages import PLAIN, Kept, Numbers, Storages, storages, unfused

MOST_STAGES = 100  # more take the planners too long; then the least useful cuts are left out
# For estimates of time; only their ratio matters. Two-core CPUs and small GPUs have about six operations a byte.
_MACS_PER_SECOND, _BYTES_PER_SECOND = 30e9, 10e9


@dataclass(frozen=True)
class Stage:
    """Steps first..last-1 of `Plan.fast`. name: its last layer. forward, backward: seconds. fixed: is never run again.

    transient, transient_back: bytes in use inside the stage, beyond what lives at its ends and what it keeps. learns:
    bytes of gradients of its weights, which are there from its backward on (part of transient_back).
    """

    first: int
    last: int
    name: str
    forward: float
    backward: float
    fixed: bool
    keeps: frozenset[Value]
    extra: int
    transient: int
    transient_back: int
    learns: int = 0


@dataclass(frozen=True)
class Chain:
    """L stages and the L + 1 places between them. frontiers: live storages there; gradients: live values that get a
    gradient. sizes: bytes of each."""

    stages: tuple[Stage, ...]
    frontiers: tuple[frozenset[Value], ...]
    gradients: tuple[frozenset[Value], ...]
    sizes: Mapping[Value, int]

    def __len__(self) -> int:
        return len(self.stages)

    def bytes(self, values: Iterable[Value]) -> int:
        return sum(self.sizes[v] for v in values)

    @property
    def seconds(self) -> float:
        """One pass with nothing run twice."""
        return sum(s.forward + s.backward for s in self.stages)

    def tape(self, k: int) -> int:
        """Bytes that stage k adds to what lives before it, when it keeps everything for its gradient."""
        stage = self.stages[k]
        return self.bytes((stage.keeps | self.frontiers[k + 1]) - self.frontiers[k]) + stage.extra

    @cached_property
    def learnt(self) -> tuple[int, ...]:
        """Bytes of gradients of weights at place k of a backward pass: of all stages behind it."""
        return tuple(accumulate((s.learns for s in reversed(self.stages)), initial=0))[::-1]

    def behind(self, k: int) -> int:
        """Bytes of gradients at place k of a backward pass: of what lives there, and of the weights behind it."""
        return self.bytes(self.gradients[k]) + self.learnt[k]

    def back(self, k: int) -> int:
        """Bytes of gradients while stage k runs backward."""
        ends = self.bytes(self.gradients[k] | self.gradients[k + 1])
        return ends + self.learnt[k + 1] + self.stages[k].transient_back


@dataclass(frozen=True)
class _Work:
    """One fast step as the planner sees it."""

    step: Step
    node: Node
    outputs: tuple[Value, ...]
    keep: Kept
    forward: float
    backward: float
    fixed: bool
    learns: int


def chain_of(graph: Graph, *, numbers: Numbers = PLAIN, most: int = MOST_STAGES) -> Chain:
    """The chain of a TRAIN graph. numbers: what it runs in; most: stages at most."""
    graph = graph if numbers.fused else unfused(graph)
    blobs = storages(graph, numbers)
    root, sizes = blobs.root, blobs.sizes
    steps = plan(graph, fused=numbers.fused)
    works = _works(graph, steps, blobs, _learns(graph, steps, numbers))
    live = _live(graph, works)
    roots = [frozenset(root[v] for v in values) for values in live]
    cuts = _legal(works, root, roots)
    cuts = _fewer(cuts, [sum(sizes[v] for v in r) for r in roots], most)
    makes = {v for w in works if w.step.backward for v in w.outputs}
    if graph.force_backward:
        makes |= {v for n in graph.nodes if n.layer.source for v in n.outputs}
    grads = [values & makes for values in live]
    stages = [_stage(works[a:b], a, roots[a : b + 1], grads[a : b + 1], sizes) for a, b in pairwise(cuts)]
    return Chain(tuple(stages), tuple(roots[c] for c in cuts), tuple(grads[c] for c in cuts), sizes)


def _learns(graph: Graph, steps: Plan, numbers: Numbers) -> list[int]:
    """Bytes of gradients of weights that begin to exist when each fast step runs backward; nothing where those of a
    pass before are there all the time. Of shared weights with the last of their layers."""
    place = {s.node.name: k for k, s in enumerate(steps.fast)}
    maker = {v: place[n.name] for n in graph.nodes if n.name in place for v in n.outputs}
    place |= {n.name: maker[n.inputs[0]] for n in graph.nodes if n.name not in place and n.absorbed}
    found = [0] * len(steps.fast)
    if not numbers.adds:
        for p in graph.params:
            if has_gradient(graph, p):
                found[max(place[name] for name, _ in p.users)] += numbers.item * prod(p.shape)
    return found


def _works(graph: Graph, steps: Plan, blobs: Storages, learns: Sequence[int]) -> list[_Work]:
    behind = {n.inputs[0]: n for n in graph.nodes if n.absorbed}
    found = []
    for step, learnt in zip(steps.fast, learns, strict=True):
        node = step.node
        outputs = node.outputs if step.affine is None else behind[node.outputs[0]].outputs
        ins, outs = [graph.shapes[v] for v in node.inputs], [graph.shapes[v] for v in node.outputs]
        moved = sum(blobs.sizes[v] for v in (*node.inputs, *node.outputs))
        forward = node.layer.macs(ins, outs) / _MACS_PER_SECOND + moved / _BYTES_PER_SECOND
        backward = 2 * forward if step.backward else 0.0
        fixed = bool(step.losses) or not node.layer.repeatable()
        found.append(_Work(step, node, outputs, blobs.kept[node.name], forward, backward, fixed, learnt))
    return found


def _live(graph: Graph, works: Sequence[_Work]) -> list[frozenset[Value]]:
    """Values that live before each step and after the last."""
    alive = set(graph.outputs)
    found = [frozenset(alive)]
    for work in reversed(works):
        alive -= set(work.outputs)
        alive |= set(work.node.inputs)
        found.append(frozenset(alive))
    found.reverse()
    # a net output lives from where it is made
    made: set[Value] = {v for n in graph.nodes if n.layer.source for v in n.outputs}
    result = [found[0] & made]
    for work, values in zip(works, found[1:], strict=True):
        made |= set(work.outputs)
        result.append(values & made)
    return result


def _legal(works: Sequence[_Work], root: Mapping[Value, Value], roots: Sequence[frozenset[Value]]) -> list[int]:
    overwritten: set[Value] = set()
    found = [len(works)]
    for p in range(len(works) - 1, -1, -1):
        node = works[p].node
        if node.inplace is not None:
            overwritten.add(root[node.inputs[node.inplace]])
        if not overwritten & roots[p] or p == 0:
            found.append(p)
    return found[::-1]


def _fewer(cuts: list[int], payload: Sequence[int], most: int) -> list[int]:
    """At most `most` stages: cuts whose payload stands out most between its neighbours' go first."""
    cuts = list(cuts)
    while len(cuts) - 1 > most:
        weight = [payload[c] + 1 for c in cuts]
        worst = max(range(1, len(cuts) - 1), key=lambda i: weight[i] / min(weight[i - 1], weight[i + 1]))
        del cuts[worst]
    return cuts


def _stage(
    works: Sequence[_Work],
    first: int,
    roots: Sequence[frozenset[Value]],
    grads: Sequence[frozenset[Value]],
    sizes: Mapping[Value, int],
) -> Stage:
    """One stage of these steps. roots, grads: before each step and after the last."""

    def total(values: Iterable[Value]) -> int:
        return sum(sizes[v] for v in values)

    keeps = frozenset().union(*(w.keep.storages for w in works))
    ends = total(roots[0] | roots[-1] | keeps)
    inside = max(total(a | b | keeps) + w.keep.passing for w, a, b in zip(works, roots, roots[1:]))
    learnt = list(accumulate(w.learns for w in reversed(works)))[::-1]
    # a blob that is read again later has a gradient already, to which this one is added
    back = max(
        total(a | b) + total(b & set(w.node.inputs)) + w.keep.scratch + own
        for w, a, b, own in zip(works, grads, grads[1:], learnt)
    )
    return Stage(
        first=first,
        last=first + len(works),
        name=works[-1].node.name,
        forward=sum(w.forward for w in works),
        backward=sum(w.backward for w in works),
        fixed=any(w.fixed for w in works),
        keeps=keeps,
        extra=sum(w.keep.extra for w in works),
        transient=inside - ends,
        transient_back=max(0, back - total(grads[0] | grads[-1])),
        learns=learnt[0],
    )
