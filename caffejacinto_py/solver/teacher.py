"""Teachers: frozen nets that run on each batch of the net that is trained. Its Teacher layers hand their blobs on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caffejacinto_py.data import probe
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, Loc, PrototxtError, near, raise_all
from caffejacinto_py.ir.build import build
from caffejacinto_py.ir.graph import Graph, Node, Shape
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context, Layer
from caffejacinto_py.passes import finish, shapes
from caffejacinto_py.passes.precision import OVERRIDES
from caffejacinto_py.schema.dialect import Dialect, resolve_dialect
from caffejacinto_py.solver.feed import Feed
from caffejacinto_py.solver.lr import Where
from caffejacinto_py.solver.nets import NetFiles, NetSource
from caffejacinto_py.solver.teacher_net import Part, Spec, shaped

log = logging.getLogger(__name__)
Wanted = dict[str, dict[str, Loc | None]]  # teacher -> its blobs -> who asks


@dataclass
class Lesson:
    """What the teachers have to say to one net.

    parts: the teachers that it reads, and for each of its tops (teacher, blob).
    """

    parts: dict[str, Part]
    tops: dict[str, tuple[str, str]] = field(default_factory=dict)

    def shapes(self, layer: Layer) -> Sequence[Shape]:
        """Of the tops of a Teacher layer."""
        return [self.parts[name].shapes[blob] for name, blob in (self.tops[top] for top in layer.proto.top)]

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tops of all Teacher layers for a batch: tensors without gradient."""
        found = {name: part(batch) for name, part in self.parts.items()}
        return {top: found[name][blob] for top, (name, blob) in self.tops.items()}


class Teachers:
    """The `teacher` entries of a solver.

    Their nets are read here, their weights when a net needs them. Raises PrototxtError or ManyErrors: files that are
    missing, names that are taken, unknown precisions.
    """

    def __init__(self, param: Any, where: Where, files: NetFiles) -> None:
        self.where = where
        self.specs: dict[str, Spec] = {}
        self.lessons: list[Lesson | None] = []
        errors: list[CaffeError] = []
        for i, message in enumerate(param.teacher):
            try:
                self._add(message, i, files)
            except CaffeError as e:
                errors.append(e)
        raise_all(errors)

    def _add(self, message: Any, i: int, files: NetFiles) -> None:
        def place(*fields: str | int) -> Loc | None:
            return self.where("teacher", i, *fields)

        name = message.name
        if name in self.specs:
            hint = 'give each its own: name: "..."' if not message.HasField("name") else None
            raise PrototxtError(f"two teachers are called '{name}'", loc=place("name"), hint=hint)
        if not message.net:
            raise PrototxtError(f"teacher '{name}' has no net", loc=place(), hint='add: net: "teacher.prototxt"')
        if not message.weights:
            hint = 'add: weights: "teacher.caffemodel"'
            raise PrototxtError(f"teacher '{name}' has no weights", loc=place(), hint=hint)
        if message.precision and message.precision not in OVERRIDES:
            text = f"precision '{message.precision}' of teacher '{name}' is unknown"
            raise PrototxtError(text, loc=place("precision"), hint=f"known: {', '.join(OVERRIDES)}")
        for k, feed in enumerate(message.feed):
            if not (getattr(feed, "from") and feed.to):
                hint = 'feed { from: "blob of the student" to: "blob of the teacher" }'
                raise PrototxtError("feed needs from and to", loc=place("feed", k), hint=hint)
        doc = files.load(message.net, "teacher", i, "net")
        dialect = resolve_dialect(doc.message, None, message.dialect or None)
        self.specs[name] = Spec(message, doc, dialect, place)

    # --- nets that read them -----------------------------------------------------------------------------------------
    def lesson(
        self, source: NetSource, phase: str, *, dialect: Dialect, device: torch.device, python_layers: bool = False
    ) -> Lesson | None:
        """The teachers that a net reads, ready to run; None: it has no Teacher layer in this state.

        Opens the net's data for its shapes. Raises PrototxtError for blobs that do not exist and inputs that nothing
        feeds, WeightsError for weights that do not fit.
        """
        found: Lesson | None = None
        if reads_teacher(source.doc.message):
            graph = _graph(source, phase, dialect)
            tops, wanted = self._resolve(graph)
            given = _data(graph, Context(phase=phase, dialect=dialect, probe=probe, python_layers=python_layers))
            parts = {}
            for name, blobs in wanted.items():
                before = next((one.parts[name] for one in self.lessons if one and name in one.parts), None)
                parts[name] = Part(
                    self.specs[name], list(blobs), given, device=device, python_layers=python_layers, share=before
                )
            found = Lesson(parts, tops) if parts else None
        self.lessons.append(found)
        return found

    def attach(self, *feeds: Feed) -> None:
        """Give the feeds of the nets their lessons, in the order in which these were made."""
        for feed, lesson in zip(feeds, self.lessons, strict=True):
            feed.derive = lesson
        unread = set(self.specs) - {name for one in self.lessons if one for name in one.parts}
        for name in sorted(unread):
            log.warning("Teacher '%s' does nothing: no layer of type Teacher reads it", name)

    def check(self, source: NetSource, phase: str, dialect: Dialect) -> None:
        """Whether the Teacher layers of a net find their teachers and blobs, without data and weights."""
        if not reads_teacher(source.doc.message):
            return
        try:
            graph = _graph(source, phase, dialect)
        except CaffeError:
            return  # whoever checks the net itself says so
        self._resolve(graph)

    def graphs(self, source: NetSource, graph: Graph, dialect: Dialect) -> dict[str, Graph]:
        """What the teachers of a net run, by their names: with shapes, without data and weights. graph: of the net."""
        if not reads_teacher(source.doc.message):
            return {}
        _, wanted = self._resolve(_graph(source, graph.phase, dialect))
        given = {v.name: graph.shapes[v] for n in _readable(graph.nodes) for v in n.outputs}
        return {name: shaped(self.specs[name], list(blobs), given)[0] for name, blobs in wanted.items()}

    def _resolve(self, graph: Graph) -> tuple[dict[str, tuple[str, str]], Wanted]:
        """(top -> teacher and blob, teacher -> its blobs)."""
        tops: dict[str, tuple[str, str]] = {}
        wanted: Wanted = {}
        errors: list[CaffeError] = []
        for node in (n for n in graph.nodes if _source(n) == "teacher"):
            layer: Any = registry.make(node.proto, Context(phase=graph.phase), len(node.outputs), node.loc)
            try:
                layer.check()
                _behind_data(graph, node)
                asked, blobs = layer.read()
                name = self._named(graph, node, asked)
                for i, (value, blob) in enumerate(zip(node.outputs, blobs, strict=True)):
                    loc = graph.where(node, "teacher_param", "blob", i)
                    self.specs[name].check(blob, loc)
                    tops[value.name] = (name, blob)
                    wanted.setdefault(name, {})[blob] = loc
            except CaffeError as e:
                e.loc = e.loc or node.loc
                errors.append(e)
        raise_all(errors)
        return tops, wanted

    def _named(self, graph: Graph, node: Node, name: str | None) -> str:
        place = graph.where(node, "teacher_param", "teacher")
        known = ", ".join(f"'{n}'" for n in self.specs)
        if not self.specs:
            text = f"layer '{node.name}' reads a teacher, and the solver has none"
            hint = 'teacher { net: "teacher.prototxt" weights: "teacher.caffemodel" } in the solver, or --teacher'
            raise PrototxtError(text, loc=place, hint=hint)
        if name is None and len(self.specs) > 1:
            hint = f"teacher_param {{ teacher: ... }}: {known}"
            raise PrototxtError(f"layer '{node.name}' does not say which teacher it reads", loc=place, hint=hint)
        name = name or next(iter(self.specs))
        if name not in self.specs:
            text = f"layer '{node.name}': the solver has no teacher '{name}'"
            raise PrototxtError(text, loc=place, hint=near(name, self.specs) or f"it has {known}")
        return name


