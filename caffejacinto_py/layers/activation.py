"""Activations: one bottom, one top of the same shape, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Blob, IntegerForm, Layer, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn


class Activation(Layer):
    """Base: the top has the bottom's shape."""

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [ins[0]]


@layer("ReLU", v1="RELU", field="relu_param")
class ReLU(Activation):
    """y = max(x, 0) + negative_slope * min(x, 0); the gradient at 0 is negative_slope.

    Bottom and top: any shape. relu_param: negative_slope (0). `engine` is accepted and ignored. Source: BVLC
    relu_layer.
    """

    narrows = "values"
    quantizes = "relu"

    may_inplace = saves_output = True

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("relu", {"slope": self.param.negative_slope} if self.param.negative_slope else {})

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import ReLU

        return ReLU(self.param.negative_slope)


@layer("PReLU", field="prelu_param")
class PReLU(Activation):
    """y = max(x, 0) + a * min(x, 0) with a learnt slope per channel (axis 1); the gradient at 0 is a.

    Bottom and top: (N, C, ...). Blob 0: a, (C), or () if channel_shared. prelu_param: filler (constant 0.25),
    channel_shared (false). Source: BVLC prelu_layer; He et al. 2015.
    """

    narrows = "weights"
    quantizes = "plain"

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if len(ins[0]) < 2:
            raise self.fail(f"the bottom needs at least 2 axes (N, C, ...), it has shape {ins[0]}", "bottom", 0)
        return [ins[0]]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        given = self.param.HasField("filler")
        filler = self.param.filler if given else pb.FillerParameter(type="constant", value=0.25)
        return [Blob(() if self.param.channel_shared else (ins[0][1],), filler)]

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("prelu")

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import PReLU

        return PReLU(blobs[0])


@layer("ELU", field="elu_param")
class ELU(Activation):
    """y = x for x > 0, alpha * (exp(x) - 1) otherwise.

    Bottom and top: any shape. elu_param: alpha (1); lambda (1; NVCaffe family): NVCaffe multiplies both branches
    (with the right constants that is SELU), caffe-jacinto only the positive one (`Dialect.elu_lambda_both`).
    Deviation: the gradient is the derivative of y; for lambda != 1 caffe-jacinto's is not (it multiplies both
    branches' gradients by lambda although the forward does not; `--compat elu=binary`).
    Source: BVLC elu_layer; Clevert et al. 2015.
    """

    narrows = "values"
    may_inplace = saves_output = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if self._scale <= 0:
            raise self.fail(f"lambda must be positive, it is {self._scale:g}", "elu_param", "lambda")
        return [ins[0]]

    @property
    def _scale(self) -> float:
        return float(getattr(self.param, "lambda"))

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules import activation as m

        dialect = self.context.dialect
        if dialect.compat.elu == "binary" and not dialect.elu_lambda_both:
            return m.JacintoELU(self.param.alpha, self._scale)
        alpha = self.param.alpha if dialect.elu_lambda_both else self.param.alpha / self._scale
        return m.ELU(alpha, self._scale)


@layer("Sigmoid", v1="SIGMOID", field="sigmoid_param")
class Sigmoid(Activation):
    """y = 1 / (1 + exp(-x)). Any shape. sigmoid_param: `engine` is accepted and ignored. Source: BVLC sigmoid_layer."""

    narrows = "values"
    may_inplace = saves_output = True

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Sigmoid

        return Sigmoid()


@layer("TanH", v1="TANH", field="tanh_param")
class TanH(Activation):
    """y = tanh(x). Any shape. tanh_param: `engine` is accepted and ignored. Source: BVLC tanh_layer."""

    narrows = "values"
    may_inplace = saves_output = True

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import TanH

        return TanH()


@layer("AbsVal", v1="ABSVAL")
class AbsVal(Activation):
    """y = |x|; the gradient at 0 is 0. Any shape. Caffe forbids it in place. Source: BVLC absval_layer."""

    forbids_inplace = True

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import AbsVal

        return AbsVal()


@layer("Power", v1="POWER", field="power_param")
class Power(Activation):
    """y = (shift + scale * x) ** power. Any shape.

    power_param: power (1), scale (1), shift (0). With power * scale == 0 the top is the constant shift ** power (1 if
    power is 0) and the gradient is 0. Source: BVLC power_layer.
    """

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Constant, Power

        power, scale, shift = self.param.power, self.param.scale, self.param.shift
        if power * scale != 0:
            return Power(power, scale, shift)
        return Constant(1.0 if power == 0 else _pow(shift, power))


