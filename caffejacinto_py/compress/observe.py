"""What numbers pass through a net: counts, range, moments and a histogram of every blob, in one pass over the data.

Calibration, low-precision analysis and reports read `Stats`; nobody keeps the blobs themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.engine.hooks import Hook, Hooks
from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.ir.graph import Node

if TYPE_CHECKING:
    from caffejacinto_py.engine.evaluate import Feeds
    from caffejacinto_py.engine.net import Net

BINS = 16384  # over both signs: one-sided data has at least 4096 of them, 16 for each step of 8 bits
_CHUNK = 2**23  # torch.histc counts in the type of its data: float32 is exact up to 2^24


@dataclass(frozen=True, eq=False)
class Stats:
    """What was seen of one blob.

    layer, blob: names. count: values seen; zeros: exact zeros among them; bad: NaN and infinite ones, which nothing
    else counts. min, max, total, squares: of the finite values (0 where there were none). hist: int64 counts of the
    *non-zero* values in equal bins over [-limit, limit), limit a power of two (0: no value but zeros yet; then, and
    where no histogram was asked for, hist is empty or zero). passes: how often the blob passed by.
    """

    layer: str = ""
    blob: str = ""
    count: int = 0
    zeros: int = 0
    bad: int = 0
    min: float = 0.0
    max: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    limit: float = 0.0
    hist: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    passes: int = 0

    @property
    def finite(self) -> int:
        return self.count - self.bad

    @property
    def mean(self) -> float:
        return self.total / self.finite if self.finite else 0.0

    @property
    def power(self) -> float:
        """Mean of the squares: what a signal-to-noise ratio puts above."""
        return self.squares / self.finite if self.finite else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros."""
        return self.zeros / self.count if self.count else 0.0

    @property
    def edges(self) -> np.ndarray:
        """Borders of the bins, float64, one more than bins."""
        return np.linspace(-self.limit, self.limit, len(self.hist) + 1)

    def quantile(self, fraction: float) -> float:
        """The value below which this fraction of all finite values lies, exact to the width of a bin; zeros count."""
        half = len(self.hist) // 2
        counts = np.insert(self.hist, half, self.zeros)  # zeros sit between the two halves, at a place without width
        left = np.insert(self.edges[:-1], half, 0.0)
        width = np.insert(np.full(len(self.hist), 2 * self.limit / max(len(self.hist), 1)), half, 0.0)
        below = np.cumsum(counts)
        if not below[-1]:
            return 0.0
        want = fraction * below[-1]
        i = int(np.searchsorted(below, want))
        i = min(i, len(counts) - 1)
        inside = (want - (below[i] - counts[i])) / counts[i] if counts[i] else 0.0
        return float(np.clip(left[i] + width[i] * inside, self.min, self.max))


