"""Activations: formulas in float64, gradients, in place, edge values and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, build, check_layer, layer_of

S = (2, 3, 4, 5)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _elu(alpha: float, both: float = 1.0, positive: float = 1.0):
    return lambda b, _: [both * np.where(b[0] > 0, positive * b[0], alpha * np.expm1(b[0]))]


def _prelu(b: list[np.ndarray], p: list[np.ndarray]) -> list[np.ndarray]:
    slope = p[0].reshape(1, -1, 1, 1) if p[0].ndim else p[0]
    return [np.maximum(b[0], 0) + slope * np.minimum(b[0], 0)]


F = np.float32  # prototxt numbers are float32
CASES = {
    "relu": Case('type: "ReLU"', [S], lambda b, _: [np.maximum(b[0], 0)], kinks=[0], compiled=True),
    "relu_leaky": Case(
        'type: "ReLU" relu_param { negative_slope: 0.1 }',
        [S],
        lambda b, _: [np.maximum(b[0], 0) + float(F(0.1)) * np.minimum(b[0], 0)],
        kinks=[0],
    ),
    "relu_negative_slope_below_zero": Case(
        'type: "ReLU" relu_param { negative_slope: -0.5 }',
        [S],
        lambda b, _: [np.where(b[0] > 0, b[0], -0.5 * b[0])],
        kinks=[0],
    ),
    "prelu": Case('type: "PReLU"', [S], _prelu, kinks=[0], compiled=True),
    "prelu_shared": Case('type: "PReLU" prelu_param { channel_shared: true }', [S], _prelu, kinks=[0]),
    "elu": Case('type: "ELU" elu_param { alpha: 0.5 }', [S], _elu(0.5), kinks=[0], compiled=True),
    "elu_alpha_negative": Case('type: "ELU" elu_param { alpha: -0.5 }', [S], _elu(-0.5), kinks=[0]),
    "elu_lambda": Case(
        'type: "ELU" elu_param { alpha: 0.5 lambda: 1.25 }', [S], _elu(0.5, both=1.25), kinks=[0], dialect="nvcaffe"
    ),
    "elu_lambda_jacinto": Case(
        'type: "ELU" elu_param { alpha: 0.5 lambda: 1.25 }', [S], _elu(0.5, positive=1.25), kinks=[0], dialect="jacinto"
    ),
    "relu6": Case(
        'type: "ReLU6"', [S], lambda b, _: [np.clip(b[0], 0, 6)], kinks=[0, 6], low=-3, high=9, compiled=True
    ),
    "relu6_n": Case(
        'type: "ReLU6" relu6_param { n: 1 }', [S], lambda b, _: [np.clip(b[0], 0, 1)], kinks=[0, 1], compiled=True
    ),
    "relu6_slope": Case(
        'type: "ReLU6" relu6_param { negative_slope: 0.25 }',
        [S],
        lambda b, _: [np.clip(b[0], 0, 6) + 0.25 * np.minimum(b[0], 0)],
        kinks=[0, 6],
        low=-3,
        high=9,
    ),
    "selu": Case(
        'type: "SELU"',
        [S],
        _elu(float(F(1.67326324)) * float(F(1.050700987)), positive=float(F(1.050700987))),
        kinks=[0],
        compiled=True,
    ),
    "selu_spelling": Case('type: "SeLU" selu_param { lambda: 2 alpha: 0.5 }', [S], _elu(1.0, positive=2.0), kinks=[0]),
    "selu_other_spelling": Case('type: "SeLu" selu_param { lambda: 1 alpha: 1 }', [S], _elu(1.0), kinks=[0]),
    "sigmoid": Case('type: "Sigmoid"', [S], lambda b, _: [_sigmoid(b[0])]),
    "tanh": Case('type: "TanH"', [S], lambda b, _: [np.tanh(b[0])]),
    "absval": Case('type: "AbsVal"', [S], lambda b, _: [np.abs(b[0])], kinks=[0]),
    "power_identity": Case('type: "Power"', [S], lambda b, _: [b[0]]),
    "power": Case(
        'type: "Power" power_param { power: 2.5 scale: 0.5 shift: 2 }', [S], lambda b, _: [(2 + 0.5 * b[0]) ** 2.5]
    ),
    "power_linear": Case('type: "Power" power_param { scale: -0.5 shift: 2 }', [S], lambda b, _: [2 - 0.5 * b[0]]),
    "power_constant": Case(
        'type: "Power" power_param { power: 3 scale: 0 shift: 2 }', [S], lambda b, _: [np.full_like(b[0], 8.0)]
    ),
    "power_zero": Case('type: "Power" power_param { power: 0 shift: 2 }', [S], lambda b, _: [np.ones_like(b[0])]),
    "exp": Case('type: "Exp"', [S], lambda b, _: [np.exp(b[0])], compiled=True),
    "exp_base": Case(
        'type: "Exp" exp_param { base: 2 scale: 0.5 shift: 0.25 }', [S], lambda b, _: [2 ** (0.25 + 0.5 * b[0])]
    ),
    "log": Case('type: "Log"', [S], lambda b, _: [np.log(b[0])], low=0.1, high=3),
    "log_base": Case(
        'type: "Log" log_param { base: 10 scale: 0.5 shift: 2 }', [S], lambda b, _: [np.log10(2 + 0.5 * b[0])]
    ),
    "bnll": Case('type: "BNLL"', [S], lambda b, _: [np.logaddexp(0, b[0])], low=-60, high=60),
    "threshold": Case(
        'type: "Threshold" threshold_param { threshold: 0.25 }',
        [S],
        lambda b, _: [(b[0] > 0.25).astype(float)],
        kinks=[0.25],
        gradient=False,
    ),
    "clip": Case(
        'type: "Clip" clip_param { min: -0.5 max: 0.75 }', [S], lambda b, _: [b[0].clip(-0.5, 0.75)], kinks=[-0.5, 0.75]
    ),
    "swish": Case('type: "Swish"', [S], lambda b, _: [b[0] * _sigmoid(b[0])]),
    "swish_beta": Case('type: "Swish" swish_param { beta: 1.5 }', [S], lambda b, _: [b[0] * _sigmoid(1.5 * b[0])]),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


@pytest.mark.parametrize(
    ("text", "slope"),
    [
        ('type: "ReLU"', 0.0),
        ('type: "ReLU" relu_param { negative_slope: 0.5 }', 0.5),
        ('type: "PReLU" prelu_param { channel_shared: true }', 0.25),
        ('type: "ELU" elu_param { alpha: 0.5 }', 0.5),
        ('type: "AbsVal"', 0.0),
        ('type: "Clip" clip_param { min: 0 max: 1 }', 1.0),  # closed interval
    ],
)
def test_gradient_at_the_kink(text: str, slope: float) -> None:
    built = build(text, [(1, 1)], blobs=[np.array(0.25)] if "PReLU" in text else None)
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    built(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.item() == slope


def test_prelu_filler_is_a_quarter() -> None:
    (blob,) = layer_of('type: "PReLU"').blobs([(2, 3)])
    assert (blob.shape, blob.filler.type, blob.filler.value) == ((3,), "constant", 0.25)
    (blob,) = layer_of('type: "PReLU" prelu_param { filler { type: "gaussian" } channel_shared: true }').blobs([(2, 3)])
    assert (blob.shape, blob.filler.type) == ((), "gaussian")


def test_power_constant_blocks_bad_numbers() -> None:
    built = build('type: "Power" power_param { scale: 0 shift: 2 }', [(1, 2)])
    x = torch.tensor([[math.inf, math.nan]], dtype=torch.float64, requires_grad=True)
    (y,) = built(x)
    y.sum().backward()
    assert y.tolist() == [[2, 2]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("power: -1 scale: 0 shift: 0", math.inf),
        ("power: 0.5 scale: 0 shift: -1", math.nan),
        ("power: 0 shift: 0", 1.0),
    ],
)
def test_power_constant_like_c(text: str, wanted: float) -> None:
    (y,) = build(f'type: "Power" power_param {{ {text} }}', [(1,)])(torch.ones(1))
    assert y.item() == wanted or (math.isnan(wanted) and math.isnan(y.item()))


def test_large_inputs_do_not_overflow() -> None:
    x = torch.tensor([-1e4, 1e4])
    assert build('type: "BNLL"', [(2,)])(x)[0].tolist() == [0, 1e4]
    assert build('type: "Sigmoid"', [(2,)])(x)[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "ins", "field", "says"),
    [
        ('type: "PReLU"', (3,), ("bottom", 0), "2 axes"),
        ('type: "ELU" elu_param { lambda: 0 }', (3,), ("elu_param", "lambda"), "lambda must be positive"),
        ('type: "Exp" exp_param { base: 0 }', (3,), ("exp_param", "base"), "base must be positive"),
        ('type: "Log" log_param { base: -2 }', (3,), ("log_param", "base"), "base must be positive"),
        ('type: "Log" log_param { base: 1 }', (3,), ("log_param", "base"), "base 1"),
        ('type: "ReLU6" relu6_param { n: 0 }', (3,), ("relu6_param", "n"), "n must be positive"),
        ('type: "SELU" selu_param { lambda: 0 }', (3,), ("selu_param", "lambda"), "lambda must be positive"),
        ('type: "SELU" selu_param { alpha: -1 }', (3,), ("selu_param", "alpha"), "alpha must be positive"),
        ('type: "Clip" clip_param { min: 1 }', (3,), ("clip_param", "max"), "needs max"),
        ('type: "Clip" clip_param { min: 1 max: 0 }', (3,), ("clip_param", "min"), "above max"),
    ],
)
def test_refusals(text: str, ins: tuple[int, ...], field: tuple, says: str) -> None:
    with pytest.raises(LayerError, match=says) as e:
        layer_of(text).shapes([ins])
    assert e.value.field == field
    assert "layer 'layer'" in e.value.text
