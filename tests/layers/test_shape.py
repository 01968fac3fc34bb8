"""Routing layers: shapes, values, ties, views and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, build, check_layer, layer_of

S = (2, 3, 4, 5)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


CASES = {
    "concat": Case('type: "Concat"', [S, (2, 1, 4, 5)], lambda b, _: [np.concatenate(b, 1)], compiled=True),
    "concat_last": Case('type: "Concat" concat_param { axis: -1 }', [S, S], lambda b, _: [np.concatenate(b, 3)]),
    "concat_batch": Case(
        'type: "Concat" concat_param { concat_dim: 0 }', [S, S], lambda b, _: [np.concatenate(b, 0)], rebatch=True
    ),
    "concat_one": Case('type: "Concat"', [S], lambda b, _: b),
    "slice_equal": Case('type: "Slice" slice_param { axis: 2 }', [S], lambda b, _: np.split(b[0], 2, 2), tops=2),
    "slice_points": Case(
        'type: "Slice" slice_param { slice_point: 1 slice_point: 2 }', [S], lambda b, _: np.split(b[0], 3, 1), tops=3
    ),
    "slice_batch": Case(
        'type: "Slice" slice_param { slice_dim: 0 slice_point: 1 }',
        [S],
        lambda b, _: np.split(b[0], [1], 0),
        tops=2,
        compiled=True,
    ),
    "slice_one": Case('type: "Slice"', [S], lambda b, _: b),
    "split": Case('type: "Split"', [S], lambda b, _: [b[0]] * 3, tops=3),
    "flatten": Case('type: "Flatten"', [S], lambda b, _: [b[0].reshape(2, 60)], compiled=True),
    "flatten_middle": Case(
        'type: "Flatten" flatten_param { axis: 1 end_axis: -2 }', [S], lambda b, _: [b[0].reshape(2, 12, 5)]
    ),
    "reshape": Case(
        'type: "Reshape" reshape_param { shape { dim: 0 dim: -1 dim: 2 } }',
        [S],
        lambda b, _: [b[0].reshape(2, 30, 2)],
        compiled=True,
    ),
    "reshape_span": Case(
        'type: "Reshape" reshape_param { axis: 1 num_axes: 2 shape { dim: 6 dim: 2 } }',
        [S],
        lambda b, _: [b[0].reshape(2, 6, 2, 5)],
    ),
    "reshape_insert": Case(
        'type: "Reshape" reshape_param { axis: -1 num_axes: 0 shape { dim: 1 dim: 1 } }',
        [S],
        lambda b, _: [b[0].reshape(2, 3, 4, 5, 1, 1)],
    ),
    "reshape_span_infers": Case(
        'type: "Reshape" reshape_param { axis: 1 num_axes: 1 shape { dim: -1 dim: 1 } }',
        [S],
        lambda b, _: [b[0].reshape(2, 3, 1, 4, 5)],
    ),
    "softmax": Case('type: "Softmax"', [S], lambda b, _: [_softmax(b[0], 1)], compiled=True),
    "softmax_axis": Case('type: "Softmax" softmax_param { axis: -1 }', [S], lambda b, _: [_softmax(b[0], 3)]),
    "argmax": Case(
        'type: "ArgMax"', [S], lambda b, _: [b[0].reshape(2, -1).argmax(1).reshape(2, 1, 1, 1)], gradient=False
    ),
    "argmax_axis": Case(
        'type: "ArgMax" argmax_param { axis: 1 }',
        [S],
        lambda b, _: [b[0].argmax(1)[:, None]],
        gradient=False,
        compiled=True,
    ),
    "argmax_values": Case(
        'type: "ArgMax" argmax_param { axis: -1 top_k: 2 out_max_val: true }',
        [S],
        lambda b, _: [-np.sort(-b[0], -1)[..., :2]],
        gradient=False,
    ),
    "reduction_sum": Case(
        'type: "Reduction" reduction_param { coeff: 0.5 }', [S], lambda b, _: [0.5 * b[0].sum()], compiled=True
    ),
    "reduction_asum": Case(
        'type: "Reduction" reduction_param { operation: ASUM axis: 1 }',
        [S],
        lambda b, _: [np.abs(b[0]).sum((1, 2, 3))],
        kinks=[0],
    ),
    "reduction_sumsq": Case(
        'type: "Reduction" reduction_param { operation: SUMSQ axis: -1 coeff: 2 }',
        [S],
        lambda b, _: [2 * (b[0] ** 2).sum(3)],
    ),
    "reduction_mean": Case(
        'type: "Reduction" reduction_param { operation: MEAN axis: 2 }', [S], lambda b, _: [b[0].mean((2, 3))]
    ),
    "silence": Case('type: "Silence"', [S, (3,)], lambda b, _: [], tops=0, gradient=False),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def test_split_slice_and_flatten_are_views() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    for text, tops in (('type: "Split"', 2), ('type: "Slice"', 2), ('type: "Flatten"', 1)):
        built = build(text, [(2, 6)], tops=tops)
        assert built.layer.is_view
        assert all(y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for y in built(x))


def test_split_gradients_add_up() -> None:
    x = torch.ones(2, requires_grad=True)
    a, b = build('type: "Split"', [(2,)], tops=2)(x)
    (a.sum() + 3 * b.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4, 4]


def test_argmax_ties_take_the_larger_index() -> None:
    x = torch.tensor([[3.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert build('type: "ArgMax"', [(2, 4)])(x)[0].tolist() == [[[2]], [[3]]]
    (y,) = build('type: "ArgMax" argmax_param { top_k: 3 }', [(2, 4)])(x)
    assert y.tolist() == [[[2, 1, 0]], [[3, 2, 1]]]
    (y,) = build('type: "ArgMax" argmax_param { top_k: 2 out_max_val: true }', [(2, 4)])(x)
    assert y.tolist() == [[[2, 1], [5, 5]], [[3, 2], [2, 2]]]
    (y,) = build('type: "ArgMax" argmax_param { axis: 1 top_k: 2 }', [(2, 4)])(x)
    assert y.tolist() == [[2, 1], [3, 2]]


@pytest.mark.parametrize(
    ("text", "ins", "tops", "field", "says"),
    [
        ('type: "Concat"', [(2, 3), (3, 3)], 1, ("bottom", 1), "agree in all axes but axis 1"),
        ('type: "Concat"', [(2, 3), (2, 3, 1)], 1, ("bottom", 1), "agree"),
        ('type: "Concat" concat_param { axis: 2 }', [(2, 3)], 1, ("concat_param", "axis"), "axis 2 is out of range"),
        (
            'type: "Concat" concat_param { axis: 1 concat_dim: 1 }',
            [(2, 3)],
            1,
            ("concat_param", "concat_dim"),
            "not both",
        ),
        ('type: "Slice"', [(2, 3)], 2, ("top",), "size 3 cannot be cut into 2"),
        (
            'type: "Slice" slice_param { slice_point: 1 }',
            [(2, 3)],
            3,
            ("slice_param", "slice_point", 0),
            "1 slice_point for 3 tops",
        ),
        (
            'type: "Slice" slice_param { slice_point: 2 slice_point: 2 }',
            [(2, 3)],
            3,
            ("slice_param", "slice_point", 1),
            "increase between 0 and 3",
        ),
        (
            'type: "Slice" slice_param { slice_point: 3 }',
            [(2, 3)],
            2,
            ("slice_param", "slice_point", 0),
            "increase",
        ),
        (
            'type: "Flatten" flatten_param { axis: 2 end_axis: 1 }',
            [(2, 3, 4)],
            1,
            ("flatten_param", "end_axis"),
            "before axis 2",
        ),
        (
            'type: "Reshape" reshape_param { shape { dim: -1 dim: -1 } }',
            [(6,)],
            1,
            ("reshape_param", "shape", "dim", 1),
            "only one dim",
        ),
        (
            'type: "Reshape" reshape_param { shape { dim: -1 dim: 4 } }',
            [(6,)],
            1,
            ("reshape_param", "shape", "dim", 0),
            "cannot be divided by 4",
        ),
        (
            'type: "Reshape" reshape_param { shape { dim: 5 } }',
            [(6,)],
            1,
            ("reshape_param", "shape"),
            "has 6 numbers, the new shape \\(5,\\) has 5",
        ),
        (
            'type: "Reshape" reshape_param { shape { dim: 6 dim: 0 } }',
            [(6,)],
            1,
            ("reshape_param", "shape", "dim", 1),
            "copies axis 1",
        ),
        (
            'type: "Reshape" reshape_param { shape { dim: -2 } }',
            [(6,)],
            1,
            ("reshape_param", "shape", "dim", 0),
            "dim -2",
        ),
        ('type: "Reshape" reshape_param { axis: 2 }', [(6,)], 1, ("reshape_param", "axis"), "axis 2"),
        ('type: "Reshape" reshape_param { num_axes: 2 }', [(6,)], 1, ("reshape_param", "num_axes"), "num_axes 2"),
        ('type: "Softmax"', [(6,)], 1, ("softmax_param", "axis"), "axis 1 is out of range"),
        ('type: "ArgMax" argmax_param { top_k: 7 }', [(1, 6)], 1, ("argmax_param", "top_k"), "between 1 and 6"),
        ('type: "ArgMax" argmax_param { axis: 3 }', [(1, 6)], 1, ("argmax_param", "axis"), "axis 3"),
        ('type: "Reduction" reduction_param { axis: -3 }', [(1, 6)], 1, ("reduction_param", "axis"), "axis -3"),
    ],
)
def test_refusals(text: str, ins: list, tops: int, field: tuple, says: str) -> None:
    with pytest.raises(LayerError, match=says) as e:
        layer_of(text, bottoms=len(ins), tops=tops).shapes(ins)
    assert e.value.field == field
