"""Which learnable blobs the net has: owners, sharers, learning-rate and decay multipliers. Fills `graph.params`.

Order is Caffe's: layers in order, blobs in order, a shared blob at its first user.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod

from caffejacinto_py.errors import CaffeError, LayerError, raise_all
from caffejacinto_py.ir.graph import Graph, Node, Param, Shape, Spec
from caffejacinto_py.layers.base import Blob

log = logging.getLogger(__name__)
GROUP_LASSO = ("kernel_shape_decay_mult", "breadth_decay_mult", "block_group_lasso")


@dataclass
class _Open:
    """A Param under construction."""

    node: str
    index: int
    shape: Shape
    name: str
    shared: bool
    lr_mult: float | None
    decay_mult: float | None
    forced: bool
    users: list[tuple[str, int]]


def collect(graph: Graph) -> Graph:
    """The graph with params. Raises LayerError / ManyErrors: too many ParamSpecs, sharers that disagree."""
    owners: dict[str, _Open] = {}
    found: list[_Open] = []
    errors: list[CaffeError] = []
    for node in graph.nodes:
        try:
            blobs = node.layer.blobs([graph.shapes[v] for v in node.inputs])
            if len(node.specs) > len(blobs):
                raise LayerError(
                    f"layer '{node.name}': {len(node.specs)} param entries for {len(blobs)} learnable blobs",
                    field=("param", len(blobs)),
                )
            for i, blob in enumerate(blobs):
                entry = node.layer.param_entry(i, len(node.specs))
                spec = node.specs[entry] if entry is not None and entry < len(node.specs) else Spec()
                if spec.name and spec.name in owners:
                    _join(owners[spec.name], node, i, blob, spec)
                    continue
                p = _open(node, i, blob, spec)
                found.append(p)
                if spec.name:
                    owners[spec.name] = p
        except LayerError as e:
            e.loc = e.loc or graph.where(node, *e.field)
            errors.append(e)
    raise_all(errors)
    _warn(graph)
    return graph.with_nodes(graph.nodes, params=tuple(_close(p) for p in found))


def _warn(graph: Graph) -> None:
    """Say what is doubtful about `param`, and which of its fields are read but do nothing: the group lasso of
    wenwei202's SSL."""
    for node in graph.nodes:
        doubt = node.layer.param_doubt(len(node.specs))
        if doubt:
            place = graph.where(node, "param", 0)
            log.warning("%slayer '%s': %s", f"{place}: " if place else "", node.name, doubt)
        for i, spec in enumerate(node.layer.proto.param):
            for field in (f.name for f, _ in spec.ListFields() if f.name in GROUP_LASSO):
                place = graph.where(node, "param", i, field)
                log.warning(
                    "%slayer '%s': '%s' of param has no effect: group lasso is not supported",
                    f"{place}: " if place else "", node.name, field,
                )  # fmt: skip


def _open(node: Node, i: int, blob: Blob, spec: Spec) -> _Open:
    return _Open(
        node=node.name,
        index=i,
        shape=tuple(blob.shape),
        name=spec.name or str(i),
        shared=bool(spec.name),
        lr_mult=blob.lr_mult if blob.lr_mult is not None else spec.lr_mult,
        decay_mult=blob.decay_mult if blob.decay_mult is not None else spec.decay_mult,
        forced=blob.lr_mult is not None,
        users=[(node.name, i)],
    )


def _join(owner: _Open, node: Node, i: int, blob: Blob, spec: Spec) -> None:
    """Let a further blob share the owner's memory, when shapes and multipliers allow it."""
    shape = tuple(blob.shape)
    who = f"layer '{node.name}': blob {i} shares param '{spec.name}' with layer '{owner.node}'"
    if spec.permissive:
        if prod(shape) != prod(owner.shape):
            raise LayerError(
                f"{who}, but has {prod(shape)} values where the owner has {prod(owner.shape)}", field=("param", i)
            )
    elif shape != owner.shape:
        raise LayerError(
            f"{who}, but has shape {shape} where the owner has {owner.shape}",
            field=("param", i),
            hint="share_mode: PERMISSIVE compares the number of values only",
        )
    for what in ("lr_mult", "decay_mult"):
        mine, theirs = getattr(spec, what), getattr(owner, what)
        if mine is not None and theirs is not None and mine != theirs and not owner.forced:
            raise LayerError(
                f"{who}, but {what} {mine:g} differs from the owner's {theirs:g}", field=("param", i, what)
            )
        if theirs is None:
            setattr(owner, what, mine)
    owner.users.append((node.name, i))


def _close(p: _Open) -> Param:
    return Param(
        node=p.node,
        index=p.index,
        shape=p.shape,
        name=p.name,
        lr_mult=1.0 if p.lr_mult is None else p.lr_mult,
        decay_mult=1.0 if p.decay_mult is None else p.decay_mult,
        users=tuple(p.users),
    )
