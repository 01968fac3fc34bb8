"""DetectNetTransformation on torch: all images of a batch at once, each with its own augmentation.

Sizes and places that differ from image to image are tensors, so no image is looked at by Python: what is resized,
rotated and cropped is gathered from the source, pixel by pixel of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caffejacinto_py.errors import DataError

_BOX = 16  # numbers of a box
_LEAST = 1.1920929e-07  # FLT_EPSILON
_FINE = 1 << 20  # parts of a pixel: a quarter turn ends on whole pixels
_CHUNK = 64  # boxes at a time: bounds the memory of the masks


class Augment(NamedTuple):
    """What happens to n images: tensors of shape (n,). height, width: after the resize. angle: degrees clockwise. top,
    left: of the crop, may be negative.
    """

    hue: Tensor
    saturation: Tensor
    flip: Tensor
    height: Tensor
    width: Tensor
    angle: Tensor
    top: Tensor
    left: Tensor


@dataclass(frozen=True)
class Chances:
    """The probability of each change, and how far it goes; see the layer."""

    hue: tuple[float, float]
    desaturation: tuple[float, float]
    flip: float
    scale: tuple[float, float, float]
    rotation: tuple[float, float]
    crop: tuple[float, int, int]

    def draw(self, n: int, source: tuple[int, int], size: tuple[int, int], device: Any = None) -> Augment:
        """The changes of n images of `source` (height, width) that are cropped to `size`; from torch's generator."""
        r = iter(torch.rand((12, n), dtype=torch.float64, device=device))
        zero, one = torch.zeros_like(r0 := next(r)), torch.ones_like(r0)
        hue = torch.where(r0 < self.hue[0], ((2 * next(r) - 1) * self.hue[1]).clamp(-180, 180), zero)
        saturation = torch.where(next(r) < self.desaturation[0], 1 - next(r) * self.desaturation[1], one)
        flip = next(r) < self.flip
        chance, low, high = self.scale
        scale = torch.where(next(r) < chance, low + (high - low) * next(r), one)
        height, width = (_round(v * scale).clamp(min=1) for v in source)
        angle = torch.where(next(r) < self.rotation[0], (2 * next(r) - 1) * self.rotation[1], zero)
        turn = _turn(height, width, angle)
        anywhere = next(r) < self.crop[0]
        top, left = (
            torch.where(anywhere, _round(next(r) * (full - want + shift) - shift // 2), _round((full - want) / 2))
            for full, want, shift in zip(turn.size, size, self.crop[1:])
        )
        return Augment(hue, saturation, flip, height.long(), width.long(), angle, top.long(), left.long())

    @staticmethod
    def none(n: int, size: tuple[int, int], device: Any = None) -> Augment:
        """Only the resize to `size` (height, width)."""
        zero = torch.zeros(n, dtype=torch.float64, device=device)
        whole = zero.long()
        return Augment(zero, zero + 1, zero > 0, whole + size[0], whole + size[1], zero, whole, whole)

    @property
    def colors(self) -> bool:
        return any(p > 0 and far != 0 for p, far in (self.hue, self.desaturation))

    @property
    def rotates(self) -> bool:
        return self.rotation[0] > 0 and self.rotation[1] != 0

    def largest(self, source: tuple[int, int]) -> tuple[int, int]:
        """The largest height and width after the resize."""
        most = max(1.0, *self.scale[1:]) if self.scale[0] > 0 else 1.0
        return math.ceil(source[0] * most), math.ceil(source[1] * most)


def _round(x: Tensor) -> Tensor:
    """C's round: halves away from zero."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


class _Turn(NamedTuple):
    """A rotation about the middle that then moves all into the bounding rectangle: x' = cos x - sin y + dx, y' = sin x
    + cos y + dy. size: (height, width) of that rectangle.
    """

    cos: Tensor
    sin: Tensor
    dx: Tensor
    dy: Tensor
    size: tuple[Tensor, Tensor]


def _turn(height: Tensor, width: Tensor, angle: Tensor) -> _Turn:
    """The rectangle has whole pixels and one to spare, and its size is that about a whole middle, as OpenCV has it."""
    radians = torch.deg2rad(angle.double())
    cos, sin = torch.cos(radians), torch.sin(radians)
    x, y = width / 2, height / 2
    reach_x, reach_y = cos.abs() * x + sin.abs() * y, sin.abs() * x + cos.abs() * y
    still = angle == 0
    sizes = [_span(torch.floor(c), r) for c, r in ((y, reach_y), (x, reach_x))]
    rows, columns = (torch.where(still, full.double(), s) for full, s in zip((height, width), sizes))
    dx = torch.where(still, 0.0, x - _low(x, reach_x) - cos * x + sin * y)
    dy = torch.where(still, 0.0, y - _low(y, reach_y) - sin * x - cos * y)
    return _Turn(cos, sin, dx, dy, (rows, columns))


def _low(middle: Tensor, reach: Tensor) -> Tensor:
    return torch.floor((middle - reach).float()).double()  # float: a rounding error of double is no pixel


def _span(middle: Tensor, reach: Tensor) -> Tensor:
    return torch.ceil((middle + reach).float()).double() - _low(middle, reach) + 1


def _per_image(v: Tensor) -> Tensor:
    return v[:, None, None, None]


def recolor(x: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Hue turned by degrees and saturation scaled in HSV; x: (n, 3, H, W), BGR. Saturation above 1 - 1 / 255 stays."""
    saturation = torch.where(saturation < 1 - 1 / 255, saturation, 1.0)
    change = _per_image((hue.abs() > _LEAST) | (saturation < 1))
    b, g, r = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    range_ = value - least
    unit = 1 / range_.clamp(min=_LEAST)
    angle = torch.where(value == r, (g - b) * unit, torch.where(value == g, (b - r) * unit + 2, (r - g) * unit + 4))
    angle = angle + (hue / 60).to(x.dtype)[:, None, None]
    chroma = range_ * saturation.to(x.dtype)[:, None, None]
    turned = []
    for offset in (1, 3, 5):  # b, g, r
        k = torch.remainder(angle + offset, 6)
        turned.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.where(change, torch.stack(turned, 1), x)


def _cubic(x: Tensor, dim: int, place: Tensor, size: Tensor) -> Tensor:
    """Pixels `place` (n, k) along an axis of x, as it were after a bicubic resize of that axis to `size` (n,)."""
    length = x.shape[dim]
    source = (place + 0.5) * (length / size.double())[:, None] - 0.5
    base = torch.floor(source)
    t = (source - base).to(x.dtype)
    base = base.long()
    a = -0.75  # OpenCV's
    first = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
    second = ((a + 2) * t - (a + 3)) * t * t + 1
    third = ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1
    wide = [-1, 1, 1, 1]
    wide[dim] = place.shape[1]
    shape = [*x.shape]
    shape[dim] = place.shape[1]
    out = torch.zeros(shape, dtype=x.dtype, device=x.device)
    for i, weight in enumerate((first, second, third, 1 - first - second - third)):
        index = (base + (i - 1)).clamp(0, length - 1).reshape(wide).expand(shape)
        out = out + x.gather(dim, index) * weight.reshape(wide)
    return out


def _places(first: Tensor, count: int) -> Tensor:
    return first[:, None] + torch.arange(count, device=first.device)


def resize_crop(x: Tensor, a: Augment, size: tuple[int, int]) -> Tensor:
    """The bicubic resize and the crop to `size`, zeros outside."""
    rows, columns = _places(a.top, size[0]), _places(a.left, size[1])
    out = _cubic(_cubic(x, 2, rows, a.height), 3, columns, a.width)
    inside = ((rows >= 0) & (rows < a.height[:, None]))[:, None, :, None]
    inside = inside & ((columns >= 0) & (columns < a.width[:, None]))[:, None, None, :]
    return torch.where(inside, out, 0.0)


def resize_rotate_crop(x: Tensor, a: Augment, size: tuple[int, int], largest: tuple[int, int]) -> Tensor:
    """The bicubic resize (to at most `largest`), the bilinear rotation, and the crop to `size`, zeros outside.

    A pixel that would need one outside the image is 0 too, as in OpenCV.
    """
    n, c = x.shape[:2]
    start = torch.zeros_like(a.top)
    full = _cubic(_cubic(x, 2, _places(start, largest[0]), a.height), 3, _places(start, largest[1]), a.width)
    turn = _turn(a.height, a.width, a.angle)
    y = (_places(a.top, size[0]).double() - turn.dy[:, None])[:, :, None]
    x_ = (_places(a.left, size[1]).double() - turn.dx[:, None])[:, None, :]
    cos, sin = turn.cos[:, None, None], turn.sin[:, None, None]
    column, row = (torch.round(v * _FINE) / _FINE for v in (cos * x_ + sin * y, cos * y - sin * x_))
    left, top = torch.floor(column), torch.floor(row)
    spare = torch.where(a.angle == 0, 1, 2)
    inside = (left >= 0) & (left <= (a.width - spare)[:, None, None])
    inside = inside & (top >= 0) & (top <= (a.height - spare)[:, None, None])
    fx, fy = ((v - w).to(x.dtype).reshape(n, 1, -1) for v, w in ((column, left), (row, top)))
    pixels = full.reshape(n, c, -1)

    def at(down: int, right: int) -> Tensor:
        i = (top.long() + down).clamp(0, largest[0] - 1) * largest[1] + (left.long() + right).clamp(0, largest[1] - 1)
        return pixels.gather(2, i.reshape(n, 1, -1).expand(n, c, -1))

    upper = at(0, 0) * (1 - fx) + at(0, 1) * fx
    lower = at(1, 0) * (1 - fx) + at(1, 1) * fx
    return torch.where(inside[:, None], (upper * (1 - fy) + lower * fy).reshape(n, c, *size), 0.0)


def move(boxes: Tensor, a: Augment, source: tuple[int, int]) -> Tensor:
    """Boxes (n, m, 4: x, y, width, height) of images of `source` (height, width), after the same changes.

    A mirrored box is one pixel further left than its pixels, as in NVCaffe; a rotated one keeps its size.
    """
    x, y, w, h = boxes.double().unbind(2)
    x = torch.where(a.flip[:, None], source[1] - x - w - 1, x)
    down, right = (a.height / source[0])[:, None], (a.width / source[1])[:, None]
    x, y, w, h = x * right, y * down, w * right, h * down
    t = _turn(a.height, a.width, a.angle)
    cx, cy = x + w / 2, y + h / 2
    cos, sin = t.cos[:, None], t.sin[:, None]
    new_x, new_y = cos * cx - sin * cy + t.dx[:, None] - w / 2, sin * cx + cos * cy + t.dy[:, None] - h / 2
    still = (a.angle == 0)[:, None]
    x, y = torch.where(still, x, new_x), torch.where(still, y, new_y)
    return torch.stack([x - a.left[:, None], y - a.top[:, None], w, h], 2)


@dataclass(frozen=True)
class Coverage:
    """How boxes become a grid; see the layer. size: (height, width) of the image. shortest: min_cvg_len with
    GRIDBOX_MIN, None with GRIDBOX_MAX.
    """

    size: tuple[int, int]
    stride: int
    classes: Mapping[int, int]
    shrink: float = 0.5
    shortest: float | None = None
    longest: float = 50
    least_norm: float = 1.0
    crop: bool = True

    def grid(self, boxes: Tensor, kinds: Tensor, exists: Tensor) -> Tensor:
        """Boxes (n, m, 4: x, y, width, height), their classes and whether they are there (n, m), as the grid (n, 8 +
        classes, rows, columns), float64. m is at least 1.
        """
        x1, y1, w, h = boxes.unbind(2)
        x2, y2 = x1 + w, y1 + h
        if self.crop:
            x1, x2 = x1.clamp(min=0), x2.clamp(max=self.size[1])
            y1, y2 = y1.clamp(min=0), y2.clamp(max=self.size[0])
            w, h = x2 - x1, y2 - y1
        kind = torch.full_like(kinds, -1, dtype=torch.long)
        for source, target in self.classes.items():
            kind = torch.where(torch.trunc(kinds) == source, target, kind)
        exists = exists & (kind >= 0) & (w > 0) & (h > 0) & (w * h >= _LEAST)
        long_x, long_y = self._covered(w), self._covered(h)
        norm = (self.stride**2 / (long_x * long_y).clamp(min=1e-30)).clamp(min=self.least_norm)
        rows, columns = (v // self.stride for v in self.size)
        over_y, over_x = self._overlap((y1 + y2) / 2, long_y, rows), self._overlap((x1 + x2) / 2, long_x, columns)
        winner = _last(over_y, over_x, exists, _LEAST * self.stride**2)
        table = torch.stack([x1, y1, x2, y2, 1 / w, 1 / h, norm, kind.double()], 2)
        index = (winner - 1).clamp(min=0).flatten(1)[:, :, None].expand(-1, -1, table.shape[2])
        found = table.gather(1, index).transpose(1, 2).unflatten(2, (rows, columns))
        corner_x = torch.arange(columns, device=boxes.device) * self.stride
        corner_y = (torch.arange(rows, device=boxes.device) * self.stride)[:, None]
        corner = torch.stack([c.expand(rows, columns) for c in (corner_x, corner_y, corner_x, corner_y)])
        cells = torch.arange(max(self.classes.values()) + 1, device=boxes.device)
        one_hot = found[:, 7:] == cells[:, None, None]
        one = torch.ones_like(found[:, :1])
        out = torch.cat([one, found[:, :4] - corner, found[:, 4:7], one_hot.double()], 1)
        return torch.where((winner > 0)[:, None], out, 0.0)

    def _covered(self, side: Tensor) -> Tensor:
        """The side of the region that a box of this side covers."""
        small = side * self.shrink
        if self.shortest is None:
            return small.clamp(max=self.longest)
        return torch.minimum(side, small.clamp(min=self.shortest))

    def _overlap(self, middle: Tensor, side: Tensor, cells: int) -> Tensor:
        """Pixels that an interval shares with each cell of an axis: (n, m, cells)."""
        start = torch.arange(cells, device=middle.device) * self.stride
        low, high = (middle - side / 2)[:, :, None], (middle + side / 2)[:, :, None]
        return (torch.minimum(high, start + self.stride) - torch.maximum(low, start)).clamp(min=0)


def _last(over_y: Tensor, over_x: Tensor, exists: Tensor, least: float) -> Tensor:
    """For each cell 1 + the number of the last box that covers more than `least` pixels of it; 0 for none."""
    n, m, rows = over_y.shape
    number = torch.arange(1, m + 1, device=over_y.device) * exists
    winner = torch.zeros((n, rows, over_x.shape[2]), dtype=torch.long, device=over_y.device)
    for i in range(0, m, _CHUNK):
        part = slice(i, i + _CHUNK)
        covers = over_y[:, part, :, None] * over_x[:, part, None, :] > least
        winner = torch.maximum(winner, (covers * number[:, part, None, None]).amax(1))
    return winner


def _fit(mean: Tensor, source: tuple[int, int]) -> Tensor:
    """The mean for images of `source` (height, width)."""
    if mean.shape[2:] in ((1, 1), source):
        return mean
    return F.interpolate(mean, size=source, mode="bicubic", align_corners=False)


class DetectNetTransformation(nn.Module):
    """See the layer. mean: (3 or 1, height, width) array or None."""

    mean: Tensor | None

    def __init__(self, coverage: Coverage, chances: Chances, mean: Any = None, *, name: str = "") -> None:
        super().__init__()
        self.coverage, self.chances, self.name = coverage, chances, name
        self.register_buffer("mean", None if mean is None else torch.as_tensor(mean)[None], persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        n, source, size = len(x), (x.shape[2], x.shape[3]), self.coverage.size
        rows = self._rows(labels)
        plain = Chances.none(n, size, x.device)
        a = self.chances.draw(n, source, size, x.device) if self.training else plain
        if self.training and self.chances.colors:
            x = recolor(x, a.hue, a.saturation)
        if self.mean is not None:
            x = x - _fit(self.mean.to(x.dtype), source)
        x = torch.where(_per_image(a.flip), x.flip(3), x)
        if self.training and self.chances.rotates:
            x = resize_rotate_crop(x, a, size, self.chances.largest(source))
        else:
            x = resize_crop(x, a, size)
        boxes, exists = rows[:, 1:], torch.arange(rows.shape[1] - 1, device=x.device) < rows[:, :1, 0]
        grid = self.coverage.grid(move(boxes[..., :4], a, source), boxes[..., 5], exists)
        return x, grid.to(x.dtype)

    def _rows(self, labels: Tensor) -> Tensor:
        """Labels as (n, 1 + boxes, 16), at least one box. Damaged ones are found where looking costs nothing."""
        flat = labels.reshape(len(labels), -1)
        count = flat.shape[1] // _BOX
        rows = flat[:, : count * _BOX].reshape(len(flat), count, _BOX)
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(rows)
        return rows if count > 1 else F.pad(rows, (0, 0, 0, 1))

    def _check(self, rows: Tensor) -> None:
        boxes, length = rows[:, 0, 0], rows[:, 0, 1]
        good = (length == _BOX) & (boxes >= 0) & (boxes <= rows.shape[1] - 1)
        if bool(good.all()):
            return
        i = int((~good).nonzero()[0, 0])
        text = f"the label of image {i} of the batch starts with ({boxes[i].item():g}, {length[i].item():g})"
        room = f"here the first is at most {rows.shape[1] - 1}"
        raise DataError(
            f"layer '{self.name}' (DetectNetTransformation): {text}: it must be the count of boxes and {_BOX}; {room}",
            hint="are these labels of DetectNet, from the tool that converts KITTI?",
        )
