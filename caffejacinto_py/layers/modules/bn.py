"""The BN layers of PSPNet, SegNet and their ancestors, on torch. Blobs are (1, C, 1, 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.layers.modules import over_ranks

LEAST = 1e-30  # torch refuses an eps of 0 in training


def _normalize(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """By the batch's own statistics."""
    if x.numel() == x.shape[1]:  # torch refuses one value per channel; its variance is 0
        return (x - x) * _like(scale, x) + _like(shift, x)
    return F.batch_norm(x, None, None, scale.view(-1), shift.view(-1), True, 0.0, max(eps, LEAST))


def _like(blob: Tensor, x: Tensor) -> Tensor:
    return blob.view(1, -1, *(1,) * (x.dim() - 2))


class Affine(nn.Module):
    """y = scale * x + shift."""

    def __init__(self, scale: nn.Parameter, shift: nn.Parameter) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * _like(self.scale, x) + _like(self.shift, x)


class BatchOnly(nn.Module):
    """The batch's statistics in either phase; nothing is kept. together: see `BatchNorm`."""

    def __init__(self, scale: nn.Parameter, shift: nn.Parameter, *, eps: float) -> None:
        super().__init__()
        self.scale, self.shift, self.eps = scale, shift, eps
        self.together: over_ranks.AddUp | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.together is not None:
            y = over_ranks.normalize(x, self.eps, self.together)[0]
            return y * _like(self.scale, x) + _like(self.shift, x)
        return _normalize(x, self.scale, self.shift, self.eps)


class RunningNorm(nn.Module):
    """With a plain moving average: running = keep * running + (1 - keep) * batch in training.

    use: whose statistics count; "phase": the batch's in training, else the running ones; "running"; "batch".
    inverse: the fourth blob holds 1 / sqrt(variance + eps). update: False while a pass is recomputed. together: see
    `BatchNorm`.
    """

    def __init__(
        self,
        scale: nn.Parameter,
        shift: nn.Parameter,
        mean: nn.Parameter,
        variance: nn.Parameter,
        *,
        eps: float,
        keep: float,
        use: str,
        inverse: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.shift, self.mean, self.variance = scale, shift, mean, variance
        self.eps, self.keep, self.use, self.inverse = eps, keep, use, inverse
        self.update = True
        self.together: over_ranks.AddUp | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.use == "running" or (self.use == "phase" and not self.training):
            return self.normalize_running(x)
        if self.together is not None:
            y, mean, variance, _ = over_ranks.normalize(x, self.eps, self.together)
            self.accumulate(mean, variance)
            return y * _like(self.scale, x) + _like(self.shift, x)
        y = _normalize(x, self.scale, self.shift, self.eps)
        if self.training and self.update:
            axes = [i for i in range(x.dim()) if i != 1]
            variance, mean = torch.var_mean(x.detach(), axes, unbiased=False)
            self.accumulate(mean, variance)
        return y

    def accumulate(self, mean: Tensor, variance: Tensor) -> None:
        if self.training and self.update:
            with torch.no_grad():
                self.mean.mul_(self.keep).add_((1 - self.keep) * mean.view(self.mean.shape))
                self.variance.mul_(self.keep).add_((1 - self.keep) * variance.view(self.variance.shape))

    def normalize_running(self, x: Tensor) -> Tensor:
        factor = self.variance if self.inverse else torch.rsqrt(self.variance + self.eps)
        return (x - _like(self.mean, x)) * _like(self.scale * factor, x) + _like(self.shift, x)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, keep={self.keep:g}, use={self.use}, inverse={self.inverse}"
