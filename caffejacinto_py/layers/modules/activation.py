"""Torch side of the activations. `inplace` is set by whoever knows that nobody else needs the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ReLU(nn.Module):
    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = slope
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        if self.slope == 0:
            return torch.relu_(x) if self.inplace else torch.relu(x)
        # torch recovers the sign of x from the result, which a negative slope destroys
        return F.leaky_relu(x, self.slope, self.inplace and self.slope > 0)


class PReLU(nn.Module):
    def __init__(self, slope: nn.Parameter) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return torch.prelu(x, self.slope.view(-1))


class ELU(nn.Module):
    """scale * (max(x, 0) + alpha * (exp(min(x, 0)) - 1))"""

    def __init__(self, alpha: float, scale: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.scale = scale
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        # torch recovers the sign of x from the result, which a negative alpha destroys
        op = torch.ops.aten.elu_ if self.inplace and self.alpha > 0 else torch.ops.aten.elu
        return op(x, self.alpha, self.scale)


class JacintoELU(nn.Module):
    """scale * max(x, 0) + alpha * (exp(min(x, 0)) - 1), with caffe-jacinto's gradient."""

    def __init__(self, alpha: float, scale: float) -> None:
        super().__init__()
        self.alpha, self.scale = alpha, scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _JacintoELU.apply(x, self.alpha, self.scale)
        return y


class _JacintoELU(torch.autograd.Function):
    """Backward: scale * (1 where x > 0, else alpha + y), which is no derivative unless scale is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, scale: float) -> Tensor:
        y = scale * x.clamp(min=0) + alpha * torch.expm1(x.clamp(max=0))
        ctx.save_for_backward(y, x > 0)
        ctx.alpha, ctx.scale = alpha, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, positive = ctx.saved_tensors
        return dy * torch.where(positive, ctx.scale, ctx.scale * (ctx.alpha + y)), None, None


class Sigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid_(x) if self.inplace else torch.sigmoid(x)


class TanH(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh_(x) if self.inplace else torch.tanh(x)


class AbsVal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Power(nn.Module):
    def __init__(self, power: float, scale: float, shift: float) -> None:
        super().__init__()
        self.power = power
        self.scale = scale
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.scale == 1 else x * self.scale
        if self.shift != 0:
            y = y + self.shift
        return y if self.power == 1 and y is not x else y.pow(self.power)


class Constant(nn.Module):
    """The same value everywhere; x stays connected with gradient 0, also where it is inf or NaN."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.zeros_like(x, dtype=torch.bool), x, self.value)


class Exp(nn.Module):
    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale = scale
        self.shift = shift
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        fresh = self.inplace
        if self.scale != 1:
            x = x.mul_(self.scale) if fresh else x * self.scale
            fresh = True
        if self.shift != 0:
            x = x.add_(self.shift) if fresh else x + self.shift
            fresh = True
        return x.exp_() if fresh else x.exp()


class Log(nn.Module):
    """log(shift + scale * x) * factor"""

    def __init__(self, scale: float, shift: float, factor: float) -> None:
        super().__init__()
        self.scale = scale
        self.shift = shift
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if self.scale != 1:
            x = x * self.scale
        if self.shift != 0:
            x = x + self.shift
        y = x.log()
        return y if self.factor == 1 else y.mul_(self.factor)


class BNLL(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x, threshold=50.0)


class Threshold(nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.threshold).to(x.dtype)


class Clip(nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


class Swish(nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.beta == 1 else x * torch.sigmoid(x * self.beta)


class ReLU6(nn.Module):
    """min(max(x, 0), top) + slope * min(x, 0); not in place with a slope."""

    def __init__(self, top: float, slope: float = 0.0) -> None:
        super().__init__()
        self.top = top
        self.slope = slope
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        if self.slope == 0:
            return F.hardtanh(x, 0.0, self.top, self.inplace)
        return F.hardtanh(x, 0.0, self.top) + self.slope * -torch.relu(-x)
