"""One teacher as it runs: the part of its net that the wanted blobs need, frozen, fed with the student's data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from caffejacinto_py.compress import quantize
from caffejacinto_py.engine import precision
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, Loc, PrototxtError, WeightsError, near
from caffejacinto_py.ir.build import build
from caffejacinto_py.ir.graph import Graph, Node, Shape, Value
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context
from caffejacinto_py.passes import finish, quantize_check, shapes
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.schema.weights import read_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spec:
    """A `teacher` entry of a solver: its message, net and dialect. place: where a field of the entry stands."""

    message: Any
    doc: Any
    dialect: Dialect
    place: Callable[..., Loc | None]

    @property
    def name(self) -> str:
        return str(self.message.name)

    def graph(self) -> Graph:
        """The whole net in phase TEST, without shapes."""
        return build(
            self.doc.message,
            registry.find,
            phase="TEST",
            level=self.message.level,
            stages=tuple(self.message.stage),
            dialect=self.dialect,
            locate=self.doc.locs.find if self.doc.locs is not None else None,
        )

    def check(self, blob: str, loc: Loc | None) -> None:
        """Raise PrototxtError at `loc` unless the net has this blob."""
        if not self.doc.message.layer:
            return  # a file that `check` did not find: reported there
        known = _latest(self.graph())
        if blob not in known:
            text = f"teacher '{self.name}' ({self.message.net}) has no blob '{blob}' in phase TEST"
            raise PrototxtError(text, loc=loc, hint=near(blob, known) or f"it has {', '.join(list(known)[:20])}")


def inputs(spec: Spec, blobs: Sequence[str]) -> list[str]:
    """The input blobs of a teacher that these blobs need."""
    graph = spec.graph()
    return _tops(_cut(graph, [_latest(graph)[blob] for blob in blobs]))


def _tops(graph: Graph) -> list[str]:
    return [v.name for n in graph.nodes if registry.find(n.type).source for v in n.outputs]


class Part:
    """A frozen teacher. Called with a batch of the student it returns the wanted blobs.

    given: shapes of the student's data blobs, by name. share: the same teacher for another net, whose weights are used.
    A pure function of the batch: phase TEST, no gradients, no ranges that move. shapes: of the blobs.
    """

    def __init__(
        self,
        spec: Spec,
        blobs: Sequence[str],
        given: Mapping[str, Shape],
        *,
        device: torch.device,
        python_layers: bool = False,
        share: Part | None = None,
    ) -> None:
        graph, self.feeds, self._outputs = shaped(spec, blobs, given, python_layers=python_layers)
        seen = _seen(self.feeds, given)
        try:
            self.net: Net = _make(spec, graph, device, share.net if share else None)
            _load(spec, self.net)
        except CaffeError as e:
            e.hint = e.hint or f"teacher '{spec.name}' is fed with {seen}"
            raise
        self.net.requires_grad_(False)
        _still(spec, self.net)
        made = {v.name: graph.shapes[v] for v in graph.outputs}
        self.shapes = {blob: made[name] for blob, name in self._outputs.items()}
        text = "Teacher '%s': %s, %d layers for %s, fed with %s"
        if share is None:
            log.info(text, spec.name, spec.message.net, len(graph.nodes), ", ".join(blobs), seen)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            result = self.net({to: batch[source] for to, source in self.feeds.items()})
        return {blob: result.outputs[name] for blob, name in self._outputs.items()}


def shaped(
    spec: Spec, blobs: Sequence[str], given: Mapping[str, Shape], *, python_layers: bool = False
) -> tuple[Graph, dict[str, str], dict[str, str]]:
    """What a teacher runs for these blobs, with shapes, without weights; what it is fed with (input -> data blob of the
    student); and which of its outputs the blobs are. given: see `Part`."""
    graph = spec.graph()
    wanted = {blob: _latest(graph)[blob] for blob in blobs}
    graph = _cut(graph, list(wanted.values()))
    feeds = _feeds(spec, graph, given)
    graph, outputs = _show(graph, wanted)
    context = Context(phase="TEST", dialect=spec.dialect, python_layers=python_layers)
    try:
        fed = {to: given[source] for to, source in feeds.items()}
        graph = finish(quantize_check.check(shapes.infer(graph, context, given=fed)))
    except CaffeError as e:
        e.hint = e.hint or f"teacher '{spec.name}' is fed with {_seen(feeds, given)}"
        raise
    return graph, feeds, outputs


def _seen(feeds: Mapping[str, str], given: Mapping[str, Shape]) -> str:
    return ", ".join(f"'{to}' {given[source]}" for to, source in feeds.items())


def _latest(graph: Graph) -> dict[str, Value]:
    """Blob names and what they mean at the end of the net, behind in-place layers."""
    return {v.name: v for n in graph.nodes for v in n.outputs}


def _cut(graph: Graph, wanted: Sequence[Value]) -> Graph:
    """The layers that the wanted blobs need; data layers with only those tops that are read."""
    need = set(wanted)
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if not need & set(node.outputs):
            continue
        need.update(node.inputs)
        if registry.find(node.type).source:
            kept = [i for i, v in enumerate(node.outputs) if v in need]
            weights = tuple(node.loss_weights[i] for i in kept) if node.loss_weights else ()
            node = replace(node, outputs=tuple(node.outputs[i] for i in kept), loss_weights=weights)
        nodes.append(node)
    return graph.with_nodes(nodes[::-1])


def _feeds(spec: Spec, graph: Graph, given: Mapping[str, Shape]) -> dict[str, str]:
    """Input blob of the teacher -> data blob of the student."""
    mapped = {f.to: (getattr(f, "from"), i) for i, f in enumerate(spec.message.feed)}
    names = _tops(graph)
    known = ", ".join(f"'{name}'" for name in given) or "none"
    for to, (_, i) in mapped.items():
        if to not in _latest(spec.graph()):
            text = f"feed: teacher '{spec.name}' has no blob '{to}'"
            raise PrototxtError(text, loc=spec.place("feed", i, "to"), hint=near(to, names))
    found = {}
    for to in names:
        source, i = mapped.get(to, (to, -1))
        if source not in given:
            loc = spec.place("feed", i, "from") if i >= 0 else spec.place()
            text = f"input '{to}' of teacher '{spec.name}' is fed from blob '{source}', which no data layer has"
            hint = f"data blobs of the net that is trained: {known}"
            if i < 0:
                hint += f'; feed {{ from: "..." to: "{to}" }} in the teacher entry connects them'
            raise PrototxtError(text, loc=loc, hint=near(source, given) if i >= 0 and near(source, given) else hint)
        found[to] = source
    return found


def _show(graph: Graph, wanted: Mapping[str, Value]) -> tuple[Graph, dict[str, str]]:
    """The net with every wanted blob among its outputs, and the outputs' names. A blob that other layers read gets a
    Split, which keeps it intact."""
    ends = set(graph.outputs)
    names = {v.name for n in graph.nodes for v in n.outputs}
    nodes, found = list(graph.nodes), {}
    for blob, value in wanted.items():
        name = blob
        if value not in ends:
            while name in names:
                name += "'"
            names.add(name)
            proto = pb.LayerParameter(name=name, type="Split", bottom=[blob], top=[name])
            nodes.append(Node(name, proto.type, (value,), (Value(name),), proto, (), (0.0,), (None,)))
        found[blob] = name
    return graph.with_nodes(nodes), found


def _make(spec: Spec, graph: Graph, device: torch.device, share: Net | None) -> Net:
    """The net in its own number types, or in those of `precision`."""
    shared = share.dtype if share is not None else None
    table, lines = precision.choose(graph, device, spec.message.precision or None, shared=shared)
    for line in (*table.notes, *lines) if share is None else ():
        log.warning("Teacher '%s': %s", spec.name, line)
    return Net(graph, device=device, dtype=precision.DTYPES[table.base], types=table, share=share, seed=0)


def _load(spec: Spec, net: Net) -> None:
    """All weights, or WeightsError: a teacher with a layer as it was initialised teaches noise."""
    missing = set(net.params)
    place = spec.place("weights", 0)
    for name in (n.strip() for one in spec.message.weights for n in one.split(",") if n.strip()):
        try:
            report = net.load(read_model(name))
        except WeightsError as e:
            where = f"{e.loc}: " if e.loc else ""
            raise WeightsError(f"teacher '{spec.name}': {where}{e.text}", loc=place, hint=e.hint) from e
        missing -= set(report.loaded)
    if missing:
        first = ", ".join(f"'{n}'" for n in net.params if n in missing)
        text = f"teacher '{spec.name}': its weights have no layer {first}"
        raise WeightsError(text, loc=place, hint="layers are matched by name: are these the weights of this net?")


def _still(spec: Spec, net: Net) -> None:
    """Simulated quantization only with stored ranges: running ones would depend on the batches before."""
    hook = quantize.attach(net)
    if hook is not None and not hook.scheme.fixed:
        hint = "`caffejacinto calibrate` writes a net with stored ranges"
        text = f"teacher '{spec.name}' measures its quantization ranges while it runs"
        raise PrototxtError(text, loc=spec.place("net"), hint=hint)
