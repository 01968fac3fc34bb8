"""Learning rate, momentum and weight decay as functions of the iteration. Pure: a solver message in, a number out.

Formulas: Caffe's `GetLearningRate` (BVLC and caffe-jacinto 0.17; warm-up and "multifixed": Intel Caffe). The iteration
is the one about to be applied, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from caffejacinto_py.errors import CaffeError, Loc, PrototxtError, near, raise_all
from caffejacinto_py.schema.dialect import BVLC, Dialect

Where = Callable[..., Loc | None]  # a field path of the solver file -> its place

# what each policy reads: a field that must be set (its default would train with a rate of 0, or divide by 0)
LR_POLICIES: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "step": ("gamma", "stepsize"),
    "exp": ("gamma",),
    "inv": ("gamma", "power"),
    "multistep": ("gamma",),
    "poly": ("power", "max_iter"),
    "sigmoid": ("gamma", "stepsize"),
    "multifixed": (),
}
MOMENTUM_POLICIES: dict[str, tuple[str, ...]] = {"fixed": (), "poly": ("max_iter",), "opt": ()}
DECAY_POLICIES: dict[str, tuple[str, ...]] = {"fixed": (), "poly": ("max_iter",)}


def nowhere(*path: str | int) -> Loc | None:
    """The `Where` of a message that came from no file."""
    return None


def check(param: Any, where: Where = nowhere) -> None:
    """Refuse unknown policies and missing or wrong fields of the three schedules: all errors at once, with places."""
    errors: list[CaffeError] = []
    if not param.HasField("base_lr") and (param.lr_policy != "multifixed" or param.warmup_iter > 0):
        errors.append(PrototxtError("base_lr is not set: nothing would be learned", loc=where()))
    if not param.lr_policy:
        hint = 'for a constant rate: lr_policy: "fixed"'
        errors.append(PrototxtError("lr_policy is not set", loc=where(), hint=hint))
    else:
        _check(param, "lr_policy", LR_POLICIES, where, errors)
    _check(param, "momentum_policy", MOMENTUM_POLICIES, where, errors)
    _check(param, "weight_decay_policy", DECAY_POLICIES, where, errors)
    if param.lr_policy in ("step", "sigmoid") and param.HasField("stepsize") and param.stepsize <= 0:
        errors.append(PrototxtError(f"stepsize must be positive, not {param.stepsize}", loc=where("stepsize")))
    if param.lr_policy == "multistep":
        steps = list(param.stepvalue)
        if not steps:
            errors.append(PrototxtError("lr_policy 'multistep' needs stepvalue", loc=where("lr_policy")))
        if steps != sorted(steps):
            errors.append(PrototxtError(f"stepvalue must increase: {steps}", loc=where("stepvalue", 0)))
    _check_stages(param, where, errors)
    raise_all(errors)


def _check_stages(param: Any, where: Where, errors: list[CaffeError]) -> None:
    """Warm-up and the stages of "multifixed"."""
    if param.warmup_iter < 0:
        text = f"warmup_iter cannot be negative: {param.warmup_iter}"
        errors.append(PrototxtError(text, loc=where("warmup_iter")))
    if param.warmup_iter > 0 and param.rampup_interval > 0:
        text = "warmup_iter (Intel Caffe) and rampup_interval (NVCaffe) both start the learning rate; give one of them"
        errors.append(PrototxtError(text, loc=where("warmup_iter")))
    if param.lr_policy != "multifixed":
        return
    rates, ends = list(param.stagelr), list(param.stageiter)
    if not rates or len(rates) != len(ends):
        text = f"lr_policy 'multifixed' needs as many stageiter as stagelr, at least one: {len(ends)} and {len(rates)}"
        errors.append(PrototxtError(text, loc=where("lr_policy")))
    elif ends != sorted(ends):
        errors.append(PrototxtError(f"stageiter must increase: {ends}", loc=where("stageiter", 0)))


def _check(param: Any, field: str, known: dict[str, tuple[str, ...]], where: Where, errors: list[CaffeError]) -> None:
    policy = getattr(param, field)
    if policy not in known:
        hint = near(policy, known) or f"known: {', '.join(known)}"
        if policy == "plateau":
            hint = "the policy 'plateau' of SSD and Intel Caffe is not supported here; use 'multistep' or 'poly'"
        errors.append(PrototxtError(f"unknown {field} '{policy}'", loc=where(field), hint=hint))
        return
    for need in known[policy]:
        if not param.HasField(need):
            errors.append(PrototxtError(f"{field} '{policy}' needs {need}, which is not set", loc=where(field)))
        elif need == "max_iter" and param.max_iter <= 0:
            text = f"{field} '{policy}' needs a positive max_iter, not {param.max_iter}"
            errors.append(PrototxtError(text, loc=where("max_iter")))


def advance_step(param: Any, iteration: int, step: int) -> int:
    """The counter `current_step` of a solverstate for this iteration, given the one before.

    "multistep": it moves by at most one per evaluation, as Caffe's does: equal stepvalues take effect on successive
    iterations. "step": the number of steps done. Other policies leave it, and so does the warm-up.
    """
    if iteration < param.warmup_iter:
        return step
    if param.lr_policy == "step":
        return iteration // param.stepsize
    if param.lr_policy == "multistep" and step < len(param.stepvalue) and iteration >= param.stepvalue[step]:
        return step + 1
    return step


def learning_rate(param: Any, iteration: int, *, step: int = 0, dialect: Dialect = BVLC) -> float:
    """The learning rate. step: the multistep counter after `advance_step`.

    During the first warmup_iter iterations (Intel Caffe) it goes in a straight line from warmup_start_lr to base_lr,
    whatever the policy; afterwards the policy counts from iteration 0 all the same.
    Deviation: "poly" beyond max_iter stays at min_lr, where Caffe raises a negative number to a power (NaN).
    """
    if iteration < param.rampup_interval:
        done = iteration / param.rampup_interval
        done = done * done if dialect.rampup_quadratic else done
        rate = param.rampup_lr + (param.base_lr - param.rampup_lr) * done
    elif iteration < param.warmup_iter:
        done = iteration / param.warmup_iter
        rate = param.warmup_start_lr + (param.base_lr - param.warmup_start_lr) * done
    else:
        rate = _policy(param, iteration, step)
    return max(rate, param.min_lr) if dialect.lr_floor and param.HasField("min_lr") else rate


def _policy(param: Any, t: int, step: int) -> float:
    base, gamma = param.base_lr, param.gamma
    policy = param.lr_policy
    if policy == "fixed":
        return base
    if policy == "step":
        return base * gamma ** (t // param.stepsize)
    if policy == "exp":
        return base * gamma**t
    if policy == "inv":
        return base * (1 + gamma * t) ** -param.power
    if policy == "multistep":
        return base * gamma**step
    if policy == "poly":
        left = max(1 - t / param.max_iter, 0.0)
        return (base - param.min_lr) * left**param.power + param.min_lr
    if policy == "sigmoid":
        return base * _logistic(-gamma * (t - param.stepsize))
    if policy == "multifixed":
        # stage i lasts through iteration stageiter[i]; behind the last one its rate stays
        stage = next((i for i, end in enumerate(param.stageiter) if t <= end), len(param.stageiter) - 1)
        return param.stagelr[stage]
    raise PrototxtError(f"unknown lr_policy '{policy}'", hint=near(policy, LR_POLICIES))


def _logistic(x: float) -> float:
    """1 / (1 + e^x) without overflow."""
    if x > 0:
        return math.exp(-x) / (1 + math.exp(-x))
    return 1 / (1 + math.exp(x))


def momentum(param: Any, iteration: int, rate: float) -> float:
    """The momentum of SGD (NVCaffe's momentum_policy; other solvers use `momentum` as it is).

    "poly": from momentum to max_momentum by (t / max_iter) ^ momentum_power. "opt": (1 - sqrt(rate) / 2)^2, at most
    max_momentum where that field is set.
    """
    policy = param.momentum_policy
    if policy == "poly":
        done = min(iteration / param.max_iter, 1.0)
        return param.momentum + (param.max_momentum - param.momentum) * done**param.momentum_power
    if policy == "opt":
        best = (1 - 0.5 * math.sqrt(rate)) ** 2
        return min(best, param.max_momentum) if param.HasField("max_momentum") else best
    return param.momentum


def weight_decay(param: Any, iteration: int, *, dialect: Dialect = BVLC) -> float:
    """The weight decay. "poly": grows as (t / max_iter) ^ weight_decay_power from 0 to weight_decay.

    The exponent's default depends on the fork. caffe-jacinto on a CPU prints this value but applies the constant one;
    here it is applied, as on its GPU path.
    """
    if param.weight_decay_policy != "poly":
        return param.weight_decay
    power = param.weight_decay_power if param.HasField("weight_decay_power") else dialect.weight_decay_power
    return param.weight_decay * min(iteration / param.max_iter, 1.0) ** power
