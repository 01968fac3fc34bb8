"""Torch side of the element-wise joins."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """coeff[0] * x[0] + coeff[1] * x[1] + ...; with `inplace` the sum overwrites input `into`, whose coeff is 1."""

    def __init__(self, coeff: list[float]) -> None:
        super().__init__()
        self.coeff = coeff
        self.inplace = False
        self.into = 0

    def forward(self, *xs: Tensor) -> Tensor:
        if self.inplace and len(xs) == 2:
            other = 1 - self.into
            return xs[self.into].add_(xs[other], alpha=self.coeff[other])
        first = xs[0] if self.coeff[0] == 1 else xs[0] * self.coeff[0]
        y = torch.add(first, xs[1], alpha=self.coeff[1])
        for x, c in zip(xs[2:], self.coeff[2:]):
            y = y.add_(x, alpha=c)  # y is ours, and add keeps nothing for backward
        return y


class Product(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        y = xs[0] * xs[1]
        for x in xs[2:]:
            y = y * x
        return y


class Maximum(nn.Module):
    """Ties: of the first two the second wins, a later one must be greater. `torch.maximum` would share the gradient."""

    def forward(self, *xs: Tensor) -> Tensor:
        y = torch.where(xs[0] > xs[1], xs[0], xs[1])
        for x in xs[2:]:
            y = torch.where(x > y, x, y)
        return y
