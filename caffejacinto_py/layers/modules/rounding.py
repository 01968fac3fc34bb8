"""Rounding of tensors to whole numbers, and gradients that do not see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def half_away(y: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero (C's round)."""
    return y.abs().add_(below_half(y.dtype)).floor_().mul_(y.sign())


def below_half(dtype: torch.dtype) -> float:
    """The largest number below 1/2. Added to |y| it makes floor round to nearest; 1/2 would bring 0.49999997 to 1."""
    return 0.5 - torch.finfo(dtype).eps / 4


def half_even(y: Tensor) -> Tensor:
    """To the nearest integer, halves to even (C's rint)."""
    return y.round()


def stochastic(y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Up or down with probabilities that keep the mean; integers stay. Draws from `generator`, else torch's own."""
    noise = torch.rand(y.shape, dtype=y.dtype, device=y.device, generator=generator)
    # not floor(y + noise): that sum is rounded, and 20000 + 0.9999 would become 20001
    whole = y.floor()
    return whole + (noise < y - whole).to(y.dtype)


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """The value of y, in its memory, with the gradient of x: backward sees neither the rounding nor the clipping."""
    return _StraightThrough.apply(x, y)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.detach()  # no view_as: autograd would forbid a later layer to work in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
