"""Im2col, SPP, Crop and ROIPooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Blob, IntegerForm, Layer, Prunable, Shape
from caffejacinto_py.layers.conv import Convolution
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn

Pair = tuple[int, int]


@layer("Im2col", v1="IM2COL", field="convolution_param")
class Im2col(Convolution):
    """The windows that a convolution reads, one column each: y[n, (c, k), out] = x[n, c, stride * out + dilation * k -
    pad], zeros outside.

    Bottom: (lead.., C, spatial..); top: (lead.., C * product of the kernel, out..), out as in Convolution.
    Options: kernel_size, stride, pad, dilation, their _h and _w forms and axis, as in Convolution; the other fields
    change nothing. Blobs: none.
    Source: BVLC im2col_layer.cpp; the same in all forks.
    """

    low_precision = {}
    quantizes = narrows = None

    def _check_channels(self, channels: int) -> None:
        """num_output and group mean nothing here."""

    # nor is there a weight
    def prunable(self, ins: Sequence[Shape]) -> Prunable | None:
        return None

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        g = self.geometry(ins)
        return [(*g.lead, g.channels * math.prod(g.kernel), *self.output(g))]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        return []

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.vision import Im2col as Module

        g = self.geometry(ins)
        return Module(len(g.lead), g.kernel, g.stride, g.pad, g.dilation)

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        return 0


@layer("SPP", field="spp_param")
class SPP(Layer):
    """Spatial pyramid pooling: level l pools to 2^l x 2^l bins; all levels flattened and joined: a top of one size for
    images of any size.

    Bottom: (N, C, H, W); top: (N, C (4^L - 1) / 3), L = pyramid_height. Level l pools with kernel and stride
    ceil(size / 2^l) and the padding (kernel 2^l - size + 1) / 2 on each axis, by the rules of Pooling.
    Options: pyramid_height L; pool MAX (default), AVE (padding counts as zeros), STOCHASTIC (no padding). engine is
    ignored.
    Source: BVLC spp_layer.cpp; He et al. 2014.
    """

    def __init__(self, proto: object, context: object, ntop: int) -> None:
        super().__init__(proto, context, ntop)  # type: ignore[arg-type]
        self.stateful_forward = self.param.pool == pb.SPPParameter.STOCHASTIC  # type: ignore[misc]

    def repeatable(self) -> bool:
        return True  # random numbers are torch's

    def _levels(self, ins: Sequence[Shape]) -> list[tuple[int, Pair, Pair]]:
        """(bins an axis, kernel, padding) of each level, checked."""
        shape, height = ins[0], self.param.pyramid_height
        if len(shape) != 4:
            raise self.fail(f"SPP needs a bottom of 4 axes (N, C, H, W), not {shape}", "bottom", 0)
        if height < 1:
            raise self.fail("pyramid_height must be given and positive", "spp_param", "pyramid_height")
        levels = []
        for level in range(height):
            bins = 2**level
            kernel = (-(-shape[2] // bins), -(-shape[3] // bins))
            pad = tuple((k * bins - size + 1) // 2 for k, size in zip(kernel, shape[2:], strict=True))
            if any(p >= k for p, k in zip(pad, kernel, strict=True)):
                text = f"level {level} of the pyramid wants {bins} x {bins} bins of an image of {shape[2]} x {shape[3]}"
                raise self.fail(text, "spp_param", "pyramid_height", hint="give fewer levels or larger images")
            if any(pad) and self.param.pool == pb.SPPParameter.STOCHASTIC:
                text = f"level {level} does not divide {shape[2]} x {shape[3]} evenly: STOCHASTIC has no padding"
                raise self.fail(text, "spp_param", "pool")
            levels.append((bins, kernel, (pad[0], pad[1])))
        return levels

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [(ins[0][0], ins[0][1] * sum(bins * bins for bins, _, _ in self._levels(ins)))]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import pooling as m
        from caffejacinto_py.layers.modules.vision import SPP as Module

        size = (ins[0][2], ins[0][3])
        windows = [m.Windows(size, kernel, kernel, pad, (bins, bins)) for bins, kernel, pad in self._levels(ins)]
        kind = {pb.SPPParameter.MAX: m.MaxPool, pb.SPPParameter.AVE: m.AveragePool}.get(
            self.param.pool, m.StochasticPool
        )
        return Module([kind(w) for w in windows])


@layer("Crop", bottoms=(2, 2), field="crop_param")
class Crop(Layer):
    """The part of bottom 0 that has the size of bottom 1 on the axes from `axis` on. The top may be a view.

    Bottoms: x; a reference of as many axes, of which only the shape counts. Top: the axes of x before `axis`, then
    those of the reference.
    Options: axis (2), negative counts from the end; offset: where the part starts: none (0), one for all cropped axes,
    or one each.
    Source: BVLC crop_layer.cpp; the same in all forks.
    """

    is_view = True

    def differentiable(self, i: int) -> bool:
        return i == 0

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0] if i == 1 else None

    def _span(self, ins: Sequence[Shape]) -> tuple[int, list[int]]:
        """(first cropped axis, offset of each cropped axis), checked."""
        x, ref = ins
        if len(ref) != len(x):
            raise self.fail(f"both bottoms must have as many axes: {x} and {ref}", "bottom", 1)
        axis = self.axis(self.param.axis, len(x), "crop_param", "axis")
        given, n = list(self.param.offset), len(x) - axis
        if len(given) not in (0, 1, n):
            text = f"{len(given)} offsets for {n} axes from axis {axis} on: give none, 1 or {n}"
            raise self.fail(text, "crop_param", "offset", 0)
        offsets = given if len(given) == n else (given or [0]) * n
        for i, offset in enumerate(offsets):
            a = axis + i
            if offset + ref[a] > x[a]:
                text = f"axis {a}: {ref[a]} from offset {offset} on is more than bottom 0 has ({x[a]})"
                where = ("crop_param", "offset", min(i, len(given) - 1)) if given else ("bottom", 1)
                raise self.fail(text, *where)
        return axis, offsets

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        axis, _ = self._span(ins)
        return [(*ins[0][:axis], *ins[1][axis:])]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.vision import Crop as Module

        return Module(*self._span(ins))


@layer("ROIPooling", bottoms=(2, 2), field="roi_pooling_param", forks="adaption")
class ROIPooling(Layer):
    """The maximum of each bin of a pooled_h x pooled_w grid laid over each region of interest.

    Bottoms: x (N, C, H, W); regions (R, 5) or (R, 5, 1, 1): image index n, x1, y1, x2, y2. Top: (R, C, pooled_h,
    pooled_w). A region runs from round(spatial_scale * corner 1) to round(spatial_scale * corner 2), both included, at
    least one pixel; bin i of a size s covers floor(i s / bins) to ceil((i + 1) s / bins) - 1, what lies outside the
    image is left out; an empty bin gives 0.
    Options: pooled_h, pooled_w; spatial_scale (1).
    The gradient goes to the first maximum of each bin, on every device (C++ has it on the GPU only), none to regions.
    Bin limits are exact whole numbers (C++ divides in float32). An image index out of range raises DataError.
    Source: ADaPTION roi_pooling_layer; Girshick 2015 (Fast R-CNN).
    """

    def differentiable(self, i: int) -> bool:
        return i == 0

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return (ins[0][0], 5) if i == 1 and ins[0] else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        x, rois = ins
        for field in ("pooled_h", "pooled_w"):
            if getattr(self.param, field) < 1:
                raise self.fail(f"{field} must be given and positive", "roi_pooling_param", field)
        if len(x) != 4:
            raise self.fail(f"bottom 0 must be (N, C, H, W), it is {x}", "bottom", 0)
        if not rois or math.prod(rois[1:]) != 5:
            raise self.fail(f"bottom 1, the regions, must be (R, 5): n, x1, y1, x2, y2; it is {rois}", "bottom", 1)
        return [(rois[0], x[1], self.param.pooled_h, self.param.pooled_w)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.vision import ROIPooling as Module

        where = f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'"
        return Module((self.param.pooled_h, self.param.pooled_w), self.param.spatial_scale, where)
