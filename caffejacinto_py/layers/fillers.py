"""Fillers: the values a learnable blob starts with. numpy only.

`check` says whether a filler fits a shape (no numbers drawn), `fill` draws. The random numbers are ours: same
distributions as Caffe, not the same stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from caffejacinto_py.errors import LayerError, near
from caffejacinto_py.layers.base import Blob
from caffejacinto_py.schema.dialect import BVLC, Dialect

if TYPE_CHECKING:
    from caffejacinto_py.layers.base import Layer

Field = tuple[str | int, ...]
Draw = Callable[[Any, tuple[int, ...], np.random.Generator, Dialect], np.ndarray]
F32 = np.float32

FAN_IN, FAN_OUT, AVERAGE = 0, 1, 2  # FillerParameter.VarianceNorm


def _constant(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """value (default 0) everywhere."""
    return np.full(shape, filler.value, F32)


def _uniform(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """U[min, max] (default 0, 1)."""
    return _between(filler.min, filler.max, shape, rng)


def _gaussian(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """N(mean, std); sparse s >= 0: each value kept with probability s / shape[0], else 0."""
    out = _normal(filler.mean, filler.std, shape, rng)
    if filler.sparse >= 0:
        out *= rng.random(shape, F32) < filler.sparse / shape[0]
    return out


def _positive_unitball(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """U[0, 1], then the values of each shape[0] divided by their sum: all positive, each row sums to 1."""
    rows = rng.random((shape[0], math.prod(shape[1:])), F32)
    return (rows / rows.sum(1, keepdims=True, dtype=np.float64)).astype(F32).reshape(shape)


def _xavier(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """U(-a, a) with a = sqrt(3 / n), n as `fan` says (Glorot and Bengio 2010)."""
    bound = math.sqrt(3 / fan(shape, filler.variance_norm))
    return _between(-bound, bound, shape, rng)


def _msra(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """N(0, sqrt(2 / n)), n as `fan` says (He et al. 2015)."""
    return _normal(0.0, math.sqrt(2 / fan(shape, filler.variance_norm)), shape, rng)


def _bilinear(filler: Any, shape: tuple[int, ...], rng: np.random.Generator, dialect: Dialect) -> np.ndarray:
    """The upsampling kernel in every (n, c) plane: w[y, x] = (1 - |x/f - c|) (1 - |y/f - c|), f = ceil(k / 2).

    c = (k - 1) / 2f in BVLC 1.0 and Ristretto, (2f - 1 - f % 2) / 2f in the older forks: they differ where k % 4 is 2
    or 3. NVCaffe's floor(k / 2) for odd kernels gives negative weights and is not copied.
    """
    k = shape[3]
    f = math.ceil(k / 2)
    c = ((k - 1) if dialect.bilinear_modern else (2 * f - 1 - f % 2)) / (2 * f)
    line = 1 - np.abs(np.arange(k) / f - c)
    return np.broadcast_to(np.outer(line, line).astype(F32), shape).copy()


_FILLERS: dict[str, Draw] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "positive_unitball": _positive_unitball,
    "xavier": _xavier,
    "msra": _msra,
    "bilinear": _bilinear,
}
# NVCaffe's variants that draw once a process and reuse the numbers on every GPU: the same distribution
_FILLERS |= {f"{name}static": draw for name, draw in list(_FILLERS.items()) if name != "constant"}


def fan(shape: Sequence[int], variance_norm: int = FAN_IN) -> float:
    """The n of xavier and msra: count/shape[0] (FAN_IN), count/shape[1] (FAN_OUT) or their mean (AVERAGE).

    A missing axis counts as 1, so the fan_out of a 1-axis blob is its count. The raw blob shape decides: the fan_in of
    a Deconvolution weight (C_in, C_out/group, k, k) counts C_out k k, as in Caffe.
    """
    count = math.prod(shape)
    fan_in = count / (shape[0] if len(shape) > 0 else 1)
    fan_out = count / (shape[1] if len(shape) > 1 else 1)
    return {FAN_IN: fan_in, FAN_OUT: fan_out, AVERAGE: (fan_in + fan_out) / 2}[variance_norm]


def check(filler: Any, shape: Sequence[int], *, field: Field = (), who: str = "") -> None:
    """Raise LayerError where this filler cannot fill this shape. None (zeros) fits always.

    field: path of the filler below the layer. who: what the message starts with, e.g. "layer 'conv1' (Convolution): ".
    """
    if filler is None:
        return

    def fail(text: str, name: str, hint: str | None = None) -> LayerError:
        return LayerError(f"{who}{text}", field=(*field, name), hint=hint)

    kind = filler.type
    if kind not in _FILLERS:
        known = near(kind, _FILLERS) or "known fillers: " + ", ".join(sorted(_FILLERS))
        raise fail(f"unknown filler type '{kind}'", "type", known)
    kind = kind.removesuffix("static")
    if filler.sparse != -1 and kind != "gaussian":
        raise fail(f"filler '{filler.type}' does not know `sparse`; only gaussian does", "sparse")
    if filler.sparse != -1 and (filler.sparse < 0 or not shape):
        raise fail(f"sparse {filler.sparse} needs a value >= 0 and a blob with at least 1 axis", "sparse")
    if kind == "gaussian" and not filler.std > 0:
        raise fail(f"a gaussian filler needs std > 0, not {filler.std:g}", "std")
    if kind == "uniform" and not filler.min <= filler.max:
        raise fail(f"a uniform filler needs min <= max, not {filler.min:g} and {filler.max:g}", "min")
    if kind == "positive_unitball" and not shape:
        raise fail("a positive_unitball filler needs a blob with at least 1 axis", "type")
    if kind == "bilinear" and (len(shape) != 4 or shape[2] != shape[3]):
        raise fail(f"a bilinear filler needs a 4-axis blob with square kernels, not {tuple(shape)}", "type")


def fill(filler: Any, shape: Sequence[int], rng: np.random.Generator, dialect: Dialect = BVLC) -> np.ndarray:
    """Fresh values for a blob of this shape: float32, C order. filler: a FillerParameter message, or None for zeros."""
    if filler is None:
        return np.zeros(tuple(shape), F32)
    check(filler, shape)
    return _FILLERS[filler.type](filler, tuple(shape), rng, dialect)


def filled_blob(layer: Layer, shape: Sequence[int], name: str) -> Blob:
    """A Blob filled as the field `name` of the layer's parameter message says; a bad filler raises here, with its
    place.
    """
    filler = getattr(layer.param, name)
    check(filler, shape, field=(layer.field or "", name), who=f"layer '{layer.name}' ({layer.type}): ")
    return Blob(tuple(shape), filler)


def _between(low: float, high: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    out = rng.random(shape, F32)
    out *= F32(high - low)
    out += F32(low)
    return out


def _normal(mean: float, std: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    out = rng.standard_normal(shape, F32)
    out *= F32(std)
    out += F32(mean)
    return out
