"""Is this prototxt in order? Everything that can be said of nets and solvers without data or weights.

The engine of `caffejacinto check`; in Python: `caffejacinto_py.check(path)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from caffejacinto_py.errors import CaffeError, Loc, ManyErrors, PrototxtError, UsageError, render
from caffejacinto_py.ir.build import kept
from caffejacinto_py.ir.graph import Graph, Shape
from caffejacinto_py.layers.registry import UnknownLayer
from caffejacinto_py.passes import precision, prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import Document
from caffejacinto_py.schema.upgrade import load_net, load_solver
from caffejacinto_py.solver.nets import Embedded, NetFiles, NetSource, test_sources, train_source

PHASES = ("TRAIN", "TEST")
USUAL_SHAPES = (
    (3, 224, 224), (1, 28, 28), (3, 32, 32), (2, 28, 28), (3, 227, 227), (3, 299, 299), (3, 300, 300), (3, 512, 512),
)  # fmt: skip
_SOLVER = re.compile(r"^\s*(base_lr|lr_policy|max_iter|train_net|test_net|solver_mode|snapshot_prefix|net)\s*:", re.M)
_LAYERS = re.compile(r"^\s*(layers?\s*\{|input\s*:)", re.M)


@dataclass(frozen=True)
class Report:
    """What `check` found.

    status: "ok", "unknown_fields" (fields no fork has), "unknown_types" (layer types that are not supported), "error";
    the worst one wins, in that order. kind: "net" or "solver". unknown_types and unknown_fields: distinct names;
    `notes` has them with their places. layers, params, macs: of the net in this phase for the batch size of the file; 0
    where shapes could not be worked out. data_shape: what a data layer was taken to deliver, where that mattered.
    precision: the number types of the layers in a few lines, where a net asks for other ones than FLOAT.
    nets: the nets that a solver names, where their files are there.
    """

    path: str
    kind: str
    phase: str | None = None
    status: str = "ok"
    unknown_types: tuple[str, ...] = ()
    unknown_fields: tuple[str, ...] = ()
    errors: tuple[CaffeError, ...] = ()
    notes: tuple[CaffeError, ...] = ()
    layers: int = 0
    params: int = 0
    macs: int = 0
    data_shape: Shape | None = None
    precision: tuple[str, ...] = ()
    nets: tuple[Report, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON knows it; errors and notes as the terminal shows them."""
        keys = ("path", "kind", "phase", "status", "layers", "params", "macs", "data_shape")
        plain = {k: getattr(self, k) for k in keys}
        return {
            **plain,
            "unknown_types": list(self.unknown_types),
            "unknown_fields": list(self.unknown_fields),
            "errors": [_error(e) for e in self.errors],
            "precision": list(self.precision),
            "nets": [n.as_dict() for n in self.nets],
        }


def _error(e: CaffeError) -> dict[str, Any]:
    loc = e.loc or Loc("")
    return {"file": loc.file or None, "line": loc.line, "column": loc.col, "text": e.text, "hint": e.hint}


def check(
    path: str | os.PathLike[str],
    *,
    phase: str = "TRAIN",
    data_shape: Shape | None = None,
    level: int | None = None,
    stages: Sequence[str] | None = None,
    python_layers: bool = False,
) -> Report:
    """Check a net or solver file. Never raises for what is wrong with the file; UsageError for a phase that is none.

    data_shape: (C, H, W) of what a data layer delivers where the prototxt does not say (crops, mean values do). None:
    the first of `USUAL_SHAPES` that fits the net. python_layers: run the code of Python layers to learn their shapes;
    otherwise they are reported among the unknown types, with a note.
    """
    if phase not in PHASES:
        raise UsageError(f"phase is TRAIN or TEST, not '{phase}'")
    state = dict(data_shape=data_shape, level=level, stages=stages, python_layers=python_layers)
    return _check(os.fspath(path), (phase,), state)[0]


