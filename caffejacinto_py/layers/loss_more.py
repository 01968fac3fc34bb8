"""Losses of distances and of probabilities; the common ones are in `loss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caffejacinto_py.errors import Loc, WeightsError
from caffejacinto_py.layers.base import Shape
from caffejacinto_py.layers.loss import Loss, check_label_count, label_shape
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("L1Loss", bottoms=(2, 2), forks="nvcaffe, jacinto, jacinto-0.16")
class L1Loss(Loss):
    """Sum of absolute differences / N. Gradients go to both bottoms, 0 where they are equal.

    Bottoms: two blobs with as many items and numbers, N = size of axis 0. Top: loss (). Source: NVCaffe l1_loss_layer.
    """

    def differentiable(self, i: int) -> bool:
        return True

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[1 - i]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self._same_count(ins)
        return [()]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss_more import L1Loss as Module

        return Module()


@layer(
    "SmoothL1Loss",
    bottoms=(2, 4),
    field="smooth_l1_loss_param",
    forks="ssd, nvcaffe, jacinto, jacinto-0.16, adaption",
)
class SmoothL1Loss(Loss):
    """Sum of outer * f(inner * (x - t)) / N, f(d) = 0.5 (sigma d)^2 where |d| < 1 / sigma^2, else |d| - 0.5 / sigma^2.

    Bottoms: x; t; optional: inner weights (3 bottoms: SSD's form); or inner and outer weights (4: Fast R-CNN's form);
    all of as many items and numbers, N = size of axis 0. Top: loss (). Gradients go to x and t, none to weights.
    smooth_l1_loss_param (ADaPTION): sigma (1).
    Differs: the gradient of the weighted form is the derivative, inner weights included; SSD's C++ leaves them out of
    it, which is the same for weights of 0 and 1. Works on the CPU too (ADaPTION: GPU only).
    Source: SSD smooth_L1_loss_layer; ADaPTION smooth_L1_loss_layer; Girshick 2015.
    """

    def differentiable(self, i: int) -> bool:
        return i < 2

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[1] if i == 0 else ins[0]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if self.param.sigma <= 0:
            raise self.fail(f"sigma must be positive, not {self.param.sigma:g}", "smooth_l1_loss_param", "sigma")
        self._same_count(ins)
        for i, weights in enumerate(ins[2:], 2):
            if math.prod(weights) != math.prod(ins[0]):
                text = f"bottom {i}, the weights, must hold as many numbers as bottom 0 {ins[0]}; it is {weights}"
                raise self.fail(text, "bottom", i)
        return [()]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss_more import SmoothL1Loss as Module

        return Module(self.param.sigma)


@layer("ContrastiveLoss", v1="CONTRASTIVE_LOSS", bottoms=(3, 3), field="contrastive_loss_param")
class ContrastiveLoss(Loss):
    """1 / (2 N) sum of s d^2 + (1 - s) max(margin - d, 0)^2, d the Euclidean distance of a pair, s 1 for similar pairs.

    Bottoms: a and b (N, C) or (N, C, 1, 1); s (N), 0 or not 0. Top: loss (). Gradients go to a and b.
    contrastive_loss_param: margin (1); legacy_version (false): dissimilar pairs count max(margin - d^2, 0) instead.
    The gradient of dissimilar pairs divides by d + 1e-4, as in C++, where the derivative divides by d.
    Source: BVLC contrastive_loss_layer; Hadsell et al. 2006.
    """

    def differentiable(self, i: int) -> bool:
        return i < 2

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        known = ins[0] or ins[1]
        return known[:1] if known and i == 2 else known

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        a, b, s = ins
        for i, shape in enumerate((a, b)):
            if len(shape) < 2 or math.prod(shape[2:]) != 1:
                raise self.fail(f"bottom {i} must be (N, C) or (N, C, 1, 1), it is {shape}", "bottom", i)
        if a[:2] != b[:2]:
            raise self.fail(f"bottoms 0 and 1 must be pairs of one size: {a} and {b}", "bottom", 1)
        if math.prod(s) != a[0]:
            raise self.fail(f"{a[0]} pairs need {a[0]} marks of similarity, bottom 2 is {s}", "bottom", 2)
        return [()]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss_more import ContrastiveLoss as Module

        return Module(self.param.margin, legacy=self.param.legacy_version)


@layer("MultinomialLogisticLoss", v1="MULTINOMIAL_LOGISTIC_LOSS", bottoms=(2, 2))
class MultinomialLogisticLoss(Loss):
    """Sum of -log(max(p[label], 1e-20)) / N: SoftmaxWithLoss without its softmax.

    Bottoms: probabilities p (N, ..), flattened to classes per item; labels, N whole numbers. Top: loss (). The gradient
    is -1 / max(p, 1e-20), also where p is cut. A label out of range raises DataError (on the CPU). No options.
    Source: BVLC multinomial_logistic_loss_layer.
    """

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:1] if i == 1 and ins[0] else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        p, labels = ins
        if len(p) < 2:
            raise self.fail(f"bottom 0 needs items and classes (N, C), it has shape {p}", "bottom", 0)
        if math.prod(labels) != p[0]:
            raise self.fail(f"{p[0]} items need {p[0]} labels, bottom 1 has shape {labels}", "bottom", 1)
        return [()]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.loss_more import MultinomialLogisticLoss as Module

        return Module(f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'")


@layer("InfogainLoss", v1="INFOGAIN_LOSS", bottoms=(2, 3), tops=(1, 2), field="infogain_loss_param")
class InfogainLoss(Loss):
    """-Sum over labels l and classes k of H[l, k] log(max(p[k], 1e-20)) / normalizer; H = identity: the logistic loss.

    Bottoms: scores or probabilities; labels; optional: H, C x C numbers. Top: loss (); BVLC and Ristretto only, second:
    the probabilities, without gradient.
    BVLC and Ristretto: bottom 0 are scores, any shape with the classes on `axis`; p is their softmax. loss_param as in
    SoftmaxWithLoss: normalization (VALID), ignore_label; the deprecated normalize is refused.
    The other forks (`Dialect.infogain_softmax` false): bottom 0 are probabilities (N, ..), flattened to classes per
    item; the normalizer is N, loss_param is not read, axis does not exist.
    infogain_loss_param: source: a binaryproto file with H, where there is no third bottom; axis (1).
    The gradient goes on where log is cut. No gradient to labels and H. A label out of range raises DataError (on the
    CPU). Source: BVLC infogain_loss_layer; SSD infogain_loss_layer.
    """

    def differentiable(self, i: int) -> bool:
        return i == 0

    @property
    def _softmax(self) -> bool:
        return self.context.dialect.infogain_softmax

    def _axis(self, ndim: int) -> int:
        return self.axis(self.param.axis if self._softmax else 1, ndim, "infogain_loss_param", "axis")

    def _classes(self, scores: Shape) -> int:
        axis = self._axis(len(scores))
        return scores[axis] if self._softmax else math.prod(scores[1:])

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        scores = ins[0]
        if not scores or i == 0:
            return None
        classes = self._classes(scores)
        if i == 2:
            return (1, 1, classes, classes)
        return label_shape(scores, self._axis(len(scores))) if self._softmax else scores[:1]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        scores, labels = ins[:2]
        axis, classes = self._axis(len(scores)), self._classes(scores)
        if not self._softmax:
            if self.ntop > 1:
                text = f"the dialect {self.context.dialect.name} has no second top (probabilities)"
                raise self.fail(text, "top", 1, hint="the dialects bvlc and ristretto have one")
            if math.prod(labels) != scores[0]:
                raise self.fail(f"{scores[0]} items need {scores[0]} labels, bottom 1 is {labels}", "bottom", 1)
        else:
            check_label_count(self, ins, axis)
            loss = self.proto.loss_param
            if loss.HasField("normalize"):
                hint = "true: normalization: VALID, false: normalization: BATCH_SIZE"
                raise self.fail("InfogainLoss does not take normalize", "loss_param", "normalize", hint=hint)
        if len(ins) > 2 and math.prod(ins[2]) != classes * classes:
            raise self.fail(f"H must hold {classes} x {classes} numbers, bottom 2 is {ins[2]}", "bottom", 2)
        if len(ins) < 3 and not self.param.source:
            hint = "give infogain_loss_param a source (a binaryproto file), or a third bottom"
            raise self.fail("no infogain matrix", "infogain_loss_param", hint=hint)
        return [(), scores][: self.ntop]

    def _matrix(self, classes: int) -> Any:
        """H (classes, classes) from the file, a numpy array."""
        from caffejacinto_py.schema.blobs import read_blob

        array = read_blob(self.param.source)
        if array.size != classes * classes:
            text = f"the infogain matrix of layer '{self.name}' must hold {classes} x {classes} numbers, "
            raise WeightsError(text + f"this file has {array.shape}", loc=Loc(self.param.source))
        return array.reshape(classes, classes)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import loss_more as m

        matrix = self._matrix(self._classes(ins[0])) if len(ins) < 3 else None
        where = f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'"
        if not self._softmax:
            return m.InfogainOfProbabilities(matrix, where)
        return m.InfogainOfScores(
            matrix,
            where,
            axis=self._axis(len(ins[0])),
            normalization=self._normalization("VALID"),
            ignore=self._ignore(),
            with_prob=self.ntop == 2,
        )
