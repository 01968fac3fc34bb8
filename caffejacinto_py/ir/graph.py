"""The immutable graph of a net: values in single assignment, nodes, and what passes learn about them. No torch, no
registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from caffejacinto_py.errors import Loc
from caffejacinto_py.schema.dialect import BVLC, Dialect

Shape = tuple[int, ...]


class Value(NamedTuple):
    """A blob at one point of the net. In-place layers make a new version of the same name."""

    name: str
    version: int = 0

    def __str__(self) -> str:
        return self.name if not self.version else f"{self.name}.{self.version}"


@dataclass(frozen=True)
class Spec:
    """A ParamSpec after resolution: name "" = not shared. lr_mult / decay_mult None: not given."""

    name: str = ""
    permissive: bool = False
    lr_mult: float | None = None
    decay_mult: float | None = None


@dataclass(frozen=True)
class Node:
    """One layer of the net.

    proto: its LayerParameter, never modified. path: where it stands in the document, for locations of its fields.
    propagate: per input the prototxt's propagate_down, or None. loss_weights: per output, 0 for outputs that are no
    loss.
    layer: its Layer object (set by the shapes pass). needs: per input, whether backward must compute its gradient;
    backward: whether this node takes part in the backward pass at all (both set by the backward pass). inplace: the
    input that its module overwrites, or None. absorbed: the layer before it does its work too (see passes/fuse.py).
    """

    name: str
    type: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    proto: Any = field(compare=False, repr=False)
    specs: tuple[Spec, ...] = ()
    loss_weights: tuple[float, ...] = ()
    propagate: tuple[bool | None, ...] = ()
    loc: Loc | None = None
    path: tuple[str | int, ...] = ()
    needs: tuple[bool, ...] = ()
    backward: bool = False
    inplace: int | None = None
    absorbed: bool = False
    layer: Any = field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"Node({self.name!r}, {self.type}, {[str(v) for v in self.inputs]} -> {[str(v) for v in self.outputs]})"


@dataclass(frozen=True)
class Param:
    """One learnable blob of the net after sharing: its owner, and every (node name, blob index) that uses it."""

    node: str
    index: int
    shape: Shape
    name: str  # display name: ParamSpec name or the index
    lr_mult: float
    decay_mult: float
    users: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Graph:
    """A whole net in one phase. Node order is execution order.

    shapes, params: filled by the passes of that name; empty before. locate: field path -> Loc, from the source map.
    notices: lines a person should see once (legacy syntax upgraded, ...).
    """

    name: str
    nodes: tuple[Node, ...]
    phase: str = "TRAIN"
    level: int = 0
    stages: tuple[str, ...] = ()
    dialect: Dialect = BVLC
    force_backward: bool = False
    debug_info: bool = False
    proto: Any = field(default=None, compare=False, repr=False)
    locate: Any = field(default=None, compare=False, repr=False)
    shapes: Mapping[Value, Shape] = field(default_factory=dict, repr=False)
    params: tuple[Param, ...] = ()
    notices: tuple[str, ...] = ()

    def where(self, node: Node, *fields: str | int) -> Loc | None:
        """The place of a field of a node; the layer's own place when the field is not in the text."""
        if self.locate is None:
            return node.loc
        return self.locate((*node.path, *fields)) or node.loc

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Values nobody consumes, alphabetical by name: Caffe's order of net outputs."""
        used = {v for n in self.nodes for v in n.inputs}
        return tuple(sorted({v for n in self.nodes for v in n.outputs} - used))

    def node(self, name: str) -> Node:
        for n in self.nodes:
            if n.name == name:
                return n
        raise KeyError(name)

    def readers(self) -> dict[Value, list[tuple[Node, int]]]:
        """Who reads each value, in order: (node, input index)."""
        found: dict[Value, list[tuple[Node, int]]] = {v: [] for n in self.nodes for v in n.outputs}
        for n in self.nodes:
            for i, v in enumerate(n.inputs):
                found[v].append((n, i))
        return found

    def with_nodes(self, nodes: list[Node] | tuple[Node, ...], **changes: Any) -> Graph:
        return replace(self, nodes=tuple(nodes), **changes)