def reads_teacher(message: Any) -> bool:
    """Whether a net has a Teacher layer in any state."""
    return any(registry.known(p.type) and registry.find(p.type).source == "teacher" for p in message.layer)


def _graph(source: NetSource, phase: str, dialect: Dialect) -> Graph:
    """The net with its names resolved, without shapes."""
    locs = source.doc.locs
    return build(
        source.doc.message,
        registry.find,
        phase=phase,
        level=source.level,
        stages=source.stages,
        dialect=dialect,
        locate=locs.find if locs is not None else None,
    )


def data_feed(
    source: NetSource, phase: str, names: Sequence[str], *, dialect: Dialect, device: torch.device, workers: int = 1
) -> tuple[Feed, dict[str, Shape]]:
    """The data layers of a net that have these blobs, alone: a feed of their batches, and the shapes of all their blobs
    by name. Other data layers are not opened."""
    graph = _graph(source, phase, dialect)
    nodes = [n for n in _readable(graph.nodes) if any(v.name in names for v in n.outputs)]
    alone = shapes.infer(graph.with_nodes(nodes), Context(phase=phase, dialect=dialect, probe=probe))
    feed = Feed(Net(finish(alone), device=device, seed=0), seed=0, workers=workers)
    return feed, {value.name: shape for value, shape in alone.shapes.items()}


def _source(node: Node) -> str | None:
    return registry.find(node.type, name=node.name, loc=node.loc).source


def _readable(nodes: Iterable[Node]) -> list[Node]:
    """The data layers."""
    return [n for n in nodes if _source(n) not in (None, "teacher")]


def _behind_data(graph: Graph, node: Node) -> None:
    """Refuse a Teacher layer before a data layer: layer by layer it would run on the batch before."""
    later = _readable(graph.nodes[graph.nodes.index(node) :])
    if later:
        text = f"layer '{node.name}' stands before the data layer '{later[0].name}', whose blobs its teacher may see"
        raise PrototxtError(text, loc=node.loc, hint="put it behind the data layers")


def _data(graph: Graph, context: Context) -> dict[str, Shape]:
    """The shapes of all data blobs of a net, by name."""
    found = shapes.infer(graph.with_nodes(_readable(graph.nodes)), context)
    return {value.name: shape for value, shape in found.shapes.items()}
