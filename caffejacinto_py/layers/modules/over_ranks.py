"""Batch normalization with the statistics of the batches of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AddUp = Callable[[Tensor], Tensor]  # adds up a tensor over the ranks, in place, and returns it


def normalize(x: Tensor, eps: float, add_up: AddUp) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and per channel the mean and the biased variance, and how many values they are of: on all ranks together.

    x: (N, C, ...), of any N on each rank. All ranks must call it, and its backward, in the same order.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalize.apply(x, eps, add_up)
    return found


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, add_up: AddUp) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = _axes(x)
        wide = x.float() if x.dtype.itemsize < 4 else x
        n = wide.new_full((1,), x.numel() // x.shape[1])
        sums = add_up(torch.cat([wide.sum(axes), n]))
        whole, mean = sums[-1], sums[:-1] / sums[-1]
        centred = wide - _wide(mean, x)
        # a second exchange: the mean of squares less the square of the mean would lose digits
        variance = add_up((centred * centred).sum(axes)) / whole
        inverse = torch.rsqrt(variance + eps)
        y = (centred * _wide(inverse, x)).to(x.dtype)
        ctx.save_for_backward(x, mean, inverse, whole)  # not y: a ReLU may overwrite it
        ctx.add_up = add_up
        ctx.mark_non_differentiable(mean, variance, whole)
        return y, mean, variance, whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, mean, inverse, whole = ctx.saved_tensors
        axes = _axes(x)
        g, n = grad.to(mean.dtype), (x.to(mean.dtype) - _wide(mean, x)) * _wide(inverse, x)
        sums = ctx.add_up(torch.stack([g.sum(axes), (g * n).sum(axes)])) / whole
        dx = (g - _wide(sums[0], x) - n * _wide(sums[1], x)) * _wide(inverse, x)
        return dx.to(x.dtype), None, None


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel, laid over x."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
