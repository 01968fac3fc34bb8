"""Metrics: layers that score and have no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Head, Layer, Shape
from caffejacinto_py.layers.loss import check_label_count, label_shape
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("Accuracy", v1="ACCURACY", bottoms=(2, 2), tops=(1, 2), field="accuracy_param")
class Accuracy(Layer):
    """Share of labels whose class is among the top_k scores.

    Bottoms: scores, any shape with the classes on `axis`; labels, one for every place outside that axis. Tops:
    accuracy (); optionally the accuracy of each class (C), 0 for a class without labels. accuracy_param: top_k (1),
    axis (1), ignore_label (none): such labels count nothing. Ties: BVLC and Ristretto count another class of equal
    score as better (a tie is a miss for top_k 1); the others take the class of higher index first
    (`Dialect.accuracy_ties_lose`). Every label ignored: 0, in the others NaN (`Dialect.accuracy_empty_nan`).
    Deviations: a label whose score is NaN is a miss, in Caffe it is a hit. A label out of range raises DataError (on
    the CPU). Source: BVLC accuracy_layer; SSD.
    """

    def differentiable(self, i: int) -> bool:
        return False

    def _axis(self, ndim: int) -> int:
        return self.axis(self.param.axis, ndim, "accuracy_param", "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(len(ins[0]))
        classes = ins[0][axis]
        if not 1 <= self.param.top_k <= classes:
            text = f"top_k {self.param.top_k} must lie between 1 and the number of classes, {classes}"
            raise self.fail(text, "accuracy_param", "top_k")
        check_label_count(self, ins, axis)
        return [(), (classes,)][: self.ntop]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return label_shape(ins[0], self._axis(len(ins[0]))) if i == 1 and ins[0] else None

    def metric(self) -> int | None:
        return int(self.param.top_k)

    def head(self, ins: Sequence[Shape]) -> Head | None:
        ignore = int(self.param.ignore_label) if self.param.HasField("ignore_label") else None
        return Head(self._axis(len(ins[0])), ignore, self.param.top_k)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.metric import Accuracy

        return Accuracy(
            top_k=self.param.top_k,
            axis=self._axis(len(ins[0])),
            ignore=int(self.param.ignore_label) if self.param.HasField("ignore_label") else None,
            ties_lose=self.context.dialect.accuracy_ties_lose,
            empty_nan=self.context.dialect.accuracy_empty_nan,
            per_class=self.ntop == 2,
            where=f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'",
        )
