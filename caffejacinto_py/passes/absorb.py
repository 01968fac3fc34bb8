"""Absorbing batch norm: layers that scale and shift per channel go into the weights of a product before or behind them.

What a type can do is said by its class (`as_affine`, `fold_output`, `fold_input`); this pass finds the neighbours,
takes the layers out and says why others stay. `compat.optimize` "binary": what caffe-jacinto's OptimizeNet does, see
`_Work.binary`. Source: caffe-jacinto net.cpp; Jacob et al. 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from caffejacinto_py.errors import CaffeError, LayerError, Loc, UsageError, WeightsError, raise_all
from caffejacinto_py.ir.emit import emit
from caffejacinto_py.ir.graph import Graph, Node, Spec
from caffejacinto_py.layers.folding import Affine, Folded, Refused
from caffejacinto_py.layers.registry import make
from caffejacinto_py.passes import finish, shapes
from caffejacinto_py.passes.rewire import Blocked, bypass, maker, readers, take_over, weighs
from caffejacinto_py.schema.mark import mark_model
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile

Array = np.ndarray


@dataclass(frozen=True)
class Merge:
    """Layer `node` went into layer `into`, whose type is `type`. before: it stood before it, not behind it."""

    node: str
    into: str
    type: str
    before: bool


@dataclass(frozen=True)
class Kept:
    """A layer that stays, and why. loc: where it is written."""

    node: str
    type: str
    reason: str
    loc: Loc | None


@dataclass(frozen=True)
class Absorbed:
    """A net without what it absorbed. dropped: layers that hand their bottom through in phase TEST, taken out."""

    graph: Graph
    model: ModelFile
    merged: tuple[Merge, ...]
    kept: tuple[Kept, ...]
    dropped: tuple[str, ...]


def absorb(graph: Graph, model: ModelFile, *, keep_identity: bool = False, shared: str = "error") -> Absorbed:
    """Graph and weights with equal outputs and fewer layers.

    graph: of phase TEST, from `prepare`. model: weights of every layer that has some. keep_identity: absorbed layers
    stay, with blobs that change nothing (Caffe's form). shared: what to do where weights used by several layers stand
    in the way, "error" or "keep" the layer. Arithmetic is float64; blobs keep their types.
    Raises UsageError for a TRAIN graph, WeightsError for blobs that are missing, of another shape or not finite,
    LayerError or ManyErrors with their places for shared weights.
    """
    if graph.phase != "TEST":
        raise UsageError("only a net of phase TEST can absorb its batch norm: in TRAIN it normalizes with the batch")
    if shared not in ("error", "keep"):
        raise ValueError(f"absorb: shared={shared!r}")
    work = _Work(graph, blobs_of(graph, model), keep_identity=keep_identity, strict=shared == "error")
    if not keep_identity:
        work.drop()
    work.behind()
    if not work.binary:
        work.before()
    raise_all(work.errors)
    new = finish(shapes.reshape(graph.with_nodes(work.nodes, shapes=graph.shapes), {}))
    return Absorbed(new, _model(new, work.blobs), tuple(work.merged), tuple(work.staying()), tuple(work.dropped))


def blobs_of(graph: Graph, model: ModelFile) -> dict[str, list[Array]]:
    """The blobs of every layer in the form and shape that the net wants. Raises WeightsError."""
    held = {entry.name: entry for entry in reversed(model.current_layers())}
    owner = {user: p.users[0] for p in graph.params for user in p.users}
    where = f"{model.path}: " if model.path else ""
    found: dict[str, list[Array]] = {}
    for node in graph.nodes:
        wanted = [tuple(b.shape) for b in node.layer.blobs([graph.shapes[v] for v in node.inputs])]
        entry = held.get(node.name)
        if wanted and (entry is None or not entry.blobs):
            hint = "give the weights file of this net; several files may be named, with commas"
            raise WeightsError(f"{where}no weights for layer '{node.name}' ({node.type})", hint=hint)
        if not wanted or entry is None:
            continue
        arrays: list[Any] = list(entry.blobs)
        for i, array in enumerate(arrays):  # HDF5 leaves a shared blob to its owner
            name, index = owner.get((node.name, i), (node.name, i))
            arrays[i] = found[name][index] if array is None and name in found else array
        try:
            arrays = [np.asarray(a) for a in node.layer.adapt(arrays, wanted)]
        except LayerError as e:
            raise WeightsError(f"{where}{e.text}", hint=e.hint) from e
        found[node.name] = [_fit(where, node, i, a, wanted) for i, a in enumerate(arrays)]
        if len(arrays) != len(wanted):
            text = f"{where}layer '{node.name}' has {len(arrays)} blobs in the file, {len(wanted)} in the net"
            raise WeightsError(text, hint="is this the weights file of this net, and the right --dialect?")
    return found


def _fit(where: str, node: Node, i: int, array: Array, wanted: Sequence[tuple[int, ...]]) -> Array:
    """One blob in the net's shape, with every value finite."""
    who = f"{where}layer '{node.name}', blob {i}"
    if i < len(wanted) and array.size != np.prod(wanted[i], dtype=int):
        raise WeightsError(f"{who}: shape {array.shape} in the file, {wanted[i]} in the net")
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        text = f"{who}: {bad} of {array.size} values are NaN or infinite"
        raise WeightsError(text, hint="these weights cannot be used; take an earlier snapshot")
    return np.array(array).reshape(wanted[i]) if i < len(wanted) else array


class _Work:
    """The net while it is rewritten.

    binary: only BatchNorm, and a Scale behind it, go into a Convolution before them; the values of a Scale behind a
    BatchNorm with scale and shift are lost. (The binary takes the layers by their place in the file; here the graph
    decides.)
    """

    def __init__(self, graph: Graph, blobs: dict[str, list[Array]], *, keep_identity: bool, strict: bool) -> None:
        self.graph, self.blobs = graph, blobs
        self.nodes = list(graph.nodes)
        self.keep_identity, self.strict = keep_identity, strict
        self.binary = graph.dialect.compat.optimize == "binary"
        self.merged: list[Merge] = []
        self.dropped: list[str] = []
        self.errors: list[CaffeError] = []
        self._idle: set[str] = set()  # layers that change nothing any more, still there
        self._reasons: dict[str, list[str]] = {}
        self._shared = {user: p for p in graph.params if len(p.users) > 1 for user in p.users}

    # --- layers that do nothing in phase TEST
    def drop(self) -> None:
        for name in [n.name for n in self.nodes if n.layer.hands_through()]:
            node = self._node(name)
            try:
                self.nodes = bypass(self.nodes, node)
            except Blocked:
                try:
                    self.nodes = take_over(self.nodes, node)
                except Blocked as e:
                    self._refuse(node, str(e))
                    continue
            self.dropped.append(node.name)

    # --- into the layer before, into the layer behind
    def behind(self) -> None:
        """Layers that stand behind a product, in the order of the net: a Scale follows its BatchNorm."""
        for name in [n.name for n in self.nodes]:
            node = self._node(name)
            try:
                affine = self._affine(node)
                if affine is not None:
                    self._into_before(node, affine)
            except (Refused, Blocked) as e:
                self._refuse(node, str(e))

    def before(self) -> None:
        """What is left and stands before a product, from the end of the net."""
        for name in [n.name for n in reversed(self.nodes)]:
            node = self._node(name)
            try:
                affine = self._affine(node)
                if affine is not None and name not in self._idle:
                    self._into_behind(node, affine)
            except (Refused, Blocked) as e:
                self._refuse(node, str(e))

    def _affine(self, node: Node) -> Affine | None:
        return node.layer.as_affine(self._shapes(node), self.blobs.get(node.name, []))

    def _into_before(self, node: Node, affine: Affine) -> None:
        self._alone(node)
        product, value = maker(self.nodes, node.inputs[0]), node.inputs[0]
        while product.name in self._idle or product.layer.hands_through():
            self._alone(product)
            value = product.inputs[0]
            product = maker(self.nodes, value)
        if weighs(product, value):
            raise Blocked(f"'{value.name}' is part of the loss")
        folded = product.layer.fold_output(self._shapes(product), self.blobs.get(product.name, []), affine)
        if folded is None:
            raise Refused(f"'{product.name}' ({product.type}) before it has no weights that could take it in")
        if self.binary:
            folded = self._as_binary(node, product, folded)
        self._apply(node, product, folded, before=False)

    def _alone(self, node: Node) -> None:
        """Nobody else may see the bottom of a layer that is to go into the one before."""
        others = [n.name for n in readers(self.nodes, node.inputs[0]) if n.name != node.name]
        if others:
            raise Blocked(f"'{node.inputs[0].name}' before it is also read by '{others[0]}'")

    def _as_binary(self, node: Node, product: Node, folded: Folded) -> Folded:
        prunable = product.layer.prunable(self._shapes(product))
        if prunable is None or not prunable.convolution:
            raise Refused(f"caffe-jacinto does not absorb into '{product.name}' ({product.type})")
        taken = [m.node for m in self.merged if m.into == product.name]
        norm = node.layer.quantizes == "norm"
        if norm == bool(taken) or not (norm or node.layer.quantizes == "scale"):
            raise Refused("caffe-jacinto absorbs a BatchNorm right behind a convolution, and a Scale behind that")
        if not norm and len(self.blobs[taken[0]]) > 3:
            weight, bias = self.blobs[product.name]
            return Folded(weight, bias, added_bias=False)
        return folded

    def _into_behind(self, node: Node, affine: Affine) -> None:
        product = self._reader(node)
        while product.name in self._idle or product.layer.hands_through():
            product = self._reader(product)
        folded = product.layer.fold_input(self._shapes(product), self.blobs.get(product.name, []), affine)
        if folded is None:
            raise Refused(f"'{product.name}' ({product.type}) behind it has no weights that could take it in")
        self._apply(node, product, folded, before=True)

    def _reader(self, node: Node) -> Node:
        value = node.outputs[0]
        after = readers(self.nodes, value)
        if weighs(node, value):
            raise Blocked(f"'{value.name}' is part of the loss")
        if len(after) != 1:
            names = ", ".join(f"'{n.name}'" for n in after)
            raise Blocked(f"'{value.name}' is read by {names}" if after else f"'{value.name}' is an output of the net")
        return after[0]

    def _apply(self, node: Node, product: Node, folded: Folded, *, before: bool) -> None:
        self._check_shared(product)
        self._check_shared(node)
        blobs = [folded.weight, folded.bias]
        if not all(np.isfinite(b).all() for b in blobs):
            raise Refused(f"the weights of '{product.name}' would become infinite")
        own = self.blobs[node.name]
        if self.keep_identity:
            self._idle.add(node.name)
            self.blobs[node.name] = node.layer.neutral(self._shapes(node), own)
        else:
            self.nodes = (bypass if before else take_over)(self.nodes, node)
        self.blobs[product.name] = blobs
        if folded.added_bias:
            current = self._node(product.name)
            self.nodes[self.nodes.index(current)] = with_bias(current)
        self.merged.append(Merge(node.name, product.name, product.type, before))
        self._reasons.pop(node.name, None)

    def _check_shared(self, node: Node) -> None:
        for i in range(len(self.blobs[node.name])):
            param = self._shared.get((node.name, i))
            if param is None:
                continue
            other = next(n for n, _ in param.users if n != node.name)
            text = f"'{node.name}' shares its weights with '{other}' by the name '{param.name}'"
            if self.strict:
                loc = self.graph.where(self.graph.node(node.name), "param", i)
                hint = "--keep-shared leaves such layers as they are; or give each layer weights of its own"
                if not any(text in e.text for e in self.errors):
                    self.errors.append(LayerError(f"cannot absorb: layer {text}", loc=loc, hint=hint))
            raise Refused(text)

    # --- answers
    def staying(self) -> list[Kept]:
        """Layers that were not absorbed, in order, each with its reasons."""
        left = [n for n in self.nodes if n.name in self._reasons and n.name not in self._idle]
        return [Kept(n.name, n.type, "; ".join(dict.fromkeys(self._reasons[n.name])), n.loc) for n in left]

    def _refuse(self, node: Node, reason: str) -> None:
        self._reasons.setdefault(node.name, []).append(reason)

    def _shapes(self, node: Node) -> list[tuple[int, ...]]:
        return [self.graph.shapes[v] for v in node.inputs]

    def _node(self, name: str) -> Node:
        return next(n for n in self.nodes if n.name == name)


def with_bias(node: Node) -> Node:
    """The node with a bias, whose learning follows that of the weight: frozen where that is, never decayed."""
    proto = type(node.proto)()
    proto.CopyFrom(node.proto)
    param = getattr(proto, node.layer.field)
    param.bias_term = True
    param.bias_filler.Clear()
    param.bias_filler.type, param.bias_filler.value = "constant", 0
    specs = node.specs
    if len(specs) == 1 and specs[0].lr_mult is not None:
        proto.param.add(lr_mult=specs[0].lr_mult, decay_mult=0)
        specs = (*specs, Spec(lr_mult=specs[0].lr_mult, decay_mult=0.0))
    return replace(node, proto=proto, specs=specs, layer=make(proto, node.layer.context, len(node.outputs), node.loc))


def _model(graph: Graph, blobs: dict[str, list[Array]]) -> ModelFile:
    borrowed = {user for p in graph.params for user in p.users[1:]}
    entries = []
    for node, message in zip(graph.nodes, emit(graph).layer, strict=True):
        own = blobs.get(node.name, [])
        shared = [i for i in range(len(own)) if (node.name, i) in borrowed]
        entries.append(LayerBlobs(node.name, node.type, own, proto=message, bottoms=message.bottom, tops=message.top,
                                  shared=shared))  # fmt: skip
    name = graph.dialect.name
    return mark_model(ModelFile(graph.name, entries, dialect=name), name)
