"""PriorBoxClustered: default boxes of given widths and heights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.layers.resample import check_image

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELD = "prior_box_param"
Pair = tuple[float, float]


@layer("PriorBoxClustered", field=FIELD, bottoms=(2, 2), forks="training_toolbox_caffe (OpenVINO)")
class PriorBoxClustered(Layer):
    """At every place of a feature map one box for each given width and height, centered there.

    Bottoms: the features (N, C, H, W); the image (N, C', H', W'). Top: (1, 2, 4 H W K): row 0 xmin, ymin, xmax, ymax of
    box k at (y, x), index (y W + x) K + k, as parts of the image; row 1 the variances. No gradient.
    prior_box_param: width and height, repeated, K each; step, or step_h and step_w (image / features); offset (0.5):
    the center is (x + offset) * step; img_size, or img_h and img_w (the image bottom's); clip (false): to [0, 1];
    variance (0.1): one or four. min_size, max_size, aspect_ratio and flip belong to PriorBox and are not read.
    Differs: C++ reads foreign memory where heights are missing; here that is an error.
    Source: openvinotoolkit/training_toolbox_caffe prior_box_clustered_layer.cpp.
    """

    channels_last = False

    def differentiable(self, i: int) -> bool:
        return False

    def _pair(self, single: str, names: tuple[str, str]) -> Pair | None:
        """(height, width) from one field or from two; None where no field is given."""
        p = self.param
        given = [n for n in names if p.HasField(n)]
        if given and p.HasField(single):
            raise self.fail(f"give {single}, or {names[0]} and {names[1]}, not both", FIELD, given[0])
        if not given and not p.HasField(single):
            return None
        values = (getattr(p, names[0]), getattr(p, names[1])) if given else (getattr(p, single),) * 2
        if min(values) <= 0:
            raise self.fail(f"{' and '.join(given) or single} must be positive", FIELD, given[0] if given else single)
        return values

    def _check(self) -> None:
        p = self.param
        if not p.width or len(p.width) != len(p.height):
            text = f"width and height go in pairs, at least one; there are {len(p.width)} and {len(p.height)}"
            raise self.fail(text, FIELD, "width")
        for name in ("width", "height", "variance"):
            for i, value in enumerate(getattr(p, name)):
                if value <= 0:
                    raise self.fail(f"{name} must be positive, not {value:g}", FIELD, name, i)
        if len(p.variance) not in (0, 1, 4):
            raise self.fail(f"give 1 or 4 variances, not {len(p.variance)}", FIELD, "variance")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        check_image(self, ins[0])
        check_image(self, ins[1], 1)
        self._check()
        self._pair("img_size", ("img_h", "img_w"))
        self._pair("step", ("step_h", "step_w"))
        return [(1, 2, 4 * ins[0][2] * ins[0][3] * len(self.param.width))]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.prior_clustered import PriorBoxClustered as Module

        p = self.param
        return Module(
            list(zip(p.height, p.width, strict=True)),
            image=self._pair("img_size", ("img_h", "img_w")),
            step=self._pair("step", ("step_h", "step_w")),
            offset=p.offset,
            clip=p.clip,
            variance=list(p.variance) or [0.1],
        )
