"""Pooling against Caffe's loops: sizes, windows, divisors, masks, gradients, odd geometries, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers.modules import pooling
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

LOWEST = -float(np.finfo(np.float32).max)
Pair = tuple[int, int]


def out_size(size: Pair, k: Pair, s: Pair, p: Pair, floor: bool = False) -> Pair:
    """Caffe's sizes, in Caffe's words."""
    way = math.floor if floor else math.ceil
    out = [way((size[i] + 2 * p[i] - k[i]) / s[i]) + 1 for i in (0, 1)]
    if p[0] or p[1]:
        out = [o - 1 if (o - 1) * s[i] >= size[i] + p[i] else o for i, o in enumerate(out)]
    return out[0], out[1]


def windows(size: Pair, k: Pair, s: Pair, p: Pair, out: Pair) -> Iterator[tuple[int, int, slice, slice, int]]:
    """(row, column, rows of the image, columns of the image, divisor of the mean)."""
    for i in range(out[0]):
        for j in range(out[1]):
            top, left = i * s[0] - p[0], j * s[1] - p[1]
            bottom, right = min(top + k[0], size[0] + p[0]), min(left + k[1], size[1] + p[1])
            divisor = (bottom - top) * (right - left)
            rows = slice(max(top, 0), max(0, min(bottom, size[0])))
            yield i, j, rows, slice(max(left, 0), max(0, min(right, size[1]))), divisor


def pool(x: np.ndarray, method: str, k: Pair, s: Pair, p: Pair, floor: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(values, places of the maxima)."""
    size = (x.shape[2], x.shape[3])
    out = out_size(size, k, s, p, floor)
    y, mask = np.zeros((*x.shape[:2], *out)), np.full((*x.shape[:2], *out), -1.0)
    for i, j, rows, columns, divisor in windows(size, k, s, p, out):
        part = x[:, :, rows, columns]
        flat = part.reshape(*x.shape[:2], -1)
        if method == "AVE":
            with np.errstate(invalid="ignore"):
                y[:, :, i, j] = flat.sum(2) / np.float64(divisor)
        elif flat.shape[2]:
            best = flat.argmax(2)
            y[:, :, i, j] = flat.max(2)
            width = part.shape[3]
            mask[:, :, i, j] = (rows.start + best // width) * size[1] + columns.start + best % width
        else:
            y[:, :, i, j] = LOWEST
    return y, mask


def case(text: str, shape: tuple[int, ...], method: str, k: Pair, s: Pair = (1, 1), p: Pair = (0, 0), **kw) -> Case:
    floor, tops = kw.pop("floor", False), kw.get("tops", 1)

    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        return list(pool(ins[0], method, k, s, p, floor)[:tops])

    return Case(f'type: "Pooling" pooling_param {{ pool: {method} {text} }}', [shape], oracle, **kw)


X = (2, 3, 7, 8)
CASES = {
    f"{name}_{method.lower()}": case(text, shape, method, k, s, p, **kw)
    for method in ("MAX", "AVE")
    for name, text, shape, k, s, p, kw in [
        ("k2s2", "kernel_size: 2 stride: 2", X, (2, 2), (2, 2), (0, 0), {"compiled": True}),
        ("k3s2", "kernel_size: 3 stride: 2", X, (3, 3), (2, 2), (0, 0), {}),
        ("many_channels", "kernel_size: 3 stride: 2", (2, 9, 6, 5), (3, 3), (2, 2), (0, 0), {"compiled": True}),
        ("k3s2p1", "kernel_size: 3 stride: 2 pad: 1", X, (3, 3), (2, 2), (1, 1), {}),
        ("k3p2", "kernel_size: 3 stride: 2 pad: 2", X, (3, 3), (2, 2), (2, 2), {"compiled": True}),
        ("rect", "kernel_h: 2 kernel_w: 3 stride_h: 1 stride_w: 2 pad_h: 0 pad_w: 1", X, (2, 3), (1, 2), (0, 1), {}),
        ("floor", "kernel_size: 3 stride: 2 round_mode: FLOOR", X, (3, 3), (2, 2), (0, 0), {"floor": True}),
        ("kernel_beyond_image", "kernel_size: 9 stride: 4", X, (9, 9), (4, 4), (0, 0), {}),
        ("stride_beyond_kernel", "kernel_size: 2 stride: 4 pad: 1", X, (2, 2), (4, 4), (1, 1), {}),
        ("global", "global_pooling: true", X, (7, 8), (1, 1), (0, 0), {"compiled": True}),
    ]
}
CASES["mask"] = case("kernel_size: 3 stride: 2", X, "MAX", (3, 3), (2, 2), tops=2)
CASES["mask_own_path"] = case("kernel_size: 3 stride: 2 pad: 2", X, "MAX", (3, 3), (2, 2), (2, 2), tops=2)
CASES["mask_empty_windows"] = case(
    "kernel_size: 1 stride: 3", (2, 2, 6, 7), "MAX", (1, 1), (3, 3), tops=2, gradient=False
)


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.booleans(),
    st.sampled_from([3, 8]),
)
def test_any_geometry(size: Pair, k: Pair, s: Pair, p: Pair, floor: bool, channels: int) -> None:
    p = (min(p[0], k[0] - 1), min(p[1], k[1] - 1))
    text = (
        f"kernel_h: {k[0]} kernel_w: {k[1]} stride_h: {s[0]} stride_w: {s[1]} pad_h: {p[0]} pad_w: {p[1]} "
        f"round_mode: {'FLOOR' if floor else 'CEIL'}"
    )
    shape = (1, channels, *size)
    x = np.random.default_rng(0).normal(size=shape)
    want = out_size(size, k, s, p, floor)
    for method in ("MAX", "AVE"):
        full = f'type: "Pooling" pooling_param {{ pool: {method} {text} }}'
        if min(want) <= 0:
            with pytest.raises(LayerError, match="no output"):
                layer_of(full).shapes([shape])
            continue
        leaf = torch.tensor(x, requires_grad=True)
        (y,) = build(full, [shape])(leaf)
        values, mask = pool(x, method, k, s, p, floor)
        np.testing.assert_allclose(y.detach().numpy(), values, rtol=1e-12, atol=1e-12)
        seed = np.random.default_rng(1).normal(size=values.shape)
        y.backward(torch.tensor(seed))
        np.testing.assert_allclose(leaf.grad.numpy(), _gradient(x, seed, method, k, s, p, mask), atol=1e-12)  # type: ignore[union-attr]


