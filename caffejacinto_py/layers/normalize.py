"""MVN, Normalize and Axpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Blob, Layer, Saved, Shape
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("MVN", v1="MVN", field="mvn_param")
class MVN(Layer):
    """y = (x - mean) / (sqrt(variance) + eps) over the numbers of each channel of each item.

    Bottom and top: (N, C, anything..); the variance is the biased one.
    mvn_param: normalize_variance (true; false: the mean only); across_channels (false; true: over all numbers of an
    item); eps (1e-9), outside the root. Where all numbers are equal y = 0, and the gradient is the huge but finite one
    of C++. C++ takes at most 4 axes. Source: BVLC mvn_layer.
    """

    saves_output = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not ins[0]:
            raise self.fail("MVN needs a bottom of at least 1 axis", "bottom", 0)
        if self.param.eps < 0:
            raise self.fail(f"eps must not be negative, not {self.param.eps:g}", "mvn_param", "eps")
        return [ins[0]]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        size = item * math.prod(ins[0])
        return Saved(outputs=(0,), scratch=2 * size, passing=size)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.normalize import MVN as Module

        first = 1 if self.param.across_channels else 2
        return Module(first, self.param.eps if self.param.normalize_variance else None)


@layer("Normalize", field="norm_param", forks="ssd, nvcaffe, jacinto, jacinto-0.16")
class Normalize(Layer):
    """y = scale x / sqrt(sum of x^2 + eps): each item, or each of its pixels, brought to the length `scale`.

    Bottom and top: (N, C, anything..). Blobs: scale, one number () or one a channel (C).
    norm_param: across_spatial (true: the sum goes over all numbers of an item; false: over the channels of each pixel);
    channel_shared (true: one scale); scale_filler (1); eps (1e-10), inside the root.
    Differs: with channel_shared false C++ leaves scale out of the second half of the bottom's gradient, which is then
    no derivative unless all scales are equal; this is the true one (`--compat normalize=binary`: theirs). C++ takes 4
    axes only.
    Source: SSD normalize_layer; Liu et al. 2015 (ParseNet).
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if len(ins[0]) < 2:
            raise self.fail(f"Normalize needs a bottom of items and channels (N, C, ..), not {ins[0]}", "bottom", 0)
        if self.param.eps < 0:
            raise self.fail(f"eps must not be negative, not {self.param.eps:g}", "norm_param", "eps")
        return [ins[0]]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        size = item * math.prod(ins[0])  # the unit vectors, for the scale
        return Saved((0,), extra=size, scratch=2 * size, passing=size)

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        self.shapes(ins)
        shape = () if self.param.channel_shared else (ins[0][1],)
        if not self.param.HasField("scale_filler"):
            return [Blob(shape, pb.FillerParameter(value=1))]
        return [filled_blob(self, shape, "scale_filler")]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import normalize as m

        kind = m.BinaryNormalize if self.context.dialect.compat.normalize == "binary" else m.Normalize
        return kind(blobs[0], self.param.eps, across_spatial=self.param.across_spatial)


@layer("Axpy", bottoms=(3, 3), forks="nvcaffe, jacinto")
class Axpy(Layer):
    """a x + y, a being one number for each channel of each item.

    Bottoms: a (N, C) or (N, C, 1, 1); x and y (N, C, anything..). Top: as x. No options.
    Source: NVCaffe axpy_layer; Hu et al. 2017 (SENet).
    """

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        x = ins[1] or ins[2]
        return x[:2] if x and i == 0 else x

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        a, x, y = ins
        if len(x) < 2:
            raise self.fail(f"bottom 1 must be (N, C, ..), it is {x}", "bottom", 1)
        if y != x:
            raise self.fail(f"bottoms 1 and 2 must have one shape: {x} and {y}", "bottom", 2)
        if a[:2] != x[:2] or math.prod(a[2:]) != 1:
            raise self.fail(f"bottom 0 must have one number a channel, {x[:2]}; it is {a}", "bottom", 0)
        return [x]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.normalize import Axpy as Module

        return Module()

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        return math.prod(outs[0])
