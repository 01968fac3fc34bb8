"""Passes: Graph -> Graph, one file each. `prepare` runs the ones every net needs, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from caffejacinto_py.ir.build import PHASES, build
from caffejacinto_py.ir.graph import Graph, Shape
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context, Layer
from caffejacinto_py.passes import backward, fuse, inplace, params, quantize_check, shapes
from caffejacinto_py.schema.dialect import Dialect, resolve_dialect


def prepare(
    doc: Any,
    *,
    phase: str | None = None,
    level: int | None = None,
    stages: Sequence[str] | None = None,
    dialect: Dialect | None = None,
    probe: Callable[[Layer], Sequence[Shape]] | None = None,
    data_shape: Shape = (3, 224, 224),
    python_layers: bool = False,
    teacher: Callable[[Layer], Sequence[Shape]] | None = None,
) -> Graph:
    """From a loaded net (a Document of `load_net`, or an upgraded NetParameter) to a graph that is ready to run.

    phase, level, stages: what is None comes from the net's own `state`. probe: see Context; None does not touch data.
    python_layers: Python layers may run their code. teacher: see Context.
    Raises PrototxtError, LayerError, DataError or ManyErrors with locations.
    """
    message, locs = (doc.message, doc.locs) if hasattr(doc, "message") else (doc, None)
    state = message.state
    phase = phase or PHASES[state.phase]
    dialect = dialect or resolve_dialect(message)
    graph = build(
        message,
        registry.find,
        phase=phase,
        level=state.level if level is None else level,
        stages=tuple(state.stage) if stages is None else tuple(stages),
        dialect=dialect,
        locate=locs.find if locs is not None else None,
    )
    context = Context(
        phase=phase, dialect=dialect, probe=probe, data_shape=data_shape, python_layers=python_layers, teacher=teacher
    )
    return finish(quantize_check.check(shapes.infer(graph, context)))


def finish(graph: Graph) -> Graph:
    """The passes behind shape inference."""
    return fuse.mark(inplace.mark(backward.mark(params.collect(graph))))
