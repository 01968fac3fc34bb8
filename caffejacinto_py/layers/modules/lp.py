"""Torch side of ADaPTION's layers: rounding to fixed point, and products that compute with rounded weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caffejacinto_py.layers.modules import conv


class Rounding(NamedTuple):
    """To multiples of 2^-ad in [-limit, limit]. how: "nearest" (halves away from zero), "floor", "stochastic".

    nan: what NaN becomes; None: it stays.
    """

    ad: int
    limit: float
    how: str = "nearest"
    nan: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        scale = 2.0**self.ad
        top = self.limit * scale
        # clipping first changes nothing (top is an integer) and keeps infinities out of the sums
        y = (x * scale).clamp_(-top, top)
        if self.how == "nearest":
            # every step is exact; adding 0.5 would round 0.49999997 up, and torch's trunc is ten times slower than frac
            part = y.frac()
            y = y.sub_(part)
            y = y.add_(part.mul_(2).sub_(part.frac()))
        elif self.how == "floor":
            y = y.floor_()
        else:
            whole = y.floor()  # integers stay: a sum with the noise would be rounded
            y = whole.add_(torch.rand_like(y) < y.sub_(whole))
        y = y.div_(scale)
        return y if self.nan is None else y.nan_to_num_(self.nan)


class LPAct(nn.Module):
    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        return _Round.apply(x, self.rounding, self.inplace)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return str(self.rounding)


class _Round(torch.autograd.Function):
    """The gradient passes through, also where values are clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding, inplace: bool) -> Tensor:
        y = rounding(x)
        if not inplace:
            return y
        ctx.mark_dirty(x)
        return x.copy_(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


class _Shadow(nn.Module):
    """The rounded copies of a product's blobs, rewritten in every pass.

    gated: the bias gets a gradient only where the rounded weights would get one, as ADaPTION's flags have it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    shadow: nn.Parameter
    shadow_bias: nn.Parameter | None
    rounding: Rounding
    round_bias: bool
    gated: bool

    def keep(
        self,
        *,
        shadow: nn.Parameter,
        shadow_bias: nn.Parameter | None,
        rounding: Rounding,
        round_bias: bool,
        gated: bool,
    ) -> None:
        self.shadow, self.shadow_bias = shadow, shadow_bias
        self.rounding, self.round_bias, self.gated = rounding, round_bias, gated

    @torch.no_grad()
    def refresh(self) -> None:
        self.shadow.copy_(self.rounding(self.weight))
        if self.round_bias and self.bias is not None and self.shadow_bias is not None:
            self.shadow_bias.copy_(self.rounding(self.bias))

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """(who gets the gradient, which is added)"""
        bias: Tensor | None = self.bias
        if bias is not None and self.gated and not self.shadow.requires_grad:
            bias = bias.detach()
        return bias, self.shadow_bias if self.round_bias else bias


class LPConvolution(conv.Convolution, _Shadow):
    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        lead: int,
        **options: Any,
    ) -> None:
        super().__init__(weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, lead=lead)
        self.keep(**options)

    def forward(self, *xs: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.refresh()
        return super().forward(*xs)

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias, added = self.biases()
        window = (self.stride, self.padding, self.dilation, self.groups)
        used = self.shadow.reshape(weight.shape)
        return _Convolve.apply(x, weight, bias, used.detach(), _detached(added), self.op, window)  # type: ignore[no-any-return]


class LPInnerProduct(conv.InnerProduct, _Shadow):
    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, *, axis: int, transpose: bool, **options: Any
    ) -> None:
        super().__init__(weight, bias, axis=axis, transpose=transpose)
        self.keep(**options)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.refresh()
        bias, added = self.biases()
        if x.dim() != self.axis + 1:
            x = x.flatten(self.axis)
        used = self.shadow.detach()
        if self.transpose:
            weight, used = weight.t(), used.t()
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _Multiply.apply(flat, weight, bias, used, _detached(added))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class _Convolve(torch.autograd.Function):
    """Forward with the rounded weights; the gradient of x with the masters; weights and bias get theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        used: Tensor,
        added: Tensor | None,
        op: Any,
        window: Any,
    ) -> Tensor:
        stride, padding, dilation, groups = window
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.bias = window, None if bias is None else list(bias.shape)
        y: Tensor = op(x, used, added, stride, padding, dilation, groups)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.window
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, ctx.bias, stride, padding, dilation, False, [0] * len(stride), groups,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return (*found, None, None, None, None)


class _Multiply(torch.autograd.Function):
    """As `_Convolve`, for y = x W^T + b with two axes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor, added: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, used, added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dw = grad.t() @ x if ctx.needs_input_grad[1] else None
        db = grad.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
