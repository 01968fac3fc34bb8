"""PSROIPooling and ROIAlign: a fixed grid of numbers for each region of interest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.layers.resample import check_image

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Regions(Layer):
    """Base: bottom 1 holds regions (image in the batch, x1, y1, x2, y2), in pixels of the input image."""

    channels_last = False

    def differentiable(self, i: int) -> bool:
        return i == 0

    def check_regions(self, ins: Sequence[Shape]) -> int:
        """How many regions."""
        check_image(self, ins[0])
        shape = ins[1]
        if len(shape) < 2 or shape[1] != 5 or any(n != 1 for n in shape[2:]):
            text = f"bottom 1 must hold regions of 5 numbers, (R, 5) or (R, 5, 1, 1), not {shape}"
            raise self.fail(text, "bottom", 1)
        return shape[0]


@layer("PSROIPooling", field="psroi_pooling_param", bottoms=(2, 2), forks="R-FCN (daijifeng001/caffe-rfcn)")
class PSROIPooling(_Regions):
    """Each cell of a g x g grid over a region averages the pixels it touches, in a channel of its own.

    Bottoms: (N, D g^2, H, W); regions (R, 5): image number, x1, y1, x2, y2. Top: (R, D, g, g): cell (i, j) of channel d
    is the mean over the bottom's channel (d g + i) g + j. psroi_pooling_param, all required: spatial_scale; output_dim
    D; group_size g. A region begins at round(x1) * scale and ends at (round(x2) + 1) * scale, at least 0.1 apart; a
    cell takes whole pixels, from floor of its beginning to ceil of its end, inside the image; none: 0. No gradient to
    the regions. A region whose image number is not in the batch is 0 (C++ reads foreign memory).
    Differs: runs on a CPU too. Source: daijifeng001/caffe-rfcn psroi_pooling_layer.cu; Dai et al. 2016.
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        p, field = self.param, "psroi_pooling_param"
        for name in ("spatial_scale", "output_dim", "group_size"):
            if getattr(p, name) <= 0:
                raise self.fail(f"{name} must be given and positive", field, name)
        count = self.check_regions(ins)
        need = p.output_dim * p.group_size**2
        if ins[0][1] != need:
            text = f"output_dim {p.output_dim} and group_size {p.group_size} need {need} channels, not {ins[0][1]}"
            raise self.fail(text, "bottom", 0)
        return [(count, p.output_dim, p.group_size, p.group_size)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.roi_align import PSROIPooling as Module

        return Module(self.param.group_size, self.param.spatial_scale)


@layer(
    "ROIAlign",
    field="roi_align_param",
    bottoms=(2, 2),
    forks="Mask R-CNN ports, Huawei Ascend",
    spellings=("RoIAlign",),
)
class ROIAlign(_Regions):
    """Each cell of a grid over a region is the mean of bilinear samples at points evenly spread in it.

    Bottoms: (N, C, H, W); regions (R, 5): image number, x1, y1, x2, y2. Top: (R, C, pooled_h, pooled_w).
    roi_align_param: pooled_h, pooled_w (or aligned_h, aligned_w), required; spatial_scale (1); sampling_ratio (-1):
    samples per cell and axis, with 0 or less ceil(size of the region / pooled). Files that say roi_pooling_param give
    the first three there. The region is [x1, x2] * scale, at least 1 long, nothing is rounded. A sample up to one pixel
    outside the image takes the border's value, further out 0. No gradient to the regions.
    Differs: Caffe ports disagree. This is the layer of He et al. as Detectron and Huawei's documentation have it; other
    ports take the maximum of samples (fallingdust, nnop), or a grid of (pooled + 1)^2 corners (zhaoweicai's
    Cascade R-CNN). With sampling_ratio <= 0 a pass reads one number back from a GPU.
    Source: Huawei Ascend operator specification of ROIAlign (message and fields); He et al. 2017; for the fields of
    ports chuanqi305/caffe-fast-rcnn and fallingdust/caffe-fast-rcnn roi_align_layer.cpp.
    """

    def _grid(self) -> tuple[int, int, float]:
        """(pooled_h, pooled_w, spatial_scale)."""
        own: Any = self.param
        field = "roi_align_param"
        if not self.proto.HasField(field) and self.proto.HasField("roi_pooling_param"):
            own, field = self.proto.roi_pooling_param, "roi_pooling_param"
        sizes = []
        for name, other in (("pooled_h", "aligned_h"), ("pooled_w", "aligned_w")):
            value = getattr(own, name) or getattr(own, other, 0)
            if value < 1:
                raise self.fail(f"{name} must be given and positive", field, name)
            sizes.append(int(value))
        if own.spatial_scale <= 0:
            raise self.fail(f"spatial_scale must be positive, not {own.spatial_scale:g}", field, "spatial_scale")
        return sizes[0], sizes[1], own.spatial_scale

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        h, w, _ = self._grid()
        return [(self.check_regions(ins), ins[0][1], h, w)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.roi_align import ROIAlign as Module

        h, w, scale = self._grid()
        return Module((h, w), scale, samples=self.param.sampling_ratio)
