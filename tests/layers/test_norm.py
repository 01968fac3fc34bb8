"""LRN, Scale and Bias: contract, oracles, fast paths, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers.modules import lrn
from tests.layers.harness import Arrays, Case, check_layer, layer_of

X = (2, 7, 4, 5)


def across(x: np.ndarray, n: int, alpha: float, beta: float, k: float) -> np.ndarray:
    total = np.zeros_like(x)
    for c in range(x.shape[1]):
        total[:, c] = (x[:, max(0, c - n // 2) : c + n // 2 + 1] ** 2).sum(1)
    return x * (k + alpha / n * total) ** -beta


def within(x: np.ndarray, n: int, alpha: float, beta: float) -> np.ndarray:
    r = n // 2
    sq = np.pad(x**2, [(0, 0), (0, 0), (r, r), (r, r)])
    mean = sum(sq[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i in range(n) for j in range(n)) / n**2
    return x * (1 + alpha * mean) ** -beta


def lrn_case(text: str, function, *args, shape: tuple[int, ...] = X, **kw) -> Case:
    return Case(f'type: "LRN" lrn_param {{ {text} }}', [shape], lambda ins, _: [function(ins[0], *args)], **kw)


LRN = {
    "default": lrn_case("", across, 5, 1.0, 0.75, 1.0, compiled=True),
    "alexnet": lrn_case("local_size: 5 alpha: 0.0001 beta: 0.75 k: 2", across, 5, 1e-4, 0.75, 2.0),
    "size_1": lrn_case("local_size: 1 alpha: 0.5", across, 1, 0.5, 0.75, 1.0),
    "size_3": lrn_case("local_size: 3 alpha: 0.5 beta: 0.5", across, 3, 0.5, 0.5, 1.0),
    "size_7": lrn_case("local_size: 7 alpha: 0.5 beta: 1.25", across, 7, 0.5, 1.25, 1.0),
    "window_beyond_channels": lrn_case("local_size: 9 alpha: 2", across, 9, 2.0, 0.75, 1.0, shape=(1, 2, 3, 3)),
    "within": lrn_case(
        "norm_region: WITHIN_CHANNEL local_size: 3 alpha: 0.5 k: 9", within, 3, 0.5, 0.75, compiled=True
    ),
    "within_beyond_image": lrn_case("norm_region: WITHIN_CHANNEL local_size: 9 alpha: 2", within, 9, 2.0, 0.75),
}


@pytest.mark.parametrize("name", LRN)
def test_lrn(name: str) -> None:
    check_layer(LRN[name])


@pytest.mark.parametrize("piece", [1, 150, 1 << 18])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lrn_in_pieces_equals_the_plain_formula(
    piece: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrn, "_PIECE", piece)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, 3, 4, generator=g, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    seed = torch.randn(x.shape, generator=g, dtype=torch.float64)
    y = lrn.AcrossChannels(5, 0.3, 0.75, 2.0)(x)
    want = lrn.across_plain(x, 5, 0.3, 0.75, 2.0)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)
    grads = [torch.autograd.grad(t, x, seed)[0] for t in (y, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(lrn.AcrossChannels(5, 0.3, 0.75, 2.0)(x), want, rtol=1e-12, atol=1e-12)


def test_lrn_refusals() -> None:
    with pytest.raises(LayerError, match="odd") as e:
        layer_of('type: "LRN" lrn_param { local_size: 4 }').shapes([X])
    assert e.value.field == ("lrn_param", "local_size")
    with pytest.raises(LayerError, match="4 axes"):
        layer_of('type: "LRN"').shapes([(2, 3)])


def spread(small: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    return small.reshape(*(1,) * axis, *small.shape, *(1,) * (x.ndim - axis - small.ndim))


def affine_case(text: str, ins: list[tuple[int, ...]], axis: int, **kw) -> Case:
    """A Scale case: scale from blob 0 or bottom 1, shift from the last blob if bias_term."""

    def oracle(bottoms: Arrays, blobs: Arrays) -> Arrays:
        x, rest = bottoms[0], list(blobs)
        y = x * spread(bottoms[1] if len(bottoms) > 1 else rest.pop(0), x, axis)
        return [y + spread(rest[0], x, axis) if rest else y]

    return Case(f'type: "Scale" scale_param {{ {text} }}', ins, oracle, **kw)


def bias_case(text: str, ins: list[tuple[int, ...]], axis: int, **kw) -> Case:
    def oracle(bottoms: Arrays, blobs: Arrays) -> Arrays:
        return [bottoms[0] + spread([*bottoms[1:], *blobs][0], bottoms[0], axis)]

    return Case(f'type: "Bias" bias_param {{ {text} }}', ins, oracle, **kw)


AFFINE = {
    "scale": affine_case("", [X], 1, compiled=True),
    "scale_bias": affine_case("bias_term: true", [X], 1, compiled=True),
    "scale_matrix": affine_case("bias_term: true", [(3, 4)], 1),
    "scale_five_axes": affine_case("bias_term: true", [(2, 3, 2, 2, 2)], 1),
    "scale_two_axes": affine_case("axis: 1 num_axes: 2 bias_term: true", [X], 1, compiled=True),
    "scale_axis_0": affine_case("axis: 0 num_axes: 2", [X], 0, rebatch=False),
    "scale_to_the_end": affine_case("axis: 2 num_axes: -1 bias_term: true", [X], 2),
    "scale_negative_axis": affine_case("axis: -1", [X], 3),
    "scale_one_number": affine_case("num_axes: 0 bias_term: true", [X], 0),
    "scale_given": affine_case("", [X, (7, 4)], 1),
    "scale_given_bias": affine_case("bias_term: true axis: 2", [X, (4,)], 2, rebatch=False),
    "scale_given_number": affine_case("axis: 1", [X, ()], 0, rebatch=False),
    "scale_given_all": affine_case("axis: 0", [X, X], 0),
    "bias": bias_case("", [X], 1, compiled=True),
    "bias_to_the_end": bias_case("axis: 2 num_axes: -1", [X], 2),
    "bias_one_number": bias_case("num_axes: 0", [X], 0),
    "bias_given": bias_case("axis: 1", [X, (7, 4)], 1),
}
for _name in ("scale_given", "bias_given"):  # bottom 1 has no batch axis
    AFFINE[_name] = Case(**{**AFFINE[_name].__dict__, "rebatch": False})


@pytest.mark.parametrize("name", AFFINE)
def test_scale_and_bias(name: str) -> None:
    check_layer(AFFINE[name])


def test_scale_and_bias_fillers() -> None:
    scale, shift = layer_of('type: "Scale" scale_param { bias_term: true }').blobs([X])
    assert (scale.shape, scale.filler.type, scale.filler.value) == ((7,), "constant", 1)
    assert (shift.shape, shift.filler.value) == ((7,), 0)
    layer = layer_of('type: "Scale" scale_param { filler { value: 0 } bias_term: true bias_filler { value: 3 } }')
    assert [b.filler.value for b in layer.blobs([X])] == [0, 3]
    (shift,) = layer_of('type: "Bias" bias_param { filler { type: "xavier" } }').blobs([X])
    assert shift.filler.type == "xavier"
    assert layer_of('type: "Bias"', bottoms=2).blobs([X, (7,)]) == []
    assert [
        b.shape for b in layer_of('type: "Scale" scale_param { bias_term: true }', bottoms=2).blobs([X, (7, 4)])
    ] == [(7, 4)]


@pytest.mark.parametrize(
    ("text", "ins", "field"),
    [
        ("axis: 4", [X], ("scale_param", "axis")),
        ("num_axes: 4", [X], ("scale_param", "num_axes")),
        ("num_axes: -2", [X], ("scale_param", "num_axes")),
        ("axis: 1", [X, (7, 5)], ("bottom", 1)),
        ("axis: 3", [X, (5, 1)], ("bottom", 1)),
        ('filler { type: "xaver" }', [X], ("scale_param", "filler", "type")),
    ],
)
def test_scale_refusals(text: str, ins: list[tuple[int, ...]], field: tuple[str, ...]) -> None:
    layer = layer_of(f'type: "Scale" scale_param {{ {text} }}', bottoms=len(ins))
    with pytest.raises(LayerError) as e:
        layer.blobs(ins)  # asks for the same axes as shapes()
    assert e.value.field == field
