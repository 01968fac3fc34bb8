"""Ranges: what each method promises, against brute force on the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from caffejacinto_py.compress.numerics import Format, make_qparams, per_channel, simulate
from caffejacinto_py.compress.observe import Collector, Stats, measure
from caffejacinto_py.compress.ranges import METHODS, choose, choose_channels, choose_tensor, noise, sqnr
from caffejacinto_py.errors import CaffeError, UsageError

FORMS = [
    Format(8), Format(4), Format(8, offset=True), Format(4, power2=True), Format(4, power2=True, offset=True),
]  # fmt: skip


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _data(kind: str, n: int = 6000) -> Tensor:
    x = torch.randn(n, generator=_generator(), dtype=torch.float64)
    kinds = {
        "two-sided": x,
        "relu": x.relu(),
        "positive": x.abs() + 0.5,
        "negative": -x.abs(),
        "skewed": torch.where(x < 0, x * 0.1, x),
        "outliers": torch.cat([x, torch.tensor([30.0, -25.0], dtype=torch.float64)]),
    }
    return kinds[kind]


KINDS = ["two-sided", "relu", "positive", "negative", "skewed", "outliers"]


def _error(x: Tensor, low: float, high: float, form: Format) -> float:
    return float((simulate(x, make_qparams(low, high, form)) - x).square().mean())


def _brute(x: Tensor, form: Format) -> float:
    """The least error over a dense grid of ranges."""
    low, high = float(x.min()), float(x.max())
    steps = np.linspace(0.05, 1.0, 20)
    if low < 0 < high and form.offset:
        return min(_error(x, low * a, high * b, form) for a in steps for b in steps)
    reach = max(-low, high)
    clipped = [(max(low, -reach * f), min(high, reach * f)) for f in np.linspace(0.02, 1.0, 400)]
    if form.power2:
        tops = [2.0**e for e in range(-6, 8)]
        clipped = [(-t if low < 0 else 0.0, t if high > 0 else 0.0) for t in tops]
    found = [_error(x, a, b, form) for a, b in clipped]
    if low < 0 < high:
        found += [_error(x, 0.0, b, form) for _, b in clipped]
    return min(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("how", ["histogram", "values"])
def test_mse_is_as_good_as_brute_force(kind: str, form: Format, how: str) -> None:
    x = _data(kind, 800 if how == "values" else 6000)
    found = choose_tensor(x, "mse", form=form) if how == "values" else choose(measure(x), "mse", form=form)
    assert _error(x, *found, form) <= _brute(x, form) * 1.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_ranges_stay_within_what_was_seen(kind: str, method: str, form: Format) -> None:
    x = _data(kind)
    low, high = choose(measure(x), method, form=form, percentile=99.0)
    assert min(float(x.min()), 0.0) <= low <= high <= max(float(x.max()), 0.0)
    if method == "min-max":
        assert (low, high) == (float(x.min()), float(x.max()))
    if float(x.min()) >= 0:
        assert not make_qparams(low, high, form).limits[0]  # one-sided data keeps all levels on its side


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_exact_to_a_bin(percentile: float) -> None:
    for kind in KINDS:
        x = _data(kind)
        s = measure(x)
        width = 2 * s.limit / len(s.hist)
        # the distance to the next value: between two values any threshold is right
        for offset in (False, True):
            low, high = choose(s, "percentile", form=Format(8, offset=offset), percentile=percentile)
            inside = float(((x >= low - width) & (x <= high + width)).double().mean()) * 100
            tighter = float(((x > low + width) & (x < high - width)).double().mean()) * 100
            assert inside >= percentile - 1e-9
            assert tighter <= percentile + 0.1


def test_percentile_of_magnitudes_is_symmetric() -> None:
    low, high = choose(measure(_data("two-sided")), "percentile", form=Format(8), percentile=99.0)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(2.576, abs=0.1)


def test_percentile_counts_zeros() -> None:
    x = torch.cat([torch.zeros(98), torch.tensor([1.0, 2.0])])
    assert choose(measure(x), "percentile", form=Format(8), percentile=97)[1] == 0.0
    assert choose(measure(x), "percentile", form=Format(8), percentile=100)[1] == 2.0
    mixed = torch.cat([torch.zeros(97), torch.tensor([-1.0, 1.0, 2.0])])
    assert choose(measure(mixed), "percentile", form=Format(8), percentile=97) == (0.0, 0.0)


def test_kl_keeps_uniform_data_and_cuts_outliers() -> None:
    uniform = torch.rand(100_000, generator=_generator())
    assert choose(measure(uniform), "kl", form=Format(8))[1] > 0.97
    tail = torch.cat([torch.randn(100_000, generator=_generator()), torch.tensor([60.0, -50.0])])
    low, high = choose(measure(tail), "kl", form=Format(8))
    assert 3 < high < 12
    assert low == pytest.approx(-high)
    one_sided = choose(measure(tail.relu()), "kl", form=Format(8))
    assert one_sided[0] == 0.0
    assert 2 < one_sided[1] < 12


def test_kl_is_not_moved_by_zeros() -> None:
    x = torch.randn(50_000, generator=_generator()).abs()
    alone = choose(measure(x), "kl", form=Format(8))
    with_zeros = choose(measure(torch.cat([x, torch.zeros(400_000)])), "kl", form=Format(8))
    assert with_zeros[1] == alone[1]


def test_kl_of_few_bins_keeps_everything() -> None:
    x = _data("two-sided")
    assert choose(measure(x), "kl", form=Format(16)) == (float(x.min()), float(x.max()))
    assert choose(measure(torch.tensor([1.0, 1.0, 1.0])), "kl", form=Format(2)) == pytest.approx((1.0, 1.0), rel=0.05)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_a_histogram_is_that_of_the_values(kind: str, form: Format) -> None:
    x = _data(kind, 50_000)
    s = measure(x)
    for low, high in ((float(x.min()), float(x.max())), (float(x.min()) / 4, float(x.max()) / 2)):
        q = make_qparams(low, high, form)
        assert noise(s, q) == pytest.approx(_error(x, low, high, form), rel=0.03)


def test_sqnr() -> None:
    assert sqnr(1.0, 0.01) == pytest.approx(20)
    assert sqnr(1.0, 0.0) == math.inf
    assert math.isnan(sqnr(0.0, 0.0))


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_channels(method: str, form: Format) -> None:
    sizes = torch.logspace(-3, 1, 16)
    w = torch.randn(16, 8, 3, 3, generator=_generator()) * sizes[:, None, None, None]
    low, high = choose_channels(w, method, form=form, percentile=98)
    assert low.shape == high.shape == (16, 1, 1, 1)
    assert (low >= w.amin((1, 2, 3), True)).all()
    assert (high <= w.amax((1, 2, 3), True)).all()
    errors = (simulate(w.double(), per_channel(low, high, form)) - w).square().mean((1, 2, 3))
    for i, row in list(enumerate(w))[::5]:
        if method == "mse":
            # one kind of integer for all channels, and one fraction for both ends, where a tensor has a free choice
            assert float(errors[i]) <= _brute(row.double().flatten(), form) * (1.35 if form.offset else 1.05)
        else:
            inside = float(((row >= low[i]) & (row <= high[i])).double().mean())
            assert inside == 1.0 if method == "min-max" else 0.95 <= inside <= 0.99
    swapped = choose_channels(w.transpose(0, 1), method, form=form, percentile=98, axis=1)
    assert torch.equal(swapped[0], low.transpose(0, 1))


def test_channels_of_zeros_and_one_sided() -> None:
    w = torch.rand(4, 5)
    w[1] = 0
    low, high = choose_channels(w, "mse", form=Format(4))
    assert (float(low[1]), float(high[1])) == (0.0, 0.0)
    q = per_channel(low, high, Format(4))
    assert q.unsigned
    assert torch.isfinite(simulate(w, q)).all()


def test_degenerate_data() -> None:
    for method in METHODS:
        assert choose(measure(torch.zeros(9)), method, form=Format(8)) == (0.0, 0.0)
        low, high = choose(measure(torch.full((9,), -3.0)), method, form=Format(8))
        assert low == pytest.approx(-3.0, rel=0.03)
        assert high <= 0
        assert choose_tensor(torch.zeros(3), method, form=Format(8)) == (0.0, 0.0)


def test_bad_requests() -> None:
    s = measure(torch.randn(50))
    with pytest.raises(UsageError, match="unknown method 'minmax'") as caught:
        choose(s, "minmax", form=Format(8))
    assert "min-max" in str(caught.value.hint)
    for bits in (1, 17):
        with pytest.raises(UsageError, match="2 to 16"):
            choose(s, "mse", form=Format(bits))
    for percentile in (50.0, 100.1, math.nan):
        with pytest.raises(UsageError, match="percentile"):
            choose(s, "percentile", form=Format(8), percentile=percentile)
    with pytest.raises(CaffeError, match="layer 'conv1': no value of blob 'c'"):
        choose(Stats("conv1", "c"), "min-max", form=Format(8))
    plain = Collector("conv1", "c", bins=0)
    plain.add(torch.ones(3))
    assert choose(plain.stats, "min-max", form=Format(8)) == (1.0, 1.0)
    assert math.isnan(noise(plain.stats, make_qparams(0, 2, Format(8))))
    with pytest.raises(CaffeError, match="without a histogram"):
        choose(plain.stats, "mse", form=Format(8))
    with pytest.raises(UsageError, match="kl"):
        choose_channels(torch.randn(4, 4), "kl", form=Format(8))
