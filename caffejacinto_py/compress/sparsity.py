"""Sparsity of a net's weights: which layers take part, how zeros are counted, thresholding, masks.

Caffe-jacinto's rules: only plain convolutions count and are masked; of these only those with a kernel above 2 on every
axis, that are not depthwise and have 32 channels on either side, are thresholded. Other layer types take part where
`also` names them; then all of this holds for them too (a layer without a kernel passes that rule), per row of blob 0.
Source: caffe-jacinto 0.17 net.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from caffejacinto_py.compress import threshold
from caffejacinto_py.compress.threshold import Limits, Thresholds
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.layers.base import Prunable

MOST = 0.99  # share of a layer that `aim` may set to zero


@dataclass(frozen=True)
class Weight:
    """Blob 0 of a layer that takes part.

    label: name or index of the blob, as Caffe's tables show it. kind: "low", "mid" or "high", which fraction applies
    to it; None: never thresholded. counted: part of the totals (not right before a softmax).
    """

    name: str
    label: str
    sizes: Prunable
    kind: str | None
    counted: bool
    param: Tensor


@dataclass(frozen=True)
class Row:
    """One layer of a sparsity table: layer name, zero weights, all weights, name or index of the blob."""

    name: str
    zeros: int
    count: int
    label: str = "0"

    @property
    def fraction(self) -> float:
        return self.zeros / self.count if self.count else 0.0


class Fractions(NamedTuple):
    """Wanted share of zeros for the three kinds of layers."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Pruned:
    """What thresholding did to one weight. before, after: its zeros."""

    weight: Weight
    found: Thresholds
    before: int
    after: int


def kind_of(sizes: Prunable) -> str | None:
    """The class of a weight by its sizes, or None where it is never thresholded."""
    if (sizes.convolution and not sizes.kernel) or min(sizes.kernel, default=3) <= 2 or sizes.group >= sizes.no:
        return None
    if sizes.ni >= 256 and sizes.no >= 512:
        return "high"
    if sizes.ni >= 32 and sizes.no >= 32:
        return "mid"
    return "low" if sizes.ni >= 32 or sizes.no >= 32 else None


def weights(net: Net, *, also: Collection[str] = ()) -> list[Weight]:
    """The weights of a net that take part, in its order. also: further layer types."""
    return find(net.graph, {name: params[0] for name, params in net.params.items()}, also=also)


def find(graph: Graph, tensors: Mapping[str, Tensor], *, also: Collection[str] = ()) -> list[Weight]:
    """The same without a net. tensors: blob 0 by layer name; layers without one are passed over."""
    labels = {user: p.name for p in graph.params for user in p.users}
    readers = graph.readers()
    found = []
    for i, node in enumerate(graph.nodes):
        sizes = takes_part(graph, node, also)
        if sizes is None or node.name not in tensors:
            continue
        following = graph.nodes[i + 1] if i + 1 < len(graph.nodes) else None
        # Caffe looks at the next layer of its list, where a Split follows a layer with several readers
        split = any(len(readers[v]) > 1 for v in node.outputs)
        counted = following is None or split or not following.layer.is_softmax
        label = labels.get((node.name, 0)) or "0"
        found.append(Weight(node.name, label, sizes, kind_of(sizes), counted, tensors[node.name]))
    return found


def takes_part(graph: Graph, node: Node, also: Collection[str] = ()) -> Prunable | None:
    """The sizes of a node's weight where sparsity looks at it at all."""
    sizes = prunable(graph, node)
    return sizes if sizes is not None and (sizes.convolution or node.type in also) else None


def prunable(graph: Graph, node: Node) -> Prunable | None:
    """The sizes of a node's weight, None where it has none that can be masked."""
    ins = [graph.shapes[v] for v in node.inputs]
    return node.layer.prunable(ins) if node.layer.blobs(ins) else None


# --- counting --------------------------------------------------------------------------------------------------------
def measure(net: Net, *, also: Collection[str] = ()) -> list[Row]:
    """Exact zeros of every counted weight, in the net's order."""
    return count([w for w in weights(net, also=also) if w.counted])


def count(found: Sequence[Weight], tensors: Sequence[Tensor] | None = None) -> list[Row]:
    """Zeros of the given weights. tensors: look at these instead (masks), one for each."""
    values = [w.param.detach() for w in found] if tensors is None else tensors
    if not found:
        return []
    alive = torch.stack([v.count_nonzero() for v in values]).tolist()  # one wait for the device
    return [Row(w.name, v.numel() - n, v.numel(), w.label) for w, v, n in zip(found, values, alive, strict=True)]


def distinct(found: Iterable[Weight]) -> list[Weight]:
    """Each weight once: the first of the layers that share it. Caffe's own table counts it for each of them."""
    return list({id(w.param): w for w in reversed(list(found))}.values())[::-1]


