"""Fixed-point numbers of the quantization simulation: from a range to a scale, and the quantize operator.

A real x becomes the integer n = clip(round(x * scale + offset)); (n - offset) / scale stands for it, still a float.
Source: caffe-jacinto 0.17 quantized_layer.cpp, quantized_layer.cu, net.cpp; the sound forms are ours.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.layers.modules.rounding import below_half, half_away, half_even, stochastic, straight_through
from caffejacinto_py.schema import pb

__all__ = [
    "Format",
    "QParams",
    "from_integers",
    "from_message",
    "half_away",
    "half_even",
    "make_qparams",
    "over_axis",
    "per_channel",
    "simulate",
    "stochastic",
    "straight_through",
    "to_integers",
    "to_message",
]

_PIECE = 2**16
Number = float | Tensor  # one number for a blob, or a tensor that broadcasts over it (a scale per channel)


@dataclass(frozen=True)
class Format:
    """What a number should look like. bits: width with sign. power2: scales are powers of two. offset: asymmetric."""

    bits: int = 8
    power2: bool = False
    offset: bool = False


@dataclass(frozen=True)
class QParams:
    """One blob's quantization; the fields of `QuantizationParameter.QParams` (schema) under shorter names.

    scale, offset: x -> x * scale + offset (scale_target, offset). applied: scale_applied. unsigned: the integers are
    0 .. 2^bits - 1, else -2^(bits-1) .. 2^(bits-1) - 1 (unsigned_quant). positive: the data has no negative values
    (unsigned_data). shift: -log2(scale) where scales are powers of two (shiftbits). min, max: the range behind it.
    """

    bits: int = 8
    scale: Number = 1.0
    offset: Number = 0.0
    applied: float = 1.0
    unsigned: bool = False
    positive: bool = False
    shift: int = 0
    min: Number = 0.0
    max: Number = 0.0
    quantize: bool = False

    @property
    def channels(self) -> int:
        """How many channels have a scale of their own; 0: one scale for the blob."""
        return self.scale.numel() if isinstance(self.scale, Tensor) else 0

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self.unsigned:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def make_qparams(low: float, high: float, form: Format, *, applied: float = 1.0, sound: bool = True) -> QParams:
    """The qparams of a range. applied: the blob's scale_applied, 1 in a plain net.

    sound: an empty range gets scale 1, and the offset is rounded, so that zero is represented exactly (zero is
    taken into the range first); all numbers are what float32 can hold, so that a message keeps them. Not sound: as the
    binary computes, infinite scales included.
    """
    if sound:
        low, high = _float32(low), _float32(high)
        if form.offset:
            low, high = min(low, 0.0), max(high, 0.0)
    magnitude, extent = max(abs(low), abs(high)) * applied, abs(high - low) * applied
    positive = low >= 0
    unsigned = positive or form.offset
    reach = extent if form.offset else magnitude
    shift = 0
    if form.power2:
        exponent = math.ceil(math.log2(reach)) if reach > 0 else 0
        exponent += 0 if unsigned else 1
        shift = exponent - form.bits
        relative = 2.0**-shift
    else:
        top = 2**form.bits - 1 if unsigned else 2 ** (form.bits - 1) - 1
        relative = top / reach if reach > 0 else (1.0 if sound else math.inf)
    scale = relative * applied
    if sound:
        scale = _float32(scale)
        if not 0 < scale < math.inf:  # a range too small for float32 is as good as empty
            scale, shift = 1.0, 0
        return QParams(form.bits, scale, _zero_point(low, scale, form), applied, unsigned, positive, shift, low, high)
    offset = -low * scale if form.offset else 0.0
    return QParams(form.bits, scale, offset, applied, unsigned, positive, shift, low, high)


def _zero_point(low: float, scale: float, form: Format) -> float:
    """The integer that stands for zero."""
    return float(min(max(round(-low * scale), 0), 2**form.bits - 1)) if form.offset else 0.0


def _float32(value: float) -> float:
    return ctypes.c_float(value).value  # infinite where it does not fit


def per_channel(low: Tensor, high: Tensor, form: Format) -> QParams:
    """Sound qparams with one scale per channel. low, high: broadcastable over the blob, e.g. (out, 1, 1, 1)."""
    lows, highs = (t.detach().float().cpu().numpy().astype(np.float64) for t in (low, high))
    if form.offset:
        lows, highs = np.minimum(lows, 0), np.maximum(highs, 0)
    positive = bool((lows >= 0).all())
    # one kind of integer for the whole blob: signed as soon as one channel has negative values
    unsigned = positive or form.offset
    reach = highs - lows if form.offset else np.maximum(abs(lows), abs(highs))
    with np.errstate(divide="ignore", over="ignore"):
        if form.power2:
            exponent = np.ceil(np.log2(np.where(reach > 0, reach, 1.0))) + (0 if unsigned else 1)
            scale = np.exp2(form.bits - exponent).astype(np.float32)
        else:
            scale = ((2**form.bits - 1 if unsigned else 2 ** (form.bits - 1) - 1) / reach).astype(np.float32)
    scale = np.where((reach > 0) & np.isfinite(scale) & (scale > 0), scale, 1).astype(np.float64)
    offset = np.clip(np.rint(-lows * scale), 0, 2**form.bits - 1) if form.offset else np.zeros_like(scale)
    edges = torch.from_numpy(lows), torch.from_numpy(highs)
    return QParams(
        form.bits, torch.from_numpy(scale), torch.from_numpy(offset), 1.0, unsigned, positive, 0, *edges
    )  # fmt: skip


def over_axis(q: QParams, ndim: int, axis: int) -> QParams:
    """Per-channel qparams shaped to broadcast over a blob of `ndim` axes whose channels are on `axis`; others as they
    are."""
    if not q.channels:
        return q
    shape = [q.channels if i == axis else 1 for i in range(ndim)]

    def spread(value: Number) -> Number:
        return value.reshape(shape) if isinstance(value, Tensor) and value.numel() == q.channels else value

    return replace(q, scale=spread(q.scale), offset=spread(q.offset), min=spread(q.min), max=spread(q.max))


# --- the operator ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def to_integers(
    x: Tensor, q: QParams, *, rounding: Any = half_away, clip: bool = True, clip_first: bool = False
) -> Tensor:
    """The integers of x, as floats. rounding: a function such as half_away. clip_first: clip before rounding (the CPU
    binary)."""
    y = x * _like(q.scale, x)
    if isinstance(q.offset, Tensor) or q.offset:
        y += _like(q.offset, x)
    if not clip:
        return rounding(y)  # type: ignore[no-any-return]
    low, high = q.limits
    if clip_first:
        return rounding(y.clamp_(low, high))  # type: ignore[no-any-return]
    return rounding(y).clamp_(low, high)  # type: ignore[no-any-return]


@torch.no_grad()
def from_integers(n: Tensor, q: QParams) -> Tensor:
    """The reals that integers stand for."""
    if isinstance(q.offset, Tensor) or q.offset:
        return (n - _like(q.offset, n)).div_(_like(q.scale, n))
    return n / _like(q.scale, n)


def simulate(x: Tensor, q: QParams, **options: Any) -> Tensor:
    """x with every value replaced by the nearest one that the integers can express; options of `to_integers`. Without
    gradient, see `straight_through`."""
    plain = not isinstance(q.scale, Tensor) and not isinstance(q.offset, Tensor)
    if plain and options.get("rounding", half_away) is half_away and x.numel():
        flat = in_memory_order(x.detach())
        if flat.is_contiguous():
            return _simulate(x.detach(), flat.view(-1), q, clip=options.get("clip", True))
    y = from_integers(to_integers(x, q, **options), q)
    # strides of axes of size 1 mark channels_last memory, which convolutions look at
    return y.as_strided(x.shape, x.stride()) if x.is_contiguous() and y.is_contiguous() else y


@torch.no_grad()
def _simulate(x: Tensor, flat: Tensor, q: QParams, *, clip: bool) -> Tensor:
    """The same, rounding halves away from zero, in pieces that stay in the processor's cache."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)  # also those of axes of size 1
    piece = _PIECE * torch.get_num_threads() if x.device.type == "cpu" else flat.numel()
    scale, offset, below = float(q.scale), float(q.offset), below_half(x.dtype)
    low, high = q.limits
    signed = not clip or low < 0
    sign = torch.empty(min(piece, len(flat)) if signed else 0, dtype=x.dtype, device=x.device)
    made = in_memory_order(out).view(-1)
    pieces = [(flat, made)] if len(flat) <= piece else zip(flat.split(piece), made.split(piece), strict=True)
    for a, b in pieces:
        torch.mul(a, scale, out=b)
        if offset:
            b.add_(offset)
        if clip:  # the limits are whole numbers: before or behind the rounding is the same
            b.clamp_(low, high)
        if signed:
            s = torch.sign(b, out=sign[: len(b)])
            b.abs_().add_(below).floor_().mul_(s)
        else:
            b.add_(below).floor_()
        if offset:
            b.sub_(offset)
        b.div_(scale)
    return out


