"""Where the values of a net lie in memory while it runs, in how many bytes, and what each layer keeps for backward.

A storage is a value and those that share its memory: layers in place, views, a Scale inside its BatchNorm. Layers that
run in another type than their bottoms have copies of them (and of their weights), simulated quantization makes a copy
of what it rounds: `engine/precision.py` and `compress/simulation.py`, as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.passes import quantize
from caffejacinto_py.passes.precision import AS_BOTTOMS, WIDTHS, Table, resolve
from caffejacinto_py.passes.quantize import Scheme

# Copies of a blob while it is rounded, beside what it becomes: the sign (on a CPU a piece of it); drawn at random or
# with a scale per channel: the noise, the whole part, the rest and a comparison
_ROUNDING, _ROUNDING_STEPWISE = 1.0, 4.25


@dataclass(frozen=True)
class Numbers:
    """What numbers a net runs in.

    base: FLOAT or DOUBLE, the type of weights, gradients and what is fed. types: what layers run in; None: all in
    `base`. scheme: simulated quantization; then all layers run in `base`. fused: False for a net with a hook, where no
    layer runs inside another. unfolds: types that this device has no kernels for, see `Layer.unfolded`; a CPU has none
    for DOUBLE. pieces: on a CPU some layers work in pieces, with smaller buffers. adds: gradients
    are added to those of a pass before (iter_size).
    """

    base: str = "FLOAT"
    types: Table | None = None
    scheme: Scheme | None = None
    fused: bool = True
    unfolds: frozenset[str] = frozenset({"DOUBLE"})
    pieces: bool = False
    adds: bool = False

    @property
    def item(self) -> int:
        """Bytes of a number of the base type."""
        return WIDTHS[self.base]


PLAIN = Numbers()


def asked(graph: Graph, override: str | None = None, *, types: Table | None = None) -> Numbers:
    """What a net asks for. override: see `precision.resolve`; types: its table, where that is known better."""
    table = types or resolve(graph, override)
    if quantize.plan(graph) is None:
        return Numbers(table.base, table)
    return Numbers(table.base, None, simulated(graph), fused=False)


def simulated(graph: Graph) -> Scheme | None:
    """The quantization that a pass of this net simulates; None: none."""
    scheme = quantize.plan(graph)
    return None if scheme is None or (scheme.settings.float_only and not scheme.fixed) else scheme


@dataclass(frozen=True)
class Kept:
    """What one layer keeps for backward: whole storages, and bytes of its own (masks, indices, copies).

    scratch: bytes while its backward runs, passing: while its forward runs; beside what Saved says.
    """

    storages: frozenset[Value] = frozenset()
    extra: int = 0
    scratch: int = 0
    passing: int = 0


@dataclass
class Storages:
    """root: the value whose memory each value lies in. sizes: bytes of each value. kept: by layer name; of an absorbed
    layer nothing: the one before it does its work."""

    root: dict[Value, Value] = field(default_factory=dict)
    sizes: dict[Value, int] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)


def storages(graph: Graph, numbers: Numbers = PLAIN) -> Storages:
    """Of a shaped graph, as `Net.forward` runs it."""
    walk = _Walk(graph, numbers)
    for node in graph.nodes:
        walk.node(node)
    return walk.found


class _Walk:
    def __init__(self, graph: Graph, numbers: Numbers) -> None:
        self.graph, self.numbers = graph, numbers
        types = numbers.types
        self.types = types if types is not None and types.mixed else None
        self.keeps = graph.phase == "TRAIN" or graph.force_backward
        self.bent = _bent(graph)
        self.shared = {name for p in graph.params if len(p.users) > 1 for name, _ in p.users}
        self.kind: dict[Value, str] = {}
        self.found = Storages()

    def bytes(self, v: Value, kind: str) -> int:
        return WIDTHS[kind] * prod(self.graph.shapes[v])

    def node(self, node: Node) -> None:
        found = self.found
        if node.absorbed and self.numbers.fused:
            (top,), (bottom,) = node.outputs, node.inputs
            self.kind[top], found.root[top] = self.kind[bottom], found.root[bottom]
            found.sizes[top], found.kept[node.name] = found.sizes[bottom], Kept()
            return
        runs, out = self.runs(node)
        copies = {i: self.bytes(v, runs) for i, v in enumerate(node.inputs) if self.kind[v] != runs}
        homes: list[Value | None] = []  # where the layer itself writes; None: memory that is not the top's
        for k, v in enumerate(node.outputs):
            home = self.home(node, v, copies)
            changed = out != runs or self.rounded(node, k)
            self.kind[v] = out
            found.sizes[v] = self.bytes(v, out)
            found.root[v] = v if changed else home
            homes.append(home if home != v or not changed else None)
        found.kept[node.name] = self.kept(node, runs, copies, homes)

    def runs(self, node: Node) -> tuple[str, str]:
        """The types that a layer runs in and that its tops have."""
        base = self.numbers.base
        if self.types is None or node.layer.source:
            return base, base
        row = self.types.rows[node.name]
        kinds = {self.kind[v] for v in node.inputs} or {base}
        if row.runs != AS_BOTTOMS:
            runs = row.runs
        elif len(kinds) == 1:
            runs = next(iter(kinds))
        else:  # torch brings them to the widest; of two different ones in 16 bits to float32
            runs = max(kinds, key=lambda t: WIDTHS[t])
            runs = "FLOAT" if WIDTHS[runs] == 2 else runs
        return runs, base if row.last else runs

    def home(self, node: Node, v: Value, copies: Mapping[int, int]) -> Value:
        """The value whose memory a layer writes a top into."""
        train = self.graph.phase == "TRAIN"
        if node.inplace is not None:
            place = node.inplace
        elif node.inputs and node.layer.is_view and not (train and node.layer.stateful_forward):
            place = 0
        else:
            return v
        return v if place in copies else self.found.root[node.inputs[place]]

    def rounded(self, node: Node, k: int) -> bool:
        """Whether simulated quantization replaces top k."""
        scheme = self.numbers.scheme
        if scheme is None:
            return False
        part = scheme.parts[node.name]
        stored = [q.quantize for q in part.stored.qparam_out] if scheme.fixed and part.stored is not None else part.tops
        return k < len(stored) and stored[k]

    def weights(self, node: Node, runs: str) -> int:
        """Bytes of copies of a layer's weights: cast, or rounded."""
        sizes = [prod(b.shape) for b in node.layer.blobs([self.graph.shapes[v] for v in node.inputs])]
        scheme = self.numbers.scheme
        if scheme is not None:
            part = scheme.parts[node.name]
            stored = [q.quantize for q in part.stored.qparam_w] if scheme.fixed and part.stored is not None else ()
            return self.numbers.item * sum(n for n, w in zip(sizes, stored or part.weights, strict=False) if w)
        cast = self.types is not None and node.layer.narrows == "weights" and runs != self.numbers.base
        return WIDTHS[runs] * sum(sizes) if cast else 0

    def kept(self, node: Node, runs: str, copies: Mapping[int, int], homes: list[Value | None]) -> Kept:
        own = {k: self.bytes(v, runs) for k, v in enumerate(node.outputs) if homes[k] is None}
        weights = self.weights(node, runs) if not node.layer.source else 0
        shapes = [self.graph.shapes[v] for v in node.inputs]
        blobs = sum(prod(b.shape) for b in node.layer.blobs(shapes))
        work = WIDTHS[runs] * blobs
        lasting = int(work * node.layer.copies.kept)
        matrix = WIDTHS[runs] * node.layer.unfolded(shapes) if runs in self.numbers.unfolds else 0
        passing = sum(own.values()) + sum(copies.values()) + self.rounding(node, weights) + matrix
        passing += int(work * node.layer.copies.forward)
        if node.layer.source or not self.keeps or not node.backward:
            return Kept(passing=passing + weights + lasting)
        saved = node.layer.saved(shapes, [self.graph.shapes[v] for v in node.outputs], WIDTHS[runs])
        root = self.found.root
        values = {root[node.inputs[i]] for i in saved.inputs if i not in copies}
        values |= {home for k in saved.outputs if (home := homes[k]) is not None}
        copied = sum(copies.get(i, 0) for i in saved.inputs) + sum(own.get(k, 0) for k in saved.outputs)
        working = saved.working[0 if self.numbers.pieces else 1]
        passing += saved.passing + working - copied
        # gradients of copies, before they become those of what was copied
        scratch = saved.scratch + working + matrix + weights + sum(copies.values())
        scratch += sum(own.values()) if self.types is not None else 0
        scratch += int(work * node.layer.copies.backward) if runs not in self.numbers.unfolds else 0
        # gradients of several layers are added up before they become that of their weight: both, and the sum
        scratch += self.numbers.item * blobs * (self.numbers.adds + 2 * (node.name in self.shared))
        if not (node.layer.may_inplace or node.layer.is_view):
            scratch += sum(self.bytes(v, runs) for v in node.outputs if v in self.bent)
        return Kept(frozenset(values), saved.extra + copied + weights + lasting, scratch, passing)

    def rounding(self, node: Node, weights: int) -> int:
        """Bytes that the rounding of a layer's weights or of a top takes for a moment."""
        scheme = self.numbers.scheme
        if scheme is None:
            return 0
        tops = [self.bytes(v, self.numbers.base) for k, v in enumerate(node.outputs) if self.rounded(node, k)]
        if scheme.settings.stochastic:
            return int(_ROUNDING_STEPWISE * max([weights, *tops]))
        return int(max([weights * (_ROUNDING_STEPWISE if scheme.settings.per_channel else _ROUNDING), *tops]))


def _bent(graph: Graph) -> set[Value]:
    """Values whose gradient may come as a part or another view of a tensor: a layer with a kernel of its own copies it
    into the memory format of its blobs first."""
    found: set[Value] = set()
    for node in reversed(graph.nodes):
        views = node.layer.is_view or node.layer.narrows == "moves" or not node.layer.channels_last
        if views or (node.layer.may_inplace and not found.isdisjoint(node.outputs)):
            found.update(node.inputs)
    return found


def unfused(graph: Graph) -> Graph:
    """The graph as a net with a hook runs it: no layer inside another."""
    return graph.with_nodes([replace(n, absorbed=False) for n in graph.nodes])
