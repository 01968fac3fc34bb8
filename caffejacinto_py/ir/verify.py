"""What must be true of every Graph between passes. A violation is a defect of a pass, not of the user's file."""

from __future__ import annotations

from caffejacinto_py.ir.graph import Graph, Value


def verify(graph: Graph) -> None:
    """Raise AssertionError when the graph is not in single assignment, or what passes added does not fit it."""
    made: set[Value] = set()
    for node in graph.nodes:
        for v in node.inputs:
            assert v in made, f"{node}: reads {v} before it is made"
        for v in node.outputs:
            assert v not in made, f"{node}: makes {v} a second time"
            made.add(v)
        assert len(node.loss_weights) == len(node.outputs), f"{node}: one loss weight per output"
        assert not node.needs or len(node.needs) == len(node.inputs), f"{node}: one need per input"
        if node.inplace is not None:
            readers = [n.name for n, _ in graph.readers()[node.inputs[node.inplace]]]
            assert readers == [node.name], f"{node}: in place although {readers} read its input"
    if graph.shapes:
        assert set(graph.shapes) == made, "every value has a shape"
    users = [u for p in graph.params for u in p.users]
    assert len(users) == len(set(users)), "a blob has one owner"
