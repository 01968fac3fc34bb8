"""One layer of an integer program: its weights as integers, its real factors as gains, addends and shifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from caffejacinto_py.compress import fixed_point
from caffejacinto_py.compress.integer_forms import (
    BIAS_WIDTHS,
    FIXED_WIDTHS,
    WIDTHS,
    Form,
    Stored,
    Tensor,
    channels,
)
from caffejacinto_py.compress.integer_run import divisors, smallest
from caffejacinto_py.compress.numerics import over_axis, to_integers
from caffejacinto_py.ir.graph import Node
from caffejacinto_py.layers.base import IntegerForm

REFERS = ("weight", "weight_zero", "add", "shift")  # fields that name an array


@dataclass(frozen=True)
class Op:
    """fields: for the JSON document; some name arrays, see `placed`. exact: nothing was rounded, and every scale is a
    power of two."""

    name: str
    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]
    exact: bool


@dataclass(frozen=True)
class _Sums:
    """What a layer adds up before the gains. factors: real size of one accumulator step in steps of the output, per
    input and channel. constants: per channel, in steps of the output. bounds: largest |accumulator| per input."""

    factors: list[list[Fraction]]
    constants: list[Fraction]
    bounds: list[int]
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    power2: bool = True
    axis: int = 1
    divisor: int = 1  # of an average, the largest
    slopes: Sequence[Fraction] = ()  # per channel, what negative sums are multiplied by


def slope_of(form: IntegerForm) -> Fraction:
    """What a ReLU multiplies negative numbers by."""
    return Fraction(form.numbers.get("slope", 0))


def joined(node: Node, before: Fraction | None, form: IntegerForm) -> Fraction:
    """The slope of ReLU `node` behind numbers that already went through a ReLU of slope `before`."""
    if before is None:
        return slope_of(form)
    if before < 0:
        raise node.layer.fail("a ReLU behind one of negative slope cannot join it", "relu_param", hint="calibrate it")
    return before * slope_of(form)


def placed(fields: dict[str, Any], key: str) -> dict[str, Any]:
    """Fields of an op with `key` in front of the names of arrays."""
    named = {k: f"{key}/{v}" if k in REFERS and v is not None else v for k, v in fields.items()}
    named["gain"] = [f"{key}/{name}" for name in fields["gain"]]
    if "negative" in fields:
        named["negative"] = placed(fields["negative"], key)
    return named


def emit(
    node: Node, form: IntegerForm, ins: Sequence[Tensor], out: Tensor, found: Stored, blobs: Sequence[np.ndarray], *,
    slope: Fraction | None = None,
) -> Op:  # fmt: skip
    """The op of a layer. blobs: its float weights. slope: of a ReLU that belongs to it. Raises LayerError."""
    for i, blob in enumerate(blobs):
        if not np.isfinite(blob).all():
            raise node.layer.fail(f"blob {i} holds {int((~np.isfinite(blob)).sum())} numbers that are NaN or infinite")
    sums = EMITTERS[form.op](node, form, ins, out, found, blobs)
    fixed = _fit(node, sums, out)
    fields = {**sums.fields, "axis": sums.axis, "accumulator_bits": max(sums.bounds).bit_length() + 1,
              "sum_bits": fixed.bits}  # fmt: skip
    arrays = dict(sums.arrays)
    shape = sums.fields.get("_shape") or (len(sums.constants),)
    fields.pop("_shape", None)
    fields |= _numbers(fixed, shape, arrays)
    exact = fixed.exact
    slopes = list(sums.slopes) or ([slope] if slope else [])
    if slopes:
        if form.op == "max" and min(slopes) < 0:
            raise node.layer.fail("a ReLU of negative slope cannot join a maximum", hint="calibrate its top")
        below = _fit(node, _sloped(sums, slopes), out)
        fields["negative"] = _numbers(below, shape, arrays, "negative_")
        fields["sum_bits"] = max(fixed.bits, below.bits)
        exact = exact and below.exact
    in_float64 = fields["sum_bits"] <= 53  # else the simulation itself rounds
    exact = exact and in_float64 and sums.power2 and out.form.power2 and all(t.form.power2 for t in ins)
    name = "rescale" if form.op in ("relu", "round", "prelu", "bias") else form.op
    return Op(name, fields, arrays, exact)


def _fit(node: Node, sums: _Sums, out: Tensor) -> fixed_point.Fixed:
    zero = max(abs(out.form.zero), 1) * sums.divisor
    try:
        return fixed_point.fit(sums.factors, sums.constants, sums.bounds, zero)
    except fixed_point.NoRoom:
        text = "the sums need more than 64 bits: the scales of inputs, weights and top are too far apart"
        raise node.layer.fail(text, "quantization_param") from None


def _sloped(sums: _Sums, slopes: Sequence[Fraction]) -> _Sums:
    """The sums where they are negative."""
    slopes = _per_channel(slopes, len(sums.constants))
    factors = [[f * s for f, s in zip(_per_channel(row, len(slopes)), slopes, strict=True)] for row in sums.factors]
    return replace(sums, factors=factors, constants=[c * s for c, s in zip(sums.constants, slopes, strict=True)])


def _numbers(
    fixed: fixed_point.Fixed, shape: Sequence[int], arrays: dict[str, np.ndarray], front: str = ""
) -> dict[str, Any]:
    """Gains, addends and shifts: their fields; the numbers go into `arrays`."""
    fields: dict[str, Any] = {"gain_kind": fixed.kind, "gain": [], "add": None, "shift": f"{front}shift"}
    for i, gain in enumerate(fixed.gains):
        key = f"{front}gain" if len(fixed.gains) == 1 else f"{front}gain{i}"
        fields["gain"].append(key)
        arrays[key] = _pack(gain, shape)
    if any(fixed.add):
        fields["add"] = f"{front}add"
        arrays[f"{front}add"] = _pack(fixed.add, shape)
    arrays[f"{front}shift"] = _pack(fixed.shift, shape)
    return fields


def _pack(numbers: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """As an array of the smallest type, one number where all are equal."""
    kind = smallest(min(numbers), max(numbers))
    if len(set(numbers)) == 1:
        return np.asarray(numbers[:1], kind)
    return np.asarray(numbers, kind).reshape(shape)


def _per_channel(values: Sequence[Any], count: int) -> list[Any]:
    return list(values) * count if len(values) == 1 else list(values)


def _product(
    node: Node, form: IntegerForm, ins: Sequence[Tensor], out: Tensor, found: Stored, blobs: Sequence[np.ndarray]
) -> _Sums:
    q = found.weight(0)
    if q is None:
        text = "its weights have no quantization parameters with quantize: true"
        raise node.layer.fail(text, "quantization_param", hint="calibrate with quantize_weights, and do not ignore it")
    scales, zeros = channels(node, q, "qparam_w", 0, FIXED_WIDTHS if found.fixed else WIDTHS)
    axis = node.layer.output_axis([ins[0].shape])
    weight = torch.from_numpy(np.array(blobs[0], np.float64))
    count = node.layer.param.num_output
    if len(scales) > 1 and (axis is None or len(scales) != count):
        text = f"{len(scales)} scales for {count} output channels" if axis is not None else (
            "weights without an axis for all output channels have one scale only")  # fmt: skip
        raise node.layer.fail(text, "quantization_param", "qparam_w", 0, "channel_scale")
    whole = to_integers(weight, q if axis is None else over_axis(q, weight.dim(), axis)).numpy().astype(np.int64)
    zero = np.asarray(zeros, np.int64).reshape([-1 if a == axis and len(zeros) > 1 else 1 for a in range(whole.ndim)])
    if form.op == "dense" and form.numbers["transpose"]:
        whole, zero = whole.T, zero.T
    low, high = ins[0].form.reach
    centred = _rows(whole - zero, form, node, ins)
    more, less = np.maximum(centred, 0).sum(1), np.minimum(centred, 0).sum(1)
    most, least = (more * high + less * low).max(), (more * low + less * high).min()
    scales = _per_channel(scales, count)
    step = out.form.scale / ins[0].form.scale
    constants, bias_power2 = _bias(node, found, blobs, count, out)
    lowest, highest = q.limits
    fields = {k: v for k, v in form.numbers.items() if k != "transpose"}
    power2 = bias_power2 and all(fixed_point.exponent(s) is not None for s in scales)
    return _Sums(
        factors=[[step / s for s in scales]], constants=constants, bounds=[max(int(most), -int(least))],
        fields={**fields, "weight_bits": q.bits, "weight": "weight", "weight_zero": "weight_zero"},
        arrays={"weight": whole.astype(smallest(lowest, highest)), "weight_zero": _pack(zeros, zero.shape)},
        power2=power2, axis=len(out.shape) - 1 if form.op == "dense" else 1,
    )  # fmt: skip


def _rows(weight: np.ndarray, form: IntegerForm, node: Node, ins: Sequence[Tensor]) -> np.ndarray:
    """All numbers that can meet in one accumulator, per output channel."""
    if form.op != "deconv":
        return weight.reshape(len(weight), -1)
    group = form.numbers["group"]
    split = weight.reshape(group, len(weight) // group, *weight.shape[1:])
    return np.moveaxis(split, 2, 1).reshape(group * weight.shape[1], -1)


def _bias(
    node: Node, found: Stored, blobs: Sequence[np.ndarray], count: int, out: Tensor
) -> tuple[list[Fraction], bool]:
    """The bias in steps of the output, and whether its scale is a power of two."""
    if len(blobs) < 2:
        return [Fraction(0)] * count, True
    return _constants(node, found, 1, blobs[1], out)


def _constants(node: Node, found: Stored, i: int, blob: np.ndarray, out: Tensor) -> tuple[list[Fraction], bool]:
    """Blob i, quantized if it has qparams, in steps of the output; whether its scale is a power of two."""
    q = found.weight(i)
    values = np.asarray(blob, np.float64).ravel()
    if q is None:
        return [Fraction(v) * out.form.scale for v in values.tolist()], True
    scales, zeros = channels(node, q, "qparam_w", i, FIXED_WIDTHS if found.fixed else BIAS_WIDTHS)
    whole = to_integers(torch.from_numpy(values), over_axis(q, 1, 0)).tolist()
    rows = zip(whole, _per_channel(scales, len(values)), _per_channel(zeros, len(values)))
    power2 = all(fixed_point.exponent(s) is not None for s in scales)
    return [(int(n) - z) / s * out.form.scale for n, s, z in rows], power2


def _pool(
    node: Node, form: IntegerForm, ins: Sequence[Tensor], out: Tensor, found: Stored, blobs: Sequence[np.ndarray]
) -> _Sums:
    factor, bound, divisor = out.form.scale / ins[0].form.scale, ins[0].bound, 1
    if form.op == "average_pool":
        divisor = int(divisors(form.numbers, ins[0].shape[2:]).max())
        bound *= math.prod(form.numbers["kernel"])
    return _Sums([[factor]], [Fraction(0)], [bound], dict(form.numbers), divisor=divisor)


def _rescale(
    node: Node, form: IntegerForm, ins: Sequence[Tensor], out: Tensor, found: Stored, blobs: Sequence[np.ndarray]
) -> _Sums:
    """ReLU; PReLU: a slope per channel; Bias: a constant per channel."""
    factor = out.form.scale / ins[0].form.scale
    if form.op in ("relu", "round"):
        return _Sums([[factor]], [Fraction(0)], [ins[0].bound])
    if form.op == "prelu":
        slopes = [Fraction(v) for v in np.asarray(blobs[0], np.float64).ravel().tolist()]
        return _Sums([[factor] * len(slopes)], [Fraction(0)] * len(slopes), [ins[0].bound], slopes=slopes)
    constants, power2 = _constants(node, found, 0, blobs[0], out)
    shape = tuple(np.shape(blobs[0])) or (1,)
    fields = {"_shape": shape}
    return _Sums([[factor] * len(constants)], constants, [ins[0].bound], fields, power2=power2,
                 axis=form.numbers["axis"])  # fmt: skip


def _join(
    node: Node, form: IntegerForm, ins: Sequence[Tensor], out: Tensor, found: Stored, blobs: Sequence[np.ndarray]
) -> _Sums:
    coeff = form.numbers.get("coeff", (1.0,) * len(ins))
    factors = [[Fraction(c) * out.form.scale / t.form.scale] for c, t in zip(coeff, ins)]
    fields = {"join": form.numbers["axis"]} if form.op == "concat" else {}
    return _Sums(factors, [Fraction(0)], [t.bound for t in ins], fields)


def _multiply(
    node: Node, form: IntegerForm, ins: Sequence[Tensor], out: Tensor, found: Stored, blobs: Sequence[np.ndarray]
) -> _Sums:
    scale = math.prod((t.form.scale for t in ins), start=Fraction(1))
    return _Sums([[out.form.scale / scale]], [Fraction(0)], [math.prod(t.bound for t in ins)])


def wide(node: Node, found: Stored, source: Tensor, blobs: Sequence[np.ndarray], form: IntegerForm) -> Form:
    """The form of a product's sums as they are, for a last layer that does not round: every bit of them."""
    q = found.weight(0)
    assert q is not None
    unit = Form(2, True, source.form.scale * Fraction(float(q.scale)), 0)
    shape = node.layer.shapes([source.shape])[0]
    sums = EMITTERS[form.op](node, form, [source], Tensor("", shape, unit), found, blobs)
    most = max(sums.bounds) + max((abs(c) for c in sums.constants), default=Fraction(0)) + 1
    return replace(unit, bits=int(most).bit_length() + 1)


Emitter = Callable[[Node, IntegerForm, Sequence[Tensor], Tensor, Stored, Sequence[np.ndarray]], _Sums]
EMITTERS: dict[str, Emitter] = {
    "conv": _product,
    "deconv": _product,
    "dense": _product,
    "max_pool": _pool,
    "average_pool": _pool,
    "relu": _rescale,
    "round": _rescale,
    "prelu": _rescale,
    "bias": _rescale,
    "sum": _join,
    "max": _join,
    "concat": _join,
    "product": _multiply,
}
