"""Folding a scale and a shift per channel into the weights of a product: the terms and the arithmetic, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from caffejacinto_py.layers.base import Shape

if TYPE_CHECKING:
    from caffejacinto_py.layers.base import Layer

Array = np.ndarray


class Refused(Exception):
    """A layer could be folded, but not with these fields or values. The text is the reason, for people."""


@dataclass(frozen=True, eq=False)
class Affine:
    """y = x * scale + shift: float64, one number for each channel (axis 1)."""

    scale: Array
    shift: Array

    @property
    def shifts(self) -> bool:
        return bool(np.any(self.shift != 0))


@dataclass(frozen=True, eq=False)
class Folded:
    """New values of weight and bias, in the type of the old weight. added_bias: the layer had none before."""

    weight: Array
    bias: Array
    added_bias: bool


def normalization(
    mean: Array, variance: Array, eps: float, *, scale: Array | None = None, shift: Array | None = None
) -> Affine:
    """scale * (x - mean) / sqrt(variance + eps) + shift. Raises Refused where there is no such root."""
    below = variance + eps
    if np.any(below <= 0):
        channel = int(np.argmax(below <= 0))
        raise Refused(f"variance + eps is {below[channel]:g} in channel {channel}")
    factor = (1.0 if scale is None else scale) / np.sqrt(below)
    return Affine(factor, (0.0 if shift is None else shift) - mean * factor)


def doubles(blobs: Sequence[Array]) -> list[Array]:
    """Flat float64 copies."""
    return [np.array(b, np.float64).reshape(-1) for b in blobs]


def open_product(layer: Layer, ins: Sequence[Shape], blobs: Sequence[Array], *, bias: bool) -> tuple[Array, Array]:
    """Weight and bias (zeros where there is none) of a product as float64. Raises Refused for one that is not plain."""
    if len(ins) > 1:
        raise Refused(f"'{layer.name}' has {len(ins)} bottoms for one set of weights")
    if layer.proto.HasField("quantization_param"):
        raise Refused(
            f"'{layer.name}' has a quantization_param that fits its present weights: absorb before quantizing"
        )
    if len(blobs) != 1 + bias:
        raise Refused(f"'{layer.name}' ({layer.type}) has {len(blobs)} blobs, not a weight{' and a bias' * bias}")
    weight = np.array(blobs[0], np.float64)
    return weight, np.array(blobs[1], np.float64) if bias else np.zeros(layer.param.num_output)


def close_product(weight: Array, bias: Array, like: Sequence[Array]) -> Folded:
    """The result in shape and type of the old weight."""
    kind = like[0].dtype
    return Folded(weight.reshape(like[0].shape).astype(kind), bias.astype(kind), len(like) == 1)