def total(rows: Iterable[Row]) -> Row:
    """All rows in one, called "total"."""
    rows = list(rows)
    return Row("total", sum(r.zeros for r in rows), sum(r.count for r in rows))


def lines(rows: Sequence[Row], *, what: str = "Sparsity") -> list[str]:
    """The table as caffe-jacinto logs it, trailing blanks included. what: or "ConnectivitySparsity" for masks."""
    names = {f"{r.name}_param_{r.label}": r for r in rows}
    body = [f"{name}({names[name].fraction:.3g}) " for name in sorted(names)]
    end = total(rows)
    last = f"Total {what} (zero_weights/count) =  ({end.zeros}/{end.count}) {end.fraction:.3g}"
    return [f"Num Params({len(names)}), {what} (zero_weights/count): ", *body, last]


# --- thresholding and masks ------------------------------------------------------------------------------------------
def prune(
    found: Sequence[Weight], fractions: Fractions, limits: Limits, *, per_channel: bool = True
) -> list[Pruned | Weight]:
    """Set small weights to zero, in place. Returns for each weight what was done, or the weight where nothing is.

    per_channel: every row (output channel) by itself, else one threshold for the whole blob.
    """
    select = threshold.per_row if per_channel else threshold.whole
    done: list[Pruned | Weight] = []
    for w in found:
        if w.kind is None:
            done.append(w)
            continue
        values = w.param.detach()
        before = values.numel() - int(values.count_nonzero())
        chosen = select(values, getattr(fractions, w.kind), limits)
        threshold.apply(values, chosen)
        done.append(Pruned(w, chosen, before, values.numel() - int(values.count_nonzero())))
    return done


def aim(found: Sequence[Weight], target: float, limits: Limits, *, per_channel: bool = True) -> Fractions:
    """The smallest fractions (low: half of mid and high) with which the zeros of all counted weights reach `target`.
    Shared weights count once.

    Raises CaffeError where they cannot with MOST, saying how far they get.
    """
    counted = distinct(w for w in found if w.counted)
    whole = sum(w.param.numel() for w in counted)

    def share(fraction: float) -> float:
        zeros = 0
        for w in counted:
            part = fraction / 2 if w.kind == "low" else fraction
            zeros += _zeros_with(w, part, limits, per_channel=per_channel)
        return zeros / whole if whole else 0.0

    low, high = 0.0, MOST
    if share(low) >= target:
        return Fractions(0.0, 0.0, 0.0)
    most = share(high)
    if most < target:
        eligible = sum(w.kind is not None for w in counted)
        text = f"a sparsity of {target:g} cannot be reached: thresholding at most {MOST:g} of each layer "
        text += f"({MOST / 2:g} of those with few channels) gives {most:.3g}"
        hint = f"{eligible} of {len(counted)} counted layers can be thresholded"
        hint += "; the others are too small or 1x1" if eligible < len(counted) else ""
        if limits.maxratio < 1 or limits.value_max < threshold.INF:
            hint += "; the limits of the threshold (maxratio, value_max) may be too low"
        raise CaffeError(text, hint=hint)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) >= target else (middle, high)
    return Fractions(high / 2, high, high)


def _zeros_with(w: Weight, fraction: float, limits: Limits, *, per_channel: bool) -> int:
    """How many zeros a weight would have."""
    values = w.param.detach()
    if w.kind is None:
        return values.numel() - int(values.count_nonzero())
    chosen = (threshold.per_row if per_channel else threshold.whole)(values, fraction, limits)
    return int((values.abs() <= chosen.value.reshape(-1, *[1] * (values.dim() - 1))).sum())


def prune_lines(done: Sequence[Pruned | Weight], *, per_channel: bool = True) -> list[str]:
    """What caffe-jacinto logs while it thresholds."""
    found = []
    for one in done:
        w = one.weight if isinstance(one, Pruned) else one
        found.append(f"{w.name} ni={w.sizes.ni} no={w.sizes.no}")
        if not isinstance(one, Pruned):
            continue
        share = one.after / w.param.numel()
        if per_channel:
            found.append(f"{w.name} ZeroWeightsFraction={share:g}")
        else:
            t = one.found
            numbers = (float(t.largest), float(t.cap), float(t.value), 100 * share)
            text = "MaxAbsWeight={:g} MaxThreshold={:g} SelectedThreshold={:g} ZeroPercentage={:g}"
            found.append(f"{w.name} {text.format(*numbers)}")
    return found


def masks(found: Sequence[Weight]) -> list[Tensor]:
    """0 where a weight is zero, else 1: type, device and memory layout of the weights."""
    return [(w.param.detach() != 0).to(w.param.dtype) for w in found]
