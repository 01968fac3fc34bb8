"""Layers that join several bottoms of one shape element by element."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import IntegerForm, Layer, Saved, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("Eltwise", v1="ELTWISE", bottoms=(2, None), field="eltwise_param")
class Eltwise(Layer):
    """Sum, product or maximum of two or more bottoms of equal shape (no broadcasting); the top has that shape.

    eltwise_param: operation (SUM): SUM = coeff_0 x_0 + coeff_1 x_1 + ..., PROD, MAX. coeff: none (all 1) or one a
    bottom; refused with PROD, ignored by MAX. stable_prod_grad (true): the gradient of PROD is always the product of
    the other bottoms, never y / x, so false makes no difference here (it gave NaN at 0). MAX: the whole gradient goes
    to one bottom; where the first two are equal it is the second, and a later bottom wins only if it is greater.
    Source: BVLC eltwise_layer.
    """

    narrows = "values"
    quantizes = "plain"

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        for i, shape in enumerate(ins[1:], 1):
            if shape != ins[0]:
                raise self.fail(
                    f"all bottoms must have one shape: bottom 0 '{self.proto.bottom[0]}' is {ins[0]}, "
                    f"bottom {i} '{self.proto.bottom[i]}' is {shape}",
                    "bottom",
                    i,
                )
        n = len(self.param.coeff)
        if n and self.param.operation == pb.EltwiseParameter.PROD:
            raise self.fail("PROD takes no coeff", "eltwise_param", "coeff", 0, hint="coeff belongs to operation: SUM")
        if n and n != len(ins):
            raise self.fail(f"{n} coeff for {len(ins)} bottoms: give none or one a bottom", "eltwise_param", "coeff", 0)
        return [ins[0]]

    def keeps_memory(self) -> bool:
        return 0 in self.inplace_inputs() and len(self.inplace_inputs()) == len(self.proto.bottom)

    def inplace_inputs(self) -> Sequence[int]:
        if self.param.operation != pb.EltwiseParameter.SUM:
            return ()
        return [i for i in range(len(self.proto.bottom)) if not self.param.coeff or self.param.coeff[i] == 1]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        if self.param.operation == pb.EltwiseParameter.PROD:
            return super().saved(ins, outs, item)
        choices = len(ins) - 1 if self.param.operation == pb.EltwiseParameter.MAX else 0  # one byte each: who won
        return Saved(extra=choices * prod(outs[0]))

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        if self.param.operation == pb.EltwiseParameter.PROD:
            return IntegerForm("product")
        if self.param.operation == pb.EltwiseParameter.MAX:
            return IntegerForm("max")
        return IntegerForm("sum", {"coeff": tuple(self.param.coeff) or (1.0,) * len(ins)})

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import elementwise as m

        if self.param.operation == pb.EltwiseParameter.PROD:
            return m.Product()
        if self.param.operation == pb.EltwiseParameter.MAX:
            return m.Maximum()
        return m.Sum(list(self.param.coeff) or [1.0] * len(ins))
