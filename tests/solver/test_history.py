"""History in bfloat16 and int8: the numbers, one step of every rule, storage, snapshots and resumed runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from caffejacinto_py.engine.params import Learnable
from caffejacinto_py.errors import ManyErrors, PrototxtError
from caffejacinto_py.passes.memory import HISTORY_TYPES, account, history_bytes
from caffejacinto_py.schema.state import read_state
from caffejacinto_py.solver import history as kept
from caffejacinto_py.solver.adaptive import AdaDelta, AdaGrad, Adam, RMSProp
from caffejacinto_py.solver.history import Blocks, Codes, Half, Noise
from caffejacinto_py.solver.rules import SGD, Larc, Nesterov, Rates, Regularisation
from tests.gpu.fake import CUDA, fake_cuda
from tests.solver.helpers import assert_equal, make_files, make_solver, params

CPU = torch.device("cpu")
PACKED = ("bfloat16", "int8")
SHAPES = ((16, 40, 3, 3), (5,), (7, 613), (1, 9000), (3,))  # the fourth is longer than a piece of these tests
MULTS = ((1.0, 1.0), (2.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0, 1.0))
RULES = {
    "SGD": SGD,
    "LARC": lambda *a, **k: SGD(*a, larc=Larc(0.02), **k),
    "Nesterov": Nesterov,
    "AdaGrad": lambda *a, **k: AdaGrad(*a, delta=1e-3, **k),
    "RMSProp": lambda *a, **k: RMSProp(*a, delta=1e-3, decay=0.9, **k),
    "AdaDelta": lambda *a, **k: AdaDelta(*a, delta=1e-3, **k),
    "Adam": lambda *a, **k: Adam(*a, delta=1e-3, **k),
}


def learnables(*, last: bool = True) -> list[Learnable]:
    rng = np.random.default_rng(0)
    found = []
    for i, (shape, (lr_mult, decay_mult)) in enumerate(zip(SHAPES, MULTS)):
        w = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        if last and w.dim() == 4:
            w = w.contiguous(memory_format=torch.channels_last)
        found.append(Learnable(torch.nn.Parameter(w, requires_grad=lr_mult > 0), lr_mult, decay_mult, "n", i, ""))
    return found


def differ(blobs: list[Learnable], seed: int) -> None:
    """Gradients of very different sizes."""
    rng = np.random.default_rng(seed)
    for blob in blobs:
        if blob.lr_mult:
            shape = tuple(blob.param.shape)
            g = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 1, shape)
            blob.param.grad = torch.from_numpy(g.astype(np.float32))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kept.PIECES, "cpu", 2048)


def codes_of(*, signed: bool) -> Codes:
    return Codes(signed=signed, device=CPU)


# --- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("signed", [True, False])
def test_codes(signed: bool) -> None:
    codes = codes_of(signed=signed)
    table = codes.table.double()
    if signed:
        assert torch.equal(table[1:128], -table[129:].flip(0))  # two's complement
        table = table[:128]
    assert table[0] == 0
    assert table[-1] == 1
    assert bool((table[1:] > table[:-1]).all())
    decades = 7 if signed else 8
    for i in range(decades):  # 2^i even steps in decade i
        low, high = 10.0 ** (i - decades), 10.0 ** (i - decades + 1)
        inside = table[(table > low * 1.0001) & (table < high * 1.0001)]
        assert len(inside) == 2**i
        if i:
            np.testing.assert_allclose(np.diff([low, *inside.tolist()]), 0.9 * high / 2**i, rtol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest(signed: bool) -> None:
    codes = codes_of(signed=signed)
    values = torch.cat([torch.logspace(-9, 0, 20001), torch.linspace(0, 1, 20001)])
    values = torch.cat([values, -values]) if signed else values
    found = codes.decode(codes.encode(values, None)).double()
    table = codes.table.double().unique()
    at = torch.searchsorted(table, values.double()).clamp(1, len(table) - 1)
    steps = table[at] - table[at - 1]
    assert bool(((found - values).abs() <= 0.5001 * steps + (0 if signed else 1e-7)).all())
    assert bool((found.sign() * values.sign() >= 0).all())
    assert not signed or codes.decode(codes.encode(torch.tensor([-1.0, 1.0]), None)).tolist() == [-1.0, 1.0]


def test_second_moments_never_become_zero() -> None:
    store = Blocks(300, codes_of(signed=False), CPU)
    values = torch.full((300,), 1e-12)
    values[0], values[1] = 1.0, 0.0
    store.write(0, values, None)
    found = store.read(0, 300)
    assert found[0] == 1
    assert found[1] == 0
    assert bool((found[2:256] > 0).all())
    torch.testing.assert_close(found[256:], values[256:])


@pytest.mark.parametrize("kind", ["half", "signed", "unsigned"])
def test_rounding_has_no_bias(kind: str) -> None:
    """Over the whole list of noise a number becomes its neighbours in proportion."""
    noise = Noise(1 << 16, CPU)
    for value in (0.0123, 0.5017, 0.99):
        values = torch.full((noise.size,), value)
        store = Half(noise.size, CPU) if kind == "half" else Blocks(noise.size, codes_of(signed=kind == "signed"), CPU)
        if kind != "half":
            values[::256] = 1.0
        store.write(0, values, noise.take(noise.size))
        found = store.read(0, noise.size)
        found = found if kind == "half" else found.view(-1, 256)[:, 1:].reshape(-1)
        assert len(found.unique()) == 2
        assert float(found.double().mean()) == pytest.approx(value, rel=2e-4)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("kind", ["half", "signed", "unsigned"])
def test_stored_numbers_stay(kind: str, noisy: bool) -> None:
    """Reading and storing again changes nothing, scales of all sizes; bfloat16 not even with noise."""
    rng = np.random.default_rng(3)
    values = torch.from_numpy((rng.normal(size=2048) * 10.0 ** rng.integers(-8, 1, 2048)).astype(np.float32))
    values = values.view(8, 256) * torch.tensor([1e30, 1e3, 1, 1e-8, 1e-20, 1e-29, 1e-35, 0]).view(8, 1)
    values = values.reshape(-1) if kind == "signed" else values.reshape(-1).abs()
    store = Half(2048, CPU) if kind == "half" else Blocks(2048, codes_of(signed=kind == "signed"), CPU)
    store.write(0, values, Noise(1 << 16, CPU).take(2048) if noisy else None)
    first = store.read(0, 2048).clone()
    before = store.values.clone()
    store.write(0, first, Noise(1 << 16, CPU).take(2048) if kind == "half" else None)
    assert torch.equal(store.values, before)
    assert torch.equal(store.read(0, 2048), first)


def test_last_code_whatever_the_noise() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32)
    for signed in (True, False):
        codes = codes_of(signed=signed)
        for value in (1.0, -1.0) if signed else (1.0,):
            assert codes.decode(codes.encode(torch.full((1 << 16,), value), every)).unique().tolist() == [value]


def test_what_is_no_number_stays_visible() -> None:
    every = torch.full((256,), 65535, dtype=torch.int32)
    bad = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([bad, torch.tensor([math.inf, -math.inf]), torch.ones(252)])
    half = Half(256, CPU)
    half.write(0, values, every)
    found = half.read(0, 256)
    assert bool(found[:2].isnan().all())
    assert found[2:4].tolist() == [math.inf, -math.inf]
    blocks = Blocks(256, codes_of(signed=True), CPU)
    blocks.write(0, values, every)
    assert bool(blocks.read(0, 256).isnan().all())


# --- rules -----------------------------------------------------------------------------------------------------------
def bound(kind: str, exact: Tensor, param: Tensor, *, signed: bool) -> Tensor:
    """How far a stored number may lie from the exact one: the gap between its neighbours."""
    if kind == "bfloat16":
        return exact.abs() * 2**-7 + 1e-38
    if exact.numel() < 4096:
        return exact.abs() * 1e-6
    flat = kept.flat(exact.contiguous(memory_format=torch.channels_last) if param.dim() == 4 else exact)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256)
    most = rows.abs().amax(1, keepdim=True)
    shares = (rows.abs() / most.clamp_min(1e-30)).double()
    table = codes_of(signed=signed).table.double().abs().unique()
    at = torch.searchsorted(table, shares).clamp(1, len(table) - 1)
    gaps = ((table[at] - table[at - 1]) * 1.001 + 1e-6 * shares) * most
    return gaps.view(-1)[: len(flat)].as_strided(param.shape, param.stride()).float()


@pytest.mark.parametrize("reg", [Regularisation(), Regularisation(l1=True, iter_size=2, clip=0.5)], ids=["L2", "L1"])
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", RULES)
def test_one_step_is_the_float32_step(name: str, kind: str, reg: Regularisation) -> None:
    """From the same stored history weights are equal, and the new history is the float32 one, rounded."""
    ours, theirs = learnables(), learnables()
    rule, plain = RULES[name](ours, reg, history=kind), RULES[name](theirs, reg)
    for t in range(4):
        for a, b in zip(ours, theirs):
            b.param.data.copy_(a.param.data)
        plain.load(rule.export())
        differ(ours, t)
        differ(theirs, t)
        rates = Rates(0.1, 0.9 if name not in ("AdaGrad", "RMSProp") else 0.0, 0.01, t)
        rule.step(rates)
        plain.step(rates)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.param, b.param, rtol=2e-6, atol=1e-7)
        for k, (x, y) in enumerate(zip(rule.export(), plain.export())):
            slot, i = divmod(k, len(SHAPES))
            exact = torch.from_numpy(y)
            limit = bound(kind, exact, ours[i].param, signed=rule.signed[slot])
            assert bool(((torch.from_numpy(x) - exact).abs() <= limit).all()), (k, t)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_history_goes_round(name: str, kind: str) -> None:
    """What `export` gives is loaded as it was, and the next step is the same, bit for bit."""
    ours, other = learnables(), learnables()
    rule, again = RULES[name](ours, history=kind), RULES[name](other, history=kind)
    for t in range(3):
        differ(ours, t)
        rule.step(Rates(0.1, 0.9, 0.01, t))
    again.load(rule.export())
    for a, b in zip(ours, other):
        b.param.data.copy_(a.param.data)
    differ(ours, 3)
    differ(other, 3)
    rule.step(Rates(0.1, 0.9, 0.01, 3))
    again.step(Rates(0.1, 0.9, 0.01, 3))
    for a, b in zip(ours, other):
        assert torch.equal(a.param, b.param)
    for x, y in zip(rule.export(), again.export()):
        np.testing.assert_array_equal(x, y)


def test_averages_do_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """h = 0.999 h + 0.001 g^2 from 1 towards 0.01: so with stochastic rounding, not with rounding to nearest."""
    monkeypatch.setitem(kept.PIECES, "cpu", 4096)
    for kind in PACKED:
        for nearest in (False, True):
            blob = Learnable(torch.nn.Parameter(torch.zeros(4096)), 1.0, 0.0, "n", 0, "")
            rule = Adam([blob], momentum2=0.999, history=kind)
            rule.load([np.zeros(4096, np.float32), np.ones(4096, np.float32)])
            if nearest:
                rule.noise.values.fill_(1 << 15)
            gradient = torch.full((4096,), 0.1)
            gradient[::256] = 1.0  # int8: something in each block that stays large
            for t in range(1000):
                blob.param.grad = gradient.clone()
                rule.step(Rates(0.0, 0.9, 0.0, t))
            found = rule.export()[1].reshape(-1, 256)[:, 1:].mean()
            want = 0.01 + 0.99 * 0.999**1000
            assert abs(found - want) < 0.01 * want if not nearest else found > 2 * want, (kind, nearest, found, want)


@pytest.mark.parametrize("kind", HISTORY_TYPES)
def test_bytes(kind: str) -> None:
    rule = Adam(learnables(), history=kind)
    sizes = [math.prod(s) for s, (lr, _) in zip(SHAPES, MULTS) if lr]
    want = 2 * sum(history_bytes(n, kind=kind) for n in sizes)
    if kind == "float32":
        assert rule.noise is None
        assert sum(h.nbytes for g in rule.groups for slot in g.history for h in slot) == want == 8 * sum(sizes)
    else:
        assert sum(g.packed.nbytes for g in rule.groups if g.packed) == want
    assert history_bytes(4096, kind="int8") == 4096 + 4 * 16
    assert history_bytes(4095, kind="int8") == 4 * 4095
    assert history_bytes(5000, kind="int8") == 5120 + 4 * 20


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", RULES)
def test_on_another_device(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not there: the same numbers, and the host never waits."""
    monkeypatch.setattr(kept, "PIECE", 2048)
    momentum = 0.9 if name not in ("AdaGrad", "RMSProp") else 0.0
    ours = learnables()
    here = RULES[name](ours, history=kind)
    for t in range(3):
        differ(ours, t)
        here.step(Rates(0.1, momentum, 0.01, t))
    weights, history = [b.param.detach().numpy() for b in ours], here.export()
    with fake_cuda() as seen:
        theirs = [dataclasses.replace(b, param=torch.nn.Parameter(b.param.detach().to(CUDA))) for b in learnables()]
        there = RULES[name](theirs, history=kind)
        for t in range(3):
            differ(theirs, t)
            for b in theirs:
                if b.lr_mult and b.param.grad is not None:
                    b.param.grad = b.param.grad.to(CUDA)
            seen.forget()
            there.step(Rates(0.1, momentum, 0.01, t))
            assert seen.waits == []
        for w, b in zip(weights, theirs):
            np.testing.assert_allclose(b.param.detach().cpu().numpy(), w, rtol=1e-3, atol=1e-4)
        for x, y in zip(history, there.export()):
            np.testing.assert_allclose(x, y, rtol=0.02, atol=1e-6)


