"""The update rules against the formulas in float64, over several iterations with changing rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from caffejacinto_py.engine.params import Learnable
from caffejacinto_py.errors import WeightsError
from caffejacinto_py.solver import rules
from caffejacinto_py.solver.adaptive import AdaDelta, AdaGrad, Adam, RMSProp
from caffejacinto_py.solver.rules import SGD, Larc, Nesterov, Rates, Regularisation, Rule

SHAPES = ((3, 4, 2, 2), (5,), (7, 3), (1,))
MULTS = ((1.0, 1.0), (2.0, 0.0), (1.0, 1.0), (0.0, 1.0))  # the last one is frozen
DELTA, DECAY, MOMENTUM2 = 1e-3, 0.9, 0.99
History = list[list[np.ndarray]]


def sgd(w: np.ndarray, g: np.ndarray, h: list[np.ndarray], r: float, rates: Rates) -> np.ndarray:
    h[0] = rates.momentum * h[0] + r * g
    return w - h[0]


def nesterov(w: np.ndarray, g: np.ndarray, h: list[np.ndarray], r: float, rates: Rates) -> np.ndarray:
    before, m = h[0], rates.momentum
    h[0] = m * before + r * g
    return w - ((1 + m) * h[0] - m * before)


def adagrad(w: np.ndarray, g: np.ndarray, h: list[np.ndarray], r: float, rates: Rates) -> np.ndarray:
    h[0] = h[0] + g * g
    return w - r * g / (np.sqrt(h[0]) + DELTA)


def rmsprop(w: np.ndarray, g: np.ndarray, h: list[np.ndarray], r: float, rates: Rates) -> np.ndarray:
    h[0] = DECAY * h[0] + (1 - DECAY) * g * g
    return w - r * g / (np.sqrt(h[0]) + DELTA)


def adadelta(w: np.ndarray, g: np.ndarray, h: list[np.ndarray], r: float, rates: Rates) -> np.ndarray:
    m = rates.momentum
    h[0] = m * h[0] + (1 - m) * g * g
    u = g * np.sqrt((h[1] + DELTA) / (h[0] + DELTA))
    h[1] = m * h[1] + (1 - m) * u * u
    return w - r * u


def adam(w: np.ndarray, g: np.ndarray, h: list[np.ndarray], r: float, rates: Rates) -> np.ndarray:
    b1, b2, t = rates.momentum, MOMENTUM2, rates.iteration + 1
    h[0] = b1 * h[0] + (1 - b1) * g
    h[1] = b2 * h[1] + (1 - b2) * g * g
    c = math.sqrt(1 - b2**t) / (1 - b1**t)
    return w - r * c * h[0] / (np.sqrt(h[1]) + DELTA)


RULES: dict[str, tuple[Callable[..., np.ndarray], Callable[..., Rule]]] = {
    "SGD": (sgd, SGD),
    "Nesterov": (nesterov, Nesterov),
    "AdaGrad": (adagrad, lambda *a: AdaGrad(*a, delta=DELTA)),
    "RMSProp": (rmsprop, lambda *a: RMSProp(*a, delta=DELTA, decay=DECAY)),
    "AdaDelta": (adadelta, lambda *a: AdaDelta(*a, delta=DELTA)),
    "Adam": (adam, lambda *a: Adam(*a, delta=DELTA, momentum2=MOMENTUM2)),
}
REGULARISATIONS = {
    "L2": Regularisation(),
    "L1": Regularisation(l1=True),
    "iter_size": Regularisation(iter_size=3),
    "clip": Regularisation(clip=0.3, iter_size=2),
    "clip-unused": Regularisation(clip=1e6),
    "L1-clip": Regularisation(l1=True, clip=0.3, iter_size=2),
}
SCHEDULE = (0.1, 0.1, 0.01, 3.0, 0.0, 1e-7, 0.2)


def learnables(seed: int = 0, *, last: bool = False, kind: type = np.float32) -> list[Learnable]:
    rng = np.random.default_rng(seed)
    found = []
    for i, (shape, (lr_mult, decay_mult)) in enumerate(zip(SHAPES, MULTS)):
        w = torch.from_numpy(rng.normal(size=shape).astype(kind))
        if last and w.dim() == 4:
            w = w.contiguous(memory_format=torch.channels_last)
        found.append(Learnable(torch.nn.Parameter(w, requires_grad=lr_mult > 0), lr_mult, decay_mult, "n", i, ""))
    return found


def wanted(name: str, reg: Regularisation, rates: Rates, w: History, g: History, h: list[History]) -> None:
    """One update of the reference, in place, in float64."""
    norm = math.sqrt(sum(float((x * x).sum()) for x, (lr, _) in zip(g, MULTS) if lr))
    factor = (reg.clip / norm if 0 <= reg.clip < norm else 1.0) / reg.iter_size
    for i, (lr_mult, decay_mult) in enumerate(MULTS):
        if lr_mult:
            decay = rates.weight_decay * decay_mult
            g_i = g[i] * factor + decay * (np.sign(w[i]) if reg.l1 else w[i])
            w[i] = RULES[name][0](w[i], g_i, h[i], rates.lr * lr_mult, rates)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("reg", REGULARISATIONS)
@pytest.mark.parametrize("name", RULES)
def test_formula(name: str, reg: str, last: bool, kind: type) -> None:
    rng = np.random.default_rng(1)
    blobs = learnables(last=last, kind=kind)
    close = {"rtol": 2e-5, "atol": 2e-6} if kind is np.float32 else {"rtol": 1e-11, "atol": 1e-12}
    rule = RULES[name][1](blobs, REGULARISATIONS[reg])
    w = [b.param.detach().numpy().astype(np.float64) for b in blobs]
    h = [[np.zeros(s), np.zeros(s)] for s in SHAPES]
    for t, lr in enumerate(SCHEDULE):
        g = [rng.normal(size=s) for s in SHAPES]
        rates = Rates(lr, 0.8, 0.05, t)
        for blob, x in zip(blobs, g):
            if blob.lr_mult:
                blob.param.grad = torch.from_numpy(x.astype(kind))
        rule.step(rates)
        wanted(name, REGULARISATIONS[reg], rates, w, g, h)
        for blob, x in zip(blobs, w):
            np.testing.assert_allclose(blob.param.detach().numpy(), x, **close)
    for k, array in enumerate(rule.export()):
        slot, i = divmod(k, len(SHAPES))
        assert array.flags.c_contiguous
        np.testing.assert_allclose(array, h[i][slot] if MULTS[i][0] else 0, **close)


@pytest.mark.parametrize("piece", [1, 5, 30, 75])
@pytest.mark.parametrize("name", RULES)
def test_formula_in_pieces(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 goes over the memory in pieces: slices of large parameters, several small ones together."""
    monkeypatch.setattr(rules, "PIECE", piece)
    test_formula(name, "L1-clip", last=True, kind=np.float32)


