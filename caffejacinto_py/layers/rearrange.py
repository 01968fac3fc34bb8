"""ShuffleChannel, Reorg, Transpose, Reverse, Flip: the same numbers in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.layers.resample import check_image

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("ShuffleChannel", field="shuffle_channel_param", forks="farmingyard/ShuffleNet, xieguotian")
class ShuffleChannel(Layer):
    """Channels seen as (group, C / group) and transposed: top channel j * group + i is bottom channel
    i * C / group + j.

    Bottom and top: (N, C, ...). shuffle_channel_param: group (1), a divisor of C.
    Source: xieguotian/caffe shuffle_channel_layer.cpp; Zhang et al. 2017.
    """

    narrows = "moves"
    is_view = True  # with one group the bottom itself is the top

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        group, shape = self.param.group, ins[0]
        if len(shape) < 2:
            raise self.fail(f"ShuffleChannel needs a bottom of at least 2 axes, not {shape}", "bottom", 0)
        if group < 1 or shape[1] % group:
            raise self.fail(f"group {group} does not divide {shape[1]} channels", "shuffle_channel_param", "group")
        return [shape]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.rearrange import ShuffleChannel as Module

        self.shapes(ins)
        return Module(self.param.group)


@layer("Reorg", field="reorg_param", forks="caffe-yolo9000, caffe-yolov2, hustzxd")
class Reorg(Layer):
    """darknet's passthrough layer: s x s blocks of pixels and channels traded, in darknet's own order.

    Bottom: (N, C, H, W), C a multiple of s^2. reorg_param: stride s, required; reverse (false).
    reverse: top (N, C / s^2, s H, s W); pixel (s y + a, s x + b) of channel k is pixel (y, x) of the bottom's channel
    (s a + b) C / s^2 + k. Without it the inverse for the same C, H and W: the bottom's numbers in C order, read as
    (N, C / s^2, s H, s W), are put back into the order of (N, C, H, W), and the result, in C order, is the top
    (N, C s^2, H / s, W / s); H and W multiples of s. Caffe forbids it in place.
    Differs: choasup/caffe-yolo9000 has the two directions the other way round.
    Source: hustzxd/z0 and Cambricon/caffe reorg_layer.cpp, which are darknet's; Redmon and Farhadi 2016.
    """

    forbids_inplace = True
    channels_last = False

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        check_image(self, ins[0])
        n, c, h, w = ins[0]
        s = self.param.stride
        if s < 1:
            raise self.fail("stride must be given and positive", "reorg_param", "stride")
        if c % (s * s):
            raise self.fail(f"{c} channels are no multiple of stride^2 = {s * s}", "reorg_param", "stride")
        if self.param.reverse:
            return [(n, c // (s * s), h * s, w * s)]
        if h % s or w % s:
            raise self.fail(f"the size {h} x {w} is no multiple of the stride {s}", "reorg_param", "stride")
        return [(n, c * s * s, h // s, w // s)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.rearrange import Reorg as Module

        return Module(self.param.stride, reverse=self.param.reverse)


@layer("Transpose", field="transpose_param", forks="tianzhi0549, yutkin (CRNN)")
class Transpose(Layer):
    """Axes in another order: axis i of the top is axis dim[i] of the bottom.

    Any shape. transpose_param: dim, one per axis, each axis once. Caffe forbids it in place.
    Source: tianzhi0549/caffe transpose_layer.cpp.
    """

    is_view = forbids_inplace = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        dims = list(self.param.dim)
        if sorted(dims) != list(range(len(ins[0]))):
            text = f"dim must name each axis of the bottom {ins[0]} once: 0 to {len(ins[0]) - 1}, not {dims}"
            raise self.fail(text, "transpose_param", "dim")
        return [tuple(ins[0][d] for d in dims)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.rearrange import Transpose as Module

        return Module(list(self.param.dim))


@layer("Reverse", field="reverse_param", forks="tianzhi0549, yutkin (CRNN), training_toolbox_caffe")
class Reverse(Layer):
    """One axis backwards.

    Any shape. reverse_param: axis (0; negative counts from the end). Caffe forbids it in place.
    Source: yutkin/caffe reverse_layer.cpp; openvinotoolkit/training_toolbox_caffe caffe.proto.
    """

    forbids_inplace = True

    def _axes(self, shape: Shape) -> list[int]:
        return [self.axis(self.param.axis, len(shape), "reverse_param", "axis")]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not ins[0]:
            raise self.fail("the bottom is a scalar", "bottom", 0)
        self._axes(ins[0])
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.rearrange import Flip as Module

        return Module(self._axes(ins[0]))


@layer("Flip", field="flip_param", forks="happynear")
class Flip(Layer):
    """Images mirrored, always.

    Bottom and top: (N, C, H, W). flip_param: flip_width (true): columns; flip_height (false): rows.
    Source: happynear/caffe-windows flip_layer.cpp.
    """

    is_view = True  # with no axis the bottom itself is the top

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        check_image(self, ins[0])
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.rearrange import Flip as Module

        chosen = (self.param.flip_height, self.param.flip_width)
        return Module([axis for axis, on in zip((2, 3), chosen, strict=True) if on])
