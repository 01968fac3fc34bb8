"""Convolution and its transpose over 0 to 3 spatial axes, on torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Convolution(nn.Module):
    """The same weights over every input. lead: how many axes come before the channels (torch wants exactly one)."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        lead: int,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.points = not stride  # no spatial axes: a 1-axis convolution over one pixel
        self.stride, self.padding, self.dilation = (
            tuple(stride) or (1,),
            tuple(padding) or (0,),
            tuple(dilation) or (1,),
        )
        self.groups, self.lead, self.transposed = groups, lead, transposed
        self.plain = lead == 1 and not self.points
        self.op: Any = (_TRANSPOSED if transposed else _FORWARD)[len(self.stride)]

    def forward(self, *xs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if len(xs) == 1:
            return self.one(xs[0])
        return tuple(self.one(x) for x in xs)

    def one(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With these weights instead of its own."""
        if self.plain:
            return self.apply_op(x, weight, bias)
        flat = x.reshape(-1, *x.shape[self.lead :])
        y = (
            self.apply_op(flat.unsqueeze(-1), weight.unsqueeze(-1), bias)
            if self.points
            else self.apply_op(flat, weight, bias)
        )
        y = y.squeeze(-1) if self.points else y
        return y.reshape(*x.shape[: self.lead], *y.shape[1:])

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed:
            return self.op(x, weight, bias, self.stride, self.padding, 0, self.groups, self.dilation)
        return self.op(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        kind = "transposed, " if self.transposed else ""
        return (
            f"{kind}weight={tuple(self.weight.shape)}, bias={self.bias is not None}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


class InnerProduct(nn.Module):
    """y = x W^T + b over the axes from `axis` on, flattened in C order. transpose: W is stored (K, N)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, axis: int, transpose: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.transpose = axis, transpose

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With these weights instead of its own."""
        if x.dim() != self.axis + 1:
            x = x.flatten(self.axis)
        return F.linear(x, weight.t() if self.transpose else weight, bias)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}, axis={self.axis}"


class UnitInnerProduct(InnerProduct):
    """The rows of W are scaled to length 1 first, in place; the gradient knows nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(torch.rsqrt(self.weight.square().sum(1, keepdim=True) + 1e-6))
        return super().forward(x)
