"""Local response normalization, on torch.

Across channels the window sums are shifted adds (about 2 log2 n of them, any layout, any device, exact) done in pieces
that stay in the cache. Measured on 2 Zen 3 cores against `F.local_response_norm` and against a banded 1x1 convolution:
see bench/layers.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caffejacinto_py.layers.norm import PIECE as _PIECE


class AcrossChannels(nn.Module):
    """y = x (k + alpha / n * sum of x^2 over n channels)^-beta."""

    def __init__(self, size: int, alpha: float, beta: float, k: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return across_plain(x, self.size, self.alpha, self.beta, self.k)
        return _Across.apply(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}, k={self.k:g}"


class WithinChannel(nn.Module):
    """y = x (1 + alpha * mean of x^2 over an n x n window, padding counted)^-beta."""

    def __init__(self, size: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x * x, self.size, 1, (self.size - 1) // 2)
        return x * power(mean * self.alpha + 1, self.beta)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}"


def power(scale: Tensor, beta: float) -> Tensor:
    """scale^-beta. The usual 0.75 as a product of roots: several times faster than pow."""
    if beta == 0.75:
        root = scale.rsqrt()
        return root * root.sqrt()
    return scale.rsqrt() if beta == 0.5 else scale.pow(-beta)


def across_plain(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """The formula in plain operations, for tracing."""
    c, r = x.shape[1], size // 2
    padded = F.pad(x * x, (0, 0, 0, 0, r, r))
    total = padded[:, :c]
    for i in range(1, size):
        total = total + padded[:, i : i + c]
    return x * power(total * (alpha / size) + k, beta)


def window_sums(padded: Tensor, size: int, out: Tensor) -> None:
    """out[:, c] = sum of padded[:, c : c + size]; size odd. By doubling: 3 additions for 5 channels, 4 for 7."""
    width, level, step, done = out.shape[1], padded, 1, 0
    parts = []
    while True:
        if size & 1:
            parts.append(level[:, done : done + width])
            done += step
        size >>= 1
        if not size:
            break
        level = level[:, :-step] + level[:, step:]
        step *= 2
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


def _pieces(x: Tensor) -> list[slice]:
    """Slices of the batch: cache-sized on a CPU, all at once elsewhere."""
    n = x.shape[0]
    images = n if x.device.type != "cpu" else max(1, _PIECE * n // max(1, x.numel()))
    return [slice(i, min(n, i + images)) for i in range(0, n, images)]


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in the memory format of `like`, or in its own: contiguous or channels_last."""
    cl = torch.channels_last
    source = x if like is None else like
    return x.contiguous(
        memory_format=cl if not source.is_contiguous() and _is_last(source) else torch.contiguous_format
    )


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _padded(x: Tensor, images: int, edge: float, pad: int) -> Tensor:
    """A scratch tensor for `images` images of x with `pad` more channels at each end, those set to `edge`."""
    shape = (images, x.shape[1] + 2 * pad, *x.shape[2:])
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    scratch = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    scratch[:, :pad] = edge
    scratch[:, scratch.shape[1] - pad :] = edge
    return scratch


class _Across(torch.autograd.Function):
    """With s = k + a sum x^2, a = alpha / n: y = x s^-b; dx = dy s^-b - 2 a b x sum(dy y / s). Saves x and s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        x = _dense(x)
        c, r, pieces = x.shape[1], size // 2, _pieces(x)
        keep = ctx.needs_input_grad[0]  # else one piece of scratch will do
        y, scale = torch.empty_like(x), torch.empty_like(x if keep or not pieces else x[pieces[0]])
        # the edge and every square carry k / n, so that a sum over n channels is the finished scale
        start = x.new_full((), k / size)
        padded = _padded(x, pieces[0].stop, k / size, r) if pieces else x
        for piece in pieces:
            part, into = x[piece], padded[: piece.stop - piece.start]
            torch.addcmul(start, part, part, value=alpha / size, out=into[:, r : r + c])
            s = scale[piece] if keep else scale[: piece.stop - piece.start]
            window_sums(into, size, s)
            torch.mul(part, power(s, beta), out=y[piece])
        ctx.save_for_backward(x, scale)
        ctx.constants = size, alpha, beta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        size, alpha, beta = ctx.constants
        grad = _dense(grad, x)
        dx = torch.empty_like(x)
        c, r, pieces = x.shape[1], size // 2, _pieces(x)
        padded = _padded(x, pieces[0].stop, 0.0, r) if pieces else x
        for piece in pieces:
            part, into, s = x[piece], padded[: piece.stop - piece.start], scale[piece]
            direct = power(s, beta).mul_(grad[piece])
            torch.mul(direct, part, out=into[:, r : r + c]).div_(s)
            sums = dx[piece]
            window_sums(into, size, sums)
            torch.addcmul(direct, sums, part, value=-2 * alpha * beta / size, out=sums)
        return dx, None, None, None, None
