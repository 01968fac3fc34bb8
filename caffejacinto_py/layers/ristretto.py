"""Ristretto's layers: products and LRN in short words, the weights kept in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caffejacinto_py.layers.base import Copies, IntegerForm, Layer, Shape
from caffejacinto_py.layers.conv import FIELD as CONVOLUTION
from caffejacinto_py.layers.conv import Convolution, Deconvolution
from caffejacinto_py.layers.linear import FIELD as LINEAR
from caffejacinto_py.layers.linear import InnerProduct
from caffejacinto_py.layers.norm import LRN, WITHIN_CHANNEL
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn

    from caffejacinto_py.layers.folding import Affine, Folded

FIELD = "quantization_param"
FORK = "ristretto"
# what float32 can hold, whatever the width is
_FRACTION = (-90, 126)
_EXPONENT = (-126, 127)


@dataclass(frozen=True)
class Fixed:
    """Integers of `bits` bits with sign, times 2^-fraction."""

    bits: int
    fraction: int

    @property
    def width(self) -> int:
        return self.bits


@dataclass(frozen=True)
class Minifloat:
    """sign (1 + m / 2^mantissa) 2^(e - bias), 0 <= e < 2^exponent, bias 2^(exponent - 1) - 1; no subnormals, no NaN."""

    mantissa: int
    exponent: int

    @property
    def width(self) -> int:
        return 1 + self.mantissa + self.exponent


@dataclass(frozen=True)
class PowerOfTwo:
    """sign 2^e, low <= e <= high; there is no zero."""

    low: int
    high: int

    @property
    def width(self) -> int:
        return 1 + (self.high - self.low).bit_length()


Number = Fixed | Minifloat | PowerOfTwo


@dataclass(frozen=True)
class Words:
    """The numbers of a layer; None: left alone. stochastic: how TEST rounds."""

    input: Number | None
    weight: Number
    bias: Number | None
    output: Number | None
    stochastic: bool


@dataclass(frozen=True)
class Binary:
    """What is done as the C++ binaries do it: see the compat switch."""

    half_even: bool = False  # the GPU's rint
    overwrite: bool = False  # the layer's bottom itself is quantized
    carry: bool = False  # a minifloat may round up past the largest number


class _Short(Layer):
    """What the layers share: reading quantization_param."""

    quantizes = narrows = None  # it does so itself
    low_precision = {}
    stateful_forward = True  # draws random numbers

    def repeatable(self) -> bool:
        return True  # random numbers are torch's

    def word_bits(self) -> tuple[int | None, int | None] | None:
        words = self.words()
        blobs = [n.width for n in (words.input, words.output) if n is not None]
        return words.weight.width, max(blobs, default=None)

    def words(self) -> Words:
        """The numbers that the layer uses, checked. Raises LayerError naming the field."""
        q = getattr(self.proto, FIELD)
        stochastic = _value(q, "rounding_scheme", "Rounding", "NEAREST") == "STOCHASTIC"
        precision = _value(q, "precision", "Precision", "DYNAMIC_FIXED_POINT")
        if precision == "MINIFLOAT":
            small = Minifloat(self._within(q, "mant_bits", 0, 23), self._within(q, "exp_bits", 1, 8))
            return Words(small, small, small, small, stochastic)
        if precision == "INTEGER_POWER_OF_2_WEIGHTS":
            power = PowerOfTwo(self._within(q, "exp_min", *_EXPONENT), self._within(q, "exp_max", *_EXPONENT))
            if power.low > power.high:
                raise self.fail(f"exp_min {power.low} is above exp_max {power.high}", FIELD, "exp_min")
            if self.context.dialect.compat.ristretto == "cpu":
                return Words(None, power, None, None, stochastic)
            return Words(self._fixed(q, "layer_in"), power, None, self._fixed(q, "layer_out"), stochastic)
        params = self._fixed(q, "params")
        return Words(self._fixed(q, "layer_in"), params, params, self._fixed(q, "layer_out"), stochastic)

    def _fixed(self, q: Any, name: str) -> Fixed:
        return Fixed(self._within(q, f"bw_{name}", 1, 32), self._within(q, f"fl_{name}", *_FRACTION))

    def _within(self, q: Any, field: str, low: int, high: int) -> int:
        value = int(getattr(q, field))
        if not low <= value <= high:
            raise self.fail(f"{field} must be between {low} and {high}, not {value}", FIELD, field)
        return value

    @property
    def binary(self) -> Binary:
        choice = self.context.dialect.compat.ristretto
        return Binary(half_even=choice == "gpu", overwrite=choice != "sound", carry=choice != "sound")


class _Product(_Short):
    """A product with its words around it: the class behind it in the list of bases computes."""

    copies = Copies(kept=1, forward=4.5, backward=2.125)  # the rounded weights; parts of the rounding; see Convolution

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.words()
        return super().shapes(ins)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.ristretto import Product

        return Product(super().module(ins, blobs), self.words(), self.binary)

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return None  # its words are its own

    def fold_output(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        return None  # the words fit the weights as they are

    def fold_input(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        return None


@layer("ConvolutionRistretto", field=CONVOLUTION, bottoms=(1, None), tops=(1, None), forks=FORK)
class ConvolutionRistretto(_Product, Convolution):  # type: ignore[misc]  # traits of _Short
    """A Convolution in short words. TEST: input, weights, bias and output are rounded. TRAIN: weights and bias only,
    and always stochastically, with torch's generator.

    Bottoms, tops, size and options as in Convolution; so are the blobs, which stay in full precision: files are those
    of a Convolution. Gradients: to the bottom with the rounded weights, to the weights with the rounded bottom, both as
    if nothing had been rounded or clipped.
    quantization_param: precision (DYNAMIC_FIXED_POINT; also written 0, 1, 2 or FIXED_POINT, MINI_FLOATING_POINT,
    POWER_2_WEIGHTS, as in Ristretto's first versions), rounding_scheme (NEAREST, halves away from zero; or STOCHASTIC:
    in TEST; TRAIN always is), and
    DYNAMIC_FIXED_POINT: clip to [-2^(bw - 1), 2^(bw - 1) - 1] 2^-fl, then round to a multiple of 2^-fl; bw 1..32 (32),
    fl (16) may be negative or above bw: bw_layer_in, fl_layer_in, bw_params, fl_params (weights and bias),
    bw_layer_out, fl_layer_out.
    MINIFLOAT: mant_bits 0..23 (23), exp_bits 1..8 (8), exponent bias 2^(exp_bits - 1) - 1, no subnormals, infinities or
    NaN: what is below the smallest number becomes 0, what is above the largest becomes the largest.
    INTEGER_POWER_OF_2_WEIGHTS: weights become sign 2^e, e = log2 |w| rounded and clipped to exp_min (-8) .. exp_max
    (-1), 0 becomes +2^exp_min; the bias stays; input and output are fixed point.
    Differs: only this layer sees its rounded bottom (C++ overwrites the blob); a minifloat never rounds past its
    largest number (C++ does just below it); NaN stays NaN; zeros do not end the work (they do in C++ on a CPU); with
    powers of two the CPU leaves input and output alone. The compat switch `ristretto` brings the first, the second and
    the last back.
    Source: Ristretto ristretto/layers/conv_ristretto_layer.cpp, base_ristretto_layer.cpp and .cu; Gysel et al. 2016.
    """


@layer("DeconvolutionRistretto", field=CONVOLUTION, bottoms=(1, None), tops=(1, None), forks=FORK)
class DeconvolutionRistretto(_Product, Deconvolution):  # type: ignore[misc]  # traits of _Short
    """A Deconvolution in short words; what is rounded, when and how: see ConvolutionRistretto.

    Bottoms, tops, size, options and blobs as in Deconvolution.
    Source: Ristretto ristretto/layers/deconv_ristretto_layer.cpp.
    """


@layer("FcRistretto", field=LINEAR, forks=FORK)
class FcRistretto(_Product, InnerProduct):  # type: ignore[misc]  # traits of _Short
    """An InnerProduct in short words; what is rounded, when and how: see ConvolutionRistretto.

    Bottom, top, options (without normalize) and blobs as in InnerProduct.
    Source: Ristretto ristretto/layers/fc_ristretto_layer.cpp.
    """

    copies = Copies(kept=1, forward=4.5)

    def __init__(self, proto: Any, context: Any, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        self.stateful_forward = True  # type: ignore[misc]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if self.param.normalize:
            raise self.fail("normalize is not a field of Ristretto", LINEAR, "normalize")
        return super().shapes(ins)


@layer("LRNRistretto", field="lrn_param", forks=FORK)
class LRNRistretto(_Short, LRN):
    """LRN across channels in minifloats: x, its squares, their running sum over the window, the scale and its power,
    and the product are each rounded to nearest, in both phases.

    The sum runs from channel to channel, adding one square and subtracting another, so that rounding errors stay in
    it, as they do in C++. The gradient is LRN's, with the rounded scale and output.
    Bottom and top: (N, C, H, W). Options as in LRN. quantization_param: precision: MINIFLOAT, mant_bits (23), exp_bits
    (8); see ConvolutionRistretto. Differs: C++ has no CPU version; other precisions, which it runs with unset widths,
    are errors.
    Source: Ristretto ristretto/layers/lrn_ristretto_layer.cu.
    """

    stateful_forward = False

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not isinstance(self.words().weight, Minifloat):
            hint = "write precision: MINIFLOAT, with mant_bits and exp_bits"
            raise self.fail("LRN is done in minifloats only", FIELD, "precision", hint=hint)
        if self.param.norm_region == WITHIN_CHANNEL:
            raise self.fail("it normalizes across channels only", "lrn_param", "norm_region")
        return super().shapes(ins)

    def word_bits(self) -> tuple[int | None, int | None] | None:
        return None, self.words().weight.width

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.ristretto import ShortLRN

        p, number = self.param, self.words().weight
        assert isinstance(number, Minifloat)
        return ShortLRN(p.local_size, p.alpha, p.beta, p.k, number, self.binary)


def _value(q: Any, field: str, enum: str, default: str) -> str:
    """The name of an enum value (nets that were read have Ristretto's names, see schema/ristretto.py)."""
    return str(getattr(pb.QuantizationParameter, enum).Name(getattr(q, field))) if q.HasField(field) else default
