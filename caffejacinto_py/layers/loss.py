"""Losses: two bottoms and a scalar top, whose loss weight is 1 unless the prototxt says otherwise.

Modules return it unweighted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Head, Layer, Saved, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn


def label_shape(scores: Shape, axis: int) -> Shape:
    """The usual shape of class labels for these scores: (N,) for one label an item, else 1 in place of the classes."""
    if math.prod(scores[axis + 1 :]) == 1:
        return scores[:axis]
    return (*scores[:axis], 1, *scores[axis + 1 :])


def check_label_count(layer: Layer, ins: Sequence[Shape], axis: int) -> None:
    """Raise LayerError unless bottom 1 has one label for every place of the scores outside the class axis."""
    scores, labels = ins[0], ins[1]
    need = math.prod(scores[:axis]) * math.prod(scores[axis + 1 :])
    if math.prod(labels) != need:
        raise layer.fail(
            f"bottom 0 '{layer.proto.bottom[0]}' {scores} with classes on axis {axis} needs {need} labels, "
            f"bottom 1 '{layer.proto.bottom[1]}' {labels} has {math.prod(labels)}",
            "bottom",
            1,
            hint=f"give labels of shape {label_shape(scores, axis)} with whole numbers 0..{scores[axis] - 1}",
        )


class Loss(Layer):
    """Base: automatic scalar top; bottom 1 is a target that gets no gradient."""

    auto_tops = loss_top = True

    def differentiable(self, i: int) -> bool:
        return i != 1

    def _same_count(self, ins: Sequence[Shape]) -> None:
        """Both bottoms hold as many items, of as many numbers each."""
        a, b = ins[0], ins[1]
        if not a or not b or a[0] != b[0] or math.prod(a) != math.prod(b):
            raise self.fail(
                f"bottom 0 '{self.proto.bottom[0]}' {a} and bottom 1 '{self.proto.bottom[1]}' {b} must hold "
                "as many numbers in as many items (axis 0)",
                "bottom",
                1,
            )

    def _normalization(self, default: str) -> str:
        """loss_param: normalization, else the deprecated normalize (true VALID, false BATCH_SIZE), else the default."""
        p = self.proto.loss_param
        if p.HasField("normalization"):
            return str(pb.LossParameter.NormalizationMode.Name(p.normalization))
        if p.HasField("normalize"):
            return "VALID" if p.normalize else "BATCH_SIZE"
        return default

    def _ignore(self) -> int | None:
        p = self.proto.loss_param
        return int(p.ignore_label) if p.HasField("ignore_label") else None


@layer("SoftmaxWithLoss", v1="SOFTMAX_LOSS", bottoms=(2, 2), tops=(1, 2), field="loss_param")
class SoftmaxWithLoss(Loss):
    """Multinomial logistic loss of the softmax: sum of -log(max(p[label], FLT_MIN)) / normalizer; gradient p - onehot.

    Bottoms: scores, any shape with the classes on softmax_param.axis (1); labels, whole numbers, one for every place
    outside that axis. Tops: loss (); optionally the probabilities, without gradient. The largest loss of one label is
    87.3365, its gradient goes on. loss_param: normalization VALID (default: labels that are not ignored), FULL (all
    labels), BATCH_SIZE (items before the axis), NONE (1), never below 1; deprecated normalize (true VALID, false
    BATCH_SIZE); ignore_label (none): such labels count nothing. label_smoothing s (0): the target is 1 - s at the
    label and s / (C - 1) elsewhere, in TRAIN only. label_weights (none; one a class): the loss of a label times the
    weight of its class; the normalizer is unweighted. Deviations: NVCaffe smooths only the gradient, and only on the
    GPU; caffe-jacinto weights only the loss, not the gradient. Here loss and gradient belong together: both are
    smoothed, both are weighted. A label outside 0..C-1 that is not ignored raises DataError (on the CPU); Caffe reads
    foreign memory. Source: BVLC softmax_loss_layer; NVCaffe; caffe-jacinto.
    """

    is_softmax = True

    def _axis(self, ndim: int) -> int:
        return self.axis(self.proto.softmax_param.axis, ndim, "softmax_param", "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(len(ins[0]))
        classes = ins[0][axis]
        check_label_count(self, ins, axis)
        n, s = len(self.param.label_weights), self.param.label_smoothing
        if n and n != classes:
            raise self.fail(f"{n} label_weights for {classes} classes", "loss_param", "label_weights", 0)
        if s and (not 0 <= s < 1 or classes < 2):
            raise self.fail(
                f"label_smoothing {s:g} must lie in [0, 1), with 2 or more classes", "loss_param", "label_smoothing"
            )
        return [(), ins[0]][: self.ntop]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return label_shape(ins[0], self._axis(len(ins[0]))) if i == 1 and ins[0] else None

    def head(self, ins: Sequence[Shape]) -> Head | None:
        return Head(self._axis(len(ins[0])), self._ignore())

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        return Saved(extra=item * math.prod(ins[0]) + 8 * math.prod(ins[1]))  # log of the softmax, int64 labels

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss import SoftmaxWithLoss

        return SoftmaxWithLoss(
            axis=self._axis(len(ins[0])),
            normalization=self._normalization("VALID"),
            ignore=self._ignore(),
            smoothing=self.param.label_smoothing,
            weights=list(self.param.label_weights),
            with_prob=self.ntop == 2,
            where=f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'",
        )


@layer("EuclideanLoss", v1="EUCLIDEAN_LOSS", bottoms=(2, 2))
class EuclideanLoss(Loss):
    """Sum of squared differences / (2 N). Gradients go to both bottoms.

    Bottoms: two blobs with as many items and numbers, N = size of axis 0. Top: loss (). Source: BVLC
    euclidean_loss_layer.
    """

    def differentiable(self, i: int) -> bool:
        return True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self._same_count(ins)
        return [()]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[1 - i]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss import EuclideanLoss

        return EuclideanLoss()


@layer("SigmoidCrossEntropyLoss", v1="SIGMOID_CROSS_ENTROPY_LOSS", bottoms=(2, 2), field="loss_param")
class SigmoidCrossEntropyLoss(Loss):
    """-Sum of t log(sigmoid(x)) + (1 - t) log(1 - sigmoid(x)) / normalizer, without overflow; gradient sigmoid(x) - t.

    Bottoms: scores x; targets t (usually 0..1), as many. Top: loss (). loss_param: normalization BATCH_SIZE (default:
    items on axis 0), FULL (all numbers), VALID (numbers not ignored), NONE (1), never below 1; deprecated normalize;
    ignore_label: targets whose whole part is that number count nothing. The NVCaffe family divides by the items and
    reads none of these (`Dialect.sigmoid_ce_normalized` false). Source: BVLC sigmoid_cross_entropy_loss_layer.
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self._same_count(ins)
        return [()]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0] if i == 1 else None

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss import SigmoidCrossEntropyLoss

        if not self.context.dialect.sigmoid_ce_normalized:
            return SigmoidCrossEntropyLoss("BATCH_SIZE", None)
        return SigmoidCrossEntropyLoss(self._normalization("BATCH_SIZE"), self._ignore())


@layer("HingeLoss", v1="HINGE_LOSS", bottoms=(2, 2), field="hinge_loss_param")
class HingeLoss(Loss):
    """Sum of max(0, 1 - d x) ** p / N over all classes, d = 1 for the label's class and -1 for the others.

    Bottoms: scores (N, ...), flattened to classes per item; labels, N whole numbers. Top: loss (). hinge_loss_param:
    norm L1 (default, p = 1) or L2 (p = 2). A label out of range raises DataError (on the CPU). Source: BVLC
    hinge_loss_layer.
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        scores, labels = ins[0], ins[1]
        if len(scores) < 2:
            raise self.fail(f"bottom 0 needs items and classes (N, C), it has shape {scores}", "bottom", 0)
        if math.prod(labels) != scores[0]:
            raise self.fail(f"{scores[0]} items need {scores[0]} labels, bottom 1 has shape {labels}", "bottom", 1)
        return [()]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:1] if i == 1 and ins[0] else None

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss import HingeLoss

        return HingeLoss(
            squared=self.param.norm == pb.HingeLossParameter.L2,
            where=f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'",
        )
