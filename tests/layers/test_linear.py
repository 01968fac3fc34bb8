"""InnerProduct."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, build, check_layer, layer_of


def case(text: str, shape: tuple[int, ...], axis: int, transpose: bool = False, **kw) -> Case:
    def oracle(ins: list[np.ndarray], blobs: list[np.ndarray]) -> list[np.ndarray]:
        w = blobs[0].T if transpose else blobs[0]
        y = ins[0].reshape(*shape[:axis], -1) @ w.T
        return [y + blobs[1] if len(blobs) > 1 else y]

    return Case(f'type: "InnerProduct" inner_product_param {{ {text} }}', [shape], oracle, **kw)


CASES = {
    "plain": case("num_output: 5", (3, 4), 1, compiled=True),
    "image": case("num_output: 5", (3, 2, 3, 4), 1, compiled=True),
    "no_bias": case("num_output: 5 bias_term: false", (3, 2, 3), 1),
    "axis_2": case("num_output: 5 axis: 2", (3, 2, 3, 2), 2),
    "axis_last": case("num_output: 5 axis: -1", (3, 2, 4), 2),
    "axis_0": case("num_output: 5 axis: 0", (3, 4), 0, rebatch=False),
    "transpose": case("num_output: 5 transpose: true", (3, 2, 3), 1, transpose=True, compiled=True),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def test_normalize_scales_the_rows_and_not_the_gradient() -> None:
    text = 'type: "InnerProduct" inner_product_param { num_output: 2 normalize: true bias_term: false }'
    w = np.array([[3.0, 4.0], [0.0, 2.0]])
    built = build(text, [(1, 2)], blobs=[w])
    x = torch.tensor([[5.0, 10.0]], dtype=torch.float64, requires_grad=True)
    (y,) = built(x)
    unit = w / np.sqrt((w**2).sum(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(built.blobs[0].detach().numpy(), unit, rtol=1e-12)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() @ unit.T, rtol=1e-12)
    y.backward(torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    assert built.blobs[0].grad.tolist() == [[5, 10], [15, 30]]
    np.testing.assert_allclose(x.grad.numpy(), np.array([[1.0, 3.0]]) @ unit, rtol=1e-12)
    assert layer_of(text).stateful_forward
    assert not layer_of('type: "InnerProduct" inner_product_param { num_output: 2 }').stateful_forward


def test_blobs_and_macs() -> None:
    for text, shape in (("", (10, 48)), ("transpose: true", (48, 10))):
        layer = layer_of(f'type: "InnerProduct" inner_product_param {{ num_output: 10 {text} }}')
        ins = [(2, 3, 4, 4)]
        assert [b.shape for b in layer.blobs(ins)] == [shape, (10,)]
        assert layer.macs(ins, layer.shapes(ins)) == 2 * 10 * 48


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "num_output"),
        ("num_output: 0", "num_output"),
        ("num_output: 1 axis: 2", "axis"),
        ("num_output: 1 normalize: true transpose: true", "normalize"),
    ],
)
def test_refusals(text: str, field: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(f'type: "InnerProduct" inner_product_param {{ {text} }}').shapes([(2, 3)])
    assert e.value.field == ("inner_product_param", field)
