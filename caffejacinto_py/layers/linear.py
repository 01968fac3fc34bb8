"""InnerProduct."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from caffejacinto_py.layers.base import Blob, IntegerForm, Layer, Prunable, Saved, Shape
from caffejacinto_py.layers.dual import masters
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.folding import Affine, Folded, Refused, close_product, open_product
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELD = "inner_product_param"


@layer("InnerProduct", v1="INNER_PRODUCT", field=FIELD)
class InnerProduct(Layer):
    """y = W x + b, x being the axes of the bottom from `axis` on, flattened to K numbers in C order.

    Bottom: (lead.., rest..), top: (lead.., num_output).
    Blobs: W (num_output, K), or (K, num_output) if transpose; b (num_output) if bias_term.
    Options: num_output; bias_term (true); weight_filler and bias_filler (zeros); axis (1): the first axis that is
    summed over, negative counts from the end; transpose (false): layout of W only.
    normalize (false; happynear, AMSoftmax): every pass first scales each row of W to length 1, in place, by
    1 / sqrt(sum of squares + 1e-6); the gradient is that of the plain product, as in C++. Not with transpose, where C++
    scales numbers that belong to no row.
    Source: BVLC inner_product_layer.cpp, the same in all forks; happynear/caffe-windows for normalize.
    """

    narrows: ClassVar[str | None] = "weights"
    quantizes = "product"
    low_precision = {"adaption": "LPInnerProduct", "ristretto": "FcRistretto"}
    channels_last = False  # flattening wants C order: a channels_last bottom is copied

    def __init__(self, proto: Any, context: Any, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        self.stateful_forward = self.param.normalize  # type: ignore[misc]

    def _first(self, ins: Sequence[Shape]) -> int:
        if self.param.num_output < 1:
            raise self.fail("num_output must be given and positive", FIELD, "num_output")
        if self.param.normalize and self.param.transpose:
            raise self.fail("normalize does not go with transpose", FIELD, "normalize")
        return self.axis(self.param.axis, len(ins[0]), FIELD, "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [(*ins[0][: self._first(ins)], self.param.num_output)]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        n, k = self.param.num_output, math.prod(ins[0][self._first(ins) :])
        weight = filled_blob(self, (k, n) if self.param.transpose else (n, k), "weight_filler")
        return [weight, filled_blob(self, (n,), "bias_filler")] if self.param.bias_term else [weight]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import conv as m

        bias = blobs[1] if len(blobs) > 1 else None
        kind = m.UnitInnerProduct if self.param.normalize else m.InnerProduct
        return kind(blobs[0], bias, axis=self._first(ins), transpose=self.param.transpose)

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        if self.param.normalize:
            raise self.fail("integer programs have no normalize", FIELD, "normalize")
        return IntegerForm("dense", {"axis": self._first(ins), "transpose": bool(self.param.transpose)})

    def _folding(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> tuple[Any, Any]:
        """(weight as (num_output, K), bias), float64. Raises Refused."""
        weight, bias = open_product(self, ins, blobs, bias=self.param.bias_term)
        if self.param.normalize:
            raise Refused(f"'{self.name}' brings its weights to length 1 in every pass (normalize)")
        if self._first(ins) != 1:
            raise Refused(f"'{self.name}' sums over the axes from {self._first(ins)} on, not from 1")
        return (weight.T if self.param.transpose else weight), bias

    def _folded(self, weight: Any, bias: Any, blobs: Sequence[Any]) -> Folded:
        return close_product(weight.T if self.param.transpose else weight, bias, blobs)

    def fold_output(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        weight, bias = self._folding(ins, blobs)
        return self._folded(weight * affine.scale[:, None], bias * affine.scale + affine.shift, blobs)

    def fold_input(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        weight, bias = self._folding(ins, blobs)
        each = math.prod(ins[0][2:])  # numbers of one channel lie together
        scale, shift = affine.scale.repeat(each), affine.shift.repeat(each)
        return self._folded(weight * scale, bias + weight @ shift, blobs)

    def adapt(self, blobs: list[Any], targets: Sequence[Shape]) -> list[Any]:
        """Of ADaPTION's low-precision layers the full-precision blobs."""
        return masters(blobs, targets)

    def output_axis(self, ins: Sequence[Shape]) -> int | None:
        return 1 if self.param.transpose else 0

    def prunable(self, ins: Sequence[Shape]) -> Prunable | None:
        return Prunable(False, (), 1, math.prod(ins[0][self._first(ins) :]), self.param.num_output)

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        if len(ins[0]) == 4 and ins[0][1] > 1 and math.prod(ins[0][2:]) > 1:
            size = item * math.prod(ins[0])  # of a blob in channels_last a flattened copy; its gradient is copied back
            return Saved(extra=size, scratch=size)
        return super().saved(ins, outs, item)

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        return math.prod(outs[0]) * math.prod(ins[0][self._first(ins) :])
