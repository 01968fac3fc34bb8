"""Convolution and Deconvolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from caffejacinto_py.layers.base import Blob, Copies, IntegerForm, Layer, Prunable, Shape
from caffejacinto_py.layers.dual import masters
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.folding import Affine, Folded, Refused, close_product, open_product
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELD = "convolution_param"
# read by the layers of volume.py
VOLUME_FIELDS = (
    "kernel_depth",
    "temporal_stride",
    "temporal_pad",
    "filter_group",
    "kernel_shape",
    "stride_shape",
    "pad_shape",
)


@dataclass(frozen=True)
class Geometry:
    """What convolution_param means for one bottom shape: lead axes, channels, and one number per spatial axis."""

    lead: Shape
    channels: int
    spatial: Shape
    kernel: Shape
    stride: Shape
    pad: Shape
    dilation: Shape


class _ConvBase(Layer):
    equal_counts = True
    quantizes: ClassVar[str | None] = "product"
    narrows: ClassVar[str | None] = "weights"
    transposed: ClassVar[bool] = False

    @property
    def at(self) -> str:
        """The field that `param` comes from, for errors."""
        return self.field or FIELD

    @property
    def kernel_field(self) -> str:
        """The field that gives the kernel's size."""
        return "kernel_h" if self.param.HasField("kernel_h") else "kernel_size"

    # on a CPU kernels of oneDNN bring weights into a layout of their own, and gradients back from it
    copies = Copies(forward=1.25, backward=2.125)

    def geometry(self, ins: Sequence[Shape]) -> Geometry:
        """The sizes, all checked. Raises LayerError naming the offending field."""
        shape, p = ins[0], self.param
        for i, other in enumerate(ins):
            if other != shape:
                raise self.fail(
                    f"all bottoms must have the shape of the first, {shape}; bottom {i} has {other}", "bottom", i
                )
        axis = self.axis(p.axis, len(shape), self.at, "axis")
        lead, channels, spatial = shape[:axis], shape[axis], shape[axis + 1 :]
        n = len(spatial)
        if n > 3:
            raise self.fail(f"{n} spatial axes (bottom {shape}, axis {axis}): at most 3 are supported", self.at, "axis")
        self._check_channels(channels)
        self._check_fields()
        kernel = self._per_axis("kernel_size", n, "kernel_h", "kernel_w", default=None, least=1)
        stride = self._per_axis("stride", n, "stride_h", "stride_w", default=1, least=1)
        pad = self._per_axis("pad", n, "pad_h", "pad_w", default=0, least=0)
        return Geometry(lead, channels, spatial, kernel, stride, pad, self._dilation(n))

    def _dilation(self, n: int) -> Shape:
        """`dilation`, or DeepLab's `hole` for it."""
        hole = [f for f in ("hole", "hole_h", "hole_w") if self.param.HasField(f)]
        if not hole:
            return self._per_axis("dilation", n, default=1, least=1)
        if self.param.dilation:
            raise self.fail(f"give dilation or {hole[0]}, not both", self.at, hole[0])
        values = (self.param.hole,) * n if hole == ["hole"] else (self.param.hole_h, self.param.hole_w)
        if len(values) != n or "hole" in hole[:-1]:
            raise self.fail("give hole, or hole_h and hole_w for 2 spatial axes", self.at, hole[0])
        if min(values, default=1) < 1:
            raise self.fail("hole must be at least 1", self.at, hole[0])
        return tuple(values)

    def _check_channels(self, channels: int) -> None:
        p, group = self.param, self.groups(channels)
        if p.num_output < 1:
            raise self.fail("num_output must be given and positive", self.at, "num_output")
        if group < 1:
            raise self.fail(f"group must be positive, not {group}", self.at, "group")
        if channels % group:
            raise self.fail(f"{channels} input channels are not divisible by group {group}", self.at, "group")
        if p.num_output % group:
            raise self.fail(f"num_output {p.num_output} is not divisible by group {group}", self.at, "num_output")

    def _check_fields(self) -> None:
        """Refuse what only other layers read."""
        for field in VOLUME_FIELDS:
            if self.param.HasField(field):
                hint = "use the type Convolution3D or NdConvolution, or kernel_size with one value per axis"
                raise self.fail(f"{self.type} does not read {field}", self.at, field, hint=hint)

    def groups(self, channels: int) -> int:
        """How many groups of channels are convolved each on its own."""
        return int(self.param.group)

    def _per_axis(self, name: str, n: int, *hw: str, default: int | None, least: int) -> Shape:
        """One value per spatial axis from the repeated field `name`, or from its _h and _w fields (2 axes only)."""
        p, given = self.param, list(getattr(self.param, name))
        paired = [f for f in hw if p.HasField(f)]
        if paired and given:
            raise self.fail(f"give {name} or {hw[0]} and {hw[1]}, not both", self.at, paired[0])
        if paired and n != 2:
            raise self.fail(f"{paired[0]} needs 2 spatial axes; this bottom has {n}: use {name}", self.at, paired[0])
        if paired:
            values, field = [getattr(p, f) for f in hw], paired[0]
        else:
            values, field = given, name
            if not given and default is None and n:
                raise self.fail("no kernel size: give kernel_size, or kernel_h and kernel_w", self.at, "kernel_size")
            if len(given) not in ((0, 1, n) if default is not None or not n else (1, n)):
                raise self.fail(f"{name} has {len(given)} values for {n} spatial axes: give 1 or {n}", self.at, name)
            if len(given) <= 1:
                values = (given or [default or 0]) * n
        for i, value in enumerate(values):
            if value < least:
                names = hw if paired else [name] * n
                raise self.fail(f"{names[i]} must be at least {least}, not {value}", self.at, field)
        return tuple(values)

    def output(self, g: Geometry) -> Shape:
        """Spatial sizes of the top."""
        raise NotImplementedError(self.type)

    def weight(self, g: Geometry) -> Shape:
        """Shape of blob 0."""
        raise NotImplementedError(self.type)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        g = self.geometry(ins)
        return [(*g.lead, self.param.num_output, *self.output(g))] * len(ins)

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        weight = filled_blob(self, self.weight(self.geometry(ins)), "weight_filler")
        return (
            [weight, filled_blob(self, (self.param.num_output,), "bias_filler")] if self.param.bias_term else [weight]
        )

    def unfolded(self, ins: Sequence[Shape]) -> int:
        g = self.geometry(ins)
        if {*g.kernel, *g.stride} <= {1} and not any(g.pad):
            return 0
        if self.transposed:  # one image at a time
            return math.prod((self.param.num_output // self.groups(g.channels), *g.kernel, *g.spatial))
        return math.prod((g.channels // self.groups(g.channels), *g.kernel, *g.lead, *self.output(g)))

    def adapt(self, blobs: list[Any], targets: Sequence[Shape]) -> list[Any]:
        """Of ADaPTION's low-precision layers the full-precision blobs."""
        return masters(blobs, targets)

    def output_axis(self, ins: Sequence[Shape]) -> int | None:
        if not self.transposed:
            return 0
        return 1 if self.groups(self.geometry(ins).channels) == 1 else None

    def prunable(self, ins: Sequence[Shape]) -> Prunable | None:
        g = self.geometry(ins)
        group = self.groups(g.channels)
        # of the types that convolve, Caffe prunes and counts this one only
        return Prunable(self.type == "Convolution", g.kernel, group, g.channels, self.param.num_output)

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        g = self.geometry(ins)
        if len(g.lead) != 1 or len(g.spatial) != 2:
            raise self.fail(f"integer programs convolve blobs of 4 axes (N, C, H, W), not {ins[0]}", self.at, "axis")
        numbers = {"stride": g.stride, "pad": g.pad, "dilation": g.dilation, "group": self.groups(g.channels)}
        return IntegerForm("deconv" if self.transposed else "conv", numbers)

    def _rows(self, g: Geometry) -> tuple[Shape, int, int]:
        """The weight as (group, .., .., taps), and the axes of its input and output channels there."""
        group = self.groups(g.channels)
        inner, outer = g.channels // group, self.param.num_output // group
        return ((group, inner, outer, -1), 1, 2) if self.transposed else ((group, outer, inner, -1), 2, 1)

    def _folding(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> tuple[Geometry, Any, Any]:
        """(geometry, weight by `_rows`, bias), float64. Raises Refused."""
        weight, bias = open_product(self, ins, blobs, bias=self.param.bias_term)
        g = self.geometry(ins)
        if len(g.lead) != 1:
            raise Refused(f"the channels of '{self.name}' are axis {len(g.lead)}, not 1")
        return g, weight.reshape(self._rows(g)[0]), bias

    def fold_output(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        g, weight, bias = self._folding(ins, blobs)
        shape, _, axis = self._rows(g)
        return close_product(weight * _along(affine.scale, shape, axis), bias * affine.scale + affine.shift, blobs)

    def fold_input(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        g, weight, bias = self._folding(ins, blobs)
        shape, axis, _ = self._rows(g)
        if affine.shifts:
            self._check_borders(g)
            axes = tuple(i for i in (1, 2, 3) if i != 3 - axis)
            bias = bias + (weight * _along(affine.shift, shape, axis)).sum(axes).reshape(-1)
        return close_product(weight * _along(affine.scale, shape, axis), bias, blobs)

    def _check_borders(self, g: Geometry) -> None:
        """A shift of the input is one bias only where all output pixels see equally many input pixels."""
        if self.transposed and any(n != 1 for n in (*g.kernel, *g.stride)):
            raise Refused(f"'{self.name}' ({self.type}) lays kernels over each other, so a shift before it is no bias")
        if any(g.pad):
            raise Refused(f"'{self.name}' pads with zeros, which a shift before it would change")

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.conv import Convolution as Module

        g = self.geometry(ins)
        return Module(
            blobs[0],
            blobs[1] if len(blobs) > 1 else None,
            stride=g.stride,
            padding=g.pad,
            dilation=g.dilation,
            groups=self.groups(g.channels),
            lead=len(g.lead),
            transposed=self.transposed,
        )


def _along(values: Any, shape: Shape, axis: int) -> Any:
    """One number per channel, for a weight by `_rows`."""
    spread = [shape[0], 1, 1, 1]
    spread[axis] = shape[axis]
    return values.reshape(spread)


@layer("Convolution", v1="CONVOLUTION", field=FIELD, bottoms=(1, None), tops=(1, None))
class Convolution(_ConvBase):
    """y[n, o] = b[o] + sum over c, k of W[o, c, k] x[n, c, stride * out + dilation * k - pad], cross-correlation, zero
    padded.

    Bottoms: any number of (lead.., C, spatial..), all of one shape; tops: (lead.., num_output, out..), as many, all
    through the same weights. 0 to 3 spatial axes; depthwise is group = C.
    Size: out = floor((in + 2 pad - (dilation (kernel - 1) + 1)) / stride) + 1.
    Blobs: W (num_output, C / group, kernel..), b (num_output) if bias_term.
    Options: num_output; kernel_size, stride (1), pad (0), dilation (1): one value, or one per spatial axis; or kernel_h
    and kernel_w, stride_h and stride_w, pad_h and pad_w (2 spatial axes); group (1); bias_term (true); weight_filler
    and bias_filler (zeros); axis (1): the channel axis, everything before it is batch; hole, or hole_h and hole_w:
    DeepLab's and PSPNet's names for dilation. engine, force_nd_im2col and the
    cuDNN fields choose kernels in C++ and change nothing here.
    Differs: a kernel larger than the padded input is an error (C++ division truncates to an output of 1 when stride >
    1).
    Source: BVLC base_conv_layer.cpp, conv_layer.cpp; the same in all forks.
    """

    low_precision = {"adaption": "LPConvolution", "ristretto": "ConvolutionRistretto"}

    def output(self, g: Geometry) -> Shape:
        out = []
        for size, k, s, p, d in zip(g.spatial, g.kernel, g.stride, g.pad, g.dilation, strict=True):
            reach = d * (k - 1) + 1
            if size + 2 * p < reach:
                text = f"the kernel covers {reach} pixels, but the input has {size} and padding adds {2 * p}: no output"
                raise self.fail(text, self.at, self.kernel_field)
            out.append((size + 2 * p - reach) // s + 1)
        return tuple(out)

    def weight(self, g: Geometry) -> Shape:
        return (self.param.num_output, g.channels // self.groups(g.channels), *g.kernel)

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        g = self.geometry(ins)
        return len(outs) * math.prod(outs[0]) * (g.channels // self.groups(g.channels)) * math.prod(g.kernel)


@layer("Deconvolution", v1="DECONVOLUTION", field=FIELD, bottoms=(1, None), tops=(1, None))
class Deconvolution(_ConvBase):
    """The transpose of Convolution: each input pixel adds W[c, o] x[n, c] to the output at stride * in + dilation * k -
    pad.

    Bottoms: any number of (lead.., C, spatial..), all of one shape; tops: (lead.., num_output, out..), as many.
    Size: out = stride (in - 1) + dilation (kernel - 1) + 1 - 2 pad.
    Blobs: W (C, num_output / group, kernel..), which is also torch's layout; b (num_output) if bias_term.
    Options as in Convolution. The classic upsampling layer: kernel 2f - f % 2, stride f, pad ceil((f - 1) / 2), group =
    num_output = C, weight_filler bilinear, lr_mult 0.
    Source: BVLC deconv_layer.cpp; the same in all forks.
    """

    low_precision = {"ristretto": "DeconvolutionRistretto"}
    transposed = True

    def output(self, g: Geometry) -> Shape:
        out = []
        for size, k, s, p, d in zip(g.spatial, g.kernel, g.stride, g.pad, g.dilation, strict=True):
            full = s * (size - 1) + d * (k - 1) + 1
            if full <= 2 * p:
                text = f"the output has {full} pixels and pad takes {2 * p} of them: nothing is left"
                raise self.fail(text, self.at, "pad_h" if self.param.HasField("pad_h") else "pad")
            out.append(full - 2 * p)
        return tuple(out)

    def weight(self, g: Geometry) -> Shape:
        return (g.channels, self.param.num_output // self.groups(g.channels), *g.kernel)

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        g = self.geometry(ins)
        return len(ins) * math.prod(ins[0]) * (self.param.num_output // self.groups(g.channels)) * math.prod(g.kernel)


@layer(
    "DepthwiseConvolution",
    field=FIELD,
    bottoms=(1, None),
    tops=(1, None),
    forks="yonghenglh6, farmingyard, MobileNet-YOLO, training_toolbox_caffe",
    spellings=("ConvolutionDepthwise",),
)
class DepthwiseConvolution(Convolution):
    """A Convolution with one group per input channel: top channel o reads bottom channel o * C // num_output only.

    Bottoms, tops, size and options as in Convolution. Blobs: W (num_output, 1, kernel..), b (num_output) if bias_term.
    num_output: C or a multiple of it. group: C if it is not given.
    Differs: the layer called ConvolutionDepthwise reads neither num_output nor group and always has C top channels;
    here another num_output than its files have makes another top.
    Source: yonghenglh6/DepthwiseConvolution depthwise_conv_layer.cpp (a Convolution, group written out);
    openvinotoolkit/training_toolbox_caffe conv_dw_layer.cpp (BVLC pull request 5665).
    """

    def groups(self, channels: int) -> int:
        return int(self.param.group) if self.param.HasField("group") else channels

    def replacement(self, scheme: str, ins: Sequence[Shape]) -> Any:
        made = super().replacement(scheme, ins)
        if made is not None:
            made.convolution_param.group = self.groups(self.geometry(ins).channels)
        return made
