"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import IntegerForm, Layer, Saved, Shape
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELD = "pooling_param"
MAX, AVE, STOCHASTIC = 0, 1, 2  # PoolingParameter.PoolMethod
FLOOR = 1  # PoolingParameter.RoundMode
VOLUME_FIELDS = ("kernel_depth", "temporal_stride", "temporal_pad", "kernel_shape", "stride_shape", "pad_shape")
Pair = tuple[int, int]


@layer("Pooling", v1="POOLING", field=FIELD, tops=(1, 2))
class Pooling(Layer):
    """One number per window of each channel.

    MAX: the largest value, the first of equals. AVE: the mean; zeros of the padding count, what hangs over the padded
    image does not. STOCHASTIC (values >= 0): TRAIN one value drawn in proportion to the values, TEST sum x^2 / sum x.
    Bottom: (N, C, H, W). Tops: (N, C, h, w); MAX only, second top: the place y * W + x of each maximum, as numbers.
    Size: out = ceil((in + 2 pad - kernel) / stride) + 1 (round_mode FLOOR: floor); with any padding a last window that
    would start behind the image and its near padding is dropped, on both axes. Without padding it is not: with stride >
    kernel a window can be empty; MAX then gives -FLT_MAX (mask -1), AVE divides zero by what is left of the window (0,
    -0 or NaN), as in Caffe.
    Options: pool (MAX); kernel_size, or kernel_h and kernel_w; stride (1), or stride_h and stride_w; pad (0), or pad_h
    and pad_w, smaller than the kernel, not with STOCHASTIC; global_pooling (false): one window, no other size;
    round_mode (CEIL; BVLC and Ristretto only), or ceil_mode (true; BVLC pull request 3057, SqueezeNet and MobileNet
    ports): false is round_mode FLOOR. engine and NVCaffe's torch_pooling change nothing.
    Differs: STOCHASTIC runs on a CPU too, and its TEST gradient is the derivative (C++ has none).
    Source: BVLC pooling_layer.cpp and .cu; Zeiler and Fergus 2013 for STOCHASTIC.
    """

    quantizes = "plain"

    def __init__(self, proto: object, context: object, ntop: int) -> None:
        super().__init__(proto, context, ntop)  # type: ignore[arg-type]
        # STOCHASTIC adds up squares; only it draws random numbers in training
        self.narrows = None if self.param.pool == STOCHASTIC else "values"  # type: ignore[misc]
        self.stateful_forward = self.param.pool == STOCHASTIC  # type: ignore[misc]

    def _pair(self, name: str, default: int | None, least: int) -> Pair:
        """Height and width from the field `name` or from its pair of fields."""
        p = self.param
        both = {"kernel_size": ("kernel_h", "kernel_w")}.get(name, (f"{name}_h", f"{name}_w"))
        paired = [f for f in both if p.HasField(f)]
        if paired and p.HasField(name):
            raise self.fail(f"give {name} or {both[0]} and {both[1]}, not both", FIELD, paired[0])
        if len(paired) == 1:
            raise self.fail(f"{both[0]} and {both[1]} belong together; only {paired[0]} is given", FIELD, paired[0])
        if not paired and not p.HasField(name) and default is None:
            raise self.fail("no kernel size: give kernel_size, or kernel_h and kernel_w", FIELD, name)
        values = (getattr(p, both[0]), getattr(p, both[1])) if paired else (getattr(p, name),) * 2
        for field, value in zip(both if paired else (name, name), values, strict=True):
            if value < least:
                raise self.fail(f"{field} must be at least {least}, not {value}", FIELD, field)
        return values

    def _windows(self, ins: Sequence[Shape]) -> tuple[Pair, Pair, Pair, Pair, Pair]:
        """(size, kernel, stride, pad, out), each (height, width), all checked."""
        p, shape = self.param, ins[0]
        if len(shape) != 4:
            raise self.fail(f"pooling needs a bottom of 4 axes (N, C, H, W), not {shape}", "bottom", 0)
        for field in VOLUME_FIELDS:
            if p.HasField(field):
                raise self.fail(f"Pooling does not read {field}", FIELD, field, hint="use Pooling3D or NdPooling")
        if self.ntop > 1 and p.pool != MAX:
            raise self.fail("only MAX pooling has a second top (the places of the maxima)", FIELD, "pool")
        size = (shape[2], shape[3])
        pad, stride = self._pair("pad", 0, 0), self._pair("stride", 1, 1)
        if p.global_pooling:
            for field in ("kernel_size", "kernel_h", "kernel_w"):
                if p.HasField(field):
                    raise self.fail(f"global_pooling takes the whole image; leave out {field}", FIELD, field)
            if pad != (0, 0) or stride != (1, 1):
                field = "stride" if pad == (0, 0) else "pad"
                field = field if p.HasField(field) else f"{field}_h"
                raise self.fail("global_pooling goes with pad 0 and stride 1 only", FIELD, field)
            return size, size, stride, pad, (1, 1)
        kernel = self._pair("kernel_size", None, 1)
        if any(pad):
            self._check_pad(kernel, pad)
        return size, kernel, stride, pad, self._output(size, kernel, stride, pad)

    def _check_pad(self, kernel: Pair, pad: Pair) -> None:
        paired = self.param.HasField("pad_h")
        if self.param.pool == STOCHASTIC:
            raise self.fail("STOCHASTIC pooling has no padding", FIELD, "pad_h" if paired else "pad")
        for name, k, p in zip(("pad_h", "pad_w"), kernel, pad, strict=True):
            if p >= k:
                text = f"the padding ({p}) must be smaller than the kernel ({k})"
                raise self.fail(text, FIELD, name if paired else "pad")

    def _floor(self) -> bool:
        p = self.param
        if not p.HasField("ceil_mode"):
            return bool(p.round_mode == FLOOR)
        if p.HasField("round_mode") and (p.round_mode == FLOOR) == p.ceil_mode:
            raise self.fail("round_mode and ceil_mode contradict each other; give one of them", FIELD, "ceil_mode")
        return not p.ceil_mode

    def _output(self, size: Pair, kernel: Pair, stride: Pair, pad: Pair) -> Pair:
        """Caffe's rule, see the class."""
        floor = self._floor()
        out = []
        for h, k, s, p in zip(size, kernel, stride, pad, strict=True):
            room = h + 2 * p - k
            steps = room // s if floor else -(-room // s)
            if any(pad) and steps * s >= h + p:
                steps -= 1
            if steps < 0:
                field = "kernel_h" if self.param.HasField("kernel_h") else "kernel_size"
                text = f"a kernel of {k} does not fit an input of {h} with padding {p}: no output"
                raise self.fail(text, FIELD, field)
            out.append(steps + 1)
        return out[0], out[1]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        *_, out = self._windows(ins)
        return [(*ins[0][:2], *out)] * self.ntop

    def repeatable(self) -> bool:
        return True  # random numbers are torch's

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        if self.param.pool == STOCHASTIC:  # the windows, and which value was drawn
            _, kernel, *_ = self._windows(ins)
            windows = prod(outs[0]) * prod(kernel) * item
            return Saved(extra=windows + 8 * prod(outs[0]), scratch=2 * windows, passing=4 * windows)
        places = 8 * prod(outs[0]) if self.param.pool == MAX else 0  # int64
        # in channels_last torch makes a second gradient of the bottom, and copies the places
        return Saved((0,), extra=places, scratch=item * prod(ins[0]) + places)

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        if self.param.pool == STOCHASTIC:
            raise self.fail("integer programs have no STOCHASTIC pooling", FIELD, "pool", hint="use AVE or MAX")
        if self.ntop > 1:
            raise self.fail("integer programs have no second top of MAX pooling", "top", 1)
        size, kernel, stride, pad, out = self._windows(ins)
        for o, h, k, s, p in zip(out, size, kernel, stride, pad, strict=True):
            if (o - 1) * s - p >= h or k <= p:
                raise self.fail("the last window is empty: integer programs have no number for it", FIELD, "stride")
        numbers = {"kernel": kernel, "stride": stride, "pad": pad, "out": out}
        return IntegerForm("max_pool" if self.param.pool == MAX else "average_pool", numbers)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import pooling as m

        windows = m.Windows(*self._windows(ins))
        if self.param.pool == MAX:
            return m.MaxPool(windows, mask=self.ntop > 1)
        return m.AveragePool(windows) if self.param.pool == AVE else m.StochasticPool(windows)
