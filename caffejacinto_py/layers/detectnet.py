"""DetectNet: from images and lists of boxes to augmented images and a grid of what each cell shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from caffejacinto_py.errors import DataError
from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn

GROUNDTRUTH, AUGMENTATION = "detectnet_groundtruth_param", "detectnet_augmentation_param"
BOX = 16  # numbers of a box
CELL = 8  # numbers of a cell before its classes


@layer(
    "DetectNetTransformation", bottoms=(2, 2), tops=(2, 2), field=GROUNDTRUTH, forks="nvcaffe, jacinto, jacinto-0.16"
)
class DetectNetTransformation(Layer):
    """Augments images together with their boxes, and spreads the boxes over a grid of cells.

    Bottoms: images (N, 3, H, W), BGR in 0..255; labels (N, ...), read as rows of 16 numbers an image: first (count, 16,
    ...), then a row a box: x, y, width, height in pixels, alpha, class, scenario, roty, truncated, occlusion and seven
    more, of which x, y, width, height and class are used.
    Tops: images (N, 3, image_size_y, image_size_x); grid (N, 8 + classes, image_size_y / stride, image_size_x /
    stride), rounded down: foreground (1 where a box covers the cell), the box's x1, y1, x2, y2 seen from the cell's
    corner, 1 / width, 1 / height, object norm, one-hot class; all 0 in other cells. The last box wins. No gradients.

    TRAIN, each image by itself: hue and saturation, mean, mirror, bicubic resize, rotation (bilinear), crop; what is
    outside the image is 0. TEST: mean and bicubic resize to image_size_x, image_size_y.
    detectnet_groundtruth_param: stride (4); image_size_x (1248), image_size_y (384); object_class { src dst }: label
    class src is class dst of the grid, others are left out; default: 1 is 0; crop_bboxes (true): boxes are cut at the
    border of the image; a box covers what is left of it after shrinking by scale_cvg (0.5) around its centre, each
    side with gridbox_type GRIDBOX_MAX at most max_cvg_len (50), with GRIDBOX_MIN at least min_cvg_len (50) or the box;
    obj_norm (false): object norm = cell area / covered area (false: at least 1); coverage_type (one kind).
    detectnet_augmentation_param (TRAIN): hue_rotation_prob (0.33), hue_rotation (15: up to so many degrees either way);
    desaturation_prob (0.33), desaturation_max (0.5); flip_prob (0.33); scale_prob (0.33), scale_min (0.7), scale_max
    (1); rotation_prob (0.33), max_rotate_degree (1); crop_prob (1: a random place, else the middle), shift_x, shift_y
    (0: so many pixels more may be cut off or added in all). Its other fields have no effect.
    transform_param: mean_value, 1 or 3, or mean_file, resized to the images; other fields have no effect.
    Source: NVCaffe detectnet_transform_layer.cpp, detectnet_coverage_rectangular.cpp.

    Deviations: random numbers come from torch's generator; the rotation does not round positions to 1/32 pixel; a
    probability of 0 is never (there: nearly never).
    """

    stateful_forward = True  # draws random numbers
    channels_last = False

    def differentiable(self, i: int) -> bool:
        return False

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        images, labels = ins
        self._check()
        if len(images) != 4 or images[1] != 3:
            raise self.fail(f"images of shape (N, 3, H, W) are needed, not {images}", "bottom", 0)
        if not labels or labels[0] != images[0]:
            raise self.fail(f"{images[0]} images and labels of shape {labels}: one label an image", "bottom", 1)
        if math.prod(labels[1:]) < BOX:
            text = f"labels of shape {labels} hold {math.prod(labels[1:])} numbers an image, {BOX} are needed"
            raise self.fail(text, "bottom", 1, hint="the first row of 16 is (count, 16, ...), then a row a box")
        p = self.param
        grid = (images[0], CELL + max(self._classes().values()) + 1, *(v // p.stride for v in self._size()))
        return [(images[0], 3, *self._size()), grid]

    def _size(self) -> tuple[int, int]:
        return self.param.image_size_y, self.param.image_size_x

    def _classes(self) -> dict[int, int]:
        """Class of the labels -> class of the grid. The default is KITTI's car."""
        return {c.src: c.dst for c in self.param.object_class} or {1: 0}

    def _check(self) -> None:
        p, a, t = self.param, self.proto.detectnet_augmentation_param, self.proto.transform_param
        for name in ("stride", "image_size_x", "image_size_y"):
            if getattr(p, name) < 1:
                raise self.fail(f"{name} must be at least 1", GROUNDTRUTH, name)
        if p.stride > min(self._size()):
            raise self.fail(f"stride {p.stride} is larger than the image", GROUNDTRUTH, "stride")
        for i, c in enumerate(p.object_class):
            if not (c.HasField("src") and c.HasField("dst")):
                raise self.fail("object_class needs src and dst", GROUNDTRUTH, "object_class", i)
        for name in ("scale_min", "scale_max"):
            if not getattr(a, name) > 0:
                raise self.fail(f"{name} must be above 0", AUGMENTATION, name)
        if len(t.mean_value) not in (0, 1, 3):
            raise self.fail("give 1 or 3 mean_value", "transform_param", "mean_value", 0)
        if t.HasField("mean_file") and t.mean_value:
            raise self.fail("give mean_file or mean_value, not both", "transform_param", "mean_value", 0)

    def _mean(self) -> np.ndarray | None:
        """The mean as (3 or 1, height, width), or None."""
        t = self.proto.transform_param
        if not t.HasField("mean_file"):
            return np.array(t.mean_value, np.float64)[:, None, None] if t.mean_value else None
        from caffejacinto_py.schema.blobs import read_blob

        mean = np.array(read_blob(t.mean_file), np.float64)
        mean = mean[0] if mean.ndim == 4 and len(mean) == 1 else mean
        if mean.ndim != 3 or mean.shape[0] != 3:
            raise DataError(f"{t.mean_file}: a mean of shape (3, height, width) is needed, not {mean.shape}")
        return mean

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import detectnet as m

        p: Any = self.param
        coverage = m.Coverage(
            size=self._size(),
            stride=p.stride,
            classes=self._classes(),
            shrink=p.scale_cvg,
            shortest=p.min_cvg_len if p.gridbox_type == pb.DetectNetGroundTruthParameter.GRIDBOX_MIN else None,
            longest=p.max_cvg_len,
            least_norm=0.0 if p.obj_norm else 1.0,
            crop=p.crop_bboxes,
        )
        a: Any = self.proto.detectnet_augmentation_param
        chances = m.Chances(
            hue=(a.hue_rotation_prob, a.hue_rotation),
            desaturation=(a.desaturation_prob, a.desaturation_max),
            flip=a.flip_prob,
            scale=(a.scale_prob, a.scale_min, a.scale_max),
            rotation=(a.rotation_prob, a.max_rotate_degree),
            crop=(a.crop_prob, a.shift_y, a.shift_x),
        )
        return m.DetectNetTransformation(coverage, chances, self._mean(), name=self.name)
