"""LRN, BatchNorm, Scale and Bias."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from caffejacinto_py.layers.base import Blob, IntegerForm, Layer, Saved, Shape
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.folding import Affine, Refused, doubles, normalization
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn

WITHIN_CHANNEL = 1  # LRNParameter.NormRegion
PIECE = 1 << 18  # numbers that LRN works on at one time on a CPU: a few buffers of this size fit the second-level cache
LEAST_EPS = 1e-5  # NVCaffe: what cuDNN accepts


@layer("LRN", v1="LRN", field="lrn_param")
class LRN(Layer):
    """Local response normalization.

    ACROSS_CHANNELS: y = x (k + alpha / n * sum of x^2 over the n channels around each, zeros outside)^-beta.
    WITHIN_CHANNEL: y = x (1 + alpha * a)^-beta, a = the mean of x^2 over the n x n window around each pixel, zero
    padded, padding counted; k is ignored.
    Bottom and top: (N, C, H, W).
    Options: local_size n (5), odd; alpha (1); beta (0.75); k (1); norm_region (ACROSS_CHANNELS). engine changes
    nothing.
    Differs: cuDNN computes divisive normalization under the name WITHIN_CHANNEL; this is the CPU's.
    Source: BVLC lrn_layer.cpp; Krizhevsky et al. 2012.
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if len(ins[0]) != 4:
            raise self.fail(f"LRN needs a bottom of 4 axes (N, C, H, W), not {ins[0]}", "bottom", 0)
        if self.param.local_size % 2 == 0:
            raise self.fail(f"local_size must be odd, not {self.param.local_size}", "lrn_param", "local_size")
        return [ins[0]]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        size = item * prod(ins[0])
        if self.param.norm_region == WITHIN_CHANNEL:  # squares, means, scale, power
            return Saved((0,), extra=4 * size, scratch=3 * size)
        n, c, *_ = ins[0]
        buffers = 1 + (c + self.param.local_size - 1) / max(1, c) * int(self.param.local_size).bit_length()
        piece = size * min(1, max(1, PIECE // max(1, prod(ins[0][1:]))) / max(1, n))
        # the scale; the gradient in the bottom's memory format; partial sums over padded channels
        return Saved((0,), extra=size, scratch=size, working=(int(buffers * piece), int(buffers * size)))

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import lrn as m

        p = self.param
        if p.norm_region == WITHIN_CHANNEL:
            return m.WithinChannel(p.local_size, p.alpha, p.beta)
        return m.AcrossChannels(p.local_size, p.alpha, p.beta, p.k)


@layer("BatchNorm", field="batch_norm_param")
class BatchNorm(Layer):
    """y = (x - mean) / sqrt(variance + eps) per channel; over the batch's own values, or with the running statistics.

    Bottom and top: (N, C, anything..), or (N): one channel. The variance of the batch is the biased one.
    BVLC, SSD, ADaPTION, Ristretto. Blobs: mean (C), variance (C), factor (1), all from 0, lr_mult 0 (another explicit
    value is an error). use_global_stats decides, where absent the phase: TEST uses the running statistics mean / factor
    and variance / factor (0 if the factor is 0). Every pass over the batch's own values, in either phase, updates with
    f = moving_average_fraction: factor = f factor + 1, mean = f mean + m, variance = f variance + n / (n - 1) v. No
    scale and shift: put a Scale layer behind.
    NVCaffe, caffe-jacinto. Blobs: mean, variance, factor (1; never read), and with scale_bias or either filler scale
    (C; 1) and shift (C; 0), lr_mult and decay_mult 1 whatever the prototxt says, as in C++: y = scale (..) + shift. The
    phase decides, use_global_stats is not consulted; eps is at least 1e-5. Running averages r = f r + (1 - f) batch;
    the first two passes of a run overwrite. As in C++ on a CPU the stored variance is the biased one plus eps; on a GPU
    it is without eps, with cuDNN unbiased, and cuDNN overwrites once. A bottom of any rank is accepted (C++: 4 axes).
    Options: use_global_stats (by phase); moving_average_fraction (0.999); eps (1e-5); scale_bias (false), scale_filler,
    bias_filler: NVCaffe only.
    Source: BVLC batch_norm_layer.cpp; NVCaffe batch_norm_layer.cpp; Ioffe and Szegedy 2015.
    """

    narrows = "values"
    quantizes = "norm"

    stateful_forward = True

    def repeatable(self) -> bool:
        return True  # the module has `update`

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        channels = prod(ins[0][1:2])  # the batch's mean and deviation, and where torch puts its running ones
        return Saved((0,), extra=4 * channels * item)

    @property
    def affine(self) -> bool:
        p = self.param
        return bool(p.scale_bias or p.HasField("scale_filler") or p.HasField("bias_filler"))

    @property
    def _as_binary(self) -> bool:
        """Whether caffe-jacinto's folding is wanted, with its eps and without a look at the factor."""
        return self.context.dialect.compat.optimize == "binary"

    @property
    def _eps(self) -> float:
        """What is added to the variance."""
        least = LEAST_EPS if self.context.dialect.batch_norm_ema and not self._as_binary else 0.0
        return max(float(self.param.eps), least)

    def as_affine(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> Affine | None:
        p, ema = self.param, self.context.dialect.batch_norm_ema
        if len(ins[0]) < 2:
            raise Refused(f"'{self.name}' normalizes a bottom without channels, {ins[0]}")
        if not ema and p.HasField("use_global_stats") and not p.use_global_stats:
            raise Refused(f"'{self.name}' normalizes with the batch in phase TEST too (use_global_stats: false)")
        mean, variance, factor, *affine = doubles(blobs)
        if not ema and not self._as_binary:  # sums; 0 counts as nothing seen
            inverse = 0.0 if factor[0] == 0 else 1 / factor[0]
            mean, variance = mean * inverse, variance * inverse
        scale, shift = affine or (None, None)
        return normalization(mean, variance, self._eps, scale=scale, shift=shift)

    def neutral(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> list[Any]:
        new = [np.zeros_like(blobs[0]), np.full_like(blobs[1], 1 - self._eps), np.array(blobs[2])]
        if not (self.context.dialect.batch_norm_ema or self._as_binary):
            new[2] = np.ones_like(new[2])
        return new if len(blobs) == 3 else [*new, np.ones_like(blobs[3]), np.zeros_like(blobs[4])]

    def absorbs_affine(self) -> bool:
        return not (self.affine and self.context.dialect.batch_norm_ema)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not ins[0]:
            raise self.fail("BatchNorm needs a bottom of at least 1 axis", "bottom", 0)
        if self.param.eps < 0:
            raise self.fail(f"eps must not be negative, not {self.param.eps:g}", "batch_norm_param", "eps")
        if not self.context.dialect.batch_norm_ema:
            self._check_plain()
        return [ins[0]]

    def _check_plain(self) -> None:
        """What BVLC's layer refuses."""
        for field in ("scale_bias", "scale_filler", "bias_filler"):
            if self.affine and self.param.HasField(field):
                hint = "choose the dialect nvcaffe or jacinto, or put a Scale layer behind"
                text = f"{field} belongs to NVCaffe's BatchNorm, but the dialect is {self.context.dialect.name}"
                raise self.fail(text, "batch_norm_param", field, hint=hint)
        for i, spec in enumerate(self.proto.param[:3]):
            if spec.HasField("lr_mult") and spec.lr_mult != 0:
                text = f"the statistics of BatchNorm are not learned: lr_mult must be 0, not {spec.lr_mult:g}"
                raise self.fail(text, "param", i, "lr_mult", hint="leave the param entries out")

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        self.shapes(ins)
        channels = (ins[0][1] if len(ins[0]) > 1 else 1,)
        ema = self.context.dialect.batch_norm_ema
        one = pb.FillerParameter(type="constant", value=1)
        stats = [
            Blob(channels, None, 0.0, 0.0),
            Blob(channels, None, 0.0, 0.0),
            Blob((1,), one if ema else None, 0.0, 0.0),
        ]
        if not (ema and self.affine):
            return stats
        scale, shift = (filled_blob(self, channels, name).filler for name in ("scale_filler", "bias_filler"))
        scale = scale if self.param.HasField("scale_filler") else one
        return [*stats, Blob(channels, scale, 1.0, 1.0), Blob(channels, shift, 1.0, 1.0)]

    def adapt(self, blobs: list[Any], targets: Sequence[Shape]) -> list[Any]:
        """DIGITS' order {scale, shift, mean, variance, 1}, 4-axis shapes, BVLC's sums in an NV net."""
        ema = self.context.dialect.batch_norm_ema
        if len(blobs) == 5 and blobs[2].size != 1 and blobs[4].size == 1:
            blobs = [blobs[2], blobs[3], blobs[4], blobs[0], blobs[1]]
        if len(blobs) == 5 and not ema:
            raise self.fail(
                "the file has NVCaffe's five blobs, with scale and shift, but the net's dialect is "
                f"{self.context.dialect.name}, whose BatchNorm has three",
                hint="give scale_bias: true in batch_norm_param, or choose --dialect nvcaffe or jacinto",
            )
        fits = [b.size == prod(t) for b, t in zip(blobs, targets, strict=False)]
        blobs = [b.reshape(t) if ok else b for b, t, ok in zip(blobs, targets, fits, strict=False)] + blobs[len(fits) :]
        factor = float(blobs[2].reshape(-1)[0]) if len(blobs) > 2 and blobs[2].size else 1.0
        # BVLC divides at use, NVCaffe never looks at the factor
        if ema and factor not in (0.0, 1.0) and not self._as_binary:
            blobs = [blobs[0] / factor, blobs[1] / factor, blobs[2] / factor, *blobs[3:]]
        return blobs

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import norm as m

        p = self.param
        if self.context.dialect.batch_norm_ema:
            return m.BatchNormAverage(*blobs, eps=max(p.eps, LEAST_EPS), fraction=p.moving_average_fraction)
        use_global = p.use_global_stats if p.HasField("use_global_stats") else None
        return m.BatchNorm(*blobs, eps=p.eps, fraction=p.moving_average_fraction, use_global=use_global)


class _Spread(Layer):
    """A small blob, own or bottom 1, laid over axes of bottom 0."""

    def small(self, ins: Sequence[Shape]) -> tuple[int, Shape]:
        """(first axis, shape) of the small blob, checked against bottom 0."""
        shape, field = ins[0], self.field or ""
        if len(ins) > 1:
            axis = self.axis(self.param.axis, len(shape), field, "axis") if ins[1] else 0
            if shape[axis : axis + len(ins[1])] != ins[1]:
                text = f"bottom 1 {ins[1]} must equal the axes of bottom 0 {shape} from axis {axis} on"
                raise self.fail(text, "bottom", 1)
            return axis, ins[1]
        count = self.param.num_axes
        if count < -1:
            raise self.fail(f"num_axes must be -1 (to the last axis) or more, not {count}", field, "num_axes")
        if count == 0:
            return 0, ()
        axis = self.axis(self.param.axis, len(shape), field, "axis")
        if axis + count > len(shape):
            text = f"num_axes {count} from axis {axis} on is more than the bottom has: {shape}"
            raise self.fail(text, field, "num_axes")
        return axis, shape[axis:] if count == -1 else shape[axis : axis + count]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.small(ins)
        return [ins[0]]

    def channels(self, ins: Sequence[Shape]) -> int:
        """How many channels have a number of their own from the blobs (or share one). Raises folding.Refused."""
        axis, shape = self.small(ins)
        if len(ins) > 1:
            raise Refused(f"bottom 1 of '{self.name}' changes from pass to pass")
        if len(ins[0]) < 2 or (shape and (axis, len(shape)) != (1, 1)):
            raise Refused(f"the blobs of '{self.name}' do not lie over axis 1 alone")
        return ins[0][1]


@layer("Scale", field="scale_param", bottoms=(1, 2))
class Scale(_Spread):
    """y = x * scale + shift; scale and shift laid over num_axes axes of x from `axis` on.

    Bottoms: x of any shape; optional: the scale, its shape equal to the axes of x from `axis` on (no axes: one number).
    Top: as x.
    Blobs: scale, unless it is bottom 1; shift (same shape) if bias_term.
    Options: axis (1), negative counts from the end; num_axes (1; -1: to the last axis; 0: one number), not used with
    two bottoms; filler (1); bias_term (false); bias_filler (0).
    Source: BVLC scale_layer.cpp; the same in all forks.
    """

    narrows = "values"
    quantizes = "scale"

    def is_affine(self, ins: Sequence[Shape]) -> bool:
        axis, shape = self.small(ins)
        return len(ins) == 1 and axis == 1 and len(shape) == 1

    def as_affine(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> Affine | None:
        channels = self.channels(ins)
        scale, *shift = doubles(blobs)
        return Affine(np.full(channels, scale), np.full(channels, shift[0] if shift else 0.0))

    def neutral(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> list[Any]:
        return [np.ones_like(blobs[0]), *(np.zeros_like(b) for b in blobs[1:])]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        _, shape = self.small(ins)
        blobs = []
        if len(ins) == 1:
            own = filled_blob(self, shape, "filler")
            blobs.append(own if self.param.HasField("filler") else Blob(shape, pb.FillerParameter(value=1)))
        if self.param.bias_term:
            blobs.append(filled_blob(self, shape, "bias_filler"))
        return blobs

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.norm import Scale as Module

        scale = blobs[0] if len(ins) == 1 else None
        return Module(scale, blobs[-1] if self.param.bias_term else None, axis=self.small(ins)[0])


@layer("Bias", field="bias_param", bottoms=(1, 2))
class Bias(_Spread):
    """y = x + shift, laid over num_axes axes of x from `axis` on.

    Bottoms: x of any shape; optional: the shift, its shape equal to the axes of x from `axis` on. Top: as x.
    Blobs: shift, unless it is bottom 1.
    Options: axis (1), num_axes (1; -1: to the last axis; 0: one number), as in Scale; filler (0).
    Source: BVLC bias_layer.cpp; the same in all forks.
    """

    narrows = "values"
    quantizes = "plain"

    may_inplace = True

    def as_affine(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> Affine | None:
        channels = self.channels(ins)
        return Affine(np.ones(channels), np.full(channels, doubles(blobs)[0]))

    def neutral(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> list[Any]:
        return [np.zeros_like(blobs[0])]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        return Saved()

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        return [filled_blob(self, self.small(ins)[1], "filler")] if len(ins) == 1 else []

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        if len(ins) > 1:
            raise self.fail("integer programs add constants only: the shift must be a blob of the layer", "bottom", 1)
        return IntegerForm("bias", {"axis": self.small(ins)[0]})

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.norm import Bias as Module

        return Module(blobs[0] if blobs else None, axis=self.small(ins)[0])
