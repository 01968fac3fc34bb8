"""Convolution3D, Pooling3D, NdConvolution, NdPooling: layers of nets for videos and volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.conv import Convolution, Geometry
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

STOCHASTIC, AVE = 2, 1  # PoolingParameter.PoolMethod


class _Kernel:
    """Sizes of a kernel from the fields of one parameter message, one number per spatial axis."""

    def __init__(self, owner: Layer, param: Any, field: str, axes: int) -> None:
        self.owner, self.param, self.field, self.axes = owner, param, field, axes

    def depth(self, name: str, *spellings: str, default: int | None) -> int:
        """The first of the fields that is given."""
        for field in spellings:
            if field in self.param.DESCRIPTOR.fields_by_name and self.param.HasField(field):
                return int(getattr(self.param, field))
        if default is None:
            raise self.owner.fail(f"{name} is missing: give {spellings[0]}", self.field, spellings[0])
        return default

    def plane(self, name: str, *pair: str, default: int | None) -> tuple[int, int]:
        """Height and width, from `name` (repeated or not) or from its pair of fields."""
        given: Any = getattr(self.param, name)
        if not isinstance(given, int):
            values = list(given)
            if len(values) > 1:
                text = f"{name} is one number for height and width here"
                raise self.owner.fail(
                    text, self.field, name, hint="write NdConvolution with kernel_shape, stride_shape"
                )
        else:
            values = [given] if self.param.HasField(name) else []
        paired = [f for f in pair if f in self.param.DESCRIPTOR.fields_by_name and self.param.HasField(f)]
        if paired and values:
            raise self.owner.fail(f"give {name}, or {pair[0]} and {pair[1]}, not both", self.field, paired[0])
        if len(paired) == 1:
            raise self.owner.fail(f"{pair[0]} and {pair[1]} belong together", self.field, paired[0])
        if paired:
            return getattr(self.param, pair[0]), getattr(self.param, pair[1])
        if not values and default is None:
            raise self.owner.fail(f"{name} is missing", self.field, name)
        value = values[0] if values else int(default or 0)
        return value, value

    def volume(self) -> tuple[Shape, Shape, Shape]:
        """(kernel, stride, pad) over length, height and width."""
        k = self.depth("the kernel's length", "kernel_depth", "kernel_l", default=None)
        s = self.depth("", "temporal_stride", "stride_l", default=1)
        p = self.depth("", "temporal_pad", "pad_l", default=0)
        kernel = (k, *self.plane("kernel_size", "kernel_h", "kernel_w", default=None))
        stride = (s, *self.plane("stride", "stride_h", "stride_w", default=1))
        return self.checked(kernel, stride, (p, *self.plane("pad", "pad_h", "pad_w", default=0)))

    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """(kernel, stride, pad) from kernel_shape, stride_shape and pad_shape."""
        found = []
        for name, default in (("kernel_shape", None), ("stride_shape", 1), ("pad_shape", 0)):
            dims = list(getattr(self.param, name).dim)
            if not dims and default is None:
                raise self.owner.fail("kernel_shape is missing", self.field, name, hint="kernel_shape { dim: 3 ... }")
            if dims and len(dims) != self.axes:
                text = f"{name} has {len(dims)} numbers for {self.axes} spatial axes"
                raise self.owner.fail(text, self.field, name)
            found.append(tuple(dims) if dims else (default or 0,) * self.axes)
        return self.checked(*found)

    def checked(self, kernel: Shape, stride: Shape, pad: Shape) -> tuple[Shape, Shape, Shape]:
        if min(kernel, default=1) < 1 or min(stride, default=1) < 1 or min(pad, default=0) < 0:
            text = f"kernel {kernel} and stride {stride} must be positive, pad {pad} not negative"
            raise self.owner.fail(text, self.field)
        return kernel, stride, pad


class _Volume(Convolution):
    """Base: a Convolution whose sizes have fields of their own."""

    narrows = None
    low_precision = {}  # the types that stand for Convolution do not read those fields

    def sizes(self, axes: int) -> tuple[Shape, Shape, Shape]:
        """(kernel, stride, pad)."""
        raise NotImplementedError(self.type)

    @property
    def kernel_field(self) -> str:
        return "kernel_shape" if "kernel_shape" in self.param.DESCRIPTOR.fields_by_name else "kernel_size"

    def geometry(self, ins: Sequence[Shape]) -> Geometry:
        shape = ins[0]
        for i, other in enumerate(ins):
            if other != shape:
                raise self.fail(f"bottom {i} must have the shape of the first, {shape}, not {other}", "bottom", i)
        axes = len(shape) - 2
        if not 1 <= axes <= 3:
            raise self.fail(f"the bottom must be (N, C, spatial..) with 1 to 3 spatial axes, not {shape}", "bottom", 0)
        self._check_channels(shape[1])
        kernel, stride, pad = self.sizes(axes)
        return Geometry(shape[:1], shape[1], shape[2:], kernel, stride, pad, (1,) * axes)

    def adapt(self, blobs: list[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        # C3D keeps the bias as (1, 1, 1, 1, num_output)
        pairs = zip(blobs, targets, strict=False)
        flat = [b.reshape(t) if len(t) == 1 and b.shape[-1:] == t and b.size == t[0] else b for b, t in pairs]
        return flat + blobs[len(flat) :]


@layer(
    "Convolution3D",
    v1="CONVOLUTION3D",
    field="convolution3d_param",
    bottoms=(1, None),
    tops=(1, None),
    forks="C3D, ZhaofanQiu",
)
class Convolution3D(_Volume):
    """Convolution over length, height and width.

    Bottoms: (N, C, L, H, W), all of one shape; tops: (N, num_output, l, h, w), as many. Blobs and sizes as in
    Convolution: W (num_output, C / group, kernel length, height, width), b (num_output) if bias_term.
    convolution3d_param, or with C3D 1.0 convolution_param: num_output; kernel_size, stride (1), pad (0): height and
    width; kernel_depth, temporal_stride (1), temporal_pad (0), or kernel_l, stride_l, pad_l: length; group (1);
    bias_term (true); weight_filler, bias_filler (zeros). filter_group (C3D) saves memory in C++ and changes nothing.
    Source: facebookarchive/C3D convolution3d_layer.cpp (1.0 and 1.1); ZhaofanQiu/caffe base_conv3D_layer.cpp;
    Tran et al. 2015.
    """

    def __init__(self, proto: Any, context: Any, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        if not proto.HasField("convolution3d_param"):
            self.field = "convolution_param"  # type: ignore[misc]
            self.param = proto.convolution_param

    def sizes(self, axes: int) -> tuple[Shape, Shape, Shape]:
        if axes != 3:
            raise self.fail("Convolution3D needs a bottom of 5 axes (N, C, L, H, W)", "bottom", 0)
        return _Kernel(self, self.param, self.at, axes).volume()


@layer("NdConvolution", field="convolution_param", bottoms=(1, None), tops=(1, None), forks="video-caffe")
class NdConvolution(_Volume):
    """Convolution over 1 to 3 spatial axes.

    Bottoms: (N, C, spatial..), all of one shape; tops: (N, num_output, out..), as many. Blobs and sizes as in
    Convolution. convolution_param: num_output; kernel_shape { dim: .. }, one dim per spatial axis; stride_shape (1s);
    pad_shape (0s); group (1); bias_term (true); weight_filler, bias_filler (zeros).
    Source: chuckcho/video-caffe README (fields and example).
    """

    def sizes(self, axes: int) -> tuple[Shape, Shape, Shape]:
        if not self.param.HasField("kernel_shape") and self.param.kernel_size:
            hint = "kernel_shape { dim: 3 dim: 3 dim: 3 }, or the type Convolution"
            raise self.fail("NdConvolution reads kernel_shape, not kernel_size", self.at, "kernel_size", hint=hint)
        return _Kernel(self, self.param, self.at, axes).shapes()


class _VolumePool(Layer):
    """Base: Caffe's windows over 1 to 3 spatial axes."""

    channels_last = False

    def sizes(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """(kernel, stride, pad)."""
        raise NotImplementedError(self.type)

    def windows(self, ins: Sequence[Shape]) -> tuple[Shape, Shape, Shape, Shape]:
        """(kernel, stride, pad, out), checked."""
        shape, field = ins[0], str(self.field)
        if not 3 <= len(shape) <= 5:
            raise self.fail(f"the bottom must be (N, C, spatial..) with 1 to 3 spatial axes, not {shape}", "bottom", 0)
        if self.param.pool == STOCHASTIC:
            raise self.fail("volumes have no STOCHASTIC pooling, in C++ neither", field, "pool")
        kernel, stride, pad = self.sizes(shape)
        out = []
        for n, k, s, p in zip(shape[2:], kernel, stride, pad, strict=True):
            if p and p >= k:
                raise self.fail(f"the padding ({p}) must be smaller than the kernel ({k})", field)
            steps = -(-(n + 2 * p - k) // s)
            if any(pad) and steps * s >= n + p:
                steps -= 1
            if steps < 0:
                raise self.fail(f"a kernel of {k} does not fit an input of {n} with padding {p}: no output", field)
            out.append(steps + 1)
        return kernel, stride, pad, tuple(out)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [(*ins[0][:2], *self.windows(ins)[-1])]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.volume import VolumePool as Module

        return Module(ins[0][2:], *self.windows(ins), average=self.param.pool == AVE)


@layer("Pooling3D", v1="POOLING3D", field="pooling3d_param", forks="C3D, ZhaofanQiu")
class Pooling3D(_VolumePool):
    """MAX or AVE over windows of length, height and width, by the rules of Pooling.

    Bottom: (N, C, L, H, W); top: (N, C, l, h, w), sizes rounded up. pooling3d_param, or with C3D 1.0 pooling_param:
    pool MAX (default) or AVE; kernel_size, or kernel_h and kernel_w; stride (1), pad (0) likewise: height and width;
    kernel_depth, temporal_stride (1), temporal_pad (0), or kernel_l, stride_l, pad_l: length; global_pooling (false;
    ZhaofanQiu). engine changes nothing.
    Differs: with padding C3D keeps a last window that starts behind the image; here it is dropped, as in Pooling and
    ZhaofanQiu's layer. C3D gives every one of equal maxima the gradient, here the first has it.
    Source: facebookarchive/C3D pool3d_layer.cpp (1.0 and 1.1); ZhaofanQiu/caffe pooling3d_layer.cpp.
    """

    def __init__(self, proto: Any, context: Any, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        if not proto.HasField("pooling3d_param"):
            self.field = "pooling_param"  # type: ignore[misc]
            self.param = proto.pooling_param

    def sizes(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        if len(shape) != 5:
            raise self.fail(f"Pooling3D needs a bottom of 5 axes (N, C, L, H, W), not {shape}", "bottom", 0)
        if not self.param.global_pooling:
            return _Kernel(self, self.param, str(self.field), 3).volume()
        for field in ("kernel_size", "kernel_depth", "kernel_h", "kernel_w"):
            if self.param.HasField(field):
                raise self.fail(f"global_pooling takes the whole volume; leave out {field}", str(self.field), field)
        return shape[2:], (1, 1, 1), (0, 0, 0)


@layer("NdPooling", field="pooling_param", forks="video-caffe")
class NdPooling(_VolumePool):
    """MAX or AVE over windows of 1 to 3 spatial axes, by the rules of Pooling.

    Bottom: (N, C, spatial..); top: (N, C, out..), sizes rounded up. pooling_param: pool MAX (default) or AVE;
    kernel_shape { dim: .. }, one dim per spatial axis; stride_shape (1s); pad_shape (0s); global_pooling (false).
    Source: chuckcho/video-caffe README (fields and example); sizes as in BVLC pooling_layer.cpp.
    """

    def sizes(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        axes = len(shape) - 2
        if self.param.global_pooling:
            return shape[2:], (1,) * axes, (0,) * axes
        return _Kernel(self, self.param, "pooling_param", axes).shapes()