@pytest.mark.parametrize("name", RULES)
def test_history_goes_round(name: str) -> None:
    blobs, other = learnables(last=True), learnables()
    rule, again = RULES[name][1](blobs), RULES[name][1](other)
    for t in range(3):
        for pair in (blobs, other) if t == 2 else (blobs,):
            rng = np.random.default_rng(t)
            for blob in pair:
                if blob.lr_mult:
                    blob.param.grad = torch.from_numpy(rng.normal(size=tuple(blob.param.shape)).astype(np.float32))
        if t == 2:
            for a, b in zip(blobs, other):
                b.param.data.copy_(a.param.data)
            again.load(rule.export())
            again.step(Rates(0.1, 0.9, 0.01, t))
        rule.step(Rates(0.1, 0.9, 0.01, t))
    for a, b in zip(blobs, other):
        assert torch.equal(a.param, b.param)
    for x, y in zip(rule.export(), again.export()):
        np.testing.assert_array_equal(x, y)


def test_history_that_does_not_fit() -> None:
    rule = SGD(learnables())
    good = rule.export()
    with pytest.raises(WeightsError, match="3 history blobs"):
        rule.load(good[:3])
    with pytest.raises(WeightsError, match=r"history blob 1 .* shape \(6,\)"):
        rule.load([good[0], np.zeros(6, np.float32), *good[2:]])


def test_no_gradient_still_decays() -> None:
    blobs = learnables()
    before = [b.param.detach().clone() for b in blobs]
    SGD(blobs).step(Rates(0.1, 0.9, 0.5, 0))
    assert torch.allclose(blobs[0].param, before[0] * (1 - 0.05))
    assert torch.equal(blobs[1].param, before[1])  # its decay_mult is 0
    assert torch.equal(blobs[3].param, before[3])  # frozen


@pytest.mark.parametrize("clip", [False, True])
def test_larc(clip: bool) -> None:
    blobs = learnables()
    rule = SGD(blobs, larc=Larc(eta=0.02, clip=clip))
    before = [b.param.detach().clone() for b in blobs]
    grads = [torch.full(s, 0.5) for s in SHAPES]
    grads[1] = torch.full(SHAPES[1], 1e-8)  # rounding noise beside the others: no full-size step
    for blob, g in zip(blobs, grads):
        if blob.lr_mult:
            blob.param.grad = g.clone()
    rule.step(Rates(0.04, 0.9, 0.1, 0))
    g = grads[0] + 0.1 * before[0]
    local = float(0.02 * before[0].norm() / g.norm())
    r = min(local, 0.04) if clip else local * 0.04
    assert torch.allclose(blobs[0].param, before[0] - r * g, atol=1e-6)
    assert torch.allclose(blobs[1].param, before[1] - 0.04 * grads[1], atol=1e-9)
