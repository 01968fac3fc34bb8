"""Magnitude thresholds: which weights of a row, or of a whole blob, become zero.

caffe-jacinto scans: from 0 upwards in steps of step * max|w|, coarse steps first, while at most the wanted fraction of
the weights is that small and the cap is not reached. What such a scan stops at is the last grid point below the
(k + 1)-th smallest magnitude, k being the count that the fraction allows; here that magnitude is selected instead.
Source: caffe-jacinto net.cpp, both its routines (per output channel, and the older one per layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True)
class Limits:
    """maxratio: the threshold stays below this times max|w|. value_max: and below this. step: of the scan, relative to
    max|w|."""

    maxratio: float = 0.2
    value_max: float = 0.2
    step: float = 1e-7


@dataclass(frozen=True)
class Thresholds:
    """What was selected, one value per row (one in all for a whole blob).

    largest: max|w|. cap: what the threshold had to stay below, at most max|w|. value: the threshold, inclusive.
    """

    largest: Tensor
    cap: Tensor
    value: Tensor


def allowed(fraction: float, n: int) -> int:
    """The largest count whose share of n is at most `fraction`, both in float32 as in C++."""
    share, size = np.float32(fraction), np.float32(n)
    k = int(np.floor(float(share) * n))
    while k < n and np.float32(k + 1) / size <= share:
        k += 1
    while k > 0 and np.float32(k) / size > share:
        k -= 1
    return k


def per_row(weight: Tensor, fraction: float, limits: Limits) -> Thresholds:
    """Thresholds of the rows (axis 0), each below its own cap."""
    rows = _magnitudes(weight).reshape(weight.shape[0], -1)
    return _select(rows, fraction, limits)


def whole(weight: Tensor, fraction: float, limits: Limits) -> Thresholds:
    """One threshold for all of a blob."""
    return _select(_magnitudes(weight).reshape(1, -1), fraction, limits)


@torch.no_grad()
def apply(weight: Tensor, found: Thresholds) -> None:
    """Set what is not above its threshold to zero, in place. `found`: from `per_row` or `whole` of this weight."""
    value = found.value.reshape(-1, *[1] * (weight.dim() - 1))
    weight.masked_fill_(weight.abs() <= value, 0.0)


def _magnitudes(weight: Tensor) -> Tensor:
    return weight.detach().abs()


def _select(rows: Tensor, fraction: float, limits: Limits) -> Thresholds:
    n = rows.shape[1]
    largest = rows.amax(1)
    ratio = torch.tensor(limits.maxratio, dtype=rows.dtype, device=rows.device)
    cap = torch.minimum((largest * ratio).clamp_max(limits.value_max), largest)
    k = allowed(fraction, n)
    limit = cap if k >= n else torch.minimum(cap, rows.kthvalue(k + 1, dim=1).values)
    step = largest.double() * limits.step
    # the last point of the grid 0, step, 2 step, ... that is below the limit
    points = torch.where(step > 0, torch.ceil(limit.double() / step) - 1, torch.zeros_like(step)).clamp_min(0)
    exact = points * step
    value = exact.to(rows.dtype)
    value = torch.where(value.double() > exact, torch.nextafter(value, torch.zeros_like(value)), value)
    return Thresholds(largest, cap, value)