def check_phases(
    path: str | os.PathLike[str],
    *,
    data_shape: Shape | None = None,
    level: int | None = None,
    stages: Sequence[str] | None = None,
    python_layers: bool = False,
) -> list[Report]:
    """`check` in every phase in which something feeds the net (a train.prototxt has no data in phase TEST); one report
    for a solver.
    """
    state = dict(data_shape=data_shape, level=level, stages=stages, python_layers=python_layers)
    return _check(os.fspath(path), PHASES, state)


def _check(file: str, phases: Sequence[str], state: dict[str, Any]) -> list[Report]:
    kind = kind_of(file)
    only = None if kind == "solver" else phases[0]
    try:
        doc = (load_solver if kind == "solver" else load_net)(file, unknown="collect")
    except CaffeError as e:
        return [_judge(Report(file, kind, only, errors=_flat(e)))]
    if kind == "solver":
        return [_solver(file, doc, state)]
    if len(phases) > 1:
        phases = [p for p in phases if _fed(doc.message, p, state["level"], state["stages"])] or phases[:1]
    return [_net(file, doc, {**state, "phase": p}) for p in phases]


def _fed(message: Any, phase: str, level: int | None, stages: Sequence[str] | None) -> bool:
    """Whether a layer without bottoms is there in this phase. A layer with contradictory rules counts: building reports
    it.
    """
    for proto in message.layer:
        try:
            if not proto.bottom and proto.top and kept(proto, phase=phase, level=level or 0, stages=stages or ()):
                return True
        except CaffeError:
            return True
    return False