class Collector:
    """Statistics of one blob that grow with every tensor added. `stats` is a frozen view of the moment."""

    def __init__(self, layer: str = "", blob: str = "", *, bins: int = BINS) -> None:
        if bins % 4:
            raise ValueError("bins must be a multiple of 4")
        self.layer, self.blob = layer, blob
        self.count = self.zeros = self.bad = self.passes = 0
        self.min, self.max, self.total, self.squares = math.inf, -math.inf, 0.0, 0.0
        self.hist = np.zeros(bins, np.int64)
        self.limit = 0.0

    def add(self, x: Tensor) -> None:
        """Count one tensor of floats; any shape, device and type."""
        self.passes += 1
        self.count += x.numel()
        if not x.numel():
            return
        x = _flat(x.detach())
        x = x.float() if x.dtype not in (torch.float32, torch.float64) else x
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = x[x.isfinite()]
            self.bad += x.numel() - finite.numel()
            x = finite
            if not x.numel():
                return
            low, high = (float(v) for v in torch.aminmax(x))
        self.min, self.max = min(self.min, low), max(self.max, high)
        zeros = x.numel() - int(torch.count_nonzero(x))
        self.zeros += zeros
        self.total += float(x.sum(dtype=torch.float64))
        self.squares += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        if len(self.hist) and zeros < x.numel():
            self._bin(x, zeros, max(-low, high))

    def _bin(self, x: Tensor, zeros: int, magnitude: float) -> None:
        limit = 2.0 ** math.frexp(magnitude)[1]  # the power of two above
        if not self.limit:
            self.limit = limit
        while self.limit < limit:
            self._double()
        if not 2.0**-100 < self.limit < 2.0**100:  # the bins' borders must exist in the type of x
            x = x.double()
        bins = len(self.hist)
        for part in torch.split(x, _CHUNK):
            counted = torch.histc(part, bins, -self.limit, self.limit)
            self.hist += counted.cpu().numpy().astype(np.int64)
        self.hist[bins // 2] -= zeros  # zero itself starts this bin

    def _double(self) -> None:
        """Twice the range: neighbours become one bin, in the middle half."""
        pairs = self.hist.reshape(-1, 2).sum(1)
        quarter = len(self.hist) // 4
        self.hist[:] = 0
        self.hist[quarter : 3 * quarter] = pairs
        self.limit *= 2

    @property
    def stats(self) -> Stats:
        low, high = (self.min, self.max) if self.min <= self.max else (0.0, 0.0)
        hist = self.hist.copy()
        hist.setflags(write=False)
        return Stats(self.layer, self.blob, self.count, self.zeros, self.bad, low, high, self.total, self.squares,
                     self.limit, hist, self.passes)  # fmt: skip


class Observer(Hook):
    """Collects the tops of every layer, sources included.

    wanted: which nodes, default all. bins: of the histograms, a multiple of 4; 0: none, cheaper. The bottoms of a layer
    are the tops of others, at the version that it read: `bottom`.
    """

    def __init__(self, *, wanted: Callable[[Node], bool] | None = None, bins: int = BINS) -> None:
        self.wanted, self.bins = wanted, bins
        self._collected: dict[str, list[Collector]] = {}
        self._made: dict[tuple[str, int], tuple[str, int]] = {}  # value -> (layer, top)

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.wanted is None or self.wanted(node):
            if node.name not in self._collected:
                self._collected[node.name] = [Collector(node.name, v.name, bins=self.bins) for v in node.outputs]
                self._made.update({(v.name, v.version): (node.name, i) for i, v in enumerate(node.outputs)})
            for collector, out in zip(self._collected[node.name], outs, strict=True):
                collector.add(out)
        return outs

    @property
    def stats(self) -> dict[str, tuple[Stats, ...]]:
        """Layer name -> Stats of its tops, in the order in which layers ran."""
        return {name: tuple(c.stats for c in collectors) for name, collectors in self._collected.items()}

    def bottom(self, node: Node, index: int = 0) -> Stats | None:
        """What was seen of a bottom of a layer; None where its maker was not wanted."""
        value = node.inputs[index]
        place = self._made.get((value.name, value.version))
        return None if place is None else self._collected[place[0]][place[1]].stats

    def check(self) -> None:
        """Raises CaffeError naming the first layer that made NaN or infinite values."""
        for name, collectors in self._collected.items():
            for c in collectors:
                if c.bad:
                    text = f"layer '{name}': {c.bad} of {c.count} values of blob '{c.blob}' are NaN or infinite"
                    raise CaffeError(text, hint="look at the weights, or at the data that enters this layer")


def observe(
    net: Net,
    feed: Feeds,
    iterations: int,
    *,
    wanted: Callable[[Node], bool] | None = None,
    bins: int = BINS,
) -> Observer:
    """Run batches through a net and collect; a hook that the net has stays and runs first.

    Raises UsageError for no iterations, CaffeError where a layer made NaN or infinite values.
    """
    if iterations < 1:
        raise UsageError(f"{iterations} batches to observe; at least 1 is needed")
    observer, before = Observer(wanted=wanted, bins=bins), net.hook
    net.hook = observer if before is None else Hooks(before, observer)
    try:
        for _ in range(iterations):
            with torch.no_grad():
                net(feed.next())
    finally:
        net.hook = before
    observer.check()
    return observer


def measure(x: Tensor, *, layer: str = "", blob: str = "", bins: int = BINS) -> Stats:
    """Stats of one tensor, for weights."""
    collector = Collector(layer, blob, bins=bins)
    collector.add(x)
    return collector.stats


def channel_ranges(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel, shaped to broadcast over the blob, e.g. (out, 1, 1, 1)."""
    others = [i for i in range(weight.dim()) if i != axis % max(weight.dim(), 1)]
    if not others:
        return weight.detach().clone(), weight.detach().clone()
    return weight.detach().amin(others, keepdim=True), weight.detach().amax(others, keepdim=True)


def _flat(x: Tensor) -> Tensor:
    """All values in the order of memory: a view also where the layout is not Caffe's."""
    strides: tuple[int, ...] = tuple(x.stride())
    return x.permute(sorted(range(x.dim()), key=lambda i: -strides[i])).reshape(-1)