# --- solvers ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The usual small net, with blobs that are large enough for blocks."""
    make_files(tmp_path)
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text().replace("num_output: 6", "num_output: 160"))
    return tmp_path


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_resumed_run_is_the_whole_run(large: Path, rule: str, kind: str) -> None:
    """Bit for bit; and the state is C++ Caffe's, float32."""
    lr = "0.05" if rule == "SGD" else "0.001"
    extra = f'type: "{rule}"\nbase_lr: {lr}\nhistory_type: "{kind}"\nsnapshot: 3\nmax_iter: 6'
    whole = make_solver(large, extra)
    whole.solve()
    again = make_solver(large, extra)
    again.restore(large / "snap_iter_3.solverstate")
    state = read_state(large / "snap_iter_3.solverstate")
    for stored, mine, blob in zip(state.history, again.rule.export(), whole.net.learnable * again.rule.slots):
        assert stored.dtype == np.float32
        assert stored.shape == tuple(blob.param.shape)
        np.testing.assert_array_equal(stored, mine)
    again.step(3)
    assert_equal(params(again), params(whole))
    for a, b in zip(again.rule.export(), whole.rule.export()):
        np.testing.assert_array_equal(a, b)
    float32 = make_solver(large, f'type: "{rule}"\nbase_lr: {lr}')
    float32.restore(large / "snap_iter_3.solverstate")  # a run may go on with another type
    for stored, mine in zip(state.history, float32.rule.export()):
        np.testing.assert_array_equal(stored, mine)
    float32.step(3)
    assert any(not np.array_equal(a, b) for a, b in zip(float32.rule.export(), whole.rule.export()))


