"""NVCaffe's random resize of the image before the crop (transform_param img_rand_resize_*, rand_resize_ratio_*,
*_stretch_*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from caffejacinto_py.data.decode import resize
from caffejacinto_py.errors import LayerError


@dataclass(frozen=True)
class RandomResize:
    """Pick a random size, then resize.

    The short side becomes S ~ U{short}; the aspect is kept, unless `ratio` is given: then the longer side becomes
    short * U(ratio) (a square tosses a coin which side that is). Each side is multiplied by U(vertical) /
    U(horizontal). No side falls below the crop; none exceeds the original unless `upscale`. `down` / `up`: cv2
    interpolation codes.
    """

    short: tuple[int, int] = (0, 0)
    ratio: tuple[float, float] = (0.0, 0.0)
    vertical: tuple[float, float] = (1.0, 1.0)
    horizontal: tuple[float, float] = (1.0, 1.0)
    down: int = 0
    up: int = 2
    upscale: bool = False

    @classmethod
    def from_param(cls, param: Any) -> RandomResize | None:
        """None where no random resize is asked for. Raises LayerError for a half-given range."""
        short = (param.img_rand_resize_lower, param.img_rand_resize_upper)
        ratio = (param.rand_resize_ratio_lower, param.rand_resize_ratio_upper)
        vertical = (param.vertical_stretch_lower, param.vertical_stretch_upper)
        horizontal = (param.horizontal_stretch_lower, param.horizontal_stretch_upper)
        ranges = {"img_rand_resize": short, "rand_resize_ratio": ratio}
        ranges |= {"vertical_stretch": vertical, "horizontal_stretch": horizontal}
        for name, (low, high) in ranges.items():
            if low > high or (low == 0) != (high == 0):
                raise LayerError(
                    f"transform_param: {name}_lower {low} and {name}_upper {high} are no range",
                    field=("transform_param", f"{name}_lower"),
                )
        if not short[0] and ratio[1] <= 1 and vertical == horizontal == (1.0, 1.0):
            return None
        # The enum's order is OpenCV's: NEAREST 0, LINEAR 1, CUBIC 2, AREA 3.
        return cls(
            short, ratio, vertical, horizontal,
            param.interpolation_algo_down, param.interpolation_algo_up, param.allow_upscale,
        )  # fmt: skip

    def size(self, height: int, width: int, draw: np.ndarray, crop: tuple[int, int] | None) -> tuple[int, int]:
        """The new (height, width). draw: five random numbers in [0, 1)."""
        short = min(height, width)
        if self.short[0]:
            short = self.short[0] + int(draw[0] * (self.short[1] - self.short[0] + 1))
        scale = short / min(height, width)
        tall, wide = height * scale, width * scale
        if self.ratio[0] >= 1 and self.ratio[1] > 1:
            longer = short * _uniform(self.ratio, draw[1])
            vertical = height > width or (height == width and draw[2] < 0.5)
            tall, wide = (longer, float(short)) if vertical else (float(short), longer)
        tall *= _uniform(self.vertical, draw[3])
        wide *= _uniform(self.horizontal, draw[4])
        if not self.upscale:
            tall, wide = min(tall, height), min(wide, width)
        low = crop or (1, 1)
        return max(round(tall), low[0]), max(round(wide), low[1])

    def apply(self, image: np.ndarray, draw: np.ndarray, crop: tuple[int, int] | None) -> np.ndarray:
        """Resize an H,W,C image."""
        height, width = self.size(image.shape[0], image.shape[1], draw, crop)
        smaller = height <= image.shape[0] and width <= image.shape[1]
        return resize(image, height, width, self.down if smaller else self.up)


def _uniform(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(u)
