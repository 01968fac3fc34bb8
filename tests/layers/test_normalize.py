"""MVN, Normalize, Axpy: oracles, gradients, constant inputs, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

S = (2, 3, 4, 5)


def _mvn(x: np.ndarray, axes: tuple[int, ...], eps: float | None) -> Arrays:
    centred = x - x.mean(axes, keepdims=True)
    return [centred if eps is None else centred / (x.std(axes, keepdims=True) + eps)]


def _normalize(x: np.ndarray, scale: np.ndarray, axes: tuple[int, ...], eps: float = 1e-10) -> Arrays:
    y = x / np.sqrt((x * x).sum(axes, keepdims=True) + eps)
    return [y * (scale.reshape(-1, *[1] * (x.ndim - 2)) if scale.ndim else scale)]


CASES = {
    "mvn": Case('type: "MVN"', [S], lambda b, _: _mvn(b[0], (2, 3), 1e-9)),
    "mvn_across": Case(
        'type: "MVN" mvn_param { across_channels: true }', [S], lambda b, _: _mvn(b[0], (1, 2, 3), 1e-9)
    ),
    "mvn_mean": Case(
        'type: "MVN" mvn_param { normalize_variance: false }', [(2, 3, 7)], lambda b, _: _mvn(b[0], (2,), None)
    ),
    "mvn_5_axes": Case('type: "MVN"', [(2, 2, 3, 2, 2)], lambda b, _: _mvn(b[0], (2, 3, 4), 1e-9)),
    "normalize": Case('type: "Normalize"', [S], lambda b, p: _normalize(b[0], p[0], (1, 2, 3))),
    "normalize_pixels": Case(
        'type: "Normalize" norm_param { across_spatial: false channel_shared: false }',
        [S],
        lambda b, p: _normalize(b[0], p[0], (1,)),
        compiled=True,
    ),
    "normalize_channels": Case(
        'type: "Normalize" norm_param { channel_shared: false eps: 0.1 }',
        [S],
        lambda b, p: _normalize(b[0], p[0], (1, 2, 3), 0.1),
    ),
    "normalize_vectors": Case('type: "Normalize"', [(3, 4)], lambda b, p: _normalize(b[0], p[0], (1,))),
    "axpy": Case('type: "Axpy"', [(2, 3), S, S], lambda b, _: [b[0][:, :, None, None] * b[1] + b[2]], compiled=True),
    "axpy_4_axes": Case('type: "Axpy"', [(2, 3, 1, 1), S, S], lambda b, _: [b[0] * b[1] + b[2]]),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    check_layer(CASES[name])


def test_mvn_gradient_of_a_large_eps_is_caffes() -> None:
    """C++ (and we) divide by std + eps twice where the derivative has std once: the same for the usual tiny eps."""
    x = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
    (y,) = build('type: "MVN" mvn_param { eps: 0.5 }', [(1, 1, 6)])(x)
    dy = torch.arange(6, dtype=torch.float64).view(1, 1, 6)
    y.backward(dy)
    scale = 1 / (x.detach().std(correction=0) + 0.5)
    y = y.detach()
    torch.testing.assert_close(x.grad, (dy - dy.mean() - y * (y * dy).mean()) * scale)


def test_constant_inputs() -> None:
    """Equal numbers: y = 0 and a finite gradient; Normalize of zeros: 0 and finite."""
    x = torch.full((1, 2, 3, 3), 4.0, requires_grad=True)
    (y,) = build('type: "MVN"', [(1, 2, 3, 3)], dtype=torch.float32)(x)
    assert not y.any()
    y.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    z = torch.zeros(1, 2, 3, 3, requires_grad=True)
    (y,) = build('type: "Normalize"', [(1, 2, 3, 3)], dtype=torch.float32)(z)
    y.sum().backward()
    assert not y.any()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_blobs() -> None:
    (one,) = layer_of('type: "Normalize"').blobs([S])
    assert one.shape == ()
    assert one.filler.value == 1
    text = 'type: "Normalize" norm_param { channel_shared: false scale_filler { value: 20 } }'
    (many,) = layer_of(text).blobs([S])
    assert many.shape == (3,)
    assert many.filler.value == 20


Shapes = list[tuple[int, ...]]


@pytest.mark.parametrize(
    ("text", "ins", "match"),
    [
        ('type: "MVN"', [()], "at least 1 axis"),
        ('type: "MVN" mvn_param { eps: -1 }', [S], "eps must not be negative"),
        ('type: "Normalize"', [(3,)], "items and channels"),
        ('type: "Normalize" norm_param { eps: -1 }', [S], "eps must not be negative"),
        ('type: "Axpy"', [(2, 3), (2,), (2,)], "bottom 1 must be"),
        ('type: "Axpy"', [(2, 3), S, (2, 3, 4, 4)], "one shape"),
        ('type: "Axpy"', [(2, 4), S, S], "one number a channel"),
        ('type: "Axpy"', [S, S, S], "one number a channel"),
    ],
)
def test_refusals(text: str, ins: Shapes, match: str) -> None:
    with pytest.raises(LayerError, match=match):
        layer_of(text, bottoms=len(ins)).shapes(ins)


def test_expected_shapes() -> None:
    axpy = layer_of('type: "Axpy"', bottoms=3)
    assert [axpy.expects(i, [None, S, None]) for i in (0, 2)] == [(2, 3), S]
    assert axpy.macs([(2, 3), S, S], [S]) == 120
