"""Type Lstm of junhyukoh/caffe-lstm: a loop in numpy, bounded gradients by hand, rows and (T, N), marks and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

T, N, D, H = 4, 3, 2, 2
ROWS = (T * N, D)
MARKS = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 1]], float)


def _text(extra: str = "", *, n: int | None = N) -> str:
    size = "" if n is None else f"batch_size: {n}"
    fill = "weight_filler { type: 'uniform' } bias_filler { type: 'uniform' }"
    return f'type: "Lstm" lstm_param {{ num_output: {H} {size} {fill} {extra} }}'


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def steps_of(x: np.ndarray, marks: np.ndarray, blobs: Arrays) -> list[tuple[np.ndarray, ...]]:
    """(i, f, o, g, h before, c before, c, h) of every step, from a zero state."""
    wi, wh, b = blobs
    h = c = np.zeros((N, H))
    out: list[tuple[np.ndarray, ...]] = []
    for xt, k in zip(x.reshape(T, N, -1), marks.reshape(T, N, 1)):
        h0, c0 = k * h, k * c
        z = xt @ wi.T + h0 @ wh.T + b
        i, f, o = (sigmoid(z[:, j * H : (j + 1) * H]) for j in range(3))
        g = np.tanh(z[:, 3 * H :])
        c = f * c0 + i * g
        h = o * np.tanh(c)
        out.append((i, f, o, g, h0, c0, c, h))
    return out


def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
    marks = ins[1] if len(ins) > 1 else np.repeat(np.arange(T) > 0, N).astype(float)
    top = np.stack([s[-1] for s in steps_of(ins[0], marks, blobs)])
    return [top if ins[0].ndim == 3 and ins[0].shape[:2] == (T, N) else top.reshape(T * N, H)]


def _blobs() -> Arrays:
    rng = np.random.default_rng(6)
    return [rng.uniform(-1, 1, s) for s in ((4 * H, D), (4 * H, H), (4 * H,))]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("shape", [ROWS, (T * N, D, 1, 1), (T, N, D)])
def test_sequence(shape: tuple[int, ...], marks: bool) -> None:
    first = np.random.default_rng(5).normal(size=shape)
    bottoms = [first, MARKS if shape == (T, N, D) else MARKS.reshape(-1)] if marks else [first]
    text = _text(n=None if shape == (T, N, D) else N)
    options: dict[str, Any] = {"bottoms": bottoms, "blobs": _blobs(), "rebatch": False, "waits": marks}
    check_layer(Case(text, [b.shape for b in bottoms], oracle, **options))


@pytest.mark.parametrize("plain", [False, True])
def test_bounded_gradients(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients worked out step by step: each gate's is cut before it reaches weights, bottom and the step before."""
    limit = 0.05
    if plain:  # the road of torch.compile
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    rng = np.random.default_rng(7)
    x, dy = rng.normal(size=ROWS), rng.normal(size=(T, N, H))
    blobs = _blobs()
    built = build(_text(f"clipping_threshold: {limit}"), [ROWS, (T * N,)])
    with torch.no_grad():
        for p, value in zip(built.blobs, blobs):
            p.copy_(torch.tensor(value))
    bottom = torch.tensor(x, requires_grad=True)
    (y,) = built(bottom, torch.tensor(MARKS.reshape(-1)))
    y.backward(torch.tensor(dy.reshape(T * N, H)))

    wi, wh, _ = blobs
    dx, dwi, dwh, db = np.zeros((T, N, D)), np.zeros_like(wi), np.zeros_like(wh), np.zeros(4 * H)
    dh, dc, cut = np.zeros((N, H)), np.zeros((N, H)), 0
    for t, (i, f, o, g, h0, c0, c, _) in reversed(list(enumerate(steps_of(x, MARKS, blobs)))):
        dh = dh + dy[t]
        dc = dc + dh * o * (1 - np.tanh(c) ** 2)
        parts = [dc * g * i * (1 - i), dc * c0 * f * (1 - f), dh * np.tanh(c) * o * (1 - o), dc * i * (1 - g * g)]
        dz = np.concatenate(parts, 1)
        cut += int((abs(dz) > limit).sum())
        dz = np.clip(dz, -limit, limit)
        dx[t], dwi, dwh, db = dz @ wi, dwi + dz.T @ x.reshape(T, N, D)[t], dwh + dz.T @ h0, db + dz.sum(0)
        dh, dc = MARKS[t][:, None] * (dz @ wh), MARKS[t][:, None] * dc * f
    assert 5 < cut < T * N * 4 * H - 5, "some are cut, some are not"
    for leaf, want in zip([bottom, *built.blobs], [dx.reshape(ROWS), dwi, dwh, db], strict=True):
        got = leaf.grad
        assert got is not None
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-7)


def test_state() -> None:
    """With marks a pass goes on where the last one ended; without, it starts from zero."""
    rng = np.random.default_rng(8)
    x = torch.tensor(rng.normal(size=ROWS))
    half = T // 2 * N
    marks = torch.ones(T * N, dtype=torch.float64)
    marks[:N] = 0
    text = _text("clipping_threshold: 1")
    whole, parts = build(text, [ROWS, (T * N,)]), build(text, [(half, D), (half,)])
    got = torch.cat([parts(x[:half], marks[:half])[0], parts(x[half:], marks[half:] * 0.5)[0]])
    torch.testing.assert_close(got, whole(x, marks)[0])
    alone = build(text, [ROWS])
    torch.testing.assert_close(alone(x)[0], alone(x)[0])
    torch.testing.assert_close(alone(x)[0], got)
    assert not list(alone.module.buffers())
    assert layer_of(text, bottoms=2).stateful_forward
    assert not layer_of(text).stateful_forward


def test_blobs_and_macs() -> None:
    layer = layer_of(_text())
    assert [b.shape for b in layer.blobs([(T * N, 5, 1, 1)])] == [(8, 5), (8, 2), (8,)]
    assert layer.macs([ROWS], [(T * N, H)]) == T * N * (16 + 16)
    assert layer_of(_text(n=None)).shapes([(6, 1, 5)]) == [(6, 1, 2)]
    assert layer_of(_text(n=1)).shapes([(6, 1, 5)]) == [(6, 2)]
    assert layer_of(_text(), bottoms=2).expects(1, [ROWS, None]) == (T * N,)


@pytest.mark.parametrize(
    ("text", "ins", "match"),
    [
        ('type: "Lstm"', [ROWS], "num_output"),
        (_text(n=0), [ROWS], "batch_size must be positive"),
        (_text(n=5), [ROWS], r"\(T \* N, \.\.\) with N = batch_size = 5"),
        (_text(), [ROWS, (T,)], "sequence marks"),
    ],
)
def test_refusals(text: str, ins: list[tuple[int, ...]], match: str) -> None:
    with pytest.raises(LayerError, match=match):
        layer_of(text, bottoms=len(ins)).shapes(ins)
