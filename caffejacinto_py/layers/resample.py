"""Interp and Upsample: feature maps of another size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

Pair = tuple[int, int]


def check_image(layer: Layer, shape: Shape, i: int = 0) -> None:
    if len(shape) != 4:
        raise layer.fail(f"{layer.type} needs a bottom of 4 axes (N, C, H, W), not {shape}", "bottom", i)


@layer(
    "Interp",
    v1="INTERP",
    field="interp_param",
    bottoms=(1, 2),
    forks="DeepLab, PSPNet, SegStereo, training_toolbox_caffe",
)
class Interp(Layer):
    """The image resized, bilinear, corner pixels on corner pixels: top pixel i reads bottom place
    i * (in - 1) / (out - 1), or 0 where out is 1.

    Bottoms: (N, C, H, W); optional, anything of 4 axes: its H and W are the top's. Top: (N, C, h, w).
    interp_param: pad_beg, pad_end (0; never positive): so many rows and columns are cut off first at the beginning and
    the end of either axis, in = H + pad_beg + pad_end. Then exactly one of: zoom_factor z, out = in + (in - 1)(z - 1);
    shrink_factor s, out = (in - 1) / s + 1, rounded down; both, first shrunk and then zoomed; height and width; the
    second bottom. interp_type bilinear (default) or nearest_neighbor (SegStereo), which takes pixel
    floor(place + 0.5).
    Differs: training_toolbox_caffe makes out = in * z for a zoom_factor alone; write height and width for its nets.
    Source: gpapan/caffe (DeepLab) interp_layer.cpp; hszhao/PSPNet interp.cpp; yangguorun/SegStereo interp_layer.cpp.
    """

    def differentiable(self, i: int) -> bool:
        return i == 0

    def _size(self, ins: Sequence[Shape]) -> Pair:
        p = self.param
        size = (ins[0][2] + p.pad_beg + p.pad_end, ins[0][3] + p.pad_beg + p.pad_end)
        factors = [f for f in ("zoom_factor", "shrink_factor") if p.HasField(f)]
        for name in factors:
            if getattr(p, name) < 1:
                raise self.fail(f"{name} must be at least 1, not {getattr(p, name)}", "interp_param", name)
        explicit = [f for f in ("height", "width") if p.HasField(f)]
        if len(explicit) == 1:
            raise self.fail("height and width belong together", "interp_param", explicit[0])
        if bool(factors) + bool(explicit) + (len(ins) > 1) != 1:
            text = "give the size once: zoom_factor and shrink_factor, or height and width, or a second bottom"
            raise self.fail(text, "interp_param", *(factors + explicit)[:1])
        if explicit:
            return p.height, p.width
        if len(ins) > 1:
            check_image(self, ins[1], 1)
            return ins[1][2], ins[1][3]
        # defaults of 1 leave the size as it is
        out = [(n - 1) // p.shrink_factor + 1 for n in size]
        return out[0] + (out[0] - 1) * (p.zoom_factor - 1), out[1] + (out[1] - 1) * (p.zoom_factor - 1)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        check_image(self, ins[0])
        p = self.param
        for name in ("pad_beg", "pad_end"):
            if getattr(p, name) > 0:
                raise self.fail(
                    f"{name} cuts off and is never positive; it is {getattr(p, name)}", "interp_param", name
                )
        if p.interp_type not in ("bilinear", "nearest_neighbor"):
            text = f"interp_type is bilinear or nearest_neighbor, not '{p.interp_type}'"
            raise self.fail(text, "interp_param", "interp_type")
        for n in ins[0][2:]:
            if n + p.pad_beg + p.pad_end < 1:
                raise self.fail(f"pad_beg and pad_end leave nothing of {n} pixels", "interp_param", "pad_beg")
        out = self._size(ins)
        if min(out) < 1:
            raise self.fail(f"the size must be positive, not {out}", "interp_param", "height")
        return [(*ins[0][:2], *out)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.resample import Interp as Module

        p = self.param
        size = self.shapes(ins)[0][2:]
        crop = (-p.pad_beg, -p.pad_end)
        return Module((size[0], size[1]), crop=crop, nearest=p.interp_type == "nearest_neighbor")


@layer(
    "Upsample",
    v1="UPSAMPLE",
    field="upsample_param",
    bottoms=(1, 2),
    forks="SegNet, ENet; MobileNet-YOLO, darknet ports",
)
class Upsample(Layer):
    """With a mask: each value goes to its place in a top of zeros. Without: each pixel becomes a block of its value.

    Bottoms: (N, C, H, W); optional: the mask, of the same shape, places y * w + x in the top as the second top of a MAX
    Pooling gives them (of values with one place the last one stays). Top: (N, C, h, w).
    upsample_param: upsample_h and upsample_w: the top's size; else scale (2), or scale_h and scale_w, times the
    bottom's; pad_out_h, pad_out_w (false; with a scale of 2 and a mask only): one row or column fewer.
    A place outside the top is an error on a CPU. Differs: C++ SegNet refuses sizes and scales below 2.
    Source: alexgkendall/caffe-segnet upsample_layer.cpp; eric612/MobileNet-YOLO upsample_layer.cpp (no mask, scale).
    """

    def differentiable(self, i: int) -> bool:
        return i == 0

    def _pair(self, names: Sequence[str], default: int) -> Pair:
        p = self.param
        given = [n for n in names if p.HasField(n)]
        if len(given) == 1:
            raise self.fail(f"{names[0]} and {names[1]} belong together", "upsample_param", given[0])
        values = (getattr(p, names[0]), getattr(p, names[1])) if given else (default, default)
        if min(values) < 1:
            raise self.fail(f"{' and '.join(names)} must be positive, not {values}", "upsample_param", names[0])
        return values

    def _size(self, ins: Sequence[Shape]) -> Pair:
        p = self.param
        if p.HasField("upsample_h") or p.HasField("upsample_w"):
            return self._pair(("upsample_h", "upsample_w"), 1)
        if p.HasField("scale") and (p.HasField("scale_h") or p.HasField("scale_w")):
            raise self.fail("give scale, or scale_h and scale_w, not both", "upsample_param", "scale")
        scale = self._pair(("scale_h", "scale_w"), p.scale)
        for name, value, s in zip(("pad_out_h", "pad_out_w"), (p.pad_out_h, p.pad_out_w), scale, strict=True):
            if value and (s != 2 or len(ins) < 2):
                raise self.fail(f"{name} goes with a scale of 2 and a mask only", "upsample_param", name)
        return ins[0][2] * scale[0] - p.pad_out_h, ins[0][3] * scale[1] - p.pad_out_w

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        check_image(self, ins[0])
        if len(ins) > 1 and ins[1] != ins[0]:
            raise self.fail(f"the mask must have the shape of bottom 0, {ins[0]}, not {ins[1]}", "bottom", 1)
        size = self._size(ins)
        if len(ins) == 1 and (size[0] % ins[0][2] or size[1] % ins[0][3]):
            text = f"without a mask the top's size must be a multiple of the bottom's {ins[0][2:]}, not {size}"
            raise self.fail(text, "upsample_param", "upsample_h", hint="give the mask as second bottom")
        return [(*ins[0][:2], *size)]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0] if i == 1 else None

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import resample as m

        h, w = self.shapes(ins)[0][2:]
        if len(ins) > 1:
            return m.Unpool((h, w), where=f"layer '{self.name}'")
        return m.Repeat((h // ins[0][2], w // ins[0][3]))
