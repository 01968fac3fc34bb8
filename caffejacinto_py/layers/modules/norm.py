"""BatchNorm in both dialects, Scale, Bias and Dropout, on torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.layers.modules import over_ranks

_OVERWRITES = 2  # NVCaffe: so many first passes overwrite the running statistics instead of averaging


class BatchNorm(nn.Module):
    """Normalization per channel with its statistics in Caffe's blobs, updated in place by every pass that uses the
    batch.

    fraction: moving_average_fraction. use_global: True, False, or None for "as the phase says".
    update: set it to False while a pass is recomputed (activation checkpointing), so that statistics count once.
    together: for the statistics of the batches of all ranks of a training; None: of this rank's.
    """

    def __init__(
        self,
        mean: nn.Parameter,
        variance: nn.Parameter,
        factor: nn.Parameter,
        *,
        eps: float,
        fraction: float,
        use_global: bool | None = None,
    ) -> None:
        super().__init__()
        self.mean, self.variance, self.factor = mean, variance, factor
        self.scale: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        self.eps, self.fraction, self.use_global = eps, fraction, use_global
        self.update = True
        self.together: over_ranks.AddUp | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """scale, shift: those of a Scale layer behind this one, applied in the same pass over memory."""
        scale, shift = self.scale if scale is None else scale, self.shift if shift is None else shift
        flat = x.unsqueeze(1) if x.dim() == 1 else x
        use_global = not self.training if self.use_global is None else self.use_global
        y = (self.normalize_global if use_global else self.normalize_batch)(flat, scale, shift)
        return y.squeeze(1) if x.dim() == 1 else y

    def normalize_global(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        with torch.no_grad():
            mean, variance = self.running()
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, self.eps)

    def normalize_batch(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        if self.together is not None:
            return self.normalize_together(x, scale, shift, self.together)
        count = x.numel() // x.shape[1]
        # momentum 1 leaves the batch's own mean and unbiased variance in the two buffers
        mean, unbiased = torch.zeros_like(self.mean), torch.zeros_like(self.variance)
        if count > 1:
            y = F.batch_norm(x, mean, unbiased, scale, shift, True, 1.0, self.eps)
        else:  # torch refuses one value per channel; Caffe's variance is then 0
            with torch.no_grad():
                mean.copy_(x.reshape(-1))
            y = _affine(x - x, scale, shift)
        if self.update:
            with torch.no_grad():
                self.accumulate(mean, unbiased, count)
        return y

    def normalize_together(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, add_up: over_ranks.AddUp
    ) -> Tensor:
        y, mean, variance, whole = over_ranks.normalize(x, self.eps, add_up)
        if self.update:
            with torch.no_grad():
                self.accumulate(mean, variance * (whole / (whole - 1).clamp(min=1)), whole)
        return _affine(y, scale, shift)

    def running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance for the global mode. BVLC: the sums divided by the factor; 0 where nothing was counted."""
        inverse = torch.where(self.factor == 0, 0.0, 1 / self.factor)
        return self.mean * inverse, self.variance * inverse

    def accumulate(self, mean: Tensor, unbiased: Tensor, count: int | Tensor) -> None:
        """BVLC: sums that fade with `fraction`, and the factor counts how much is in them."""
        self.factor.mul_(self.fraction).add_(1)
        self.mean.mul_(self.fraction).add_(mean)
        self.variance.mul_(self.fraction).add_(unbiased)

    def extra_repr(self) -> str:
        return (
            f"channels={self.mean.numel()}, eps={self.eps:g}, fraction={self.fraction:g}, "
            f"use_global={self.use_global}, affine={self.scale is not None}"
        )


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    tail = (1,) * (y.dim() - 2)
    y = y if scale is None else y * scale.view(-1, *tail)
    return y if shift is None else y + shift.view(-1, *tail)


