"""Fixed-point numbers of the quantization simulation: from a range to a scale, and the quantize operator.

A real x becomes the integer n = clip(round(x * scale + offset)); (n - offset) / scale stands for it, still a float.
Source: caffe-jacinto 0.17 quantized_layer.cpp, quantized_layer.cu, net.cpp; the sound forms are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from caffejacinto_py.layers.modules.rounding import half_away, half_even, stochastic, straight_through

__all__ = [
    "Format",
    "QParams",
    "from_integers",
    "half_away",
    "half_even",
    "make_qparams",
    "per_channel",
    "simulate",
    "stochastic",
    "straight_through",
    "to_integers",
]

Number = float | Tensor  # one number for a blob, or a tensor that broadcasts over it (a scale per channel)


@dataclass(frozen=True)
class Format:
    """What a number should look like. bits: width with sign. power2: scales are powers of two. offset: asymmetric."""

    bits: int = 8
    power2: bool = False
    offset: bool = False


@dataclass(frozen=True)
class QParams:
    """One blob's quantization; the fields of `QuantizationParameter.QParams` (schema) under shorter names.

    scale, offset: x -> x * scale + offset (scale_target, offset). applied: scale_applied. unsigned: the integers are
    0 .. 2^bits - 1, else -2^(bits-1) .. 2^(bits-1) - 1 (unsigned_quant). positive: the data has no negative values
    (unsigned_data). shift: -log2(scale) where scales are powers of two (shiftbits). min, max: the range behind it.
    """

    bits: int = 8
    scale: Number = 1.0
    offset: Number = 0.0
    applied: float = 1.0
    unsigned: bool = False
    positive: bool = False
    shift: int = 0
    min: Number = 0.0
    max: Number = 0.0
    quantize: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self.unsigned:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def make_qparams(low: float, high: float, form: Format, *, applied: float = 1.0, sound: bool = True) -> QParams:
    """The qparams of a range. applied: the blob's scale_applied, 1 in a plain net.

    sound: an empty range gets scale 1, and the offset is rounded, so that zero is represented exactly (zero is
    taken into the range first). Not sound: as the binary computes, infinite scales included.
    """
    if sound and form.offset:
        low, high = min(low, 0.0), max(high, 0.0)
    magnitude, extent = max(abs(low), abs(high)) * applied, abs(high - low) * applied
    positive = low >= 0
    unsigned = positive or form.offset
    reach = extent if form.offset else magnitude
    shift = 0
    if form.power2:
        exponent = math.ceil(math.log2(reach)) if reach > 0 else 0
        exponent += 0 if unsigned else 1
        shift = exponent - form.bits
        relative = 2.0**-shift
    else:
        top = 2**form.bits - 1 if unsigned else 2 ** (form.bits - 1) - 1
        relative = top / reach if reach > 0 else (1.0 if sound else math.inf)
    scale = relative * applied
    offset = -low * scale if form.offset else 0.0
    if sound:
        offset = float(round(offset))
    return QParams(form.bits, scale, offset, applied, unsigned, positive, shift, low, high)


def per_channel(low: Tensor, high: Tensor, form: Format) -> QParams:
    """Sound qparams with one scale per channel. low, high: broadcastable over the blob, e.g. (out, 1, 1, 1)."""
    rows = [make_qparams(float(a), float(b), form) for a, b in zip(low.flatten(), high.flatten(), strict=True)]
    # one kind of integer for the whole blob: signed as soon as one channel has negative values
    if not form.offset and any(not r.unsigned for r in rows):
        reach = [max(abs(float(r.min)), abs(float(r.max))) for r in rows]
        rows = [make_qparams(-a, a, form) for a in reach]

    def stack(name: str) -> Tensor:
        return torch.tensor([getattr(r, name) for r in rows], dtype=torch.float64).reshape(low.shape)

    first = rows[0]
    return replace(first, scale=stack("scale"), offset=stack("offset"), min=low, max=high, shift=0)


def to_integers(
    x: Tensor, q: QParams, *, rounding: Any = half_away, clip: bool = True, clip_first: bool = False
) -> Tensor:
    """The integers of x, as floats. rounding: a function such as half_away. clip_first: clip before rounding (the CPU
    binary)."""
    y = x * _like(q.scale, x) + _like(q.offset, x)
    low, high = q.limits
    if clip and clip_first:
        return rounding(y.clamp(low, high))
    y = rounding(y)
    return y.clamp(low, high) if clip else y


def from_integers(n: Tensor, q: QParams) -> Tensor:
    """The reals that integers stand for."""
    return (n - _like(q.offset, n)) / _like(q.scale, n)


def simulate(x: Tensor, q: QParams, **options: Any) -> Tensor:
    """x with every value replaced by the nearest one that the integers can express; options of `to_integers`."""
    return from_integers(to_integers(x, q, **options), q)


def _like(value: Number, x: Tensor) -> Number:
    return value.to(x.device, x.dtype) if isinstance(value, Tensor) else value
