"""Factors as shifts, multipliers and addends."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffejacinto_py.compress.fixed_point import MANTISSA, ROOM, NoRoom, exponent, fit, half_away


def value(fixed: object, c: int = 0) -> tuple[F, F]:
    """The factor and the constant that the integers stand for."""
    gain = fixed.gains[0][c]  # type: ignore[attr-defined]
    gain = 1 << gain if fixed.kind == "shift" else gain  # type: ignore[attr-defined]
    return F(gain, 1 << fixed.shift[c]), F(fixed.add[c], 1 << fixed.shift[c])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("factor", "constant", "gain", "add", "shift"),
    [
        (F(1, 128), F(0), 0, 0, 7),
        (F(8), F(0), 3, 0, 0),
        (F(1, 128), F(3, 1024), 3, 3, 10),  # the constant is finer than the accumulator: align to it
        (F(1, 4), F(5), 0, 20, 2),
        (F(2), F(1, 8), 4, 1, 3),
    ],
)
def test_powers_of_two_are_shifts_and_exact(factor: F, constant: F, gain: int, add: int, shift: int) -> None:
    fixed = fit([[factor]], [constant], [1 << 20], 0)
    assert (fixed.kind, fixed.gains, fixed.add, fixed.shift, fixed.exact) == (
        "shift", ((gain,),), (add,), (shift,), True)  # fmt: skip
    assert value(fixed) == (factor, constant)


def test_whole_multiples_of_a_power_of_two_are_exact_multipliers() -> None:
    fixed = fit([[F(-3, 4)], [F(1, 2)]], [F(0)], [128, 128], 0)
    assert (fixed.kind, fixed.gains, fixed.shift, fixed.exact) == ("multiplier", ((-3,), (2,)), (2,), True)


def test_a_ratio_of_float32_scales_that_was_meant_to_be_a_power_of_two_is_a_shift() -> None:
    fixed = fit([[F(1, 64) * (1 + F(1, 1 << 22))]], [F(1, 3)], [1 << 20], 0)
    assert (fixed.kind, fixed.exact) == ("shift", False)
    assert abs(value(fixed)[1] - F(1, 3)) < F(1, 1 << 10)
    assert fit([[F(1, 64) * (1 + F(1, 1 << 12))]], [F(0)], [1 << 20], 0).kind == "multiplier"


@given(st.fractions(F(1, 1 << 30), 1 << 8), st.fractions(-1000, 1000), st.integers(1, 1 << 33), st.integers(0, 1 << 15))
def test_multipliers_are_near_and_have_room(factor: F, constant: F, bound: int, zero: int) -> None:
    fixed = fit([[factor]], [constant], [bound], zero)
    got_factor, got_constant = value(fixed)
    gain = fixed.gains[0][0]
    assert fixed.kind == "shift" or abs(gain) < 1 << MANTISSA
    assert fixed.bits <= ROOM + 1
    # the largest sum is off by less than a hundredth of a step, where 31 bits and 64 bits allow it at all
    if bound * factor < 1 << 16:
        assert abs(got_factor - factor) * bound + abs(got_constant - constant) < F(1, 100)


def test_no_room() -> None:
    with pytest.raises(NoRoom):
        fit([[F(1 << 40)]], [F(0)], [1 << 30], 0)


def test_channels_have_their_own_numbers() -> None:
    fixed = fit([[F(1, 2), F(1, 8)]], [F(1), F(-1, 16)], [100], 3)
    assert (fixed.gains, fixed.add, fixed.shift) == (((0, 1),), (2, -1), (1, 4))


@pytest.mark.parametrize(("x", "n"), [(F(1, 2), 1), (F(-1, 2), -1), (F(5, 2), 3), (F(49, 100), 0), (F(-51, 100), -1)])
def test_half_away(x: F, n: int) -> None:
    assert half_away(x) == n


def test_exponent() -> None:
    assert [exponent(x) for x in (F(8), F(1), F(1, 4), F(3), F(0), F(-2))] == [3, 0, -2, None, None, None]
