"""Resizing of feature maps, on torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.errors import DataError

Pair = tuple[int, int]


class Interp(nn.Module):
    """To `size` with aligned corners, after `crop` = (begin, end) rows and columns have been cut off.

    With a second input its size counts.
    """

    def __init__(self, size: Pair, *, crop: Pair = (0, 0), nearest: bool = False) -> None:
        super().__init__()
        self.size, self.crop, self.nearest = size, crop, nearest

    def forward(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        size = self.size if like is None else (like.shape[2], like.shape[3])
        begin, end = self.crop
        if begin or end:
            x = x[:, :, begin : x.shape[2] - end, begin : x.shape[3] - end]
        if self.nearest:
            return x.index_select(2, _places(x, 2, size[0])).index_select(3, _places(x, 3, size[1]))
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    def extra_repr(self) -> str:
        return f"size={self.size}, crop={self.crop}, nearest={self.nearest}"


def _places(x: Tensor, axis: int, out: int) -> Tensor:
    """Caffe computes them in float32, whatever the type of the data."""
    size = x.shape[axis]
    index = torch.arange(out, device=x.device)
    if size == out:
        return index
    # filled where it is used: a copy to a GPU would make the host wait
    ratio = torch.full((), (size - 1) / (out - 1) if out > 1 else 0.0, dtype=torch.float32, device=x.device)
    return torch.floor(index.float() * ratio + 0.5).long()


class Unpool(nn.Module):
    """Values at the places of a mask, zeros elsewhere."""

    def __init__(self, size: Pair, *, where: str) -> None:
        super().__init__()
        self.size, self.where = size, where

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, w = self.size
        index = mask.detach().long().flatten(2)
        if not torch.compiler.is_compiling() and index.device.type == "cpu":
            self.check(index, h * w)
        top = x.new_zeros(*x.shape[:2], h * w).scatter(2, index, x.flatten(2))
        return top.view(*x.shape[:2], h, w)

    def check(self, index: Tensor, count: int) -> None:
        wrong = (index < 0) | (index >= count)
        if bool(wrong.any()):
            text = f"{self.where}: the mask says place {int(index[wrong][0])}, but the top has {count} pixels"
            raise DataError(text, hint="upsample_h, upsample_w or scale must give the size the pooling layer had")

    def extra_repr(self) -> str:
        return f"size={self.size}"


class Repeat(nn.Module):
    """Each pixel as a block of `scale` rows and columns."""

    def __init__(self, scale: Pair) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (x.shape[2] * self.scale[0], x.shape[3] * self.scale[1]), mode="nearest-exact")

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
