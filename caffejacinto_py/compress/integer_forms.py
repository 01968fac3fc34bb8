"""How integers stand for reals in an integer program: forms of tensors, and the qparams they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from caffejacinto_py.compress import fixed_point
from caffejacinto_py.compress.numerics import QParams, from_message
from caffejacinto_py.ir.graph import Node, Shape
from caffejacinto_py.passes.quantize import is_float, is_stored

WIDTHS = 2, 16  # bits of weights and tensors
BIAS_WIDTHS = 2, 32
FIXED_WIDTHS = 1, 24  # of layers that round by themselves
PIXELS = QParams(bits=8, unsigned=True, positive=True, quantize=True)


@dataclass(frozen=True)
class Form:
    """How integers stand for reals: real = (n - zero) / scale."""

    bits: int
    signed: bool
    scale: Fraction
    zero: int
    symmetric: bool = False  # the most negative number is not used

    @property
    def limits(self) -> tuple[int, int]:
        high = (1 << (self.bits - 1 if self.signed else self.bits)) - 1
        return (-high if self.symmetric else -high - 1) if self.signed else 0, high

    @property
    def power2(self) -> bool:
        return fixed_point.exponent(self.scale) is not None

    @property
    def reach(self) -> tuple[int, int]:
        """Least and largest n - zero; 0 (padding) is among them."""
        low, high = self.limits
        return min(low - self.zero, 0), max(high - self.zero, 0)


@dataclass(frozen=True)
class Tensor:
    """A blob of the program."""

    name: str
    shape: Shape
    form: Form

    @property
    def bound(self) -> int:
        """Largest |n - zero|."""
        low, high = self.form.reach
        return max(-low, high)

    def describe(self) -> dict[str, Any]:
        f = self.form
        found = {"shape": list(self.shape), "bits": f.bits, "signed": f.signed, "scale": float(f.scale), "zero": f.zero}
        return {**found, "symmetric": True} if f.symmetric else found


def pixels(node: Node) -> QParams:
    """Whole numbers 0 .. 255, times the scale of the data layer's transformation."""
    scale = node.proto.transform_param.scale
    return PIXELS if scale <= 0 else replace(PIXELS, scale=1 / scale)


@dataclass(frozen=True)
class Stored:
    """The qparams of a layer whose `quantize` is set, None for the others."""

    node: Node
    weights: tuple[QParams | None, ...] = ()
    outs: tuple[QParams | None, ...] = ()
    fixed: bool = False  # the layer rounds by itself, to symmetric numbers

    def weight(self, i: int) -> QParams | None:
        return self.weights[i] if i < len(self.weights) else None

    def out(self, i: int) -> QParams | None:
        return self.outs[i] if i < len(self.outs) else None


def stored(node: Node) -> Stored:
    """What the prototxt says of a layer. Raises LayerError."""
    words = node.layer.fixed_words()
    if words is not None:
        weights = (_fixed(words.weight), _fixed(words.bias)) if words.weight else ()
        return Stored(node, weights, (_fixed(words.top),) if words.top else (), fixed=True)
    message = node.proto.quantization_param
    if not is_stored(node.proto) or is_float(node.proto):
        return Stored(node)

    def read(messages: Any) -> tuple[QParams | None, ...]:
        return tuple(from_message(m) if m.quantize else None for m in messages)

    return Stored(node, read(message.qparam_w), read(message.qparam_out))


def _fixed(word: tuple[int, int] | None) -> QParams | None:
    return None if word is None else QParams(bits=word[0], scale=2.0 ** word[1], quantize=True)


def masters(found: Stored, blobs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """The float blobs that a layer computes with, clipped where it rounds to symmetric numbers."""
    if not found.fixed:
        return blobs

    def clipped(blob: np.ndarray, q: QParams | None) -> np.ndarray:
        return blob if q is None else np.clip(blob, -q.limits[1] / float(q.scale), q.limits[1] / float(q.scale))

    return [clipped(np.asarray(b, np.float64), found.weight(i)) for i, b in enumerate(blobs[::2])]


def tensor_form(node: Node, q: QParams, name: str, i: int) -> Form:
    """The form of a blob. name, i: its place in quantization_param, for errors."""
    if q.channels:
        raise node.layer.fail("a blob has one scale for all channels", "quantization_param", name, i, "channel_scale")
    symmetric = node.layer.fixed_words() is not None
    scales, zeros = channels(node, q, name, i, FIXED_WIDTHS if symmetric else WIDTHS)
    return Form(q.bits, not q.unsigned, scales[0], zeros[0], symmetric)


def channels(node: Node, q: QParams, name: str, i: int, widths: tuple[int, int]) -> tuple[list[Fraction], list[int]]:
    """Scales and zero points, one or one per channel, checked."""
    at = ("quantization_param", name, i)
    if not widths[0] <= q.bits <= widths[1]:
        raise node.layer.fail(f"bitwidth {q.bits} is outside of {widths[0]}..{widths[1]}", *at, "bitwidth")
    scales = np.atleast_1d(np.asarray(q.scale, np.float64)).ravel().tolist()
    zeros = np.atleast_1d(np.asarray(q.offset, np.float64)).ravel().tolist()
    zeros = zeros * len(scales) if len(zeros) == 1 else zeros
    for scale, zero in zip(scales, zeros):
        if not 0 < scale < math.inf:
            raise node.layer.fail(f"scale_target {scale:g}: a scale must be positive and finite", *at, "scale_target")
        if zero != round(zero) or abs(zero) >= 1 << 31:
            hint = "`caffejacinto calibrate` writes whole ones; caffe-jacinto's own are not"
            raise node.layer.fail(f"offset {zero:g} is not a whole number", *at, "offset", hint=hint)
    return [Fraction(s) for s in scales], [int(z) for z in zeros]
