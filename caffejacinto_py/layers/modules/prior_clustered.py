"""Default boxes of given sizes, on torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caffejacinto_py.layers.modules.constant import Constant

Pair = tuple[float, float]


class PriorBoxClustered(nn.Module):
    """boxes: (height, width) in pixels. image, step: (height, width); None: from the inputs' sizes."""

    def __init__(
        self,
        boxes: list[Pair],
        *,
        image: Pair | None,
        step: Pair | None,
        offset: float,
        clip: bool,
        variance: list[float],
    ) -> None:
        super().__init__()
        self.count, self.image, self.step, self.offset, self.clip = len(boxes), image, step, offset, clip
        self.boxes, self.variance = Constant(boxes), Constant(variance * 4 if len(variance) == 1 else variance)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        h, w = features.shape[2:]
        image = self.image or (images.shape[2], images.shape[3])
        step = self.step or (image[0] / h, image[1] / w)
        like: dict[str, Any] = {"dtype": features.dtype, "device": features.device}
        center = [(torch.arange(n, **like) + self.offset) * s / i for n, s, i in zip((h, w), step, image, strict=True)]
        high, wide = (self.boxes.like(features)[:, i] / 2 / image[i] for i in (0, 1))
        y, x = center[0][:, None, None], center[1][:, None]
        sides = (x - wide, y - high, x + wide, y + high)
        corners = torch.stack([s.expand(h, w, self.count) for s in sides], -1)
        if self.clip:
            corners = corners.clamp(0, 1)
        variance = self.variance.like(features).expand_as(corners)
        return torch.stack([corners.flatten(), variance.flatten()])[None]