def test_unknown_type(tmp_path: Path) -> None:
    make_files(tmp_path)
    with pytest.raises((PrototxtError, ManyErrors)) as caught:
        make_solver(tmp_path, 'history_type: "int4"')
    (error,) = getattr(caught.value, "errors", (caught.value,))
    assert str(error.loc).startswith("solver.prototxt:")
    assert "unknown history_type 'int4'" in error.text
    assert error.hint == "one of float32, bfloat16, int8"


def test_double_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrototxtError, match="double precision") as caught:
        make_solver(tmp_path, 'history_type: "int8"', precision="fp64")
    assert caught.value.loc is not None
    assert caught.value.loc.line > 0
    make_solver(tmp_path, 'history_type: "float32"', precision="fp64")


def test_budget_counts_the_type(large: Path) -> None:
    """What a plan leaves for activations is what the rule really leaves."""
    plans = {}
    for kind in HISTORY_TYPES:
        solver = make_solver(large, f'type: "Adam"\nhistory_type: "{kind}"\nmemory {{ budget: "64MiB" }}')
        made = account(solver.net.graph, solver="Adam", history=kind)
        assert solver.memory is not None
        assert solver.memory.memory.history == made.history
        held = sum(g.packed.nbytes if g.packed else 8 * sum(p.numel() for p in g.params) for g in solver.rule.groups)
        assert held == made.history
        plans[kind] = made.total
    assert plans["int8"] < plans["bfloat16"] < plans["float32"]
