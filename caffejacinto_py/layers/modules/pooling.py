"""Max, average and stochastic pooling with Caffe's windows, on torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]
LOWEST = -3.4028234663852886e38  # -FLT_MAX: what Caffe's MAX gives for an empty window
_PIECE = 1 << 18  # numbers per piece where the batch is worked on in pieces


@dataclass(frozen=True)
class Windows:
    """Where the windows lie: for one input size (height, width), in pixels.

    plain: torch's own pooling has exactly these windows, in mode `ceil`. Otherwise the input is padded explicitly by
    (`pad`, `after`) so that every window is whole.
    """

    size: Pair
    kernel: Pair
    stride: Pair
    pad: Pair
    out: Pair

    @property
    def ceil(self) -> bool:
        return any(
            o > (h + 2 * p - k) // s + 1
            for h, k, s, p, o in zip(self.size, self.kernel, self.stride, self.pad, self.out, strict=True)
        )

    @property
    def plain(self) -> bool:
        """torch wants pad <= kernel / 2, drops windows that start behind the image, and rounds both axes alike."""
        ceil = self.ceil
        for h, k, s, p, o in zip(self.size, self.kernel, self.stride, self.pad, self.out, strict=True):
            room = h + 2 * p - k
            theirs = (-(-room // s) if ceil else room // s) + 1
            if ceil and (theirs - 1) * s >= h + p:
                theirs -= 1
            if 2 * p > k or theirs != o or room < 0:
                return False
        return True

    @property
    def whole(self) -> bool:
        """One window, the whole image."""
        return self.out == (1, 1) and self.kernel == self.size and self.pad == (0, 0)

    @property
    def after(self) -> Pair:
        """Pixels to add behind the image so that every window is whole."""
        rows = zip(self.size, self.kernel, self.stride, self.pad, self.out, strict=True)
        y, x = (max(0, (o - 1) * s + k - h - p) for h, k, s, p, o in rows)
        return y, x

    def divisors(self) -> tuple[list[int], list[int]]:
        """Caffe's window sizes per output row and column: padding counts, what hangs over the padded image does not."""
        rows = zip(self.size, self.kernel, self.stride, self.pad, self.out, strict=True)
        y, x = ([min(i * s - p + k, h + p) - (i * s - p) for i in range(o)] for h, k, s, p, o in rows)
        return y, x

    def padded(self, x: Tensor, value: float) -> Tensor:
        (bottom, right), (top, left) = self.after, self.pad
        whole = F.pad(x, (left, right, top, bottom), value=value)
        # windows further apart than their size may leave a rest that no window reads
        height, width = ((o - 1) * s + k for k, s, o in zip(self.kernel, self.stride, self.out, strict=True))
        return whole[:, :, :height, :width]


