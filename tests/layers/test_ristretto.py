"""Ristretto's numbers, and the layers that use them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from hypothesis import example, given, settings
from hypothesis import strategies as st

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context
from caffejacinto_py.layers.modules.ristretto import quantize
from caffejacinto_py.layers.modules.rounding import half_away, half_even, stochastic
from caffejacinto_py.layers.ristretto import Fixed, Minifloat, PowerOfTwo
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import DIALECTS
from caffejacinto_py.schema.upgrade import load_net
from tests.layers.harness import Case, build, check_layer, layer_of

# --- numbers ---------------------------------------------------------------------------------------------------------
INF, NAN = math.inf, math.nan


def short(values: list[float], number, rounding=half_away, **options) -> list[float]:
    return quantize(torch.tensor(values), number, rounding, **options).tolist()


@pytest.mark.parametrize(
    ("number", "values", "want"),
    [
        # clip first, then round halves away from zero
        (Fixed(8, 4), [0.03125, -0.03125, 7.97, 9.0, -8.5, 0.0], [0.0625, -0.0625, 7.9375, 7.9375, -8.0, 0.0]),
        (Fixed(4, 6), [0.2, 0.0078125, -1.0], [7 / 64, 1 / 64, -8 / 64]),  # more fraction than bits
        (Fixed(6, -1), [3.0, -3.0, 1.0, 100.0], [4.0, -4.0, 2.0, 62.0]),  # steps of two
        (Fixed(1, 0), [5.0, -0.5, -0.4], [0.0, -1.0, 0.0]),
        (Fixed(32, 16), [1.0, 1 / 65536 / 2, 1e9], [1.0, 1 / 65536, 32768.0]),
        (Minifloat(3, 4), [0.0, -0.0, 1.06, 1.0625, -1.0625, 1e9, -INF], [0.0, 0.0, 1.0, 1.125, -1.125, 480.0, -480.0]),
        (Minifloat(2, 4), [600.0, 500.0, 479.9, 2.0**-7, 0.0077], [448.0, 448.0, 448.0, 2.0**-7, 0.0]),
        (Minifloat(0, 3), [1.4, 1.5, 3.0, 40.0, 0.124], [1.0, 2.0, 4.0, 16.0, 0.0]),
        (Minifloat(23, 8), [1.1, -3e38, 1e-39], [1.1, -3e38, 0.0]),
        (PowerOfTwo(-8, -1), [0.0, -0.0, 0.3, -0.3, 0.36, 5.0, -1e-9], [2**-8, 2**-8, 0.25, -0.25, 0.5, 0.5, -(2**-8)]),
        (PowerOfTwo(0, 0), [INF, -7.0], [1.0, -1.0]),
    ],
)
def test_numbers(number, values: list[float], want: list[float]) -> None:
    assert short(values, number) == torch.tensor(want).tolist()


def test_what_the_binaries_do() -> None:
    assert short([500.0, 600.0, NAN], Minifloat(2, 4), carry=True) == [512.0, 448.0, 448.0]
    assert short([0.5, 1.5, -0.5], Fixed(8, 0), half_even) == [0.0, 2.0, 0.0]
    assert short([1.0625, 1.1875], Minifloat(3, 4), half_even) == [1.0, 1.25]


@pytest.mark.parametrize("number", [Fixed(8, 4), Minifloat(3, 4), PowerOfTwo(-8, -1)])
def test_nan_is_seen(number) -> None:
    assert math.isnan(short([NAN], number)[0])


def test_powers_of_two_are_exact() -> None:
    want = [2.0**e for e in range(-126, 128)]
    assert short([1.2 * v for v in want], PowerOfTwo(-126, 127)) == want


FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)
NUMBERS = st.one_of(
    st.builds(Fixed, st.integers(1, 32), st.integers(-90, 126)),
    st.builds(Minifloat, st.integers(0, 23), st.integers(1, 8)),
    st.integers(-126, 127).flatmap(lambda low: st.builds(PowerOfTwo, st.just(low), st.integers(low, 127))),
)


def limits(number) -> tuple[float, float]:
    if isinstance(number, Fixed):
        step = 2.0**-number.fraction
        return -(2.0 ** (number.bits - 1)) * step, (2.0 ** (number.bits - 1) - 1) * step
    if isinstance(number, Minifloat):
        top = (2 - 2.0**-number.mantissa) * 2.0 ** (2 ** (number.exponent - 1))
        return -top, top
    return -(2.0**number.high), 2.0**number.high


@given(FLOATS, NUMBERS, st.sampled_from([half_away, half_even, stochastic]))
@settings(max_examples=100, deadline=None)
def test_rounded_twice_is_rounded_once_and_inside_the_limits(values: list[float], number, rounding) -> None:
    x = torch.tensor(values)
    once = quantize(x, number, rounding)
    assert torch.equal(quantize(once, number, rounding), once)
    low, high = (torch.tensor(v).float() for v in limits(number))
    assert ((once >= low) & (once <= high)).all()


@given(FLOATS, NUMBERS, st.sampled_from([half_away, half_even]))
@settings(max_examples=100, deadline=None)
def test_order_is_kept(values: list[float], number, rounding) -> None:
    x = torch.tensor(values).sort().values
    # powers of two have no zero: its code is the smallest positive one
    y = quantize(x, number, rounding)
    assert (y.diff() >= 0).all()


@given(FLOATS, NUMBERS)
@example([math.inf, 3e38, -3e38], Minifloat(0, 8))
@settings(max_examples=100, deadline=None)
def test_double_precision_agrees(values: list[float], number) -> None:
    x = torch.tensor(values)
    if isinstance(number, PowerOfTwo):  # halfway between two powers log2 is rounded itself
        x = x[((x.double().abs().log2() * 2) % 1 - 0.5).abs().sub(0.5).abs() > 1e-5]
    if isinstance(number, Fixed):  # float32 has no room for the largest integers
        number = Fixed(min(number.bits, 24), number.fraction)
    torch.testing.assert_close(quantize(x.double(), number).float(), quantize(x, number), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("number", "value", "near"),
    [
        (Fixed(8, 4), 1.04, (1.0, 1.0625)),
        (Minifloat(3, 4), 1.04, (1.0, 1.125)),
        (Fixed(16, 0), 20000.25, (20000, 20001)),
    ],
)
def test_stochastic_rounding_keeps_the_mean(number, value: float, near: tuple[float, float]) -> None:
    torch.manual_seed(0)
    y = quantize(torch.full((40_000,), value), number, stochastic)
    assert sorted(set(y.tolist())) == list(near)
    assert abs(float(y.double().mean()) - value) < 0.02 * (near[1] - near[0])  # 8 standard errors


# --- layers ----------------------------------------------------------------------------------------------------------
WORDS = "quantization_param { bw_layer_in: 8 fl_layer_in: 5 bw_params: 6 fl_params: 4 bw_layer_out: 8 fl_layer_out: 3 }"
CONV = 'type: "ConvolutionRistretto" convolution_param { num_output: 4 kernel_size: 3 %s } ' + WORDS
RANDOM = {"gradient": False, "phase": "TEST", "phases_agree": False}
LEVELS = [np.round(np.random.default_rng(3).uniform(-1, 1, s) * 16) / 16 for s in ((4, 3, 3, 3), (4,))]


@pytest.mark.parametrize(
    "case",
    [
        Case(CONV % "pad: 1", [(2, 3, 5, 5)], **RANDOM),
        Case(CONV % "group: 2 stride: 2", [(2, 4, 7, 6)], **RANDOM),
        Case(CONV % "", [(2, 3, 5, 5)] * 2, tops=2, **RANDOM),
        Case('type: "DeconvolutionRistretto" convolution_param { num_output: 2 kernel_size: 4 stride: 2 pad: 1 '
             "bias_term: false group: 2 } " + WORDS, [(2, 4, 3, 3)], **RANDOM),
        Case('type: "FcRistretto" inner_product_param { num_output: 5 } ' + WORDS, [(3, 2, 4)], **RANDOM),
        Case('type: "FcRistretto" inner_product_param { num_output: 5 transpose: true } quantization_param { '
             "precision: MINIFLOAT mant_bits: 4 exp_bits: 4 }", [(3, 6)], compiled=True, **RANDOM),
        Case('type: "FcRistretto" inner_product_param { num_output: 5 } quantization_param { '
             "precision: INTEGER_POWER_OF_2_WEIGHTS }", [(3, 6)], **RANDOM),
        Case('type: "LRNRistretto" lrn_param { local_size: 3 alpha: 0.5 } quantization_param { precision: MINIFLOAT '
             "mant_bits: 4 exp_bits: 5 }", [(2, 5, 3, 4)], gradient=False),
    ],
)  # fmt: skip
def test_layer(case: Case) -> None:
    check_layer(case)


def test_full_words_are_the_plain_layers() -> None:
    """Words wide enough for everything: the same numbers and gradients as the layers they replace."""
    wide = "quantization_param { precision: MINIFLOAT mant_bits: 23 exp_bits: 8 }"
    for kind, other, rest, shape in (
        ("ConvolutionRistretto", "Convolution", "convolution_param { num_output: 4 kernel_size: 3 }", (2, 3, 5, 5)),
        ("DeconvolutionRistretto", "Deconvolution", "convolution_param { num_output: 4 kernel_size: 3 }", (2, 3, 5, 5)),
        ("FcRistretto", "InnerProduct", "inner_product_param { num_output: 4 }", (2, 3)),
        ("LRNRistretto", "LRN", "lrn_param { local_size: 3 alpha: 0.5 }", (2, 6, 4, 3)),
    ):
        results = []
        for text in (f'type: "{kind}" {rest} {wide}', f'type: "{other}" {rest}'):
            built = build(text, [shape], phase="TEST", dtype=torch.float32)
            x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).requires_grad_()
            (y,) = built(x)
            y.backward(torch.linspace(0, 1, y.numel()).reshape(y.shape))
            results.append([y, x.grad, *(p.grad for p in built.blobs)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_training_rounds_the_parameters_only_and_by_chance() -> None:
    text = 'type: "FcRistretto" inner_product_param { num_output: 2 bias_term: false } ' + WORDS
    weight = np.full((2, 500), 0.52)  # between 8/16 and 9/16
    built = build(text, [(1, 500)], phase="TRAIN", blobs=[weight], dtype=torch.float32)
    x = torch.full((1, 500), 0.011)
    torch.manual_seed(1)
    first, second = built(x)[0].detach(), built(x)[0].detach()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(built(x)[0], first)
    total = first / 0.011 * 16  # the input is as it was, each weight 8 or 9 sixteenths
    torch.testing.assert_close(total, total.round(), rtol=0, atol=1e-2)
    assert 8 * 500 < float(total.mean()) < 9 * 500


def test_gradients_use_the_rounded_operands_and_ignore_clipping() -> None:
    text = 'type: "FcRistretto" inner_product_param { num_output: 1 } ' + WORDS
    built = build(text, [(1, 2)], phase="TEST", blobs=[np.array([[0.52, 9.0]]), np.array([0.1])], dtype=torch.float32)
    x = torch.tensor([[0.3, 99.0]], requires_grad=True)
    built(x)[0].backward(torch.ones(1, 1))
    assert x.grad.tolist() == [[0.5, 31 / 16]]
    assert built.blobs[0].grad.tolist() == [[10 / 32, 127 / 32]]
    assert built.blobs[1].grad.tolist() == [1.0]
    np.testing.assert_allclose(built.blobs[0].detach().numpy(), [[0.52, 9.0]], rtol=1e-7)  # the master stays


@pytest.mark.parametrize(("choice", "want"), [("sound", 5.0), ("cpu", 4.5), ("gpu", 4.0)])
def test_activations_with_powers_of_two_and_halves(choice: str, want: float) -> None:
    text = (
        'name: "l" type: "FcRistretto" bottom: "b" top: "t" inner_product_param { num_output: 1 bias_term: false } '
        "quantization_param { precision: INTEGER_POWER_OF_2_WEIGHTS exp_max: 3 bw_layer_in: 8 fl_layer_in: 4 "
        "bw_layer_out: 8 fl_layer_out: 0 }"
    )
    dialect = replace(DIALECTS["ristretto"], compat=Compat(ristretto=choice))
    made = registry.make(text_format.Parse(text, pb.LayerParameter()), Context("TEST", dialect), 1)
    module = made.module([(1, 1)], [torch.nn.Parameter(torch.ones(1, 1))]).eval()
    assert module(torch.tensor([[4.5]])).item() == want


def test_lrn_rounds_every_step() -> None:
    text = ('type: "LRNRistretto" lrn_param { local_size: 3 alpha: 3 beta: 0.5 k: 1 } '
            "quantization_param { precision: MINIFLOAT mant_bits: 1 exp_bits: 5 }")  # fmt: skip
    x = torch.tensor([1.0, 1.3, 2.6, 0.2]).reshape(1, 4, 1, 1)

    def q(v: float) -> float:
        return short([v], Minifloat(1, 5))[0]

    seen = [q(v) for v in (1.0, 1.3, 2.6, 0.2)]
    squares, total, want = [q(v * v) for v in seen], 0.0, []
    for head in range(5):
        total = q(total + squares[head]) if head < 4 else total
        total = q(total - squares[head - 3]) if head >= 3 else total
        if head >= 1:
            want.append(q(seen[head - 1] * q(q(1 + q(total)) ** -0.5)))
    for phase in ("TRAIN", "TEST"):
        assert build(text, [(1, 4, 1, 1)], phase=phase, dtype=torch.float32)(x)[0].flatten().tolist() == want


# --- what is refused -------------------------------------------------------------------------------------------------
FC = 'type: "FcRistretto" inner_product_param { num_output: 2 } quantization_param { %s }'


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        (FC % "bw_params: 0", "bw_params", "between 1 and 32, not 0"),
        (FC % "bw_layer_in: 33", "bw_layer_in", "between 1 and 32, not 33"),
        (FC % "fl_layer_out: 200", "fl_layer_out", "between -90 and 126, not 200"),
        (FC % "precision: MINIFLOAT mant_bits: 24", "mant_bits", "between 0 and 23"),
        (FC % "precision: MINIFLOAT exp_bits: 0", "exp_bits", "between 1 and 8"),
        (FC % "precision: INTEGER_POWER_OF_2_WEIGHTS exp_min: 0", "exp_min", "exp_min 0 is above exp_max -1"),
        (FC % "precision: INTEGER_POWER_OF_2_WEIGHTS exp_max: 500", "exp_max", "between -126 and 127"),
        ('type: "LRNRistretto"', "precision", "in minifloats only"),
    ],
)
def test_impossible_words(text: str, field: str, words: str) -> None:
    layer = layer_of(text)
    with pytest.raises(LayerError, match=words) as e:
        layer.shapes([(2, 3, 1, 1)])
    assert e.value.field == ("quantization_param", field)


def test_other_refusals() -> None:
    minifloat = "quantization_param { precision: MINIFLOAT }"
    with pytest.raises(LayerError, match="across channels only"):
        layer_of('type: "LRNRistretto" lrn_param { norm_region: WITHIN_CHANNEL } ' + minifloat).shapes([(1, 2, 3, 3)])
    with pytest.raises(LayerError, match="normalize is not a field of Ristretto"):
        layer_of('type: "FcRistretto" inner_product_param { num_output: 2 normalize: true }').shapes([(2, 3)])


def test_impossible_words_have_their_place(tmp_path: Path) -> None:
    text = (
        'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 dim: 3 } } }\n'
        'layer { name: "fc" type: "FcRistretto" bottom: "x" top: "y" inner_product_param { num_output: 2 }\n'
        "  quantization_param { precision: 1\n    mant_bits: 40 } }\n"
    )
    (tmp_path / "n.prototxt").write_text(text)
    with pytest.raises(
        LayerError, match=r"layer 'fc' \(FcRistretto\): mant_bits must be between 0 and 23, not 40"
    ) as e:
        prepare(load_net(tmp_path / "n.prototxt"), phase="TEST")
    assert e.value.loc is not None
    assert (e.value.loc.line, e.value.loc.col) == (4, 5)
