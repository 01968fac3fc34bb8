"""Scales from ranges, rounding, and the quantize operator."""

from __future__ import annotations

import math

import pytest
import torch

from caffejacinto_py.compress.numerics import (
    Format,
    QParams,
    from_integers,
    from_message,
    half_away,
    half_even,
    make_qparams,
    over_axis,
    per_channel,
    simulate,
    stochastic,
    straight_through,
    to_integers,
    to_message,
)
from caffejacinto_py.schema import pb


@pytest.mark.parametrize(
    ("low", "high", "form", "scale", "offset", "unsigned", "shift"),
    [
        (-1.0, 2.0, Format(8), 127 / 2, 0, False, 0),
        (0.0, 2.0, Format(8), 255 / 2, 0, True, 0),
        (-1.0, 2.0, Format(8, offset=True), 255 / 3, 85, True, 0),
        (-1.0, 2.0, Format(8, power2=True), 64, 0, False, -6),  # 8 bits with sign: -2 .. 2 - 1/64
        (0.0, 2.0, Format(8, power2=True), 128, 0, True, -7),
        (0.0, 300.0, Format(8, power2=True), 0.5, 0, True, 1),
        (0.0, 0.0, Format(8), 1, 0, True, 0),  # the binary divides by zero here
    ],
)
def test_scales(low: float, high: float, form: Format, scale: float, offset: float, unsigned: bool, shift: int) -> None:
    q = make_qparams(low, high, form)
    assert (q.scale, q.offset, q.unsigned, q.shift) == (pytest.approx(scale), offset, unsigned, shift)


def test_the_binary_has_infinite_scales_and_real_offsets() -> None:
    assert make_qparams(0, 0, Format(8), sound=False).scale == math.inf
    assert make_qparams(-1, 2.3, Format(8, offset=True), sound=False).offset == pytest.approx(255 / 3.3)


def test_rounding_of_halves_and_of_their_neighbours() -> None:
    y = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.49999997, 8388609.0, 2.0**24 + 2])
    assert half_away(y).tolist() == [-3, -2, -1, 1, 2, 3, 0, 0, 8388609, 2**24 + 2]
    assert half_even(y).tolist() == [-2, -2, 0, 0, 2, 2, 0, 0, 8388609, 2**24 + 2]


def test_stochastic_rounding_keeps_the_mean() -> None:
    y = torch.full((100_000,), 2.25)
    n = stochastic(y, torch.Generator().manual_seed(1))
    assert set(n.tolist()) == {2.0, 3.0}
    assert abs(float(n.mean()) - 2.25) < 0.01  # 7 standard errors


@pytest.mark.parametrize("form", [Format(8), Format(8, offset=True), Format(4, power2=True), Format(12, offset=True)])
def test_zero_stays_zero_and_errors_are_below_half_a_step(form: Format) -> None:
    x = torch.linspace(-1.3, 2.1, 1001).double()
    x[500] = 0.0
    q = make_qparams(float(x.min()), float(x.max()), form)
    y = simulate(x, q)
    assert y[500] == 0
    inside = (x * q.scale + q.offset >= q.limits[0]) & (x * q.scale + q.offset <= q.limits[1])
    assert ((x - y).abs()[inside] <= 0.5 / q.scale + 1e-12).all()
    n = to_integers(x, q)
    assert n.min() >= q.limits[0]
    assert n.max() <= q.limits[1]
    assert torch.equal(from_integers(n, q), y)


def test_one_scale_per_channel() -> None:
    w = torch.tensor([[-1.0, 0.5], [0.1, 0.02], [0.0, 0.0]])
    q = per_channel(w.amin(1, keepdim=True), w.amax(1, keepdim=True), Format(8))
    assert not q.unsigned
    assert torch.allclose(torch.as_tensor(q.scale).flatten(), torch.tensor([127.0, 1270.0, 1.0], dtype=torch.float64))
    assert torch.allclose(simulate(w, q), w, atol=0.5 / 127)


def test_the_gradient_goes_straight_through() -> None:
    x = torch.tensor([0.3, 900.0], requires_grad=True)
    y = straight_through(x, simulate(x.detach(), make_qparams(-1, 1, Format(8))))
    y.backward(torch.tensor([2.0, 3.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [2, 3]


@pytest.mark.parametrize("form", [Format(8), Format(12, offset=True), Format(4, power2=True), Format(5, True, True)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_channel_gets_what_it_would_get_alone(form: Format, shift: float) -> None:
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)) + shift
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if shift:
        w = w.abs()
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    q = per_channel(low, high, form)
    for i in range(6):
        one = make_qparams(float(low[i]), float(high[i]), form)
        assert (torch.as_tensor(q.scale)[i, 0], torch.as_tensor(q.offset)[i, 0]) == (one.scale, one.offset)
        assert q.unsigned == one.unsigned
        assert torch.equal(simulate(w, q)[i], simulate(w[i], one))


def test_a_range_too_small_for_float32_counts_as_empty() -> None:
    q = make_qparams(0.0, 1e-40, Format(8))
    assert (q.scale, q.offset) == (1.0, 0.0)
    assert make_qparams(-1e-42, 1e-42, Format(8, offset=True)).scale == 1.0


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("q", [make_qparams(-1, 2, Format(8)), make_qparams(0, 2, Format(6)),
                               make_qparams(-1, 2, Format(4, offset=True))])  # fmt: skip
@pytest.mark.parametrize("shape", [(70_000,), (4, 1, 5, 5), (2, 3, 4, 5), (0,)])
def test_the_quick_road_is_the_plain_one(q: QParams, clip: bool, shape: tuple[int, ...]) -> None:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x = torch.cat([x.flatten()[: x.numel() // 2], (x.flatten()[x.numel() // 2 :] * 8).round() / 8 / q.scale]).view(
        shape
    )
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    y = simulate(x, q, clip=clip)
    assert torch.equal(y, from_integers(to_integers(x, q, clip=clip), q))
    assert y.stride() == x.stride()
    assert torch.equal(simulate(x[..., ::2], q, clip=clip), y[..., ::2])


def test_qparams_survive_a_message() -> None:
    for q in (
        make_qparams(-1.3, 0.7, Format(9, offset=True)),
        make_qparams(0, 3.3, Format(8, power2=True), applied=2.5),
    ):
        assert from_message(pb.QuantizationParameter.QParams.FromString(to_message(q).SerializeToString())) == q
    w = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    for form in (Format(8), Format(8, offset=True)):
        q = per_channel(w.amin((1, 2, 3), keepdim=True), w.amax((1, 2, 3), keepdim=True), form)
        message = to_message(q)
        again = from_message(message)
        assert again.channels == q.channels == 4
        assert torch.equal(simulate(w, over_axis(again, 4, 0)), simulate(w, q))
        # a reader that knows nothing of channels gets numbers for the whole blob
        assert message.scale_target == min(message.channel_scale)
        assert (message.min, message.max) == pytest.approx((float(w.min()), float(w.max())), abs=1e-6)
    old = pb.QuantizationParameter.QParams(bitwidth=7, scale=12.5)
    assert from_message(old).scale == 12.5
