"""Losses of a student that learns from a teacher: bottom 0 is the student's and gets the gradient, bottom 1 the
teacher's. The teacher's blob may come from a Teacher layer or, written by `teacher_dump`, from a Data layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Shape
from caffejacinto_py.layers.loss import Loss, label_shape
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

OURS = "caffejacinto"


def bare(shape: Shape) -> Shape:
    """A shape without axes of 1 at its end: records of a database always have three axes."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class TeacherLoss(Loss):
    """Base: only the student learns."""

    def differentiable(self, i: int) -> bool:
        return i == 0

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0] if i == 1 else None

    def _two(self, ins: Sequence[Shape]) -> str:
        names = self.proto.bottom
        return f"the student's blob '{names[0]}' is {ins[0]}, the teacher's '{names[1]}' {ins[1]}"

    def _same(self, ins: Sequence[Shape], hint: str | None = None) -> None:
        if bare(ins[0]) != bare(ins[1]):
            raise self.fail(f"{self._two(ins)}: they must have one shape", "bottom", 1, hint=hint)


@layer(
    "DistillSoftmaxLoss",
    bottoms=(2, 3),
    field="distill_softmax_loss_param",
    forks=OURS,
)
class DistillSoftmaxLoss(TeacherLoss):
    """T^2 * sum of q (log q - log p) / normalizer, p = softmax(student / T), q = softmax(teacher / T).

    Bottoms: the student's scores, any shape with the classes on distill_softmax_loss_param.axis (1); the teacher's, of
    the same shape; optionally labels, one for every place outside that axis: only with loss_param { ignore_label },
    whose places count nothing. Top: loss (). Gradient T (p - q) / normalizer, to the student only; the factor T^2 keeps
    its size about the same at every temperature. distill_softmax_loss_param: temperature T (4);
    divergence KL, or CROSS_ENTROPY, which leaves out the teacher's own entropy: another value, the same gradient;
    probabilities (false): bottom 1 is a softmax already, its logarithm is the scores. loss_param: normalization VALID
    (default: places that are not ignored), FULL (all places), BATCH_SIZE (items before the axis), NONE.
    Source: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.
    """

    def _axis(self, ndim: int) -> int:
        return self.axis(self.param.axis, ndim, "distill_softmax_loss_param", "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not self.param.temperature > 0:
            text = f"temperature must be positive, not {self.param.temperature:g}"
            raise self.fail(text, "distill_softmax_loss_param", "temperature")
        axis = self._axis(len(ins[0]))
        self._same(ins, hint="both nets must have the same classes, at the same resolution")
        if len(ins) < 3 and self._ignore() is not None:
            raise self.fail("ignore_label needs the labels, as bottom 2", "loss_param", "ignore_label")
        if len(ins) == 3:
            self._labels(ins[0], ins[2], axis)
        return [()]

    def _labels(self, scores: Shape, labels: Shape, axis: int) -> None:
        if self._ignore() is None:
            hint = "loss_param { ignore_label: 255 }, or leave the labels out"
            raise self.fail("bottom 2, the labels, is read only for its ignored places", "bottom", 2, hint=hint)
        need = math.prod(scores) // max(scores[axis], 1)
        if math.prod(labels) != need:
            text = f"bottom 2 '{self.proto.bottom[2]}' {labels} must have {need} labels, one for each place of {scores}"
            raise self.fail(text, "bottom", 2, hint=f"labels of shape {label_shape(scores, axis)}")

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        if i == 2 and ins[0]:
            return label_shape(ins[0], self._axis(len(ins[0])))
        return super().expects(i, ins)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.distill import DistillSoftmaxLoss as Module

        p = self.param
        return Module(
            axis=self._axis(len(ins[0])),
            temperature=p.temperature,
            entropy=p.divergence == type(p).KL,
            probabilities=p.probabilities,
            normalization=self._normalization("VALID"),
            ignore=self._ignore(),
        )


@layer("FeatureHintLoss", bottoms=(2, 2), field="feature_hint_loss_param", forks=OURS)
class FeatureHintLoss(TeacherLoss):
    """Distance of a student's blob s from a teacher's t: sum of f(s - t) / normalizer. Gradient to the student only.

    Bottoms: two blobs of one shape, N = size of axis 0. Where channels differ, a 1x1 convolution (or an inner product)
    in the student, the regressor, brings its blob to the teacher's. Top: loss (). feature_hint_loss_param: norm L2
    (default): f = d^2 / 2; L1: |d|; SMOOTH_L1: 0.5 (sigma d)^2 where |d| < 1 / sigma^2, else |d| - 0.5 / sigma^2; sigma
    (1). loss_param: normalization BATCH_SIZE (default: N, as EuclideanLoss), FULL or VALID (all numbers, so that the
    loss does not grow with the blob), NONE. Source: Romero et al.: FitNets, 2015.
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not self.param.sigma > 0:
            text = f"sigma must be positive, not {self.param.sigma:g}"
            raise self.fail(text, "feature_hint_loss_param", "sigma")
        self._same(ins, hint=self._adapter(bare(ins[0]), bare(ins[1])))
        return [()]

    def _adapter(self, student: Shape, teacher: Shape) -> str | None:
        """What to put between blobs that do not fit."""
        name = self.proto.bottom[0]
        if len(student) != len(teacher) or len(student) < 2:
            return None
        if student[2:] != teacher[2:]:
            return f"bring '{name}' to {teacher[2:]} places, with Pooling or Interp, or choose a blob of that size"
        if len(student) == 2:
            return f"put an InnerProduct with num_output: {teacher[1]} behind '{name}' and compare its top"
        size = f"num_output: {teacher[1]} kernel_size: 1"
        return f"put an adapter behind '{name}', a Convolution with {size}, and compare its top"

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.distill import FeatureHintLoss as Module

        p = self.param
        return Module(norm=type(p).Norm.Name(p.norm), sigma=p.sigma, normalization=self._normalization("BATCH_SIZE"))


@layer("AttentionTransferLoss", bottoms=(2, 2), field="attention_transfer_loss_param", forks=OURS)
class AttentionTransferLoss(TeacherLoss):
    """Distance of attention maps: sum of |a(s) - a(t)|^2 / normalizer, a(x) = m / |m|, m = mean over c of |x_c|^power.

    Bottoms: the student's features (N, C, H, W) and the teacher's (N, C', H, W); channels may differ, places may not.
    Other numbers of axes from three on work too. Top: loss (). a is one vector of length 1 an item. Gradient to the
    student only. attention_transfer_loss_param: power (2). loss_param: normalization FULL (default: N H W, the
    published code's mean), BATCH_SIZE (N), NONE; VALID is FULL.
    Source: Zagoruyko, Komodakis: Paying More Attention to Attention, 2017; szagoruyko/attention-transfer.
    """

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0] if i == 1 else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not self.param.power >= 1:
            text = f"power must be at least 1, not {self.param.power:g}"
            raise self.fail(text, "attention_transfer_loss_param", "power")
        if min(len(s) for s in ins) < 3:
            text = f"{self._two(ins)}: attention needs items, channels and places (N, C, H, W)"
            raise self.fail(text, "bottom", 0)
        if ins[0][0] != ins[1][0] or ins[0][2:] != ins[1][2:]:
            hint = "choose blobs of one resolution, or bring one to the other's with Pooling or Interp"
            raise self.fail(f"{self._two(ins)}: items and places must agree", "bottom", 1, hint=hint)
        return [()]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.distill import AttentionTransferLoss as Module

        return Module(power=self.param.power, normalization=self._normalization("FULL"))
