"""Nets that no memory of this machine can hold are refused before anything is allocated or read."""

from __future__ import annotations

import os
from math import prod

from caffejacinto_py.errors import LayerError, Loc
from caffejacinto_py.ir.graph import Graph


def check(graph: Graph, *, item: int, memory: int | None = None) -> None:
    """Raise LayerError for the first blob or learnable blob that alone is larger than the machine's memory.

    item: bytes of a number. memory: bytes; None asks the system, and where it does not tell nothing is checked.
    """
    memory = physical() if memory is None else memory
    if not memory:
        return
    for node in graph.nodes:
        for v in node.outputs:
            if prod(graph.shapes[v]) * item > memory:
                what = f"layer '{node.name}': its top '{v.name}' of shape {graph.shapes[v]}"
                raise _too_large(what, prod(graph.shapes[v]) * item, memory, node.loc)
    for p in graph.params:
        if prod(p.shape) * item > memory:
            what = f"layer '{p.node}': its learnable blob {p.index} of shape {p.shape}"
            raise _too_large(what, prod(p.shape) * item, memory, graph.node(p.node).loc)


def _too_large(what: str, size: int, memory: int, loc: Loc | None) -> LayerError:
    text = f"{what} takes {size / 2**30:,.0f} GiB, more than the {memory / 2**30:,.0f} GiB of this machine"
    return LayerError(text, loc=loc, hint="is a batch_size, num_output or input size mistyped?")


def physical() -> int:
    """Bytes of main memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
