"""WindowData: windows of images, listed in a text file with the class they overlap (R-CNN), cropped and warped to one
size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from caffejacinto_py.data.decode import decode, resize
from caffejacinto_py.data.order import Order
from caffejacinto_py.data.sources import relative_hint
from caffejacinto_py.errors import DataError, Loc

Shape = tuple[int, ...]
_FORMAT = "a block is '# number', path, channels, height, width, count, then so many lines 'class overlap x1 y1 x2 y2'"
_INT = 1 << 31


@dataclass(frozen=True)
class Windows:
    """Windows of one kind, a row each: image (index into the file's images), label, box (x1, y1, x2, y2, both ends
    included), line (of the window file).
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    line: np.ndarray

    def __len__(self) -> int:
        return len(self.line)


class WindowFile:
    """A window file, read whole. Windows whose overlap is at least `fg` are foreground (their class must be above 0),
    those below `bg` are background (class 0), others are left out.

    images: paths as they stand there. Tokens may be divided into lines only as Caffe's tools write them, but a path
    may contain blanks. The number after '#', the channels, height and width are not used (Caffe finds the image of
    a window by that number, which is wrong unless blocks are numbered 0, 1, 2, ...). first: read one block only.
    Raises DataError with the line of whatever is wrong.
    """

    def __init__(self, path: str, *, fg: float, bg: float, first: bool = False) -> None:
        self.path, self.fg, self.bg = path, np.float32(fg), np.float32(bg)
        self.images: list[str] = []
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                lines = ((i, text.strip()) for i, text in enumerate(file, 1) if not text.isspace())
                for number, text in lines:
                    for kind, rows in zip(found, self._block(number, text, lines)):
                        kind.append(rows)
                    if first:
                        break
        except OSError as error:
            problem = DataError(f"{path}: cannot read the window file: {error.strerror}", hint=relative_hint(path))
            problem.missing = path
            raise problem from error
        if not self.images:
            raise DataError(f"{path}: the window file is empty", hint=_FORMAT)
        self.foreground, self.background = (_columns(rows) for rows in found)

    def where(self, windows: Windows, i: int) -> str:
        return f"{self.path}:{windows.line[i]}: window of image '{self.images[windows.image[i]]}'"

    def _block(self, number: int, text: str, lines: Iterator[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
        """One image: its foreground and its background rows (image, label, x1, y1, x2, y2, line)."""
        head = text.split()
        if len(head) != 2 or head[0] != "#" or not _whole(head[1]):
            raise self._wrong(number, f"expected '# number', found {text[:60]!r}")
        number, name = self._next(number, lines)
        self.images.append(name)
        size: list[str] = []
        while len(size) < 4:
            number, text = self._next(number, lines)
            size += text.split()
            if len(size) > 4 or not all(map(_whole, size)):
                raise self._wrong(number, f"expected channels, height, width or the count of windows, found {text!r}")
        count = int(size[3])
        if count < 0:
            raise self._wrong(number, f"a count of {count} windows")
        rows = list(islice(lines, count))
        if len(rows) < count:
            raise self._wrong(rows[-1][0] if rows else number, f"the file ends after {len(rows)} of {count} windows")
        return self._split(rows)

    def _next(self, number: int, lines: Iterator[tuple[int, str]]) -> tuple[int, str]:
        for line in lines:
            return line
        raise self._wrong(number, "the file ends inside a block")

    def _split(self, rows: Sequence[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
        values = self._values(rows)
        whole = values[:, [0, 2, 3, 4, 5]]
        lines = np.array([number for number, _ in rows], np.int64)
        self._refuse(lines, ~((whole % 1 == 0) & (np.abs(whole) < _INT)).all(1), "class and corners are whole numbers")
        overlap = values[:, 1].astype(np.float32)
        fg = overlap >= self.fg
        bg = ~fg & (overlap < self.bg)
        self._refuse(lines, fg & (whole[:, 0] <= 0), "a foreground window (by its overlap) needs a class above 0")
        empty = (whole[:, 3] < whole[:, 1]) | (whole[:, 4] < whole[:, 2])
        self._refuse(lines, empty & (fg | bg), "x2 must be at least x1, and y2 at least y1")
        image = np.full(len(rows), len(self.images) - 1)
        table = np.column_stack([image, whole, lines]).astype(np.int32)
        table[~fg, 1] = 0
        return table[fg], table[bg]

    def _values(self, rows: Sequence[tuple[int, str]]) -> np.ndarray:
        """The numbers of these lines, six a row."""
        if not rows:
            return np.empty((0, 6))
        try:
            values = np.loadtxt([text for _, text in rows], np.float64, comments=None, ndmin=2)  # type: ignore[arg-type]
            if values.shape[1] == 6 and np.isfinite(values).all():
                return values
        except ValueError:
            pass  # it cannot say which line of the file it was
        return np.array([self._row(number, text) for number, text in rows])

    def _row(self, number: int, text: str) -> list[float]:
        try:
            row = [float(word) for word in text.split()]
        except ValueError:
            row = []
        if len(row) != 6 or not math.isfinite(sum(row)):
            raise self._wrong(number, f"expected 'class overlap x1 y1 x2 y2', found {text[:60]!r}")
        return row

    def _refuse(self, lines: np.ndarray, bad: np.ndarray, text: str) -> None:
        if bad.any():
            raise self._wrong(int(lines[bad.argmax()]), text)

    def _wrong(self, number: int, text: str) -> DataError:
        return DataError(text, loc=Loc(self.path, number, 1), hint=_FORMAT)


def _columns(rows: list[np.ndarray]) -> Windows:
    table = np.concatenate(rows)
    return Windows(table[:, 0], table[:, 1].astype(np.float32), np.ascontiguousarray(table[:, 2:6]), table[:, 6])


def _whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


class Place(NamedTuple):
    """What part of an image goes where: rows y:y+height, columns x:x+width, warped to out_height x out_width, with the
    first pixel at (top, left) of the crop.
    """

    x: int
    y: int
    width: int
    height: int
    out_width: int
    out_height: int
    left: int = 0
    top: int = 0


@dataclass(frozen=True)
class Warp:
    """How a window becomes a crop of size x size pixels.

    pad: context around the window, in pixels of the crop. square: the window is first widened to a square, so that the
    aspect stays; else it is warped. Where either needs more than the image has, the crop keeps an empty border.
    """

    size: int
    pad: int = 0
    square: bool = False

    def place(self, box: Sequence[int], height: int, width: int, *, mirror: bool) -> Place | None:
        """The Place of a window in an image; None where they do not overlap (without context: where the window is not
        inside). The numbers are float32 and halves are rounded away from zero, as in Caffe, so the pixels agree.
        """
        x1, y1, x2, y2 = (int(v) for v in box)
        if not self.pad and not self.square:
            inside = x1 >= 0 and y1 >= 0 and x2 < width and y2 < height
            return Place(x1, y1, x2 - x1 + 1, y2 - y1 + 1, self.size, self.size) if inside else None
        half_x, half_y = np.float32((x2 - x1 + 1) / 2), np.float32((y2 - y1 + 1) / 2)
        center_x, center_y = np.float32(x1) + half_x, np.float32(y1) + half_y
        if self.square:
            half_x = half_y = max(half_x, half_y)
        grow = np.float32(self.size) / np.float32(self.size - 2 * self.pad)
        x, w, out_w, before, after = self._axis(center_x, half_x * grow, width)
        y, h, out_h, top, _ = self._axis(center_y, half_y * grow, height)
        left = after if mirror else before  # the border is mirrored with the image
        if w < 1 or h < 1:
            return None
        return Place(x, y, w, h, min(out_w, self.size - left), min(out_h, self.size - top), left, top)

    def _axis(self, center: np.float32, half: np.float32, length: int) -> tuple[int, int, int, int, int]:
        """First pixel, pixels, pixels after the warp, and the border before and after, along one axis."""
        first, last = _round(center - half), _round(center + half)
        scale = np.float32(self.size) / np.float32(last - first + 1)
        before, after = max(0, -first), max(0, last - length + 1)
        count = last - after - first - before + 1
        warped, *border = (_round(np.float32(v) * scale) for v in (count, before, after))
        return first + before, count, warped, border[0], border[1]


def center(mean: np.ndarray, size: int) -> np.ndarray:
    """The centre of a mean image C,H,W, as C,size,size. Caffe takes the column's offset for the rows too, which is the
    same for the square means that its tools write.
    """
    channels, height, width = mean.shape
    if channels != 3 or height < size or width < size:
        text = f"the mean file is {channels}x{height}x{width}, the windows are 3x{size}x{size}"
        raise DataError(text, hint="a mean of color images, at least as large as crop_size, is needed; or mean_value")
    y, x = (height - size) // 2, (width - size) // 2
    return mean[:, y : y + size, x : x + size]


def _round(x: np.float32) -> int:
    """C's round: halves away from zero."""
    return int(math.copysign(math.floor(abs(float(x)) + 0.5), x))


class WindowBatches:
    """WindowData layer. Tops: crops N,3,size,size (BGR) and labels N: background windows first, then foreground.

    Batch k draws its windows (each with equal chance, again and again) and mirrors from the random numbers of batch k.
    mean: 3,size,size or a shape that broadcasts to it, taken off under the warped pixels; the border stays 0, which is
    the mean. cache: keep the (still compressed) image files in memory.
    """

    def __init__(
        self,
        file: WindowFile,
        order: Order,
        warp: Warp,
        shapes: Sequence[Shape],
        *,
        fg_fraction: float,
        mirror: bool = False,
        mean: np.ndarray | None = None,
        scale: float = 1.0,
        root: str = "",
        cache: bool = False,
    ) -> None:
        self.file, self.order, self.warp, self.shapes = file, order, warp, tuple(shapes)
        self.mirror, self.scale, self.root = mirror, np.float32(scale), root
        self.mean = None if mean is None else np.broadcast_to(mean, (3, warp.size, warp.size))
        self._cache: dict[int, bytes] | None = {} if cache else None
        foreground = int(np.float32(self.shapes[0][0]) * np.float32(fg_fraction))  # float32: as in Caffe
        self.counts = (self.shapes[0][0] - foreground, foreground)
        for windows, count, what in (
            (file.background, self.counts[0], f"is below bg_threshold {file.bg:g}"),
            (file.foreground, foreground, f"reaches fg_threshold {file.fg:g}"),
        ):
            if count and not len(windows):
                text = f"{file.path}: a batch needs {count} windows whose overlap {what}, and there is none"
                raise DataError(text, hint="change the threshold or fg_fraction")

    def make(self, k: int) -> list[np.ndarray]:
        out, labels = np.zeros(self.shapes[0], np.float32), np.zeros(self.shapes[0][0], np.float32)
        draws = self.order.draws(k, lambda n, rng: rng.random((n, 2)))
        for i, (which, coin) in enumerate(draws.tolist()):
            windows = self.file.background if i < self.counts[0] else self.file.foreground
            chosen = int(which * len(windows))
            labels[i] = windows.label[chosen]
            self._paint(out[i], windows, chosen, self.mirror and coin < 0.5)
        return [out, labels][: len(self.shapes)]

    def _paint(self, out: np.ndarray, windows: Windows, i: int, mirror: bool) -> None:
        image = self._image(windows, i)
        height, width = image.shape[:2]
        p = self.warp.place(windows.box[i], height, width, mirror=mirror)
        if p is None:
            box = " ".join(map(str, windows.box[i].tolist()))
            text = f"{self.file.where(windows, i)}: ({box}) is not inside the image of {width} x {height} pixels"
            raise DataError(text, hint="corners count from 0 and are pixels of the image: x1 y1 x2 y2")
        if p.out_width < 1 or p.out_height < 1:
            return  # less than half a pixel of the crop
        part = resize(image[p.y : p.y + p.height, p.x : p.x + p.width], p.out_height, p.out_width)
        pixels = part[:, :: -1 if mirror else 1].transpose(2, 0, 1).astype(np.float32)
        at = np.s_[:, p.top : p.top + p.out_height, p.left : p.left + p.out_width]
        if self.mean is not None:
            pixels -= self.mean[at]
        out[at] = pixels * self.scale

    def _image(self, windows: Windows, i: int) -> np.ndarray:
        number = int(windows.image[i])
        data = self._cache.get(number) if self._cache is not None else None
        if data is None:
            path = self.root + self.file.images[number]
            try:
                with open(path, "rb") as f:
                    data = f.read()
            except OSError as error:
                text = f"{self.file.where(windows, i)}: cannot read '{path}': {error.strerror}"
                raise DataError(text, hint=relative_hint(path)) from error
            if self._cache is not None:
                self._cache[number] = data
        return decode(data, color=True, where=lambda: self.file.where(windows, i))
