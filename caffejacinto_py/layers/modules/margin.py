"""Margins and centers of face recognition, on torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caffejacinto_py.layers.modules.loss import check_labels


@dataclass(frozen=True)
class Lambda:
    """max(base (1 + gamma t)^-power, least)."""

    base: float
    gamma: float
    power: float
    least: float

    def __call__(self, t: Tensor) -> Tensor:
        return (self.base * (1 + self.gamma * t) ** -self.power).clamp(min=self.least)


@dataclass(frozen=True)
class Annealed:
    """base + (1 + gamma t)^power - 1, between least and most."""

    base: float
    gamma: float
    power: float
    least: float
    most: float

    def __call__(self, t: Tensor) -> Tensor:
        return (self.base + (1 + self.gamma * t) ** self.power - 1).clamp(self.least, self.most)


# cos(m theta) and its derivative as polynomials in c = cos(theta), highest power first
_COSINES = {
    1: ((1.0, 0.0), (1.0,)),
    2: ((2.0, 0.0, -1.0), (4.0, 0.0)),
    3: ((4.0, 0.0, -3.0, 0.0), (12.0, 0.0, -3.0)),
    4: ((8.0, 0.0, -8.0, 0.0, 1.0), (32.0, 0.0, -16.0, 0.0)),
}


def _polynomial(coefficients: tuple[float, ...], c: Tensor) -> Tensor:
    y = torch.full_like(c, coefficients[0])
    for a in coefficients[1:]:
        y = y * c + a
    return y


def psi(c: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """(-1)^k cos(m theta) - 2 k with k = floor(m theta / pi), as a function of c = cos(theta); and its derivative."""
    value, slope = (_polynomial(p, c) for p in _COSINES[margin])
    # theta >= j pi / m where c <= cos(j pi / m)
    k = sum((c <= math.cos(math.pi * j / margin)).to(c.dtype) for j in range(1, margin))
    sign = 1 - 2 * (k % 2)
    return sign * value - 2 * k, sign * slope


class _Margin(torch.autograd.Function):
    """Forward and SphereFace's gradients. weight has rows of length 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, label: Tensor, strength: Tensor, margin: int) -> Tensor:
        plain = x @ weight.t()
        ctx.margin = margin
        if margin == 1:
            ctx.save_for_backward(x, weight, label, strength)
            return plain
        length = x.norm(dim=1)
        own = plain.gather(1, label[:, None]).squeeze(1)
        c = own / torch.where(length > 0, length, 1)
        target, _ = psi(c, margin)
        mixed = (length * target + strength * own) / (1 + strength)
        ctx.save_for_backward(x, weight, label, strength)
        return plain.scatter(1, label[:, None], mixed[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, label, strength = ctx.saved_tensors
        d_weight = grad.t() @ x
        d_x = grad @ weight
        if ctx.margin == 1:
            return d_x, d_weight, None, None, None
        length = x.norm(dim=1, keepdim=True)
        length = torch.where(length > 0, length, 1)
        row = weight[label]
        c = (x * row).sum(1, keepdim=True) / length
        value, slope = psi(c, ctx.margin)
        a, b = slope, (value - c * slope) / length
        size = torch.sqrt(a * a + b * b)
        direction = (a * row + b * x) / torch.where(size > 0, size, 1)
        own = grad.gather(1, label[:, None])
        # d_x holds own * row already; it should be own * (direction + strength * row) / (1 + strength)
        return d_x + own * (direction - row) / (1 + strength), d_weight, None, None, None


class MarginInnerProduct(nn.Module):
    """See the layer. iteration: passes so far."""

    iteration: Tensor

    def __init__(
        self, weight: nn.Parameter, *, margin: int, schedule: Lambda, iteration: int, with_lambda: bool, where: str
    ) -> None:
        super().__init__()
        self.weight, self.margin, self.schedule = weight, margin, schedule
        self.with_lambda, self.where = with_lambda, where
        self.register_buffer("iteration", torch.tensor(float(iteration), dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        label = label.detach().reshape(-1)
        check_labels(label, self.weight.shape[0], None, self.where)
        with torch.no_grad():
            self.iteration.add_(1)
            strength = self.schedule(self.iteration).to(x.dtype)
            self.weight.copy_(F.normalize(self.weight, dim=1, eps=1e-30))
        y = _Margin.apply(flat, self.weight, label.long(), strength, self.margin)
        return (y, strength.reshape(1)) if self.with_lambda else y

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, margin={self.margin}, {self.schedule}"


class LabelSpecificAdd(nn.Module):
    """See the layer. iteration: training passes so far."""

    iteration: Tensor

    def __init__(self, bias: float, *, schedule: Annealed | None, iteration: int, with_bias: bool, where: str) -> None:
        super().__init__()
        self.bias, self.schedule, self.with_bias, self.where = bias, schedule, with_bias, where
        self.register_buffer("iteration", torch.tensor(float(iteration), dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        bias = x.new_full((), self.bias) if self.schedule is None else self.annealed().to(x.dtype)
        y = self.add(x, label, bias) if self.training else x.clone()
        return (y, bias.reshape(1)) if self.with_bias else y

    def annealed(self) -> Tensor:
        assert self.schedule is not None
        with torch.no_grad():
            bias = self.schedule(self.iteration) if self.training else torch.full_like(self.iteration, self.bias)
            if self.training:
                self.iteration.add_(1)
        return bias

    def add(self, x: Tensor, label: Tensor, bias: Tensor) -> Tensor:
        label = label.detach().reshape(-1)
        check_labels(label, x.shape[1], None, self.where)
        own = (label.long()[:, None] == torch.arange(x.shape[1], device=x.device)).view(x.shape)
        return x + (own & (x.detach() > -bias)) * bias

    def extra_repr(self) -> str:
        return f"bias={self.bias:g}, {self.schedule}"


class _Center(torch.autograd.Function):
    """Half the mean squared distance, with caffe-face's step for the centers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centers: Tensor, label: Tensor) -> Tensor:
        distance = x - centers[label]
        ctx.save_for_backward(distance, label)
        ctx.classes = centers.shape[0]
        return (distance * distance).sum() / (2 * x.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        distance, label = ctx.saved_tensors
        total = distance.new_zeros(ctx.classes, distance.shape[1]).index_add(0, label, -distance)
        count = distance.new_zeros(ctx.classes).index_add(0, label, torch.ones_like(distance[:, 0]))
        return distance * (grad / distance.shape[0]), total / (1 + count)[:, None], None


class CenterLoss(nn.Module):
    """See the layer."""

    def __init__(self, centers: nn.Parameter, *, where: str) -> None:
        super().__init__()
        self.centers, self.where = centers, where

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        label = label.detach().reshape(-1)
        check_labels(label, self.centers.shape[0], None, self.where)
        return _Center.apply(x.flatten(1), self.centers, label.long())
