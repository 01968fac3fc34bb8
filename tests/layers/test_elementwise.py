"""Eltwise: three operations over any number of bottoms, and which bottom gets the gradient of a tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, build, check_layer, layer_of

S = (2, 3, 4, 5)
CASES = {
    "sum": Case('type: "Eltwise"', [S] * 2, lambda b, _: [sum(b)], compiled=True),
    "sum_of_four": Case('type: "Eltwise"', [S] * 4, lambda b, _: [sum(b)]),
    "sum_coeff": Case(
        'type: "Eltwise" eltwise_param { coeff: 0.5 coeff: -1 coeff: 2 }',
        [S] * 3,
        lambda b, _: [0.5 * b[0] - b[1] + 2 * b[2]],
    ),
    "prod": Case('type: "Eltwise" eltwise_param { operation: PROD }', [S] * 2, lambda b, _: [b[0] * b[1]]),
    "prod_of_three": Case(
        'type: "Eltwise" eltwise_param { operation: PROD stable_prod_grad: false }',
        [S] * 3,
        lambda b, _: [b[0] * b[1] * b[2]],
    ),
    "max": Case(
        'type: "Eltwise" eltwise_param { operation: MAX }', [S] * 2, lambda b, _: [np.maximum(*b)], compiled=True
    ),
    "max_of_three": Case(
        'type: "Eltwise" eltwise_param { operation: MAX }', [S] * 3, lambda b, _: [np.max(np.stack(b), axis=0)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


@pytest.mark.parametrize(
    ("values", "winner"),
    [((1, 1), 1), ((2, 1), 0), ((1, 1, 1), 1), ((2, 1, 2), 0), ((1, 2, 3), 2), ((1, 1, 0, 1), 1)],
)
def test_max_gives_the_gradient_to_one_bottom(values: tuple[int, ...], winner: int) -> None:
    built = build('type: "Eltwise" eltwise_param { operation: MAX }', [(1,)] * len(values))
    xs = [torch.tensor([float(v)], requires_grad=True) for v in values]
    (y,) = built(*xs)
    y.sum().backward()
    assert y.item() == max(values)
    assert [x.grad.item() for x in xs] == [float(i == winner) for i in range(len(values))]  # type: ignore[union-attr]


def test_prod_gradient_at_zero() -> None:
    built = build('type: "Eltwise" eltwise_param { operation: PROD stable_prod_grad: false }', [(1,)] * 3)
    xs = [torch.tensor([v], requires_grad=True) for v in (0.0, 3.0, 5.0)]
    built(*xs)[0].sum().backward()
    assert [x.grad.item() for x in xs] == [15, 0, 0]  # type: ignore[union-attr]


def test_sum_keeps_its_bottoms() -> None:
    xs = [torch.ones(2) * i for i in range(3)]
    build('type: "Eltwise"', [(2,)] * 3)(*xs)
    assert [x.tolist() for x in xs] == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("param", "ins", "field", "says"),
    [
        ("", [(2, 3), (2, 1)], ("bottom", 1), "bottom 0 'b0' is \\(2, 3\\), bottom 1 'b1' is \\(2, 1\\)"),
        ("operation: PROD coeff: 1 coeff: 1", [(2,), (2,)], ("eltwise_param", "coeff", 0), "PROD takes no coeff"),
        ("coeff: 1", [(2,), (2,)], ("eltwise_param", "coeff", 0), "1 coeff for 2 bottoms"),
    ],
)
def test_refusals(param: str, ins: list, field: tuple, says: str) -> None:
    with pytest.raises(LayerError, match=says) as e:
        layer_of(f'type: "Eltwise" eltwise_param {{ {param} }}', bottoms=len(ins)).shapes(ins)
    assert e.value.field == field
