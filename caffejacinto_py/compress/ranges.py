"""From statistics to a range: which values fixed-point numbers should reach, and what the rounding then costs.

A range is (low, high); `numerics.make_qparams` makes a scale of it. Zero is always expressed exactly there, so exact
zeros cost nothing. Sources: percentile and KL as TensorRT's entropy calibration describes them (8-bit inference with
TensorRT, 2017), for any width and for one-sided data; the mean squared error in closed form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress.numerics import Format, QParams, make_qparams
from caffejacinto_py.compress.observe import Stats, measure
from caffejacinto_py.errors import CaffeError, UsageError, near

METHODS = ("min-max", "percentile", "mse", "kl")
Range = tuple[float, float]

_POINTS = 8192  # tensors up to this size are searched value by value, larger ones by histogram
_CACHED = 2**17  # values of a weight searched together: their temporaries stay in the cache
_COARSE, _FINE = 48, 24  # thresholds tried over the whole range, then around the best
_CUT = 0.05  # kl: the most values, zeros apart, that may be clipped
_SMALLEST = 0.02  # the tightest threshold tried, as a fraction of the largest magnitude


@dataclass(frozen=True, eq=False)
class _Mass:
    """How much data lies where: weights on intervals [left, right); on points where left is right."""

    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray
    total: int  # zeros included

    @classmethod
    def of_stats(cls, s: Stats) -> _Mass:
        used = np.flatnonzero(s.hist)
        edges = s.edges
        left, right = edges[used], edges[used + 1]
        if len(used):  # the outer bins end where the data ends
            left, right = np.maximum(left, min(s.min, right[0])), np.minimum(right, max(s.max, left[-1]))
        return cls(left, right, s.hist[used].astype(np.float64), s.finite)

    @classmethod
    def of_values(cls, x: Tensor) -> _Mass:
        values = x.detach().double().flatten().cpu().numpy()
        some = values[values != 0]
        return cls(some, some, np.ones(len(some)), len(values))

    def error(self, q: QParams) -> float:
        """Mean squared error of the values after `numerics.simulate`; values lie evenly in their interval."""
        if not self.total:
            return 0.0
        scale, offset = float(q.scale), float(q.offset)
        a, b = self.left * scale + offset, self.right * scale + offset
        width = b - a
        # intervals without width, and those so narrow that the difference of two integrals would be noise
        point = width < 1e-6
        spread = (_integral(b, q.limits) - _integral(a, q.limits)) / np.where(point, 1.0, width)
        per_value = np.where(point, _squared((a + b) / 2, q.limits), spread)
        return float((per_value * self.weight).sum()) / self.total / scale**2


def choose(stats: Stats, method: str, *, form: Format, percentile: float = 99.99, applied: float = 1.0) -> Range:
    """The range that a blob's numbers should cover.

    min-max: all that was seen. percentile: `percentile` of all values (by magnitude; with form.offset, equal tails on
    both sides), exact to a bin of the histogram. mse: least mean squared error after rounding and clipping. kl: the
    clipping that loses least information, as entropy calibration does. Ranges never exceed what was seen; for mse with
    power2 they may, up to the next power of two. applied: as in `make_qparams`. Raises UsageError for unknown methods,
    widths and percentiles, CaffeError for a blob that nobody observed, or observed without a histogram.
    """
    check(method, form, percentile)
    if not stats.finite:
        raise CaffeError(f"layer '{stats.layer}': no value of blob '{stats.blob}' was observed, so it has no range")
    if method == "min-max" or stats.zeros == stats.finite:
        return stats.min, stats.max
    if not stats.limit:
        raise CaffeError(f"blob '{stats.blob}' was observed without a histogram", hint="min-max needs none")
    if method == "percentile":
        return _percentile(stats, percentile, offset=form.offset)
    if method == "mse":
        return _least_error(_Mass.of_stats(stats), (stats.min, stats.max), form, applied)
    return _entropy(stats, form)


def choose_tensor(x: Tensor, method: str, *, form: Format, percentile: float = 99.99) -> Range:
    """`choose` for a tensor at hand, such as a weight."""
    x = x.detach()
    if method == "mse" and 0 < x.numel() <= _POINTS:
        check(method, form, percentile)
        low, high = float(x.min()), float(x.max())
        return (low, high) if low == high == 0 else _least_error(_Mass.of_values(x), (low, high), form)
    return choose(measure(x, bins=0) if method == "min-max" else measure(x), method, form=form, percentile=percentile)


def choose_channels(
    x: Tensor, method: str, *, form: Format, percentile: float = 99.99, axis: int = 0
) -> tuple[Tensor, Tensor]:
    """A range for each channel of a weight, shaped to broadcast over it; for `numerics.per_channel`.

    kl is refused: a channel has too few values for a histogram.
    """
    check(method, form, percentile)
    if method == "kl":
        raise UsageError("kl needs more values than a channel has", hint="use mse or min-max for weights by channel")
    if not x.numel():
        raise CaffeError("a weight without values has no range")
    rows = x.detach().double().movedim(axis, 0).reshape(x.shape[axis], -1)
    low, high = rows.amin(1), rows.amax(1)
    if method == "percentile":
        low, high = _percentile_rows(rows, low, high, percentile, offset=form.offset)
    elif method == "mse":
        low, high = _least_error_channels(rows, low, high, form)
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    return low.reshape(shape), high.reshape(shape)


def check(method: str, form: Format, percentile: float) -> None:
    """Raises UsageError for a method, width or percentile that does not exist."""
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", hint=near(method, METHODS) or "there are " + ", ".join(METHODS))
    if not 2 <= form.bits <= 16:
        raise UsageError(f"{form.bits} bits; widths are 2 to 16")
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile {percentile:g} is not above 50 and at most 100")


def noise(stats: Stats, q: QParams) -> float:
    """Mean squared error of a blob after `simulate`, from its histogram; nan where it was observed without one."""
    if stats.limit == 0 and stats.zeros < stats.finite:
        return math.nan
    return _Mass.of_stats(stats).error(q)


def sqnr(power: float, error: float) -> float:
    """Signal-to-quantization-noise ratio in dB. inf: no error. nan: no signal, or an unknown error."""
    if power <= 0 or math.isnan(error):
        return math.nan
    return 10 * math.log10(power / error) if error > 0 else math.inf


# --- percentile ------------------------------------------------------------------------------------------------------
def _percentile(s: Stats, percentile: float, *, offset: bool) -> Range:
    outside = 1 - percentile / 100
    if s.min >= 0:
        return s.min, s.quantile(1 - outside)
    if s.max <= 0:
        return s.quantile(outside), s.max
    if offset:
        return s.quantile(outside / 2), s.quantile(1 - outside / 2)
    counts = np.concatenate(([s.zeros], _magnitudes(s)))
    below = np.cumsum(counts)
    want = (1 - outside) * below[-1]
    i = min(int(np.searchsorted(below, want)), len(counts) - 1)
    inside = (want - (below[i] - counts[i])) / counts[i] if i and counts[i] else 0.0
    reach = (i - 1 + inside) * 2 * s.limit / len(s.hist) if i else 0.0
    return _within(s.min, s.max, reach)


def _percentile_rows(
    rows: Tensor, low: Tensor, high: Tensor, percentile: float, *, offset: bool
) -> tuple[Tensor, Tensor]:
    outside = 1 - percentile / 100
    if offset:
        return _quantile(rows, outside / 2), _quantile(rows, 1 - outside / 2)
    reach = _quantile(rows.abs(), 1 - outside)
    return torch.maximum(low, -reach), torch.minimum(high, reach)


def _quantile(rows: Tensor, fraction: float) -> Tensor:
    """Of each row, between the two values next to it; torch.quantile has a limit on the size of its input."""
    place = fraction * (rows.shape[1] - 1)
    below = math.floor(place)
    above = min(below + 1, rows.shape[1] - 1)
    a, b = rows.kthvalue(below + 1, 1).values, rows.kthvalue(above + 1, 1).values
    return a + (b - a) * (place - below)


# --- mean squared error ----------------------------------------------------------------------------------------------
def _squared(u: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    return (u - np.clip(np.rint(u), *limits)) ** 2  # type: ignore[no-any-return]


def _integral(u: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    """Antiderivative of `_squared`: 1/12 for each whole step, a cubic inside a step and beyond the limits."""
    whole = np.clip(np.rint(u), *limits)
    return whole / 12 + (u - whole) ** 3 / 3  # type: ignore[no-any-return]


def _least_error(mass: _Mass, seen: Range, form: Format, applied: float = 1.0) -> Range:
    low, high = seen
    # just below: (2^e / applied) * applied may round up to more than 2^e, and that to the next power
    unit = 1.0 if math.frexp(applied)[0] == 0.5 else (1 - 2.0**-20) / applied

    def cost(r: Range) -> float:
        return mass.error(make_qparams(*r, form, applied=applied))

    if form.offset and low < 0 < high and not form.power2:
        return _both_ends(cost, low, high)
    reach = max(abs(low), abs(high))
    ranges: list[Callable[[float], Range]] = [lambda t: _within(low, high, t, stretch=form.power2)]
    if low < 0 < high and not form.offset:
        # unsigned numbers are twice as fine: worth it where little is negative
        ranges.append(lambda t: (0.0, min(high, t) if not form.power2 else t))
    if form.power2 and form.offset:
        top = math.ceil(math.log2((max(high, 0.0) - min(low, 0.0)) / unit))
        shares = [0.0] if low >= 0 else [1.0] if high <= 0 else [i / 32 for i in range(33)]  # exact: ends add up to 2^e
        return min(
            ((-s * 2.0**e * unit, (1 - s) * 2.0**e * unit) for e in range(top, top - 8, -1) for s in shares), key=cost
        )
    if form.power2:
        top = math.ceil(math.log2(reach / unit))
        return min((make(2.0**e * unit) for make in ranges for e in range(top, top - 8, -1)), key=cost)
    found = [make(_search(lambda t, make=make: cost(make(t)), reach)) for make in ranges]  # type: ignore[misc]
    return min(found, key=cost)


def _search(cost: Callable[[float], float], reach: float) -> float:
    """The threshold of least cost: all over the range, then finely around the best. The whole range wins ties."""
    coarse = [reach * f for f in np.linspace(1.0, _SMALLEST, _COARSE)]
    best = min(coarse, key=cost)
    step = reach * (1 - _SMALLEST) / (_COARSE - 1)
    fine = [min(t, reach) for t in np.linspace(best + step, best - step, _FINE + 1) if t > 0]
    return float(min([best, *fine], key=cost))


def _both_ends(cost: Callable[[Range], float], low: float, high: float) -> Range:
    """Least cost over low and high: a grid, then each end by itself until nothing changes."""
    grid = np.linspace(1.0, 0.1, 10)
    best = min(((low * a, high * b) for a in grid for b in grid), key=cost)
    for _ in range(4):
        before = best
        bottom = -_search(lambda t: cost((-t, best[1])), -low)  # noqa: B023 - used at once
        best = min([best, (bottom, best[1])], key=cost)
        top = _search(lambda t: cost((best[0], t)), high)  # noqa: B023
        best = min([best, (best[0], top)], key=cost)
        if best == before:
            break
    return float(best[0]), float(best[1])


def _least_error_channels(rows: Tensor, low: Tensor, high: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """One fraction of its range for each row. All rows are one kind of integer, as `numerics.per_channel` makes them:
    signed, or unsigned where no value is negative or there is an offset."""
    unsigned = form.offset or bool((low >= 0).all())
    limits = (0, 2**form.bits - 1) if unsigned else (-(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1)
    some = max(1, _CACHED // rows.shape[1])
    parts = zip(rows.split(some), low.split(some), high.split(some), strict=True)
    best = torch.cat([_fractions(part.float(), a.float(), b.float(), form, limits) for part, a, b in parts]).double()
    return low * best, high * best


def _fractions(rows: Tensor, low: Tensor, high: Tensor, form: Format, limits: tuple[int, int]) -> Tensor:
    base, top = limits

    def cost(f: Tensor) -> Tensor:
        a, b = low * f, high * f
        a0, b0 = (a.clamp(max=0), b.clamp(min=0)) if form.offset else (a, b)
        reach = b0 - a0 if form.offset else torch.maximum(a.abs(), b.abs())
        if form.power2:
            # 2^e covers the reach with `top + 1` steps on each side of zero
            scale = (top + 1) / 2.0 ** torch.ceil(torch.log2(reach.clamp(min=1e-30)))
        else:
            scale = top / reach.clamp(min=1e-30)
        offset = torch.round(-a0 * scale) if form.offset else torch.zeros_like(scale)
        y = rows * scale[:, None] + offset[:, None]
        return ((y - y.round().clamp(base, top)) ** 2).mean(1) / scale**2

    def pick(fractions: Iterable[Tensor], best: Tensor) -> Tensor:
        least = cost(best)
        for f in fractions:
            c = cost(f)
            better = c < least
            best, least = torch.where(better, f, best), torch.where(better, c, least)
        return best

    one = torch.ones_like(low)
    best = pick((one * f for f in np.linspace(1.0, 0.1, _COARSE)[1:]), one)
    step = 0.9 / (_COARSE - 1)
    return pick([(best + d).clamp(1e-3, 1.0) for d in np.linspace(-step, step, _FINE + 1)], best)


# --- Kullback-Leibler divergence ---------------------------------------------------------------------------------
def _magnitudes(s: Stats) -> np.ndarray:
    """Histogram of |x|, zeros left out, over [0, limit)."""
    half = len(s.hist) // 2
    return s.hist[half:] + s.hist[:half][::-1]  # type: ignore[no-any-return]


def _entropy(s: Stats, form: Format) -> Range:
    """The threshold whose clipped and coarsened histogram is nearest to the clipped one.

    Exact zeros take no part: they cost nothing at any threshold and would drown the rest. Where there are hardly more
    bins than levels nothing can be told, and all that was seen is kept.
    """
    levels = 2**form.bits if form.offset or s.min >= 0 else 2 ** (form.bits - 1)
    counts = _magnitudes(s).astype(np.float64)
    width = 2 * s.limit / len(s.hist)
    while len(counts) >= 32 * levels:  # finer bins only hold noise
        counts, width = counts.reshape(-1, 2).sum(1), 2 * width
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used < 2 * levels:
        return s.min, s.max
    # cut nearly everything off and one bin remains, which any number of levels expresses without loss
    least = int(np.searchsorted(np.cumsum(counts), (1 - _CUT) * counts.sum())) + 1
    candidates = np.unique(np.linspace(used, max(levels, least), 256).astype(int))[::-1]
    losses = [_divergence(counts[:used], int(i), levels) for i in candidates]
    best = int(candidates[int(np.argmin(losses))])
    return _within(s.min, s.max, best * width if best < used else max(-s.min, s.max))


def _divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P, Q). P: the first `kept` bins, the rest added to the last one. Q: those bins without the rest, in `levels`
    groups, each spread evenly over its non-empty bins."""
    p = counts[:kept].copy()
    some = p > 0
    starts = np.arange(levels) * kept // levels
    sums, filled = np.add.reduceat(p, starts), np.add.reduceat(some.astype(np.float64), starts)
    share = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    q = np.where(some, np.repeat(share, np.diff(np.append(starts, kept))), 0.0)
    p[-1] += counts[kept:].sum()
    there = p > 0
    q[there] = np.maximum(q[there], 1e-4)  # counts; only the last bin can be empty in Q alone, and must not be infinite
    p, q = p / p.sum(), q / q.sum()
    return float((p[there] * np.log(p[there] / q[there])).sum())


def _within(low: float, high: float, reach: float, *, stretch: bool = False) -> Range:
    """Both ends no further than `reach`. stretch: the side with the larger magnitude reaches it."""
    if stretch and reach > max(-low, high):
        return (-reach, high) if -low > high else (low, reach)
    return max(low, -reach), min(high, reach)