def kind_of(path: str) -> str:
    """ "solver" or "net", from the fields at the start of lines; a file that cannot be read passes as "net"."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "net"
    return "solver" if _SOLVER.search(text) and not _LAYERS.search(text) else "net"


def _net(file: str, doc: Any, state: dict[str, Any]) -> Report:
    report = Report(file, "net", state["phase"], **_unknown_fields(doc))
    try:
        graph, shape = fit(doc, **state)
        types = precision.resolve(graph)
    except CaffeError as e:
        return _judge(_sorted(report, _flat(e), doc))
    lines = (*precision.describe(types), *types.notes)
    return _judge(replace(report, data_shape=shape, precision=lines, **totals(graph)))


def fit(doc: Any, *, data_shape: Shape | None = None, **state: Any) -> tuple[Graph, Shape | None]:
    """The graph of a loaded net without opening its data, and the data shape that was assumed, if any had to be.

    data_shape: None tries `USUAL_SHAPES`. state: phase, level, stages, dialect of `passes.prepare`. Raises what it
    raises for the first shape.
    """
    first: CaffeError | None = None
    for shape in [data_shape] if data_shape else USUAL_SHAPES:
        try:
            graph = prepare(doc, probe=None, data_shape=tuple(shape), **state)
        except CaffeError as e:
            first = first or e
            if any(isinstance(x, UnknownLayer) for x in _flat(e)):
                break
        else:
            return graph, _assumed(graph, tuple(shape))
    assert first is not None
    raise first


def _assumed(graph: Graph, shape: Shape) -> Shape | None:
    """The shape if a data layer delivers just that."""
    tops = (graph.shapes[n.outputs[0]] for n in graph.nodes if n.layer.source)
    return shape if any(tuple(top[1:]) == shape for top in tops) else None


def totals(graph: Graph) -> dict[str, Any]:
    """Number of layers, of learnable values (shared ones once), and multiply-accumulates of a shaped graph."""
    return {
        "layers": len(graph.nodes),
        "params": sum(prod(p.shape) for p in graph.params),
        "macs": sum(
            n.layer.macs([graph.shapes[v] for v in n.inputs], [graph.shapes[v] for v in n.outputs])
            for n in graph.nodes
            if not n.layer.source
        ),
    }


def _unknown_fields(doc: Any) -> dict[str, Any]:
    """The dropped fields of a document, for a Report."""
    unknown = getattr(doc, "unknown", [])  # a net inside a solver has none of its own
    notes = tuple(PrototxtError(f"unknown field '{name}'", loc=loc) for name, loc in unknown)
    return {"unknown_fields": tuple(dict.fromkeys(name for name, _ in unknown)), "notes": notes}


def _sorted(report: Report, errors: Iterable[CaffeError], doc: Any) -> Report:
    """Unknown layer types apart from real errors."""
    unknown = [e for e in errors if isinstance(e, UnknownLayer)]
    return replace(
        report,
        unknown_types=tuple(dict.fromkeys(e.type for e in unknown)),
        notes=(*report.notes, *unknown),
        errors=tuple(e for e in errors if not isinstance(e, UnknownLayer)),
        layers=len(doc.message.layer),
    )


# --- solvers ---------------------------------------------------------------------------------------------------------
class _Files(NetFiles):
    """Net files of a solver, found leniently; those that are absent or broken stand in as an empty net."""

    def __init__(self, solver: str, where: Any) -> None:
        super().__init__(where)
        self.solver = solver
        self.broken: list[Report] = []

    def load(self, path: str, *place: str | int) -> Any:
        found = _locate(path, self.solver)
        if found is None:
            return Embedded(pb.NetParameter(), None)
        try:
            return load_net(found, unknown="collect")
        except CaffeError as e:
            self.broken.append(_judge(Report(found, "net", errors=_flat(e))))
            return Embedded(pb.NetParameter(), None)


def _solver(file: str, doc: Document, state: dict[str, Any]) -> Report:
    from caffejacinto_py.solver import settings  # loads torch: for solver files only
    from caffejacinto_py.solver.teacher import Teachers

    param = doc.message
    errors: list[CaffeError] = []

    def where(*path: str | int) -> Loc | None:
        return doc.locs.find(path)

    files = _Files(file, where)
    found: list[tuple[NetSource, str]] = []

    def train() -> None:
        found.append((train_source(param, where, files), "TRAIN"))

    def test() -> None:
        found.extend((source, "TEST") for source in test_sources(param, where, files))

    def teach() -> None:
        teachers = Teachers(param, where, files)
        for source, phase in found:
            teachers.check(source, phase, resolve_dialect(source.doc.message, param))

    for step in (lambda: settings.check(param, where, resolve_dialect(solver_message=param)), train, test, teach):
        try:
            step()
        except CaffeError as e:
            errors += _flat(e)
    nets = list({(r.path, *r.errors): r for r in files.broken}.values())
    for source, phase in found:
        if source.doc.message.layer:
            net_state = {**state, "phase": phase, "level": source.level, "stages": source.stages}
            nets.append(_net(source.doc.file or f"{file}: {source.label}", source.doc, net_state))
    report = Report(file, "solver", **_unknown_fields(doc))
    return _judge(replace(report, errors=tuple(errors), nets=tuple(dict.fromkeys(nets))))


def _locate(name: str, solver: str) -> str | None:
    """The file of a net: as named (Caffe's rule), else relative to a folder above the solver; None when it is not
    there.
    """
    for folder in (Path(), *Path(solver).absolute().parents):
        if (folder / name).is_file():
            return str(folder / name)
    return None


# --- results ---------------------------------------------------------------------------------------------------------
def _flat(e: CaffeError) -> tuple[CaffeError, ...]:
    return e.errors if isinstance(e, ManyErrors) else (e,)


def _judge(report: Report) -> Report:
    below = {n.status for n in report.nets}
    if report.errors or "error" in below:
        status = "error"
    elif report.unknown_types or "unknown_types" in below:
        status = "unknown_types"
    elif report.unknown_fields or "unknown_fields" in below:
        status = "unknown_fields"
    else:
        status = "ok"
    return replace(report, status=status)


def describe(report: Report) -> str:
    """The report as the terminal shows it."""
    name = f"{report.path} ({report.kind}{', ' + report.phase if report.phase else ''})"
    if report.ok and report.kind == "net":
        head = f"ok: {name}: {report.layers} layers, {report.params:,} parameters, {report.macs:,} MACs"
    else:
        head = f"{report.status.replace('_', ' ')}: {name}"
    if report.data_shape:
        head += f" (for data of {'x'.join(map(str, report.data_shape))}, which the net does not say)"
    lines = [head, *(f"  {line}" for line in report.precision)]
    lines += [render(e) for e in (*report.errors, *report.notes)]
    lines += ["  " + line for net in report.nets for line in describe(net).splitlines()]
    return "\n".join(lines)