class MaxPool(nn.Module):
    """The largest value of each window, the first of equals. mask: also its place, y * width + x, as numbers of x's
    type.
    """

    def __init__(self, windows: Windows, *, mask: bool = False) -> None:
        super().__init__()
        self.windows, self.mask = windows, mask
        self.ceil, self.plain = windows.ceil, windows.plain

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        w = self.windows
        if self.mask:
            y, index = self.with_index(x)
            return y, index.to(x.dtype)
        if not self.plain:
            return F.max_pool2d(w.padded(x, LOWEST), w.kernel, w.stride)
        if _by_channel(x):
            return _MaxByChannel.apply(x, w, self.ceil)
        return F.max_pool2d(x, w.kernel, w.stride, w.pad, 1, self.ceil)

    def with_index(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = self.windows
        if self.plain:
            return F.max_pool2d_with_indices(x, w.kernel, w.stride, w.pad, (1, 1), self.ceil)
        padded = w.padded(x, LOWEST)
        y, index = F.max_pool2d_with_indices(padded, w.kernel, w.stride)
        row = index // padded.shape[3] - w.pad[0]
        column = index % padded.shape[3] - w.pad[1]
        inside = (row >= 0) & (column >= 0) & (row < x.shape[2]) & (column < x.shape[3])
        return y, torch.where(inside, row * x.shape[3] + column, -1)  # -1: Caffe's mark of an empty window

    def extra_repr(self) -> str:
        return f"{self.windows}, mask={self.mask}"


class AveragePool(nn.Module):
    """The mean of each window; padding counts as zeros, what hangs over the padded image does not count."""

    divisor: Tensor

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.windows = windows
        self.ceil, self.plain, self.whole = windows.ceil, windows.plain, windows.whole
        rows, columns = (torch.tensor(d, dtype=torch.float64) for d in windows.divisors())
        self.register_buffer("divisor", rows[:, None] * columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.windows
        if self.whole and x.is_contiguous():
            return x.mean((2, 3), keepdim=True)  # in channels_last avg_pool2d is the faster one
        # inductor's gradient forgets that a window hanging over the image has a smaller divisor (torch 2.13)
        if self.plain and not (self.ceil and torch.compiler.is_compiling()):
            if _by_channel(x):
                return _AverageByChannel.apply(x, w, self.ceil)
            return F.avg_pool2d(x, w.kernel, w.stride, w.pad, self.ceil, True)
        wide = x.float() if x.dtype.itemsize < 4 else x  # a sum of float16 numbers can pass 65504
        total = F.avg_pool2d(w.padded(wide, 0.0), w.kernel, w.stride, divisor_override=1)
        return (total / self.divisor.to(wide.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.windows}"


class StochasticPool(nn.Module):
    """Training: one value of each window, drawn in proportion to the values. Test: sum x^2 / sum x. Values must be >=
    0.
    """

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        w = self.windows
        n, c = x.shape[:2]
        values = F.unfold(w.padded(x, 0.0), w.kernel, stride=w.stride).view(n, c, w.kernel[0] * w.kernel[1], -1)
        if self.training:
            with torch.no_grad():
                heap = values.cumsum(2)
                threshold = heap[:, :, -1:] * torch.rand_like(heap[:, :, -1:])
                chosen = (heap < threshold).sum(2, keepdim=True).clamp_(max=heap.shape[2] - 1)
            y = values.gather(2, chosen).squeeze(2)
        else:
            total = values.sum(2)
            positive = total > 0
            y = torch.where(positive, (values * values).sum(2) / torch.where(positive, total, 1), 0)
        return y.view(n, c, *w.out)

    def extra_repr(self) -> str:
        return f"{self.windows}"


def _by_channel(x: Tensor) -> bool:
    """Whether to go through channels_last: torch's NCHW kernels on a CPU are scalar, the others are vectorised."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.shape[1] >= 8 and x.shape[2] * x.shape[3] > 1 and x.is_contiguous()


def _pieces(shape: torch.Size) -> list[slice]:
    """Slices of the batch whose channels_last copies stay in the cache."""
    n = shape[0]
    images = max(1, _PIECE * n // max(1, shape.numel()))
    return [slice(i, min(n, i + images)) for i in range(0, n, images)]


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _MaxByChannel(torch.autograd.Function):
    """max_pool2d of an NCHW tensor: forward in channels_last pieces, backward (a cheap scatter) in NCHW."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, ceil: bool) -> Tensor:
        w = windows
        y = x.new_empty((*x.shape[:2], *w.out))
        index = torch.empty_like(y, dtype=torch.int64) if ctx.needs_input_grad[0] else None
        for piece in _pieces(x.shape):
            values, places = F.max_pool2d_with_indices(_last(x[piece]), w.kernel, w.stride, w.pad, (1, 1), ceil)
            y[piece] = values
            if index is not None:
                index[piece] = places
        if index is not None:
            ctx.save_for_backward(index)
            ctx.rest = x.shape, w, ceil
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        shape, w, ceil = ctx.rest
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        x = grad.new_empty(shape)  # only its shape is asked for
        return backward(grad.contiguous(), x, w.kernel, w.stride, w.pad, [1, 1], ceil, index), None, None


class _AverageByChannel(torch.autograd.Function):
    """avg_pool2d of an NCHW tensor in channels_last pieces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, ceil: bool) -> Tensor:
        w = windows
        ctx.rest = x.shape, w, ceil
        y = x.new_empty((*x.shape[:2], *w.out))
        for piece in _pieces(x.shape):
            y[piece] = F.avg_pool2d(_last(x[piece]), w.kernel, w.stride, w.pad, ceil, True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, w, ceil = ctx.rest
        dx = grad.new_empty(shape)
        backward = torch.ops.aten.avg_pool2d_backward
        for piece in _pieces(shape):
            x = torch.empty_like(
                dx[piece], memory_format=torch.channels_last
            )  # only its shape and layout are asked for
            dx[piece] = backward(_last(grad[piece]), x, w.kernel, w.stride, w.pad, ceil, True, None)
        return dx, None, None
