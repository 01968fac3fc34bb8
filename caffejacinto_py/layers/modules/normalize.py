"""Torch side of MVN, Normalize and Axpy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Standardize(torch.autograd.Function):
    """(x - mean) / (std + eps) along the last axis.

    By hand for its gradient where std is 0: autograd through the root gives NaN there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        scale = variance.sqrt_().add_(eps).reciprocal_()
        y = (x - mean).mul_(scale)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        dx = dy - dy.mean(-1, keepdim=True)
        return dx.sub_(y * (y * dy).mean(-1, keepdim=True)).mul_(scale), None


class MVN(nn.Module):
    """Over the axes from `first` on. eps None: the mean only."""

    def __init__(self, first: int, eps: float | None) -> None:
        super().__init__()
        self.first, self.eps = first, eps

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*x.shape[: self.first], -1)
        y = flat - flat.mean(-1, keepdim=True) if self.eps is None else _Standardize.apply(flat, self.eps)
        return y.view(x.shape)


class Normalize(nn.Module):
    def __init__(self, scale: nn.Parameter, eps: float, *, across_spatial: bool) -> None:
        super().__init__()
        self.scale, self.eps, self.across_spatial = scale, eps, across_spatial

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.spread(x)

    def unit(self, x: Tensor) -> Tensor:
        axes = list(range(1, x.dim())) if self.across_spatial else [1]
        return x * (x.square().sum(axes, keepdim=True) + self.eps).rsqrt()

    def spread(self, x: Tensor) -> Tensor:
        """The scales, as they lie over x."""
        return self.scale.view(-1, *[1] * (x.dim() - 2)) if self.scale.dim() else self.scale


class BinaryNormalize(Normalize):
    """With C++'s gradient: the scales multiply the gradient of the normalization instead of entering its sum."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.spread(x)
        unit = self.unit(_ScaledGradient.apply(x, scale.detach()))
        return unit.detach() * scale + (unit - unit.detach())


class _ScaledGradient(torch.autograd.Function):
    """x; its gradient is multiplied by scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.saved_tensors[0], None


class Axpy(nn.Module):
    def forward(self, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(y, a.reshape(*x.shape[:2], *[1] * (x.dim() - 2)), x)
