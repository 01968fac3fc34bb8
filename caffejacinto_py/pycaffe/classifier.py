"""`caffe.Classifier`: class scores of images, from one crop or the mean of ten."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from caffejacinto_py.pycaffe import io
from caffejacinto_py.pycaffe.mode import TEST
from caffejacinto_py.pycaffe.net import Net


class ImageNet(Net):
    """A net for images in phase TEST with the Transformer of its first input.

    mean, input_scale, raw_scale, channel_swap: as `io.Transformer` takes them; images are H x W x C.
    """

    def __init__(
        self,
        model_file: str | os.PathLike[str],
        pretrained_file: str | os.PathLike[str],
        mean: np.ndarray | None = None,
        input_scale: float | None = None,
        raw_scale: float | None = None,
        channel_swap: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model_file, TEST, weights=pretrained_file)
        name = self.inputs[0]
        self.transformer = io.Transformer({name: self.blobs[name].shape})
        self.transformer.set_transpose(name, (2, 0, 1))
        if mean is not None:
            self.transformer.set_mean(name, mean)
        if input_scale is not None:
            self.transformer.set_input_scale(name, input_scale)
        if raw_scale is not None:
            self.transformer.set_raw_scale(name, raw_scale)
        if channel_swap is not None:
            self.transformer.set_channel_swap(name, channel_swap)

    def _scores(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The first output for images of any size, in order."""
        name = self.inputs[0]
        data = np.stack([self.transformer.preprocess(name, image) for image in images])
        return self.forward_all(**{name: data})[self.outputs[0]]


class Classifier(ImageNet):
    """image_dims: (height, width) that images are resized to before crops of the net's input size are taken; None: that
    size.
    """

    def __init__(
        self,
        model_file: str | os.PathLike[str],
        pretrained_file: str | os.PathLike[str],
        image_dims: Sequence[int] | None = None,
        mean: np.ndarray | None = None,
        input_scale: float | None = None,
        raw_scale: float | None = None,
        channel_swap: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model_file, pretrained_file, mean, input_scale, raw_scale, channel_swap)
        self.crop_dims = np.array(self.blobs[self.inputs[0]].shape[2:])
        self.image_dims = np.array(self.crop_dims if image_dims is None else image_dims)

    def predict(self, inputs: Sequence[np.ndarray], oversample: bool = True) -> np.ndarray:
        """Scores, N x classes, of N images (H x W x C). oversample: mean over four corners, center, and their mirror
        images; False: the center only.
        """
        images = [io.resize_image(image, self.image_dims) for image in inputs]
        if oversample:
            scores = self._scores(list(io.oversample(images, self.crop_dims)))
            return scores.reshape(len(images), 10, -1).mean(axis=1)
        top, left = (self.image_dims - self.crop_dims) // 2
        height, width = self.crop_dims
        return self._scores([image[top : top + height, left : left + width] for image in images])
