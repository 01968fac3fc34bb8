"""Dropout."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import IntegerForm, Layer, Saved, Shape
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELD = "dropout_param"


@layer("Dropout", v1="DROPOUT", field=FIELD)
class Dropout(Layer):
    """TRAIN: y = x m / (1 - p), m = 0 with probability p, else 1, drawn anew every pass. TEST: y = x.

    Bottom and top: any shape, the same.
    Options: dropout_ratio p (0.5), strictly between 0 and 1; scale_train (true; only in files of Fast R-CNN and
    ADaPTION; false: TRAIN: y = x m, TEST: y = x (1 - p)). NVCaffe's engine and random_seed are accepted and change
    nothing: the seed of the run decides.
    Source: BVLC dropout_layer.cpp, the same in all forks; scale_train: Fast R-CNN's dropout_layer.cpp.
    """

    narrows = "values"
    may_inplace = True  # backward reads the mask only
    is_view = True  # TEST hands the bottom through
    stateful_forward = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        ratio = self.param.dropout_ratio
        if not 0 < ratio < 1:
            hint = "for no dropout remove the layer" if ratio == 0 else None
            raise self.fail(f"dropout_ratio must be between 0 and 1, not {ratio:g}", FIELD, "dropout_ratio", hint=hint)
        return [ins[0]]

    def repeatable(self) -> bool:
        return True  # random numbers are torch's

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        if not self.context.train:
            return Saved()
        n = prod(ins[0])  # the mask; 32 random bits and a byte for each value go before it is there
        return Saved(extra=item * n, passing=max(1, 5 - item) * n)

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        if self.context.train or not self.param.scale_train:
            raise self.fail("integer programs have Dropout in phase TEST with scale_train only", FIELD, "scale_train")
        return IntegerForm("same")

    def hands_through(self) -> bool:
        return bool(self.param.scale_train)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import norm as m

        ratio = self.param.dropout_ratio
        return m.Dropout(ratio) if self.param.scale_train else m.UnscaledDropout(ratio)
