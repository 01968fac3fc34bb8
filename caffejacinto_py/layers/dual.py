"""Weights of ADaPTION's layers, which keep each blob twice: full precision and rounded. Numpy, no torch here.

Source: ADaPTION lp_base_conv_layer.cpp, util/math_functions.cpp (the rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_BITS = 24  # what a float32 holds exactly


@dataclass(frozen=True)
class Precision:
    """Fixed point "Qbd.ad". bd: bits before the point, the sign among them; ad: bits after it.

    Values are multiples of `step` in [-limit, limit]; the most negative code is not used. round_bias: the bias is
    rounded as well. stochastic: rounded up or down at random with the mean kept, else to the nearest, halves away
    from zero.
    """

    bd: int
    ad: int
    round_bias: bool = False
    stochastic: bool = False

    @property
    def step(self) -> float:
        return 2.0**-self.ad

    @property
    def limit(self) -> float:
        """The largest value, where everything beyond it is clipped."""
        return 2.0 ** (self.bd - 1) - self.step

    def round(self, x: np.ndarray) -> np.ndarray:
        """The nearest representable value of each element, halves away from zero; NaN stays. Keeps the type."""
        top = 2.0 ** (self.bd - 1 + self.ad) - 1
        y = np.clip(np.asarray(x, np.float64) * 2.0**self.ad, -top, top)
        return np.asarray((np.trunc(y) + np.trunc(2 * (y - np.trunc(y)))) * self.step, np.asarray(x).dtype)

    def __str__(self) -> str:
        return f"Q{self.bd}.{self.ad}"


def doubled(blobs: Sequence[Any], targets: Sequence[tuple[int, ...]], precision: Precision) -> list[Any]:
    """The blobs of a plain layer (weights and perhaps bias) as masters with their rounded copies; others as they are.

    The copy of a bias is the bias itself unless it is rounded.
    """
    if len(blobs) != len(targets) // 2:
        return list(blobs)
    found: list[Any] = []
    for i, (master, shape) in enumerate(zip(blobs, targets[::2], strict=True)):
        if master.size == np.prod(shape):  # old files: four axes, ones in front
            squeezed = [n for n in master.shape if n != 1] == [n for n in shape if n != 1]
            master = master.reshape(shape) if squeezed else master
        rounded = precision.round(master) if i == 0 or precision.round_bias else np.array(master)
        found += [master, rounded]
    return found


def masters(blobs: Sequence[Any], targets: Sequence[tuple[int, ...]]) -> list[Any]:
    """The full-precision half of a low-precision layer's blobs, where a plain layer wants only that; else as they are.

    Told by their number (twice the targets) and shapes (pairs that are equal).
    """
    pairs = list(zip(blobs[::2], blobs[1::2], strict=False))
    if len(blobs) != 2 * len(targets) or any(a.shape != b.shape for a, b in pairs):
        return list(blobs)
    return [a for a, _ in pairs]
