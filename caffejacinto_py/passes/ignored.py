"""Net settings that are read but have no effect: said once, with their place, so that nobody relies on them."""

from __future__ import annotations

from dataclasses import replace

from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.schema import pb

_TYPES = ("forward_type", "backward_type", "forward_math", "backward_math")


def note(graph: Graph) -> Graph:
    """The graph with a notice for each such setting; of a setting on many layers, for the first."""
    found = []
    message = graph.proto
    if message is not None:
        for name in (f"default_{t}" for t in _TYPES):
            if getattr(message, name) != pb.FLOAT:
                found.append(_line(graph, (name,), "everything runs in float32"))
    for name in _TYPES:
        users = [n for n in graph.nodes if n.proto.HasField(name) and getattr(n.proto, name) != pb.FLOAT]
        if users:
            more = f" (and on {len(users) - 1} more layers)" if len(users) > 1 else ""
            found.append(_line(graph, (*users[0].path, name), f"everything runs in float32{more}"))
    return replace(graph, notices=(*graph.notices, *found))


def _line(graph: Graph, path: tuple[str | int, ...], why: str) -> str:
    place = graph.locate(path) if graph.locate else None
    return f"{place}: '{path[-1]}' has no effect: {why}" if place else f"'{path[-1]}' has no effect: {why}"
