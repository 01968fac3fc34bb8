"""BN: batch normalization with scale and shift in one layer, as PSPNet, SegNet and the first pull requests had it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from caffejacinto_py.layers.base import Blob, Layer, Shape
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.folding import Affine, Refused, doubles, normalization
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn

FIELD = "bn_param"
INFERENCE = 1  # BNParameter.BNMode
SEGNET_EPS = 1e-9
# fields that only one of the three layers has
_FIRST = ("var_eps", "moving_average", "decay", "axis")
_SLOPE = ("slope_filler", "bias_filler", "momentum", "eps", "frozen", "inverse_std")
_SCALE = ("scale_filler", "shift_filler", "bn_mode")


@layer(
    "BN",
    v1="BN",
    field=FIELD,
    forks="yjxiong, PSPNet, happynear; SegNet, DeconvNet; ChenglongChen",
)
class BN(Layer):
    """y = slope * (x - mean) / sqrt(variance + eps) + bias per channel. Three layers of this name; the fields decide.

    Bottom and top: (N, C, ...). The variance is always the biased one. All blobs have the shape (1, C, 1, 1).
    1. yjxiong, PSPNet, happynear (bn_param without the fields of 2 and 3). Blobs: slope (slope_filler), bias
    (bias_filler), running mean (0), running variance (0; 1 if frozen), the last two with lr_mult and decay_mult 0.
    TRAIN normalizes with the batch and updates running = momentum * running + (1 - momentum) * batch; TEST and
    frozen use the running values. Options: momentum (0.9), eps (1e-5), frozen (false: true also gives slope and bias
    lr_mult and decay_mult 0), inverse_std (false; ours: blob 3 of the weights holds 1 / sqrt(variance + eps), not the
    variance; TEST or frozen only).
    2. SegNet, DeconvNet (bn_mode, or scale_filler or shift_filler without a field of 3). Blobs: scale, shift. bn_mode
    LEARN (default) normalizes with the batch in either phase, eps 1e-9; INFERENCE is y = scale * x + shift, the
    statistics having been merged into the blobs.
    3. ChenglongChen, the first PSPNet (var_eps, moving_average, decay or axis). Blobs: scale, shift, running mean,
    running variance, as in 1. running = (1 - decay) * running + decay * batch in TRAIN; TEST uses them if
    moving_average, else the batch. Options: var_eps (1e-10), decay (0.05), moving_average (false), axis 1 (C++ also
    has 2).
    A filler that is not given is a constant 0, as in C++: with scale or slope 0 the top starts as 0. engine changes
    nothing. Differs: builds with cuDNN store an unbiased running variance; SegNet's second and third top (mean and
    variance of the batch) are not made.
    Source: hszhao/PSPNet bn_layer.cpp and caffe.proto; alexgkendall/caffe-segnet bn_layer.cpp; for inverse_std
    xiahouzuoxin/caffe_segtask, whose backward reads blob 3 so; Ioffe and Szegedy 2015.
    """

    stateful_forward = True

    def repeatable(self) -> bool:
        return True  # the module has `update`

    @property
    def kind(self) -> int:
        """1, 2 or 3: which of the layers, see the class."""
        p = self.param
        if any(p.HasField(f) for f in _FIRST):
            return 3
        return 2 if any(p.HasField(f) for f in _SCALE) else 1

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        p = self.param
        if len(ins[0]) < 2:
            raise self.fail(f"BN needs a bottom of at least 2 axes (N, C, ...), not {ins[0]}", "bottom", 0)
        other = {1: (), 2: _SLOPE, 3: (*_SLOPE, "bn_mode")}[self.kind]
        for field in other:
            if p.HasField(field):
                mine = next(f for f in (*_FIRST, *_SCALE) if p.HasField(f))
                text = f"{field} and {mine} belong to different BN layers"
                raise self.fail(text, FIELD, field, hint="keep the fields of the repository the net comes from")
        for field in ("eps", "var_eps"):
            if getattr(p, field) < 0:
                raise self.fail(f"{field} must not be negative, not {getattr(p, field):g}", FIELD, field)
        for field in ("momentum", "decay"):
            if not 0 <= getattr(p, field) <= 1:
                raise self.fail(f"{field} must lie in [0, 1], not {getattr(p, field):g}", FIELD, field)
        if p.axis != 1:
            raise self.fail(f"only axis 1 is supported, not {p.axis}", FIELD, "axis")
        if p.inverse_std and self.context.train and not p.frozen:
            hint = "set frozen: true, or convert the weights to variances"
            raise self.fail("inverse_std goes with TEST or frozen only", FIELD, "inverse_std", hint=hint)
        return [ins[0]]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        self.shapes(ins)
        shape = (1, ins[0][1], 1, 1)
        names = ("slope_filler", "bias_filler") if self.kind == 1 else ("scale_filler", "shift_filler")
        scale, shift = (filled_blob(self, shape, name) for name in names)
        if self.kind == 2:
            return [scale, shift]
        if not self.param.frozen:
            return [scale, shift, Blob(shape, None, 0.0, 0.0), Blob(shape, None, 0.0, 0.0)]
        one = pb.FillerParameter(type="constant", value=1)
        fixed = [Blob(b.shape, b.filler, 0.0, 0.0) for b in (scale, shift)]
        return [*fixed, Blob(shape, None, 0.0, 0.0), Blob(shape, one, 0.0, 0.0)]

    def as_affine(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> Affine | None:
        p = self.param
        if (self.kind == 2 and p.bn_mode != INFERENCE) or (self.kind == 3 and not p.moving_average):
            field = "bn_mode: LEARN" if self.kind == 2 else "moving_average: false"
            raise Refused(f"'{self.name}' normalizes with the batch in phase TEST too ({field})")
        scale, shift, *running = doubles(blobs)
        if not running:
            return Affine(scale, shift)
        mean, variance = running
        if p.inverse_std:
            return Affine(scale * variance, shift - mean * scale * variance)
        return normalization(mean, variance, self._eps, scale=scale, shift=shift)

    @property
    def _eps(self) -> float:
        return float(self.param.var_eps if self.kind == 3 else self.param.eps)

    def neutral(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> list[Any]:
        new = [np.ones_like(blobs[0]), np.zeros_like(blobs[1])]
        if len(blobs) == 2:
            return new
        return [*new, np.zeros_like(blobs[2]), np.full_like(blobs[3], 1 if self.param.inverse_std else 1 - self._eps)]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import bn as m

        p = self.param
        if self.kind == 2:
            return m.Affine(*blobs) if p.bn_mode == INFERENCE else m.BatchOnly(*blobs, eps=SEGNET_EPS)
        if self.kind == 3:
            use = "phase" if p.moving_average else "batch"
            return m.RunningNorm(*blobs, eps=p.var_eps, keep=1 - p.decay, use=use)
        use = "running" if p.frozen else "phase"
        return m.RunningNorm(*blobs, eps=p.eps, keep=p.momentum, use=use, inverse=p.inverse_std)
