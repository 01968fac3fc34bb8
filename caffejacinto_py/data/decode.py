"""Compressed images to arrays, with OpenCV: the decoder that Caffe itself uses, so the pixels agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from caffejacinto_py.errors import DataError

_REPAIR = "copy or encode it again, or take it out of the dataset"
MAX_PIXELS = 1 << 28  # an image header may claim any size; no dataset has quarter-gigapixel images


def decode(data: Any, *, color: bool | None, where: Callable[[], str]) -> np.ndarray:
    """Decode JPEG, PNG, ... bytes to uint8 HWC, channels in BGR order.

    color: True forces 3 channels, False 1, None keeps what the file has. where: names the record, for the error.
    Raises DataError for data that is no image, a JPEG without its end, or more than 8 bits a channel.
    """
    import cv2

    flag = {True: cv2.IMREAD_COLOR, False: cv2.IMREAD_GRAYSCALE, None: cv2.IMREAD_UNCHANGED}[color]
    raw = np.frombuffer(data, np.uint8)
    if raw.size == 0:
        raise DataError(f"{where()}: the image is empty (0 bytes)", hint=_REPAIR)
    if _truncated_jpeg(raw):
        raise DataError(f"{where()}: the JPEG is truncated (no end marker)", hint=_REPAIR)
    try:
        image = cv2.imdecode(raw, flag)
    except cv2.error as error:
        raise DataError(f"{where()}: OpenCV cannot decode it: {error.err or error}", hint=_REPAIR) from error
    if image is None:
        raise DataError(f"{where()}: not an image OpenCV can decode, or damaged ({raw.size} bytes)", hint=_REPAIR)
    if image.dtype != np.uint8:
        raise DataError(
            f"{where()}: {image.dtype} pixels; Caffe takes 8 bits a channel", hint="set force_color or force_gray"
        )
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise DataError(f"{where()}: {image.shape[1]} x {image.shape[0]} pixels is not a plausible image")
    return image if image.ndim == 3 else image[:, :, None]


def _truncated_jpeg(raw: np.ndarray) -> bool:
    """OpenCV fills the missing part of a cut JPEG with grey and says nothing; so did Caffe. Trailing bytes are
    harmless.
    """
    if raw[:2].tobytes() != b"\xff\xd8" or raw[-2:].tobytes() == b"\xff\xd9":
        return False
    return raw.tobytes().rfind(b"\xff\xd9") < 0


def resize(image: np.ndarray, height: int, width: int, interpolation: int | None = None) -> np.ndarray:
    """Resize HWC; bilinear unless told otherwise (Caffe's cv::resize default). Keeps three axes."""
    import cv2

    if image.shape[:2] == (height, width):
        return image
    out = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR if interpolation is None else interpolation)
    return out if out.ndim == 3 else out[:, :, None]


def resize_short_side(image: np.ndarray, short: int) -> np.ndarray:
    """Resize so that the shorter edge has `short` pixels, aspect kept (ImageData short_side of NVCaffe)."""
    height, width = image.shape[:2]
    if height <= width:
        return resize(image, short, max(short, round(width * short / height)))
    return resize(image, max(short, round(height * short / width)), short)
