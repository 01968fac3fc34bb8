"""The schedules against formulas written out, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest

from caffejacinto_py.errors import ManyErrors, PrototxtError
from caffejacinto_py.schema.dialect import DIALECTS
from caffejacinto_py.schema.text import parse
from caffejacinto_py.solver import lr

JACINTO, OLD = DIALECTS["jacinto"], DIALECTS["jacinto-0.16"]


def doc(text: str) -> Any:
    return parse(text, "SolverParameter", file="s.prototxt")


def rates(text: str, at: list[int], **options: Any) -> list[float]:
    param = doc("base_lr: 0.5 " + text).message
    lr.check(param)
    return [lr.learning_rate(param, t, **options) for t in at]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('lr_policy: "fixed"', [0.5, 0.5, 0.5]),
        ('lr_policy: "step" gamma: 0.5 stepsize: 4', [0.5, 0.5, 0.125]),
        ('lr_policy: "exp" gamma: 0.5', [0.5, 0.0625, 0.5 * 0.5**9]),
        ('lr_policy: "inv" gamma: 0.25 power: 2', [0.5, 0.5 / 1.75**2, 0.5 / 3.25**2]),
        ('lr_policy: "poly" power: 2 max_iter: 10', [0.5, 0.5 * 0.49, 0.5 * 0.01]),
        ('lr_policy: "sigmoid" gamma: -0.5 stepsize: 3',
         [0.5 / (1 + math.exp(0.5 * -3)), 0.25, 0.5 / (1 + math.exp(0.5 * 6))]),
    ],
)  # fmt: skip
def test_policies(text: str, want: list[float]) -> None:
    assert rates(text, [0, 3, 9]) == pytest.approx(want, rel=1e-6)


def test_poly_ends_at_the_floor_and_stays() -> None:
    assert (
        rates('lr_policy: "poly" power: 0.5 max_iter: 10 min_lr: 0.1', [10, 25], dialect=JACINTO)
        == [pytest.approx(0.1)] * 2
    )


def test_sigmoid_does_not_overflow() -> None:
    assert rates('lr_policy: "sigmoid" gamma: 1 stepsize: 3', [10**6]) == [0.5]
    assert rates('lr_policy: "sigmoid" gamma: -1 stepsize: 3', [10**6]) == [0.0]


def test_multistep_moves_once_per_iteration() -> None:
    param = doc('base_lr: 1 lr_policy: "multistep" gamma: 0.5 stepvalue: 2 stepvalue: 2 stepvalue: 5').message
    lr.check(param)
    found, step = [], 0
    for t in range(7):
        step = lr.advance_step(param, t, step)
        found.append(lr.learning_rate(param, t, step=step))
    assert found == [1, 1, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_rampup_and_floor_by_dialect() -> None:
    text = 'lr_policy: "exp" gamma: 0.5 rampup_interval: 4 rampup_lr: 0.1 min_lr: 0.05'
    assert rates(text, [0, 2, 4, 9], dialect=JACINTO) == pytest.approx([0.1, 0.2, 0.05, 0.05])
    assert rates(text, [0, 2, 4, 9], dialect=OLD) == pytest.approx([0.1, 0.3, 0.5 / 16, 0.5 / 512])


def test_warmup() -> None:
    text = "warmup_iter: 4 warmup_start_lr: 0.1 "
    assert rates(text + 'lr_policy: "fixed"', [0, 1, 2, 4, 9]) == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.5])
    text += 'lr_policy: "multistep" gamma: 0.1 stepvalue: 2 stepvalue: 6'
    param = doc("base_lr: 0.5 " + text).message
    lr.check(param)
    step, found = 0, []
    for t in range(8):
        step = lr.advance_step(param, t, step)
        found.append((step, lr.learning_rate(param, t, step=step)))
    assert [s for s, _ in found] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [r for _, r in found] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.05, 0.05, 0.005, 0.005])
    assert rates('lr_policy: "step" gamma: 0.5 stepsize: 2 warmup_iter: 2', [0, 1, 2, 4]) == [0, 0.25, 0.25, 0.125]


def test_multifixed() -> None:
    text = """lr_policy: "multifixed" stagelr: 0.5 stagelr: 0.25 stagelr: 0.125
              stageiter: 2 stageiter: 5 stageiter: 9"""
    param = doc(text).message
    lr.check(param)
    assert [lr.learning_rate(param, t) for t in (0, 2, 3, 5, 6, 9, 10, 99)] == [0.5] * 2 + [0.25] * 2 + [0.125] * 4


def test_momentum() -> None:
    param = doc('momentum: 0.5 momentum_policy: "poly" max_momentum: 0.9 momentum_power: 2 max_iter: 10').message
    assert [lr.momentum(param, t, 0.1) for t in (0, 5, 10, 20)] == pytest.approx([0.5, 0.6, 0.9, 0.9])
    param = doc('momentum_policy: "opt"').message
    assert lr.momentum(param, 3, 0.04) == pytest.approx(0.81)
    param.max_momentum = 0.75
    assert lr.momentum(param, 3, 0.04) == 0.75


def test_weight_decay() -> None:
    param = doc('weight_decay: 0.5 weight_decay_policy: "poly" max_iter: 16').message
    assert [lr.weight_decay(param, t, dialect=JACINTO) for t in (0, 4, 16)] == pytest.approx([0, 0.25, 0.5])
    assert lr.weight_decay(param, 4) == 0.125
    param.weight_decay_power = 2
    assert lr.weight_decay(param, 4, dialect=JACINTO) == 0.5 / 16


@pytest.mark.parametrize(
    ("text", "message", "line", "hint"),
    [
        ('base_lr: 1\nlr_policy: "stp"', "unknown lr_policy 'stp'", 2, "'step'"),
        ('base_lr: 1\nlr_policy: "plateau"', "unknown lr_policy 'plateau'", 2, "multistep"),
        ('base_lr: 1\nlr_policy: "step" stepsize: 3', "needs gamma", 2, None),
        ('lr_policy: "multifixed" stagelr: 1', "as many stageiter as stagelr", 1, None),
        ('lr_policy: "multifixed"\nstagelr: [1, 2] stageiter: [2, 1]', "stageiter must increase", 2, None),
        ('lr_policy: "multifixed" stagelr: 1 stageiter: 2 warmup_iter: 2', "base_lr is not set", 0, None),
        ('base_lr: 1 lr_policy: "fixed"\nwarmup_iter: -1', "cannot be negative", 2, None),
        ('base_lr: 1 lr_policy: "fixed" rampup_interval: 2\nwarmup_iter: 1', "give one of them", 2, None),
        ('base_lr: 1\nlr_policy: "step" gamma: 1\nstepsize: 0', "stepsize must be positive", 3, None),
        ('base_lr: 1\nlr_policy: "poly" power: 1', "needs max_iter", 2, None),
        ('base_lr: 1\nlr_policy: "multistep" gamma: 0.1', "needs stepvalue", 2, None),
        ('base_lr: 1 lr_policy: "multistep" gamma: 0.1\nstepvalue: 5 stepvalue: 3', "must increase", 2, None),
        ('base_lr: 1 lr_policy: "fixed"\nmomentum_policy: "pol"', "unknown momentum_policy", 2, "'poly'"),
        ('base_lr: 1 lr_policy: "fixed"\nweight_decay_policy: "x"', "unknown weight_decay_policy", 2, "fixed"),
        ('lr_policy: "fixed"', "base_lr is not set", 0, None),
        ("base_lr: 1", "lr_policy is not set", 0, "fixed"),
    ],
)
def test_refusals(text: str, message: str, line: int, hint: str | None) -> None:
    d = doc(text)
    with pytest.raises(PrototxtError, match=message) as error:
        lr.check(d.message, lambda *path: d.locs.find(path))
    assert (error.value.loc.line if error.value.loc else 0) == line
    assert hint is None or hint in (error.value.hint or "")


def test_all_at_once() -> None:
    d = doc('lr_policy: "exp" momentum_policy: "x"')
    with pytest.raises(ManyErrors) as error:
        lr.check(d.message)
    assert len(error.value.errors) == 3