class BatchNormAverage(BatchNorm):
    """NVCaffe's: plain running averages, the factor blob left alone, optional scale and shift, the phase decides.

    The buffer `passes` counts training passes; it belongs into a snapshot for a bit-exact resume.
    """

    passes: Tensor

    def __init__(
        self,
        mean: nn.Parameter,
        variance: nn.Parameter,
        factor: nn.Parameter,
        scale: nn.Parameter | None = None,
        shift: nn.Parameter | None = None,
        *,
        eps: float,
        fraction: float,
    ) -> None:
        super().__init__(mean, variance, factor, eps=eps, fraction=fraction)
        self.scale, self.shift = scale, shift
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64, device=mean.device))

    def running(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.variance

    def accumulate(self, mean: Tensor, unbiased: Tensor, count: int | Tensor) -> None:
        weight = torch.where(self.passes < _OVERWRITES, 1.0, 1 - self.fraction).to(mean.dtype)
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(unbiased * ((count - 1) / count) + self.eps, weight)
        self.passes.add_(1)


class Scale(nn.Module):
    """y = x * scale (+ shift), both laid over the axes of x from `axis` on. scale None: it is the second input."""

    ones: Tensor | None
    zeros: Tensor | None

    def __init__(self, scale: nn.Parameter | None, shift: nn.Parameter | None, *, axis: int) -> None:
        super().__init__()
        self.scale, self.shift, self.axis = scale, shift, axis
        per_channel = axis == 1 and scale is not None and scale.dim() == 1
        # per channel: torch's batch norm with mean 0, variance 1, eps 0 is this affine in one pass each way
        like = scale if per_channel else None
        self.register_buffer("zeros", None if like is None else torch.zeros_like(like), persistent=False)
        self.register_buffer("ones", None if like is None else torch.ones_like(like), persistent=False)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """scale and shift, for the layer before to apply."""
        return self.scale, self.shift

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        if self.zeros is not None and x.is_floating_point() and x.dtype.itemsize <= self.zeros.dtype.itemsize:
            return F.batch_norm(x, self.zeros, self.ones, self.scale, self.shift, False, 0.0, 0.0)
        y = x * spread(given[0] if self.scale is None else self.scale, x, self.axis)
        return y if self.shift is None else y + spread(self.shift, x, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, own={self.scale is not None}, bias={self.shift is not None}"


class Bias(nn.Module):
    """y = x + shift, laid over the axes of x from `axis` on. shift None: it is the second input."""

    def __init__(self, shift: nn.Parameter | None, *, axis: int) -> None:
        super().__init__()
        self.shift, self.axis = shift, axis
        self.inplace = False

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        shift = spread(given[0] if self.shift is None else self.shift, x, self.axis)
        return x.add_(shift) if self.inplace else x + shift

    def extra_repr(self) -> str:
        return f"axis={self.axis}, own={self.shift is not None}"


def spread(small: Tensor, x: Tensor, axis: int) -> Tensor:
    """`small` with as many trailing axes of size 1 as make it broadcast over x from `axis` on."""
    return small.reshape(*small.shape, *(1,) * (x.dim() - axis - small.dim()))


class Dropout(nn.Module):
    """Zeroes each value with probability ratio and scales the rest by 1 / (1 - ratio), in training."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.inplace = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.ratio, True, self.inplace)
        mask = dropout_mask(x, self.ratio)
        return x.mul_(mask) if self.inplace else x * mask

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}"


class UnscaledDropout(Dropout):
    """Zeroes each value with probability ratio in training and leaves the rest; scales all by 1 - ratio in test."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            factor: Tensor | float = 1 - self.ratio
        elif x.device.type != "cpu" or torch.compiler.is_compiling():
            factor = (torch.rand_like(x) >= self.ratio).to(x.dtype)
        else:
            factor = dropout_mask(x, self.ratio, kept=1.0)
        return x.mul_(factor) if self.inplace else x * factor


def dropout_mask(x: Tensor, ratio: float, *, kept: float | None = None) -> Tensor:
    """0 or `kept` (None: 1 / (1 - ratio)) for each value of x, from torch's generator.

    32 random bits a value, two values a draw, and Caffe's resolution of 2^-32; bernoulli_ is slower on a CPU.
    """
    n = x.numel()
    bits = torch.empty((n + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)[:n]
    stays = bits >= round(ratio * 2**32) - 2**31
    del bits  # a product of the two types would copy once more
    mask = torch.empty_like(x)
    mask.as_strided((n,), (1,)).copy_(stays).mul_(1 / (1 - ratio) if kept is None else kept)
    return mask
