"""Torch side of Im2col, SPP, Crop and ROIPooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.errors import DataError


class Im2col(nn.Module):
    """Windows as columns, over any number of spatial axes."""

    def __init__(
        self, lead: int, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int], dilation: Sequence[int]
    ) -> None:
        super().__init__()
        self.lead = lead
        self.kernel, self.stride, self.pad, self.dilation = tuple(kernel), tuple(stride), tuple(pad), tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        n, lead = len(self.kernel), self.lead
        channels = x.shape[lead]
        flat = x.reshape(-1, *x.shape[lead:])
        y = F.pad(flat, [p for pad in reversed(self.pad) for p in (pad, pad)])
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation), 2):
            y = y.unfold(axis, d * (k - 1) + 1, s)[..., ::d]  # the window becomes the last axis
        out = y.shape[2 : 2 + n]
        y = y.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
        return y.reshape(*x.shape[:lead], channels * math.prod(self.kernel), *out)


class SPP(nn.Module):
    def __init__(self, levels: Sequence[nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([pool(x).flatten(1) for pool in self.levels], 1)


class Crop(nn.Module):
    def __init__(self, axis: int, offsets: Sequence[int]) -> None:
        super().__init__()
        self.axis, self.offsets = axis, tuple(offsets)

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        for a, offset in enumerate(self.offsets, self.axis):
            x = x.narrow(a, offset, reference.shape[a])
        return x


class ROIPooling(nn.Module):
    """The place of every maximum is found without autograd, region by region; one gather then takes the values."""

    def __init__(self, bins: tuple[int, int], scale: float, where: str) -> None:
        super().__init__()
        self.bins, self.scale, self.where = bins, scale, where

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        rows = rois.detach().reshape(-1, 5)
        images = rows[:, 0].long()
        self._check(images, n)
        corners = torch.floor(rows[:, 1:] * self.scale + 0.5).long().tolist()
        with torch.no_grad():
            chosen = [self._places(x[i], corner) for i, corner in zip(images.tolist(), corners)]
            if not chosen:
                return x.new_zeros(0, channels, *self.bins)
            place = torch.stack(chosen)  # (R, C, h, w): y * width + x, or -1
            plane = images[:, None] * channels + torch.arange(channels, device=x.device)
            index = plane[:, :, None, None] * (height * width) + place.clamp(min=0)
        values = x.reshape(-1).gather(0, index.reshape(-1)).view(index.shape)
        return torch.where(place >= 0, values, 0.0)

    def _check(self, images: Tensor, n: int) -> None:
        bad = (images < 0) | (images >= n)
        if bool(bad.any()):
            text = f"{self.where}: a region lies in image {int(images[bad][0])}, but the batch has images 0..{n - 1}"
            raise DataError(text)

    def _places(self, x: Tensor, corner: list[int]) -> Tensor:
        """(C, h, w): where in the plane of height x width the maximum of each bin lies; -1 for an empty bin."""
        height, width = x.shape[1:]
        x1, y1, x2, y2 = corner
        high, wide = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        if x1 >= 0 and y1 >= 0 and x1 + wide <= width and y1 + high <= height:
            # torch's adaptive pooling has exactly these bins
            region = x[:, y1 : y1 + high, x1 : x1 + wide]
            _, at = F.adaptive_max_pool2d(region, self.bins, return_indices=True)
            return (y1 + at // wide) * width + x1 + at % wide
        places = x.new_full((x.shape[0], *self.bins), -1, dtype=torch.long)
        for i, (top, bottom) in enumerate(_limits(y1, high, self.bins[0], height)):
            for j, (left, right) in enumerate(_limits(x1, wide, self.bins[1], width)):
                if bottom > top and right > left:
                    at = x[:, top:bottom, left:right].flatten(1).argmax(1)
                    places[:, i, j] = (top + at // (right - left)) * width + left + at % (right - left)
        return places

    def extra_repr(self) -> str:
        return f"bins={self.bins}, spatial_scale={self.scale:g}"


def _limits(start: int, size: int, bins: int, end: int) -> list[tuple[int, int]]:
    """(first, behind the last) pixel of each bin, cut to 0..end."""
    cuts = [(start + i * size // bins, start - (-(i + 1) * size // bins)) for i in range(bins)]
    return [(min(max(a, 0), end), min(max(b, 0), end)) for a, b in cuts]
