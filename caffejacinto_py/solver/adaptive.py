"""The update rules with a rate per weight: AdaGrad, RMSProp, AdaDelta, Adam. See `rules` for the conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from caffejacinto_py.engine.params import Learnable
from caffejacinto_py.solver.rules import Group, Rates, Regularisation, Rule, regularised


class AdaGrad(Rule):
    """h += g'^2; w -= r g' / (sqrt(h) + delta)."""

    signed = (False,)

    def __init__(
        self,
        learnable: Sequence[Learnable],
        regularisation: Regularisation | None = None,
        *,
        delta: float = 1e-8,
        history: str = "float32",
    ) -> None:
        super().__init__(learnable, regularisation, history=history)
        self.delta = delta

    def update(self, group: Group, grads: list[Tensor], rates: Rates, decay: float, scale: Tensor | None) -> None:
        r, h = rates.lr * group.lr_mult, group.history[0]
        if group.params[0].device.type == "cpu":
            one = torch.ones(())  # the kernel divides the rate by 1 + (step - 1) * lr_decay
            torch._fused_adagrad_(
                group.params,
                grads,
                h,
                [one] * len(h),
                lr=r,
                lr_decay=0.0,
                weight_decay=decay,
                eps=self.delta,
                maximize=False,
                grad_scale=scale,
            )
            return
        g = regularised(group, grads, decay, scale)
        torch._foreach_addcmul_(h, g, g)
        _divided_step(group, g, h, r, self.delta)


class RMSProp(Rule):
    """h = decay h + (1 - decay) g'^2; w -= r g' / (sqrt(h) + delta)."""

    signed = (False,)

    def __init__(
        self,
        learnable: Sequence[Learnable],
        regularisation: Regularisation | None = None,
        *,
        delta: float = 1e-8,
        decay: float = 0.99,
        history: str = "float32",
    ) -> None:
        super().__init__(learnable, regularisation, history=history)
        self.delta = delta
        self.decay = decay

    def update(self, group: Group, grads: list[Tensor], rates: Rates, decay: float, scale: Tensor | None) -> None:
        g, h = regularised(group, grads, decay, scale), group.history[0]
        torch._foreach_mul_(h, self.decay)
        torch._foreach_addcmul_(h, g, g, value=1 - self.decay)
        _divided_step(group, g, h, rates.lr * group.lr_mult, self.delta)


class AdaDelta(Rule):
    """h = m h + (1 - m) g'^2; u = g' sqrt((k + delta) / (h + delta)); k = m k + (1 - m) u^2; w -= r u. m: momentum."""

    signed = (False, False)

    def __init__(
        self,
        learnable: Sequence[Learnable],
        regularisation: Regularisation | None = None,
        *,
        delta: float = 1e-8,
        history: str = "float32",
    ) -> None:
        super().__init__(learnable, regularisation, history=history)
        self.delta = delta

    def update(self, group: Group, grads: list[Tensor], rates: Rates, decay: float, scale: Tensor | None) -> None:
        g, (h, k), m = regularised(group, grads, decay, scale), group.history, rates.momentum
        torch._foreach_mul_(h, m)
        torch._foreach_addcmul_(h, g, g, value=1 - m)
        ratio = torch._foreach_add(k, self.delta)
        torch._foreach_div_(ratio, torch._foreach_add(h, self.delta))
        torch._foreach_sqrt_(ratio)
        torch._foreach_mul_(g, ratio)
        torch._foreach_mul_(k, m)
        torch._foreach_addcmul_(k, g, g, value=1 - m)
        torch._foreach_sub_(group.params, g, alpha=rates.lr * group.lr_mult)


class Adam(Rule):
    """m = b1 m + (1 - b1) g'; v = b2 v + (1 - b2) g'^2; w -= r c m / (sqrt(v) + delta).

    c = sqrt(1 - b2^t) / (1 - b1^t), b1: momentum, b2: momentum2, t: updates done plus one. torch's kernel
    divides sqrt(v) by sqrt(1 - b2^t) before it adds its epsilon, so it is given delta / sqrt(1 - b2^t).
    """

    signed = (True, False)

    def __init__(
        self,
        learnable: Sequence[Learnable],
        regularisation: Regularisation | None = None,
        *,
        delta: float = 1e-8,
        momentum2: float = 0.999,
        history: str = "float32",
    ) -> None:
        super().__init__(learnable, regularisation, history=history)
        self.delta = delta
        self.momentum2 = momentum2

    def update(self, group: Group, grads: list[Tensor], rates: Rates, decay: float, scale: Tensor | None) -> None:
        t = rates.iteration + 1
        step = torch.full((), float(t), device=group.params[0].device)
        torch._fused_adam_(
            group.params,
            grads,
            group.history[0],
            group.history[1],
            [],
            [step] * len(grads),
            lr=rates.lr * group.lr_mult,
            beta1=rates.momentum,
            beta2=self.momentum2,
            weight_decay=decay,
            eps=self.delta / math.sqrt(1 - self.momentum2**t),
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )


def _divided_step(group: Group, g: list[Tensor], h: list[Tensor], r: float, delta: float) -> None:
    """w -= r g / (sqrt(h) + delta)."""
    root = torch._foreach_sqrt(h)
    torch._foreach_add_(root, delta)
    torch._foreach_addcdiv_(group.params, g, root, value=-r)
