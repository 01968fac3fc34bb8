"""ADaPTION's own choice of formats, mistakes included, so that its published bit maps can be made again.

Source: ADaPTION python/caffe/quantization/qmf_check.py. It looks at the signed maximum only, adds an integer bit too
many, and takes the bits of the weights from the *biases* (`params[key][1]` of a full-precision net).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.ir.graph import Node
from caffejacinto_py.layers.dual import Precision

WEIGHTS, ACTIVATIONS = 0.0, 0.01  # the thresholds of its notebook


class Counts:
    """What the rule asks of the values of a blob: their maximum, and how many are beyond 2^m - 1 or below 2^-f."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.max, self.count = -np.inf, 0
        self.above = np.zeros(bits + 1, np.int64)  # by m
        self.below = np.zeros(bits + 1, np.int64)  # by f

    def add(self, x: Tensor) -> Counts:
        self.max = max(self.max, float(x.max()))
        self.count += x.numel()
        for k in range(self.bits + 1):
            self.above[k] += int((x > 2.0**k - 1).sum())
            self.below[k] += int((x < 2.0**-k).sum())
        return self

    def format(self, threshold: float) -> Precision:
        """bd and ad as the original finds them. threshold: share of the values that may be cut off."""
        n, m = self.bits, 0
        while self.max > 2**m and m < n:
            m += 1
        f = max(n - m, 1)
        m = max(m, 1)
        while m + f > n:
            fewer_integer, fewer_fraction = n - f, n - m
            if self.above[fewer_integer] < self.below[fewer_fraction]:
                m = fewer_integer
            else:
                f = fewer_fraction
        cut = 0.0
        while cut < threshold:
            cut = self.above[m] / self.count
            if m < 2:
                break
            m -= 1
        m = max(m + 1, 1)
        return Precision(m, max(n - m, 0))


class Counting(Hook):
    """Counts of the first top of some layers."""

    def __init__(self, layers: set[str], bits: int) -> None:
        self.found = {name: Counts(bits) for name in layers}

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if node.name in self.found:
            self.found[node.name].add(outs[0].detach())
        return outs


@torch.no_grad()
def of_biases(blobs: list[torch.nn.Parameter], bits: int) -> Precision:
    """The format of a layer's weights: that of its bias where it has one, as the original does."""
    return Counts(bits).add(blobs[min(1, len(blobs) - 1)].detach()).format(WEIGHTS)
