"""Real factors as integers: a multiplier or a left shift, one addend and one right shift, all per channel.

What is wanted: sum_i factor_i * acc_i + constant, in steps of the output. What an integer program has: (sum_i gain_i *
acc_i + add) / 2^shift, rounded once. Exact where all factors and constants are whole multiples of some 2^-shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

ROOM = 62  # bits of a sum before rounding, without its sign: the rounding itself may add one
MANTISSA = 31  # bits of a multiplier, without its sign
EXTRA = 8  # bits of an addend below the accumulator where it cannot be exact
NEARLY = Fraction(1, 1 << 18)  # float32 scales whose ratio was meant to be a power of two are this near to it


@dataclass(frozen=True)
class Fixed:
    """gains: per input, per channel: left shifts (kind "shift") or multipliers. add, shift: per channel.

    exact: nothing was rounded on the way to these integers. bits: of the largest sum before rounding, with its sign.
    """

    kind: str
    gains: tuple[tuple[int, ...], ...]
    add: tuple[int, ...]
    shift: tuple[int, ...]
    exact: bool
    bits: int


class NoRoom(ValueError):
    """The numbers need more than 64 bits."""


def exponent(x: Fraction) -> int | None:
    """e where x = 2^e, else None."""
    n, d = x.numerator, x.denominator
    if x <= 0 or n & (n - 1) or d & (d - 1):
        return None
    return n.bit_length() - d.bit_length()


def half_away(x: Fraction) -> int:
    """The nearest whole number, halves away from zero."""
    n = (2 * abs(x.numerator) + x.denominator) // (2 * x.denominator)
    return n if x >= 0 else -n


def fit(
    factors: Sequence[Sequence[Fraction]], constants: Sequence[Fraction], bounds: Sequence[int], zero: int
) -> Fixed:
    """The integers for these factors.

    factors: per input a list with one factor per channel; constants: per channel, in steps of the output. bounds:
    per input the largest |acc|. zero: the output's zero point, which is added before the rounding. Raises NoRoom.
    """
    columns = [tuple(f[c] for f in factors) for c in range(len(constants))]
    shifts_only = all(_near_power(f) is not None for column in columns for f in column)
    done = [_channel(column, constant, bounds, zero, shifts_only) for column, constant in zip(columns, constants)]
    gains = tuple(tuple(d[0][i] for d in done) for i in range(len(factors)))
    bits = max(d[4] for d in done)
    add, shift = tuple(d[1] for d in done), tuple(d[2] for d in done)
    return Fixed("shift" if shifts_only else "multiplier", gains, add, shift, all(d[3] for d in done), bits)


_Channel = tuple[tuple[int, ...], int, int, bool, int]  # gains, add, shift, exact, bits


def _channel(
    factors: tuple[Fraction, ...], constant: Fraction, bounds: Sequence[int], zero: int, shifts_only: bool
) -> _Channel:
    found = _exactly(factors, constant, bounds, zero, shifts_only)
    if found is not None:
        return found
    if shifts_only:
        powers = [_near_power(f) for f in factors]
        least = max(0, max(-p for p in powers if p is not None))
        shifts = range(least + (EXTRA if constant else 0), least - 1, -1)
        rounded = tuple(Fraction(2) ** p for p in powers if p is not None)
    else:
        largest = max(abs(f) for f in factors)
        most = MANTISSA + 1 - (largest.numerator.bit_length() - largest.denominator.bit_length())
        shifts, rounded = range(max(0, min(ROOM, most)), -1, -1), factors
    for shift in shifts:
        gains = tuple(half_away(f * (1 << shift)) for f in rounded)
        add = half_away(constant * (1 << shift))
        bits = _bits(gains, add, bounds, zero, shift)
        if bits <= ROOM and (shifts_only or max(abs(g) for g in gains) < 1 << MANTISSA):
            left = tuple(g.bit_length() - 1 for g in gains) if shifts_only else gains
            return left, add, shift, False, bits + 1
    raise NoRoom


def _exactly(
    factors: tuple[Fraction, ...], constant: Fraction, bounds: Sequence[int], zero: int, shifts_only: bool
) -> _Channel | None:
    """With the smallest shift that makes everything whole, if there is room for it."""
    shift = 0
    for x in (*factors, constant):
        if x.denominator & (x.denominator - 1):
            return None
        shift = max(shift, x.denominator.bit_length() - 1)
    if shift > ROOM:
        return None
    gains = tuple(int(f * (1 << shift)) for f in factors)
    add = int(constant * (1 << shift))
    bits = _bits(gains, add, bounds, zero, shift)
    if bits > ROOM:
        return None
    if shifts_only:
        if any(exponent(f) is None for f in factors):
            return None
        return tuple(g.bit_length() - 1 for g in gains), add, shift, True, bits + 1
    if max(abs(g) for g in gains) >= 1 << MANTISSA:
        return None
    return gains, add, shift, True, bits + 1


def _bits(gains: Sequence[int], add: int, bounds: Sequence[int], zero: int, shift: int) -> int:
    total = sum(abs(g) * b for g, b in zip(gains, bounds)) + abs(add) + (abs(zero) << shift) + (1 << shift)
    return total.bit_length()


def _near_power(x: Fraction) -> int | None:
    """e where x is 2^e, or so near to it that only the rounding of float32 scales lies between."""
    if x <= 0:
        return None
    e = x.numerator.bit_length() - x.denominator.bit_length()
    for candidate in (e - 1, e, e + 1):
        if abs(x / Fraction(2) ** candidate - 1) < NEARLY:
            return candidate
    return None
