"""Layers for face recognition: MarginInnerProduct, LabelSpecificAdd, CenterLoss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Blob, Layer, Shape
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.loss import Loss
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn


def check_one_label_an_item(layer: Layer, ins: Sequence[Shape]) -> None:
    scores, labels = ins[0], ins[1]
    if not labels or labels[0] != scores[0] or math.prod(labels) != scores[0]:
        text = f"bottom 1 must hold one label for each of the {scores[0]} items, its shape is {labels}"
        raise layer.fail(text, "bottom", 1)


class _Labelled(Layer):
    """Base: bottom 1 holds one class number an item."""

    def differentiable(self, i: int) -> bool:
        return i == 0

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:1] if i == 1 and ins[0] else None


@layer(
    "MarginInnerProduct", field="margin_inner_product_param", bottoms=(2, 2), tops=(1, 2), forks="SphereFace, happynear"
)
class MarginInnerProduct(_Labelled):
    """SphereFace's angular margin: y = |x| cos(theta) with rows of W of length 1, and for the label's class
    y = (|x| psi(theta) + lambda |x| cos(theta)) / (1 + lambda), psi(theta) = (-1)^k cos(m theta) - 2 k,
    k = floor(m theta / pi).

    Bottoms: x (lead.., rest..), flattened from `axis` on; labels, one an item. Tops: (lead.., num_output); optional:
    lambda of this pass, (1). Blob: W (num_output, K). Every pass first scales the rows of W to length 1, in place.
    margin_inner_product_param: num_output, required; type SINGLE (m = 1, default), DOUBLE (2), TRIPLE (3), QUADRUPLE
    (4); weight_filler (zeros, which cannot be scaled: give one); axis (1); lambda = max(base (1 + gamma t)^-power,
    lambda_min) with base (1), gamma (0), power (1), lambda_min (0), t = iteration (0) + passes of this layer, this one
    included. t goes on in our solver states; resuming from C++'s, set `iteration`.
    The gradients are SphereFace's, not the derivative: for W that of a plain inner product; for x at the label's class
    the direction of the derivative d = a w + b x of |x| psi, divided by sqrt(a^2 + b^2).
    A label outside 0..num_output-1 raises DataError (on the CPU). Differs: x of length 0 gives 0, in C++ NaN.
    Source: wy1iu/sphereface margin_inner_product_layer.cpp (read at zjwzcnjsy/caffe); caffe.proto of
    happynear/caffe-windows; Liu et al. 2017.
    """

    stateful_forward = True
    channels_last = False

    def _first(self, ins: Sequence[Shape]) -> int:
        field = "margin_inner_product_param"
        if self.param.num_output < 1:
            raise self.fail("num_output must be given and positive", field, "num_output")
        axis = self.axis(self.param.axis, len(ins[0]), field, "axis")
        if axis != 1:
            raise self.fail("only axis 1 is supported: one label an item", field, "axis")
        return axis

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        first = self._first(ins)
        check_one_label_an_item(self, ins)
        return [(*ins[0][:first], self.param.num_output), (1,)][: self.ntop]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        return [filled_blob(self, (self.param.num_output, math.prod(ins[0][self._first(ins) :])), "weight_filler")]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import margin as m

        p = self.param
        schedule = m.Lambda(p.base, p.gamma, p.power, p.lambda_min)
        return m.MarginInnerProduct(
            blobs[0],
            margin=p.type + 1,
            schedule=schedule,
            iteration=p.iteration,
            with_lambda=self.ntop > 1,
            where=f"layer '{self.name}'",
        )

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        return math.prod(outs[0]) * math.prod(ins[0][self._first(ins) :])


@layer(
    "LabelSpecificAdd", field="label_specific_add_param", bottoms=(2, 2), tops=(1, 2), forks="AMSoftmax, happynear, ZF"
)
class LabelSpecificAdd(_Labelled):
    """In TRAIN the score of the label's class, where it is above -bias, plus bias; all others, and TEST: as they are.

    Bottoms: scores (N, C); labels, one an item. Tops: (N, C); optional: the bias of this pass, (1). The gradient passes
    unchanged. label_specific_add_param: bias (0; additive margin softmax has a negative one, -m); or bias_base: then
    bias = bias_base + (1 + bias_gamma t)^bias_power - 1, between bias_min and bias_max, t = iteration (0) + earlier
    passes in TRAIN; bias_gamma (0), bias_power (1), bias_min (0), bias_max (0). transform_test changes nothing: C++
    reads it in TRAIN only. A label outside 0..C-1 raises DataError (on the CPU). Differs: the second top in TEST is
    `bias`, where C++ leaves it unset. training_toolbox_caffe's layer of this name takes the absolute value of bias.
    Source: happynear/caffe-windows and zhanglaplace/Caffe-ZF label_specific_add_layer.cpp; Wang et al. 2018.
    """

    def __init__(self, proto: object, context: object, ntop: int) -> None:
        super().__init__(proto, context, ntop)  # type: ignore[arg-type]
        self.stateful_forward = self.param.HasField("bias_base")  # type: ignore[misc]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if len(ins[0]) < 2 or math.prod(ins[0][2:]) != 1:
            raise self.fail(f"bottom 0 must hold one score per class, (N, C), not {ins[0]}", "bottom", 0)
        check_one_label_an_item(self, ins)
        p = self.param
        if p.HasField("bias_base") and p.bias_min > p.bias_max:
            text = f"bias_min {p.bias_min:g} is above bias_max {p.bias_max:g}"
            raise self.fail(text, "label_specific_add_param", "bias_min")
        return [ins[0], (1,)][: self.ntop]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import margin as m

        p = self.param
        schedule = None
        if p.HasField("bias_base"):
            schedule = m.Annealed(p.bias_base, p.bias_gamma, p.bias_power, p.bias_min, p.bias_max)
        return m.LabelSpecificAdd(
            p.bias,
            schedule=schedule,
            iteration=p.iteration,
            with_bias=self.ntop > 1,
            where=f"layer '{self.name}'",
        )


@layer("CenterLoss", field="center_loss_param", bottoms=(2, 2), forks="caffe-face (ydwen), happynear")
class CenterLoss(Loss):
    """Half the mean squared distance to the center of the item's class: sum of |x - c[label]|^2 / (2 N).

    Bottoms: x (N, ...), flattened from `axis` on; labels, one an item. Top: the loss (). Blob: centers (num_output, K).
    center_loss_param: num_output, required: number of classes; center_filler (zeros); axis (1); distance_type L2 only.
    The gradient for x is the derivative. That of the centers is not: for each class in the batch
    sum of (c - x) / (1 + items of the class), whatever the loss weight; lr_mult and decay_mult of `param` apply to it
    as to any blob. A label outside 0..num_output-1 raises DataError (on the CPU). Differs: over iter_size batches these
    steps add up, C++ keeps the last batch's.
    Source: ydwen/caffe-face center_loss_layer.cpp; Wen et al. 2016.
    """

    channels_last = False

    def _first(self, ins: Sequence[Shape]) -> int:
        field = "center_loss_param"
        if self.param.num_output < 1:
            raise self.fail("num_output must be given and positive", field, "num_output")
        if self.param.distance_type != "L2":
            text = f"distance_type '{self.param.distance_type}' is not supported, only L2"
            raise self.fail(text, field, "distance_type")
        axis = self.axis(self.param.axis, len(ins[0]), field, "axis")
        if axis != 1:
            raise self.fail("only axis 1 is supported: one label an item", field, "axis")
        return axis

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self._first(ins)
        check_one_label_an_item(self, ins)
        return [()]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:1] if i == 1 and ins[0] else None

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        return [filled_blob(self, (self.param.num_output, math.prod(ins[0][self._first(ins) :])), "center_filler")]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.margin import CenterLoss as Module

        return Module(blobs[0], where=f"layer '{self.name}'")