def _pow(base: float, exponent: float) -> float:
    """C's pow: inf and NaN where Python raises or turns complex."""
    if base == 0 and exponent < 0:
        return math.inf
    if base < 0 and exponent != int(exponent):
        return math.nan
    return float(base**exponent)


class _Based(Activation):
    """Base of Exp and Log: `base` is e (written -1) or a positive number."""

    def _base(self) -> float:
        """The natural logarithm of the base."""
        base, at = float(self.param.base), (str(self.field), "base")
        if base == -1:
            return 1.0
        if base <= 0:
            raise self.fail(f"base must be positive, or -1 for e; it is {base:g}", *at)
        return math.log(base)


@layer("Exp", v1="EXP", field="exp_param")
class Exp(_Based):
    """y = base ** (shift + scale * x).

    Any shape. exp_param: base (-1: e), scale (1), shift (0). Source: BVLC exp_layer.
    """

    may_inplace = saves_output = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self._base()
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Exp

        log = self._base()
        return Exp(log * self.param.scale, log * self.param.shift)


@layer("Log", field="log_param")
class Log(_Based):
    """y = log_base(shift + scale * x). Any shape.

    log_param: base (-1: e; 1 is refused), scale (1), shift (0). Source: BVLC log_layer.
    """

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if self._base() == 0:
            raise self.fail("base 1 has no logarithm", "log_param", "base")
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Log

        return Log(self.param.scale, self.param.shift, 1 / self._base())


@layer("BNLL", v1="BNLL")
class BNLL(Activation):
    """y = log(1 + exp(x)) (softplus), without overflow. Any shape. Source: BVLC bnll_layer."""

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import BNLL

        return BNLL()


@layer("Threshold", v1="THRESHOLD", field="threshold_param")
class Threshold(Activation):
    """y = 1 where x > threshold, else 0.

    Any shape. No gradient. threshold_param: threshold (0). Source: BVLC threshold_layer.
    """

    def differentiable(self, i: int) -> bool:
        return False

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Threshold

        return Threshold(self.param.threshold)


@layer("Clip", field="clip_param", forks="bvlc, ristretto")
class Clip(Activation):
    """y = x limited to [min, max]; the gradient passes where min <= x <= max. Any shape.

    clip_param: min, max, both required. Source: BVLC clip_layer.
    """

    narrows = "values"

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        for name in ("min", "max"):
            if not self.param.HasField(name):
                raise self.fail(f"clip_param needs {name}", "clip_param", name)
        if self.param.min > self.param.max:
            raise self.fail(f"min {self.param.min:g} is above max {self.param.max:g}", "clip_param", "min")
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Clip

        return Clip(self.param.min, self.param.max)


@layer("Swish", field="swish_param", forks="bvlc, ristretto")
class Swish(Activation):
    """y = x * sigmoid(beta * x).

    Any shape. swish_param: beta (1). Source: BVLC swish_layer; Ramachandran et al. 2017.
    """

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import Swish

        return Swish(self.param.beta)


@layer("ReLU6", field="relu6_param", forks="training_toolbox_caffe, Caffe-ReLU6, MobileNet-YOLO")
class ReLU6(Activation):
    """y = min(max(x, 0), n) + negative_slope * min(x, 0); the gradient at 0 and at n is the one outside.

    Any shape. relu6_param: n (6; training_toolbox_caffe only), negative_slope (0; Caffe-ReLU6 only).
    Source: openvinotoolkit/training_toolbox_caffe relu6_layer.cpp; Sandler et al. 2018.
    """

    narrows = "values"
    may_inplace = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if self.param.n <= 0:
            raise self.fail(f"n must be positive, not {self.param.n:g}", "relu6_param", "n")
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import ReLU6

        return ReLU6(self.param.n, self.param.negative_slope)


@layer("SeLU", field="selu_param", forks="caffe_latte, SELU ports", spellings=("SELU", "SeLu"))
class SeLU(Activation):
    """y = lambda * x for x > 0, lambda * alpha * (exp(x) - 1) otherwise.

    Any shape. selu_param: lambda (1.050700987), alpha (1.67326324). Source: fireae/caffe_latte selu_layer.cpp;
    Klambauer et al. 2017.
    """

    may_inplace = saves_output = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        for name in ("lambda", "alpha"):
            if getattr(self.param, name) <= 0:
                raise self.fail(f"{name} must be positive, not {getattr(self.param, name):g}", "selu_param", name)
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.activation import ELU

        return ELU(self.param.alpha, getattr(self.param, "lambda"))
