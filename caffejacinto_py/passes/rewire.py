"""Taking a layer with one bottom and one top out of a net, so that the rest still reads what it should.

Prototxt has names, not values: a value may get a new reader only where its name still means it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from caffejacinto_py.ir.graph import Node, Value

Nodes = Sequence[Node]


class Blocked(Exception):
    """Why the layer cannot be taken out. The text is the reason, for people."""


def readers(nodes: Nodes, value: Value) -> list[Node]:
    """Who reads a value, in order."""
    return [n for n in nodes if value in n.inputs]


def maker(nodes: Nodes, value: Value) -> Node:
    return next(n for n in nodes if value in n.outputs)


def weighs(node: Node, value: Value) -> bool:
    """Whether a top of this node is part of the loss."""
    return any(w for w, v in zip(node.loss_weights, node.outputs) if v == value)


def take_over(nodes: Nodes, node: Node) -> list[Node]:
    """Without `node`: the layer before it makes its top. Raises Blocked where others read what was between them."""
    old, new = node.inputs[0], node.outputs[0]
    before = maker(nodes, old)
    if before.layer.source:
        raise Blocked(f"'{before.name}' ({before.type}) is an input of the net")
    others = [n.name for n in readers(nodes, old) if n.name != node.name]
    if others:
        raise Blocked(f"'{old.name}' is also read by '{others[0]}'")
    if weighs(before, old) or weighs(node, new):
        raise Blocked(f"'{(old if weighs(before, old) else new).name}' is part of the loss")
    outputs = tuple(new if v == old else v for v in before.outputs)
    return [replace(n, outputs=outputs) if n is before else n for n in nodes if n is not node]


def bypass(nodes: Nodes, node: Node) -> list[Node]:
    """Without `node`: those that read its top read its bottom. Raises Blocked where the net would lose an output, or
    where another layer has overwritten the bottom by then."""
    old, new = node.outputs[0], node.inputs[0]
    after = readers(nodes, old)
    if not after:
        raise Blocked(f"'{old.name}' is an output of the net")
    if weighs(node, old):
        raise Blocked(f"'{old.name}' is part of the loss")
    rest = [n for n in nodes if n is not node]
    for reader in after:
        if not visible(rest, new, reader):
            raise Blocked(f"another layer works in place on '{new.name}' before '{reader.name}' reads it")
    return [replace(n, inputs=tuple(new if v == old else v for v in n.inputs)) for n in rest]


def visible(nodes: Nodes, value: Value, at: Node) -> bool:
    """Whether the name of `value` means it where node `at` reads its bottoms."""
    latest: Value | None = None
    for n in nodes:
        if n is at:
            return latest == value
        latest = next((v for v in n.outputs if v.name == value.name), latest)
    return False
