"""ADaPTION's low-precision layers: LPConvolution, LPInnerProduct, LPAct."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from caffejacinto_py.layers.base import Blob, Copies, FixedWords, IntegerForm, Layer, Saved, Shape
from caffejacinto_py.layers.conv import FIELD as CONV_FIELD
from caffejacinto_py.layers.conv import Convolution
from caffejacinto_py.layers.dual import MAX_BITS, Precision, doubled
from caffejacinto_py.layers.linear import FIELD as IP_FIELD
from caffejacinto_py.layers.linear import InnerProduct
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from caffejacinto_py.layers.folding import Affine, Folded
    from caffejacinto_py.layers.modules.lp import Rounding

FIELD = "lpfp_param"


class _LowPrecision(Layer):
    """What the three share: where the format comes from, and how the chosen binary rounds."""

    low_precision: ClassVar[dict[str, str]] = {}
    unread: ClassVar[str] = ""  # the message that the fork declares for this layer and never reads

    def __init__(self, proto: Any, context: Any, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        source = proto.lpfp_param if proto.HasField(FIELD) else getattr(proto, self.unread)
        stochastic = source.rounding_scheme == source.STOCHASTIC
        self.stateful_forward = stochastic or self._falls_through  # type: ignore[misc]

    def repeatable(self) -> bool:
        return True  # random numbers are torch's

    @property
    def _falls_through(self) -> bool:
        """Whether DETERMINISTIC runs on into STOCHASTIC, as it does on the GPU build where source and target differ."""
        return bool(self.context.dialect.compat.adaption == "gpu")

    def precision(self) -> Precision:
        """The checked format. Raises LayerError naming bd or ad."""
        proto, given = self.proto, self.proto.HasField(FIELD)
        name = FIELD if given or not proto.HasField(self.unread) else self.unread
        p = getattr(proto, name)
        if name == FIELD and not p.HasField("bd"):
            hint = 'for example: lpfp_param { bd: 2 ad: 14 } is "Q2.14", 16 bits'
            raise self.fail("bd, the bits before the point with sign, must be given", FIELD, "bd", hint=hint)
        if p.bd < 1:
            raise self.fail("bd must be at least 1: it counts the sign", name, "bd")
        if p.bd + p.ad > MAX_BITS:
            text = f"bd {p.bd} and ad {p.ad} make {p.bd + p.ad} bits; at most {MAX_BITS} fit into a float"
            raise self.fail(text, name, "ad" if p.ad >= p.bd else "bd")
        round_bias = bool(getattr(p, "round_bias", False))
        return Precision(p.bd, p.ad, round_bias, p.rounding_scheme == p.STOCHASTIC)

    def rounding(self, *, inplace: bool = False) -> Rounding:
        """How numbers are rounded, compat switch applied. inplace: C++ works in place there."""
        from caffejacinto_py.layers.modules.lp import Rounding

        precision = self.precision()
        how = "stochastic" if precision.stochastic else "nearest"
        if how == "stochastic" and self.context.dialect.compat.adaption == "cpu":
            how = "floor"
        elif how == "nearest" and self._falls_through and not inplace:
            how = "stochastic"
        nan = -precision.limit if self.context.dialect.compat.adaption == "cpu" else None
        return Rounding(precision.ad, precision.limit, how, nan)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.precision()
        return super().shapes(ins)

    def _word(self) -> tuple[int, int]:
        """(bits, fraction) for integer programs."""
        p = self.precision()
        if self.rounding(inplace=list(self.proto.bottom) == list(self.proto.top)).how != "nearest":
            raise self.fail("integer programs round to the nearest", FIELD, "rounding_scheme")
        return p.bd + p.ad, p.ad

    # the plain layer's terms of folding are not those of rounded weights
    def fold_output(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        return None

    def fold_input(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        return None


class _Dual(_LowPrecision):
    """A product whose blobs are kept twice: 0 weights, 1 rounded weights, 2 bias, 3 rounded bias."""

    # rounding: four of the weights, which are half of the blobs; backward: see products of whole numbers
    copies = Copies(forward=1.75, backward=1.125)

    @property
    def _physical(self) -> bool:
        return bool(self.context.dialect.compat.lp_param == "physical")

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        shadow = {} if self._physical else {"lr_mult": 0.0, "decay_mult": 0.0}
        return [b for master in super().blobs(ins) for b in (master, Blob(master.shape, **shadow))]

    def param_entry(self, i: int, given: int) -> int | None:
        if self._physical or given > 2:
            return i
        return None if i % 2 else i // 2

    def param_doubt(self, given: int) -> str | None:
        if not (self._physical and given == 2 and self.param.bias_term):
            return None
        return (
            "2 param entries for the 4 blobs (weights, rounded weights, bias, rounded bias): read as ADaPTION does, "
            "the second belongs to the rounded weights, and the bias trains with lr_mult 1, decay_mult 1"
        )

    def word_bits(self) -> tuple[int | None, int | None] | None:
        p = self.precision()
        return p.bd + p.ad, None

    def fixed_words(self) -> FixedWords | None:
        word = self._word()
        return FixedWords(weight=word, bias=word if self.precision().round_bias else None)

    def repeatable(self) -> bool:
        return False  # a second pass would write the rounded blobs again, which the first one's gradient reads

    def adapt(self, blobs: list[Any], targets: Sequence[Shape]) -> list[Any]:
        """Also the 1 or 2 blobs of a plain layer."""
        return doubled(blobs, targets, self.precision())

    def _split(self, blobs: Sequence[Any]) -> tuple[dict[str, Any], Any, Any]:
        """Options of the modules, master weights, master bias."""
        bias, shadow_bias = (blobs[2], blobs[3]) if len(blobs) > 2 else (None, None)
        options = {
            "shadow": blobs[1],
            "shadow_bias": shadow_bias,
            "rounding": self.rounding(),
            "round_bias": self.precision().round_bias,
            "gated": self._physical,
        }
        return options, blobs[0], bias


@layer("LPConvolution", field=CONV_FIELD, bottoms=(1, None), tops=(1, None), forks="ADaPTION")
class LPConvolution(_Dual, Convolution):
    """A Convolution with weights rounded to fixed point in every forward pass; full-precision masters are trained.

    Bottoms, tops and options as in Convolution (convolution_param), and lpfp_param: bd, bits before the point with sign
    (needed, at least 1); ad, bits after it (0); round_bias (false): round the bias too, to the same format;
    rounding_scheme (DETERMINISTIC: to the nearest, halves away from zero; STOCHASTIC: floor(x + u), u uniform in
    [0, 1), drawn from torch's generator, which the solver seeds). Then values are clipped to +-(2^(bd-1) - 2^-ad). The
    top is not rounded: LPAct does that. bd + ad is at most 24.
    Blobs: weights W (num_output, C / group, kernel..), their rounded copy, b (num_output), its copy: 4, or 2 without
    bias. The copies are rewritten by every forward pass (b's with round_bias only) and are in snapshots. Files with the
    blobs of a plain Convolution load as well, and a plain Convolution takes the masters of such a file.
    Gradients: of the bottom with W itself, of W and b as in Convolution; they land on the masters.
    param: entry 0 is for W, entry 1 for b (or one entry for each of the 4 blobs); copies are never updated. Differs:
    ADaPTION gives entry i to blob i, so that in its nets entry 1 does nothing but freeze b where lr_mult is 0, and b
    trains with lr_mult 1, decay_mult 1: `--compat lp_param=physical`.
    lp_convolution_param, which the fork declares and does not read: its bd (8), ad (8), round_bias and rounding_scheme
    are used where lpfp_param is missing; the rest of it is not read.
    Differs: copies start at zero, not filled. NaN stays NaN. `--compat adaption=cpu`: STOCHASTIC is floor, NaN becomes
    the lowest value; `adaption=gpu`: DETERMINISTIC is STOCHASTIC too.
    Source: ADaPTION lp_base_conv_layer.cpp, lp_conv_layer.cpp, util/math_functions.cpp; Milde et al. 2017.
    """

    unread = "lp_convolution_param"
    quantizes = narrows = None  # type: ignore[assignment]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.lp import LPConvolution as Module

        g = self.geometry(ins)
        options, weight, bias = self._split(blobs)
        return Module(
            weight,
            bias,
            stride=g.stride,
            padding=g.pad,
            dilation=g.dilation,
            groups=self.groups(g.channels),
            lead=len(g.lead),
            **options,
        )


@layer("LPInnerProduct", field=IP_FIELD, forks="ADaPTION")
class LPInnerProduct(_Dual, InnerProduct):
    """An InnerProduct with weights rounded to fixed point in every forward pass; full-precision masters are trained.

    Bottom, top and options as in InnerProduct (inner_product_param; not normalize). lpfp_param, the four blobs,
    `param`, gradients and what differs as in LPConvolution. lp_inner_product_param as lp_convolution_param there.
    Source: ADaPTION lp_inner_product_layer.cpp.
    """

    unread = "lp_inner_product_param"
    quantizes = narrows = None  # type: ignore[assignment]
    copies = Copies(forward=1.75)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if self.param.normalize:
            raise self.fail("normalize does not go with rounded weights", IP_FIELD, "normalize")
        return super().shapes(ins)

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.lp import LPInnerProduct as Module

        options, weight, bias = self._split(blobs)
        return Module(weight, bias, axis=self._first(ins), transpose=self.param.transpose, **options)


@layer("LPAct", field=FIELD, forks="ADaPTION")
class LPAct(_LowPrecision):
    """Rounds activations to fixed point: clip(round(x * 2^ad) / 2^ad) to +-(2^(bd-1) - 2^-ad).

    Bottom and top of any shape, in place or not. lpfp_param as in LPConvolution, without round_bias. lp_act_param (bd
    8, ad 8): used where lpfp_param is missing.
    Gradient: passes through unchanged, also where values are clipped.
    Differs: NaN stays NaN (so that the layer where it comes from is found). Where a ReLU is in place before it,
    ADaPTION's ReLU sees the rounded values in its backward pass and stops the gradient of positive values that became
    0; here it sees its own. `--compat adaption=cpu`: STOCHASTIC is floor, NaN becomes the lowest value; `adaption=gpu`:
    DETERMINISTIC is STOCHASTIC too unless the layer is in place.
    Source: ADaPTION lp_act_layer.cpp, util/math_functions.cpp.
    """

    unread = "lp_act_param"
    may_inplace = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.precision()
        return [ins[0]]

    def word_bits(self) -> tuple[int | None, int | None] | None:
        p = self.precision()
        return None, p.bd + p.ad

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("round")

    def fixed_words(self) -> FixedWords | None:
        return FixedWords(top=self._word())

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        return Saved(passing=4 * item * prod(ins[0]))  # the gradient passes through; noise and parts of the rounding

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.lp import LPAct as Module

        return Module(self.rounding(inplace=list(self.proto.bottom) == list(self.proto.top)))