def _gradient(x: np.ndarray, seed: np.ndarray, method: str, k: Pair, s: Pair, p: Pair, mask: np.ndarray) -> np.ndarray:
    grad = np.zeros_like(x)
    size = (x.shape[2], x.shape[3])
    for i, j, rows, columns, divisor in windows(size, k, s, p, (seed.shape[2], seed.shape[3])):
        if method == "AVE" and grad[:, :, rows, columns].size:
            grad[:, :, rows, columns] += seed[:, :, i : i + 1, j : j + 1] / divisor
        elif method == "MAX":
            for c in range(x.shape[1]):
                if mask[0, c, i, j] >= 0:
                    grad[0, c].reshape(-1)[int(mask[0, c, i, j])] += seed[0, c, i, j]
    return grad


@pytest.mark.parametrize("piece", [1, 1500, 1 << 18])
@pytest.mark.parametrize("method", ["MAX", "AVE"])
def test_pieces_of_the_batch(piece: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCHW on a CPU is pooled piece by piece in channels_last."""
    monkeypatch.setattr(pooling, "_PIECE", piece)
    x = torch.randn(5, 8, 9, 10, dtype=torch.float64, requires_grad=True)
    (y,) = build(f'type: "Pooling" pooling_param {{ pool: {method} kernel_size: 3 stride: 2 pad: 1 }}', [x.shape])(x)
    plain = F.max_pool2d(x, 3, 2, 1, 1, True) if method == "MAX" else F.avg_pool2d(x, 3, 2, 1, True)
    assert y.is_contiguous()
    torch.testing.assert_close(y, plain)
    seed = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, seed)[0] for t in (y, plain)))


def test_ceil_mode_is_another_word_for_round_mode() -> None:
    for other, text in (("", "ceil_mode: true"), ("round_mode: FLOOR", "ceil_mode: false")):
        for pad in (0, 1):
            full = f'type: "Pooling" pooling_param {{ kernel_size: 3 stride: 2 pad: {pad} %s }}'
            for size in (6, 7, 8):
                ins = [(2, 3, size, size + 1)]
                assert layer_of(full % text).shapes(ins) == layer_of(full % other).shapes(ins)
    both = layer_of('type: "Pooling" pooling_param { kernel_size: 2 stride: 2 round_mode: FLOOR ceil_mode: false }')
    assert both.shapes([(1, 1, 5, 5)]) == [(1, 1, 2, 2)]


@pytest.mark.parametrize("channels", [2, 16])
def test_first_of_equals_wins(channels: int) -> None:
    built = build('type: "Pooling" pooling_param { kernel_size: 2 stride: 2 }', [(1, channels, 2, 4)])
    x = torch.ones((1, channels, 2, 4), dtype=torch.float64, requires_grad=True)
    built(x)[0].sum().backward()
    assert x.grad is not None
    assert (x.grad == torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])).all()


def test_empty_windows() -> None:
    """kernel 1, stride 2 on an even size: Caffe has a last row and column of windows with nothing in them."""
    shape = (1, 1, 4, 4)
    x = torch.arange(1.0, 17, dtype=torch.float64).view(shape).requires_grad_()
    (y,) = build('type: "Pooling" pooling_param { kernel_size: 1 stride: 2 }', [shape])(x)
    assert y.tolist() == [[[[1, 3, LOWEST], [9, 11, LOWEST], [LOWEST] * 3]]]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 4
    (y,) = build('type: "Pooling" pooling_param { pool: AVE kernel_size: 1 stride: 2 }', [shape])(x.detach())
    assert y[0, 0, :2, :2].tolist() == [[1, 3], [9, 11]]
    assert y[0, 0, 2].isnan().all()


STOCHASTIC = 'type: "Pooling" pooling_param { pool: STOCHASTIC kernel_size: 2 stride: 2 }'


def test_stochastic_test_phase_is_the_weighted_mean() -> None:
    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        x = np.pad(ins[0], [(0, 0), (0, 0), (0, 1), (0, 0)]).reshape(2, 3, 3, 2, 4, 2)
        return [(x**2).sum((3, 5)) / x.sum((3, 5))]

    check_layer(Case(STOCHASTIC, [(2, 3, 5, 8)], oracle, phase="TEST", low=0.1, phases_agree=False, compiled=True))
    assert not build(STOCHASTIC, [(1, 1, 2, 2)], phase="TEST")(torch.zeros(1, 1, 2, 2))[0].any()


def test_stochastic_training_draws_in_proportion() -> None:
    torch.manual_seed(0)
    shape = (20000, 1, 2, 2)
    x = torch.tensor([1.0, 2, 0, 5]).view(1, 1, 2, 2).expand(shape).clone().requires_grad_()
    (y,) = build(STOCHASTIC, [shape], dtype=torch.float32)(x)
    shares = [(y == v).double().mean().item() for v in (1.0, 2, 0, 5)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 0, 5 / 8], abs=0.015)
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad.view(-1, 4).sum(1) == 1).all()
    assert ((x.grad.view(-1, 4) * x.detach().view(-1, 4)).sum(1) == y.detach().view(-1)).all()
    assert layer_of(STOCHASTIC).stateful_forward
    assert not layer_of('type: "Pooling" pooling_param { kernel_size: 2 }').stateful_forward


def test_float32_maximum_below_zero() -> None:
    """Padding never wins over a negative value."""
    built = build('type: "Pooling" pooling_param { kernel_size: 3 pad: 2 }', [(1, 1, 3, 3)], dtype=torch.float32)
    assert (built(torch.full((1, 1, 3, 3), -1e30))[0] == -1e30).all()


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("", "kernel_size", "no kernel size"),
        ("kernel_size: 0", "kernel_size", "at least 1"),
        ("kernel_size: 2 kernel_h: 2 kernel_w: 2", "kernel_h", "not both"),
        ("kernel_h: 2", "kernel_h", "only kernel_h"),
        ("kernel_size: 2 stride: 0", "stride", "at least 1"),
        ("kernel_size: 2 stride: 1 stride_h: 2 stride_w: 2", "stride_h", "not both"),
        ("kernel_size: 2 stride_w: 2", "stride_w", "only stride_w"),
        ("kernel_size: 3 pad: 3", "pad", "smaller than the kernel"),
        ("kernel_size: 3 pad_h: 1 pad_w: 3", "pad_w", "smaller than the kernel"),
        ("kernel_size: 3 pad: 1 pad_h: 1", "pad_h", "not both"),
        ("kernel_size: 3 pad: 1 pool: STOCHASTIC", "pad", "no padding"),
        ("kernel_size: 9", "kernel_size", "no output"),
        ("global_pooling: true kernel_size: 3", "kernel_size", "leave out"),
        ("global_pooling: true pad: 1", "pad", "pad 0 and stride 1"),
        ("global_pooling: true stride_h: 2 stride_w: 2", "stride_h", "pad 0 and stride 1"),
        ("kernel_size: 2 round_mode: FLOOR ceil_mode: true", "ceil_mode", "contradict"),
        ("kernel_size: 2 round_mode: CEIL ceil_mode: false", "ceil_mode", "contradict"),
        ("kernel_size: 2 kernel_depth: 2", "kernel_depth", "does not read"),
    ],
)
def test_refusals(text: str, field: str, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(f'type: "Pooling" pooling_param {{ {text} }}').shapes([(2, 3, 8, 8)])
    assert e.value.field == ("pooling_param", field)
    assert words in e.value.text


def test_refusals_that_depend_on_bottoms_and_tops() -> None:
    with pytest.raises(LayerError, match="4 axes"):
        layer_of('type: "Pooling" pooling_param { kernel_size: 2 }').shapes([(2, 3, 8)])
    with pytest.raises(LayerError, match="second top") as e:
        layer_of('type: "Pooling" pooling_param { pool: AVE kernel_size: 2 }', tops=2).shapes([(2, 3, 8, 8)])
    assert e.value.field == ("pooling_param", "pool")