def in_memory_order(x: Tensor) -> Tensor:
    """The same values with the axes as they lie in memory: work over channels_last memory need not copy."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1)
    return x


def _like(value: Number, x: Tensor) -> Number:
    if isinstance(value, Tensor) and x.is_cuda and not value.is_cuda:
        return value.to(x.dtype).pin_memory().to(x.device, non_blocking=True)  # nobody waits for the device
    return value.to(x.device, x.dtype) if isinstance(value, Tensor) else value


# --- messages --------------------------------------------------------------------------------------------------------
def to_message(q: QParams) -> Any:
    """A QuantizationParameter.QParams message. With a scale per channel, scale_target and offset hold what the blob as
    a whole would get; min and max are always of the whole blob."""
    m = pb.QuantizationParameter.QParams(
        bitwidth=q.bits, fracbits=0, unsigned_data=q.positive, unsigned_quant=q.unsigned, shiftbits=q.shift
    )
    if q.quantize:
        m.quantize = True
    if q.applied != 1:
        m.scale_applied = q.applied
    low, high = _edge(q.min, min), _edge(q.max, max)
    m.min, m.max = low, high
    if isinstance(q.scale, Tensor):
        # the whole blob with the coarsest of the scales
        m.channel_scale[:] = q.scale.flatten().tolist()
        m.scale_target = float(q.scale.min())
        if isinstance(q.offset, Tensor) and bool((q.offset != 0).any()):
            m.channel_offset[:] = q.offset.flatten().tolist()
            m.offset = float(round(-min(low, 0.0) * m.scale_target))
        else:
            m.offset = 0.0
    else:
        m.scale_target, m.offset = q.scale, float(q.offset)
    return m


def from_message(message: Any) -> QParams:
    """The QParams of a message. Scales per channel are float64 tensors of one axis: see `over_axis`. A message of
    caffe-jacinto 0.16 has `scale`, which is scale_target."""
    old = message.HasField("scale") and not message.HasField("scale_target")
    scale: Number = message.scale if old else message.scale_target
    offset: Number = message.offset
    if message.channel_scale:
        scale = torch.tensor(list(message.channel_scale), dtype=torch.float64)
        offset = torch.tensor(list(message.channel_offset) or [0.0] * len(scale), dtype=torch.float64)
    return QParams(
        message.bitwidth, scale, offset, message.scale_applied, message.unsigned_quant, message.unsigned_data,
        message.shiftbits, message.min, message.max, message.quantize,
    )  # fmt: skip


def _edge(value: Number, choose: Any) -> float:
    return float(choose(value.flatten().tolist())) if isinstance(value, Tensor) else value
