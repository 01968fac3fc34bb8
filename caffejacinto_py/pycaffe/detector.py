"""`caffe.Detector`: class scores of windows in images, as R-CNN does it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from caffejacinto_py.errors import UsageError
from caffejacinto_py.pycaffe import io
from caffejacinto_py.pycaffe.classifier import ImageNet

Window = Sequence[float] | np.ndarray


class Detector(ImageNet):
    """context_pad: pixels of surroundings, in the net's input, on each side of a window; None or 0: just the window."""

    def __init__(
        self,
        model_file: str | os.PathLike[str],
        pretrained_file: str | os.PathLike[str],
        mean: np.ndarray | None = None,
        input_scale: float | None = None,
        raw_scale: float | None = None,
        channel_swap: Sequence[int] | None = None,
        context_pad: int | None = None,
    ) -> None:
        super().__init__(model_file, pretrained_file, mean, input_scale, raw_scale, channel_swap)
        self.configure_crop(context_pad)

    def configure_crop(self, context_pad: int | None) -> None:
        """Set context_pad, and what lies outside of an image: the mean, or black without one."""
        name = self.inputs[0]
        channels, height, width = self.blobs[name].shape[1:]
        self.crop_dims = np.array((height, width, channels))
        self.context_pad = context_pad or 0
        if 2 * self.context_pad >= min(height, width):
            raise UsageError(f"context_pad {context_pad} leaves nothing of an input of {height} x {width}")
        blank = np.zeros((channels, height, width), np.float32)
        self.crop_mean = self.transformer.deprocess(name, blank).reshape(self.crop_dims)

    def detect_windows(
        self, images_windows: Iterable[tuple[str | os.PathLike[str], Sequence[Window]]]
    ) -> list[dict[str, Any]]:
        """Score windows (ymin, xmin, ymax, xmax) of image files, given as (file, windows) pairs.

        Returns {"window", "prediction", "filename"} for each window, in order.
        """
        found: list[dict[str, Any]] = []
        crops = []
        for file, windows in images_windows:
            image = io.load_image(file)
            for window in windows:
                crops.append(self.crop(image, window))
                found.append({"window": window, "filename": file})
        if found:
            for row, scores in zip(found, self._scores(crops), strict=True):
                row["prediction"] = scores
        return found

    def detect_selective_search(self, image_fnames: Sequence[str]) -> list[dict[str, Any]]:
        """Score the windows that selective search proposes. Needs the package `selective_search_ijcv_with_python` (and
        the MATLAB that it calls), as C++ Caffe does; raises UsageError without.
        """
        try:
            import selective_search_ijcv_with_python as proposals
        except ImportError as e:
            hint = "propose windows yourself and call detect_windows"
            raise UsageError("selective search needs selective_search_ijcv_with_python", hint=hint) from e
        files = [os.path.abspath(f) for f in image_fnames]
        return self.detect_windows(zip(files, proposals.get_windows(files, cmd="selective_search_rcnn"), strict=True))

    def crop(self, im: np.ndarray, window: Window) -> np.ndarray:
        """The window of an image (H x W x C); with context_pad in the net's input size, the mean where the image
        ends.
        """
        top, left, bottom, right = np.asarray(window, float)
        if not self.context_pad:
            return im[int(top) : int(bottom), int(left) : int(right)]
        size = int(self.crop_dims[1])  # square inputs, as in Caffe
        wider = size / (size - 2 * self.context_pad)
        half = np.array((bottom - top + 1, right - left + 1)) / 2
        center = np.array((top, left)) + half
        low, high = np.round(center - wider * half), np.round(center + wider * half)
        scale = size / (high - low + 1)
        before = np.round(np.maximum(0, -low) * scale).astype(int)
        limits = np.array(im.shape[:2])
        low, high = np.clip(low, 0, limits), np.clip(high, 0, limits)
        if (high <= low).any():
            raise UsageError(f"window {tuple(window)} lies outside of an image of {limits[0]} x {limits[1]}")
        inside = np.clip(np.round((high - low + 1) * scale).astype(int), 1, size - before)
        (y0, x0), (y1, x1) = low.astype(int), high.astype(int)
        crop = self.crop_mean.copy()
        part = io.resize_image(im[y0:y1, x0:x1], inside)
        crop[before[0] : before[0] + inside[0], before[1] : before[1] + inside[1]] = part
        return crop
