"""Pooling over regions, on torch.

Both layers are separable: a cell's number is the sum over y, x of row[y] * column[x] * pixel[y, x]. The rows' weights
of all regions form one matrix over (image, y), so that the first sum is a matrix product; no loop runs over regions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _in_image(weights: Tensor, image: Tensor, count: int) -> Tensor:
    """(R, cells, H) weights of rows -> (R, cells, N * H): zero in all images but the region's own."""
    own = image[:, None] == torch.arange(count, device=image.device)
    return (weights[:, :, None, :] * own[:, None, :, None]).flatten(2)


def _round(x: Tensor) -> Tensor:
    """C's round: halves away from zero."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


class PSROIPooling(nn.Module):
    """See the layer."""

    def __init__(self, group: int, scale: float) -> None:
        super().__init__()
        self.group, self.scale = group, scale

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        n, c, h, w = x.shape
        g = self.group
        rois = rois.detach().reshape(-1, 5)
        image, corner = rois[:, 0].long(), _round(rois[:, 1:])
        rows = self.cells(corner[:, 1], corner[:, 3], h)
        columns = self.cells(corner[:, 0], corner[:, 2], w)
        rows, columns = rows.to(x.dtype), columns.to(x.dtype)
        weights = _in_image(rows, image, n).transpose(0, 1)  # g, R, N H
        maps = x.reshape(n, c // (g * g), g, g, h, w).permute(2, 0, 4, 1, 3, 5).reshape(g, n * h, -1)
        part = torch.bmm(weights, maps).reshape(g, rois.shape[0], c // (g * g), g, w)  # i, R, d, j, w
        return torch.einsum("irdjw,rjw->rdij", part, columns)

    def cells(self, begin: Tensor, end: Tensor, size: int) -> Tensor:
        """(R, g, size): 1 / length where the pixel belongs to the cell."""
        start = begin * self.scale
        step = ((end + 1) * self.scale - start).clamp(min=0.1) / self.group
        i = torch.arange(self.group, device=begin.device, dtype=begin.dtype)
        low = torch.floor(i * step[:, None] + start[:, None]).clamp(0, size)
        high = torch.ceil((i + 1) * step[:, None] + start[:, None]).clamp(0, size)
        pixel = torch.arange(size, device=begin.device, dtype=begin.dtype)
        inside = (pixel >= low[..., None]) & (pixel < high[..., None])
        return inside / (high - low).clamp(min=1)[..., None]

    def extra_repr(self) -> str:
        return f"group={self.group}, scale={self.scale:g}"


class ROIAlign(nn.Module):
    """See the layer. samples: per cell and axis; 0 or less: by the region's size."""

    def __init__(self, grid: tuple[int, int], scale: float, *, samples: int) -> None:
        super().__init__()
        self.grid, self.scale, self.samples = grid, scale, samples

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rois = rois.detach().reshape(-1, 5).to(x.dtype)
        image, box = rois[:, 0].long(), rois[:, 1:] * self.scale
        rows = self.weights(box[:, 1], box[:, 3], h, self.grid[0])
        columns = self.weights(box[:, 0], box[:, 2], w, self.grid[1])
        pixels = x.permute(0, 2, 1, 3).reshape(n * h, c * w)
        part = (_in_image(rows, image, n).flatten(0, 1) @ pixels).reshape(rois.shape[0], self.grid[0], c, w)
        return torch.einsum("ripw,rjw->rpij", part, columns)

    def weights(self, begin: Tensor, end: Tensor, size: int, cells: int) -> Tensor:
        """(R, cells, size): how much each pixel of one axis counts in each cell."""
        length = (end - begin).clamp(min=1.0)
        step = length / cells
        count = torch.ceil(step) if self.samples <= 0 else torch.full_like(step, self.samples)
        most = int(count.max()) if self.samples <= 0 and count.numel() else max(self.samples, 1)
        k = torch.arange(most, device=begin.device, dtype=begin.dtype)
        i = torch.arange(cells, device=begin.device, dtype=begin.dtype)
        inner = (k + 0.5) * (step / count)[:, None]
        place = begin[:, None, None] + i[:, None] * step[:, None, None] + inner[:, None, :]  # R, cells, samples
        counts = (k < count[:, None])[:, None, :] & (place >= -1) & (place <= size)
        place = place.clamp(0, size - 1)
        pixel = torch.arange(size, device=begin.device, dtype=begin.dtype)
        near = (1 - (place[..., None] - pixel).abs()).clamp(min=0)  # bilinear
        return (near * counts[..., None]).sum(2) / count[:, None, None]

    def extra_repr(self) -> str:
        return f"grid={self.grid}, scale={self.scale:g}, samples={self.samples}"
