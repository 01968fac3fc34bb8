"""What a net takes in memory, from shapes alone: weights, gradients, history, and what a pass keeps for its gradient.

Memory that values share counts once (`passes/storages.py`). Not counted: the framework, workspace of kernels, data
that wait. `tests/passes/test_memory.py` holds the sums within 10 % of what autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from caffejacinto_py.errors import UsageError
from caffejacinto_py.ir.graph import Graph, Param, Shape, Value
from caffejacinto_py.passes.shapes import reshape
from caffejacinto_py.passes.storages import PLAIN, Numbers, Storages, storages

HISTORY = {"SGD": 1, "Nesterov": 1, "AdaGrad": 1, "RMSProp": 1, "AdaDelta": 2, "Adam": 2}  # blobs per learnable blob
WORKING = {"RMSProp": 1, "AdaDelta": 2}  # copies of all blobs with equal lr_mult and decay_mult, in float32
HISTORY_TYPES = ("float32", "bfloat16", "int8")  # what they are between steps
HISTORY_BLOCK = 256  # numbers in int8 with one float32 scale
HISTORY_SMALL = 4096  # int8: blobs of fewer numbers stay float32
HISTORY_PIECES = (1 << 18, 1 << 20)  # numbers that an update has in float32 at one time: on a CPU, elsewhere
_ROUNDING = 5  # pieces that storing one takes


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer. params: of blobs it owns; tops: of its tops that are new memory; saved: what it is the first
    to keep."""

    name: str
    type: str
    params: int
    tops: int
    saved: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a net in its phase. saved: kept for backward, all layers (0 in TEST). live: most blobs at one time in a
    forward pass, those kept included. inputs: what is fed."""

    phase: str
    params: int
    gradients: int
    history: int
    inputs: int
    saved: int
    live: int
    layers: tuple[LayerMemory, ...]

    @property
    def total(self) -> int:
        """TRAIN: weights, gradients, history and what is kept; TEST: weights and the most blobs at one time."""
        return self.params + self.gradients + self.history + (self.saved if self.phase == "TRAIN" else self.live)


def with_batch(graph: Graph, batch: int) -> Graph:
    """The graph for another batch size: axis 0 of everything that is fed. Raises UsageError where nothing has such an
    axis, or the layers' blobs depend on it."""
    if batch < 1:
        raise UsageError(f"a batch of {batch} images: give a positive number")
    tops = [v for n in graph.nodes if n.layer.source for v in n.outputs if graph.shapes[v]]
    if not tops:
        raise UsageError("the net has no input with a batch axis", hint="leave --batch out")
    size = graph.shapes[tops[0]][0]
    given: dict[str, Shape] = {v.name: (batch, *graph.shapes[v][1:]) for v in tops if graph.shapes[v][0] == size}
    made = reshape(graph, given)
    for n in made.nodes:
        before = [b.shape for b in n.layer.blobs([graph.shapes[v] for v in n.inputs])]
        if before != [b.shape for b in n.layer.blobs([made.shapes[v] for v in n.inputs])]:
            raise UsageError(f"layer '{n.name}' has blobs whose sizes depend on the batch", hint="leave --batch out")
    return made


def batch_of(graph: Graph) -> int:
    """Axis 0 of the first thing that is fed; 0 where there is none."""
    fed = (graph.shapes[v] for n in graph.nodes if n.layer.source for v in n.outputs)
    return next((s[0] for s in fed if s), 0)


def has_gradient(graph: Graph, param: Param) -> bool:
    """Whether backward computes the gradient of a blob, where a loss depends on it."""
    return graph.phase == "TRAIN" and (bool(param.lr_mult) or graph.force_backward)


def history_bytes(count: int, *, kind: str = "float32", item: int = 4) -> int:
    """Bytes of a history blob of so many numbers. item: those of a number of the net."""
    if kind == "bfloat16":
        return 2 * count
    if kind == "float32" or count < HISTORY_SMALL:
        return item * count
    return -(-count // HISTORY_BLOCK) * (HISTORY_BLOCK + 4)


def updating(graph: Graph, *, solver: str = "SGD", history: str = "float32", numbers: Numbers = PLAIN) -> int:
    """Bytes that an update works in, beside weights, gradients and history. With larc and a history in fewer bits that
    can be a blob more."""
    if history != "float32":
        count = sum(prod(p.shape) for p in graph.params if p.lr_mult)
        return 4 * (HISTORY[solver] + _ROUNDING) * min(count, HISTORY_PIECES[0 if numbers.pieces else 1])
    copies = max(WORKING.get(solver, 0), int(solver == "AdaGrad" and not numbers.pieces))
    groups: dict[tuple[float, float], int] = {}
    for p in graph.params:
        if p.lr_mult:
            groups[p.lr_mult, p.decay_mult] = groups.get((p.lr_mult, p.decay_mult), 0) + prod(p.shape)
    return copies * numbers.item * max(groups.values(), default=0)


def account(graph: Graph, *, solver: str = "SGD", history: str = "float32", numbers: Numbers = PLAIN) -> Memory:
    """The bytes of a shaped graph. solver: its type, for the history; history: its history_type; numbers: what it runs
    in."""
    item, train = numbers.item, graph.phase == "TRAIN"
    blobs = storages(graph, numbers)
    own: dict[str, int] = {}
    for p in graph.params:
        own[p.node] = own.get(p.node, 0) + item * prod(p.shape)
    learnt = [prod(p.shape) for p in graph.params if p.lr_mult] if train else []
    seen: set[Value] = set()
    layers = []
    for node in graph.nodes:
        keep = blobs.kept[node.name]
        fresh = keep.storages - seen
        seen |= fresh
        saved = sum(blobs.sizes[v] for v in fresh) + keep.extra
        tops = sum(blobs.sizes[v] for v in node.outputs if blobs.root[v] == v)
        layers.append(LayerMemory(node.name, node.type, own.get(node.name, 0), tops, saved))
    return Memory(
        phase=graph.phase,
        params=sum(own.values()),
        gradients=item * sum(prod(p.shape) for p in graph.params if has_gradient(graph, p)),
        history=HISTORY[solver] * sum(history_bytes(n, kind=history, item=item) for n in learnt),
        inputs=sum(blobs.sizes[v] for n in graph.nodes if n.layer.source for v in n.outputs),
        saved=sum(layer.saved for layer in layers),
        live=_most(graph, blobs),
        layers=tuple(layers),
    )


def _most(graph: Graph, blobs: Storages) -> int:
    """Bytes of the fullest moment of a forward pass."""
    root = blobs.root
    last: dict[Value, int] = {}
    for k, node in enumerate(graph.nodes):
        last.update((root[v], k) for v in (*node.inputs, *node.outputs))
    last.update((root[v], len(graph.nodes)) for v in graph.outputs)
    alive: set[Value] = set()
    saved: set[Value] = set()
    extra = most = 0
    for k, node in enumerate(graph.nodes):
        keep = blobs.kept[node.name]
        alive |= {root[v] for v in node.outputs}
        saved |= keep.storages
        extra += keep.extra
        most = max(most, extra + keep.passing + sum(blobs.sizes[v] for v in alive | saved))
        alive = {v for v in alive if last[v] > k}
    return most
