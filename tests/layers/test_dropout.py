"""Dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, build, check_layer, layer_of


def text(ratio: float) -> str:
    return f'type: "Dropout" dropout_param {{ dropout_ratio: {ratio} }}'


def test_contract_in_test_phase() -> None:
    check_layer(Case(text(0.4), [(2, 3, 4, 5)], lambda ins, _: ins, phase="TEST", phases_agree=False, compiled=True))


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_keeps_a_share_and_scales_it(ratio: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    built = build(text(ratio), [(401, 251)], dtype=dtype)
    x = torch.rand(401, 251, dtype=dtype).add_(1).requires_grad_()
    (y,) = built(x)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - ratio, abs=0.005)
    torch.testing.assert_close(y[kept], x[kept] / (1 - ratio))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, kept.to(dtype) / (1 - ratio))
    assert abs(torch.corrcoef(torch.stack([kept[:, 1:].flatten(), kept[:, :-1].flatten()]).double())[0, 1]) < 0.02


def test_in_place_layouts_and_seed() -> None:
    built = build(text(0.5), [(3, 5, 4, 4)])
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    results: list[Any] = []
    for inplace in (False, True):
        built.module.inplace = inplace  # type: ignore[assignment]
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        fed = leaf * 1
        (y,) = built(fed)
        assert (y is fed) == inplace
        y.sum().backward()
        results += [y.detach(), leaf.grad]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    last = x.contiguous(memory_format=torch.channels_last)
    built.module.inplace = False  # type: ignore[assignment]
    (y,) = built(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y[y != 0], 2 * last[y != 0])


def test_strided_input() -> None:
    (y,) = build(text(0.5), [(64, 9)])(torch.ones(64, 18, dtype=torch.float64)[:, ::2])
    assert set(y.flatten().tolist()) == {0.0, 2.0}


def test_under_compile() -> None:
    built = build(text(0.5), [(50, 40)], dtype=torch.float32)
    y = torch.compile(built.module, backend="aot_eager", fullgraph=True)(torch.ones(50, 40))
    assert set(y.flatten().tolist()) == {0.0, 2.0}


UNSCALED = 'type: "Dropout" dropout_param { dropout_ratio: 0.25 scale_train: false }'


def test_scale_train_false_scales_in_test() -> None:
    check_layer(
        Case(UNSCALED, [(2, 3, 4, 5)], lambda b, _: [b[0] * 0.75], phase="TEST", phases_agree=False, compiled=True)
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_scale_train_false_leaves_the_kept_values_alone(inplace: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    built = build(UNSCALED, [(301, 251)])
    built.module.inplace = inplace  # type: ignore[assignment]
    module = torch.compile(built.module, backend="aot_eager", fullgraph=True) if compiled else built.module
    x = torch.rand(301, 251, dtype=torch.float64).add_(1).requires_grad_()
    y = module(x * 1)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(y[kept], x[kept])
    y.sum().backward()
    assert torch.equal(x.grad, kept.double())


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_refusals(ratio: float) -> None:
    with pytest.raises(LayerError, match="between 0 and 1") as e:
        layer_of(text(ratio)).shapes([(2, 3)])
    assert e.value.field == ("dropout_param", "dropout_ratio")
