"""Pooling over 1 to 3 spatial axes with Caffe's windows, on torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.layers.modules.pooling import LOWEST


class VolumePool(nn.Module):
    """MAX, or AVE where padding counts as zeros and what hangs over the padded volume does not count.

    size, kernel, stride, pad, out: one number per spatial axis. The input is padded so that every window is whole.
    """

    divisor: Tensor

    def __init__(
        self,
        size: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        pad: Sequence[int],
        out: Sequence[int],
        *,
        average: bool,
    ) -> None:
        super().__init__()
        self.axes, self.average = len(size), average
        fill = 3 - len(size)  # torch's 3-D pooling serves fewer axes too
        self.kernel, self.stride = ([1] * fill + list(v) for v in (kernel, stride))
        rows = list(
            zip([1] * fill + list(size), self.kernel, self.stride, [0] * fill + list(pad), [1] * fill + list(out))
        )
        after = [max(0, (o - 1) * s + k - n - p) for n, k, s, p, o in rows]
        self.padding = [v for (_, _, _, p, _), a in zip(reversed(rows), reversed(after)) for v in (p, a)]
        self.reach = [(o - 1) * s + k for _, k, s, _, o in rows]
        lengths = [[min(i * s + k, n + 2 * p) - i * s for i in range(o)] for n, k, s, p, o in rows]
        a, b, c = (torch.tensor(v, dtype=torch.float64) for v in lengths)
        self.register_buffer("divisor", a[:, None, None] * b[:, None] * c, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*x.shape[:2], *[1] * (3 - self.axes), *x.shape[2:])
        flat = F.pad(flat, self.padding, value=0.0 if self.average else LOWEST)
        depth, height, width = self.reach  # windows further apart than their size leave a rest
        flat = flat[:, :, :depth, :height, :width]
        if self.average:
            y = F.avg_pool3d(flat, self.kernel, self.stride, divisor_override=1) / self.divisor.to(x.dtype)
        else:
            y = F.max_pool3d(flat, self.kernel, self.stride)
        return y.reshape(*x.shape[:2], *y.shape[-self.axes :])

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, average={self.average}"
