"""Caffe's DataTransformer: crop, mirror, mean, scale. Pure numpy; every random number comes in from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from caffejacinto_py.data.random_resize import RandomResize
from caffejacinto_py.errors import DataError, LayerError
from caffejacinto_py.schema.dialect import BVLC, Dialect

Shape = tuple[int, ...]
_DRAWS = 8  # random numbers an image gets: mirror, crop y, crop x, and five for RandomResize
_CACHED = 64 << 10  # bytes: larger images are finished one by one, while they are in the cache
_SSD = ("resize_param", "noise_param", "distort_param", "expand_param")


@dataclass(frozen=True)
class Transform:
    """What transform_param asks for, as plain values: can be sent to a worker process.

    y = (x - mean) * scale on the crop, then mirrored. crop: (height, width) or None; random place in TRAIN, centre in
    TEST. mirror is a coin per image, in both phases (Caffe does not ask for the phase).
    mean: C,H,W or None. A mean file has the size of the uncropped image and is read at the place of the crop (BVLC,
    and raw records everywhere); for decoded images NVCaffe and caffe-jacinto cut its centre instead
    (`mean_centered`), whatever its size. NVCaffe computes x*scale - mean*scale: the same number up to one rounding,
    which is not imitated.
    """

    train: bool = True
    scale: float = 1.0
    mirror: bool = False
    crop: tuple[int, int] | None = None
    mean: np.ndarray | None = field(default=None, repr=False)
    mean_values: tuple[float, ...] = ()
    mean_centered: bool = False
    color: bool | None = None  # how to decode: force_color, force_gray, as stored
    random_resize: RandomResize | None = None

    @property
    def random(self) -> bool:
        return self.mirror or (self.crop is not None and self.train) or self.random_resize is not None

    def shape(self, image: Shape) -> Shape:
        """C,H,W after the transform of an image of C,H,W. Raises LayerError where the parameters do not fit it."""
        channels, height, width = image
        if len(self.mean_values) not in (0, 1, channels):
            raise _wrong(f"{len(self.mean_values)} mean_value entries for images of {channels} channels", "mean_value")
        if self.crop is None:
            if self.random_resize:
                raise _wrong(
                    "a random resize needs a crop_size: all images of a batch must end with one size", "crop_size"
                )
            return image
        if not self.random_resize:
            self.check_crop(height, width)
        return channels, *self.crop

    def check_crop(self, height: int, width: int) -> None:
        assert self.crop is not None
        if height < self.crop[0] or width < self.crop[1]:
            raise _wrong(f"crop of {self.crop[0]}x{self.crop[1]} from an image of {height}x{width}", "crop_size")

    def draws(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """The random numbers of n images, in [0, 1): (n, 8). Independent of the image sizes."""
        return rng.random((n, _DRAWS))

    def resized(self, image: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """The random resize of an H,W,C image, where one is asked for."""
        return self.random_resize.apply(image, draw[3:], self.crop) if self.random_resize else image

    def apply(
        self, images: Sequence[np.ndarray] | np.ndarray, draws: np.ndarray, out: np.ndarray, *, decoded: bool = False
    ) -> None:
        """Transform n images C,H,W (uint8 or float32; one array N,C,H,W where all have one size) into `out`: N,C,h,w
        float32.

        decoded: they come from a decoder, not from raw records (where the mean file is read differs, see the class).
        """
        flips = draws[:, 0] < 0.5 if self.mirror else np.zeros(len(draws), bool)
        large = out[0].nbytes > _CACHED
        if self.crop is None and isinstance(images, np.ndarray) and not large:
            mean = self._mean(images.shape[1:], 0, 0, decoded)
            if mean is None:
                out[...] = images
            else:
                np.subtract(images, mean, out=out)
        else:
            for i, image in enumerate(images):
                self._crop(image, draws[i], out[i], decoded)
                if large:
                    self._finish(out[i : i + 1], flips[i : i + 1])
        if not large:
            self._finish(out, flips)

    def _finish(self, out: np.ndarray, flips: np.ndarray) -> None:
        """Mean values, scale and mirror of N,C,h,w in place."""
        if self.mean_values:
            out -= np.array(self.mean_values, np.float32)[:, None, None]
        if self.scale != 1:
            out *= np.float32(self.scale)
        for i in np.flatnonzero(flips).tolist():
            _flip(out[i])

    def _crop(self, image: np.ndarray, draw: np.ndarray, out: np.ndarray, decoded: bool) -> None:
        """The crop of one image, less the mean file."""
        height, width = image.shape[1:]
        y = x = 0
        if self.crop:
            rows, columns = height - self.crop[0], width - self.crop[1]
            if self.train:
                y, x = int(draw[1] * (rows + 1)), int(draw[2] * (columns + 1))
            else:
                y, x = rows // 2, columns // 2
            image = image[:, y : y + self.crop[0], x : x + self.crop[1]]
        mean = self._mean((image.shape[0], height, width), y, x, decoded)
        if mean is None:
            out[...] = image
        else:
            np.subtract(image, mean, out=out)

    def _mean(self, full: Shape, y: int, x: int, decoded: bool) -> np.ndarray | None:
        """The part of the mean file that lies under the crop at (y, x) of an image of shape `full`."""
        mean = self.mean
        if mean is None:
            return None
        height, width = self.crop or full[1:]
        centered = self.mean_centered and decoded
        if centered:
            y, x = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
        if mean.shape[0] != full[0] or y < 0 or x < 0 or (not centered and mean.shape != full):
            raise DataError(
                f"the mean file is {_by(mean.shape)}, the images are {_by(full)}",
                hint="compute it from these images (caffejacinto compute_image_mean DB OUT), or give mean_value",
            )
        return mean[:, y : y + height, x : x + width]


def from_param(param: Any, *, phase: str, dialect: Dialect = BVLC) -> Transform:
    """The Transform of a TransformationParameter message; reads its mean file.

    Raises LayerError for contradictory parameters, DataError for a missing or damaged mean file.
    """
    if param.mean_file and param.mean_value:
        raise _wrong("mean_file and mean_value exclude each other", "mean_value")
    if param.force_color and param.force_gray:
        raise _wrong("force_color and force_gray exclude each other", "force_gray")
    for name in _SSD:
        if param.HasField(name):
            raise _wrong(f"{name} is not supported in this layer", name, hint="only AnnotatedData knows it")
    sizes = (param.crop_size, param.crop_size)
    given = (param.crop_h, param.crop_w)
    if any(given) and not all(given):
        raise _wrong("crop_h and crop_w must be given together", "crop_h" if param.crop_h else "crop_w")
    if any(given) and (
        dialect.mean_file_centered or not param.crop_size
    ):  # NVCaffe: they win over crop_size; SSD: they lose
        sizes = given
    return Transform(
        train=phase == "TRAIN",
        scale=param.scale,
        mirror=param.mirror,
        crop=sizes if sizes[0] else None,
        mean=_read_mean(param.mean_file) if param.mean_file else None,
        mean_values=tuple(param.mean_value),
        mean_centered=dialect.mean_file_centered,
        color=True if param.force_color else False if param.force_gray else None,
        random_resize=RandomResize.from_param(param),
    )


def _flip(image: np.ndarray) -> None:
    """Reverse the columns of a contiguous C,H,W float32 array in place (OpenCV: five times faster than numpy)."""
    import cv2

    rows = image.reshape(-1, image.shape[2])
    cv2.flip(rows, 1, rows)


def _read_mean(path: str) -> np.ndarray:
    from caffejacinto_py.schema.blobs import read_blob

    mean = np.array(read_blob(path), np.float32)
    if mean.ndim == 4 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim != 3:
        raise DataError(f"{path}: a mean file has shape channels x height x width, this one {_by(mean.shape)}")
    return np.ascontiguousarray(mean)


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _wrong(text: str, name: str, hint: str | None = None) -> LayerError:
    return LayerError(f"transform_param: {text}", field=("transform_param", name), hint=hint)
