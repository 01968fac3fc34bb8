"""Training in little memory: schedules against known optima, execution bit for bit, budgets that are too small."""

from __future__ import annotations

import random
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch

from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.engine.memory import rotor, strategies
from caffejacinto_py.engine.memory.budget import (
    Beside,
    BudgetError,
    attach,
    in_units,
    make_plan,
    numbers_of,
    parse_bytes,
)
from caffejacinto_py.engine.memory.execute import Recompute
from caffejacinto_py.engine.memory.measure import peak_bytes
from caffejacinto_py.engine.memory.profile import profile
from caffejacinto_py.engine.memory.schedule import Again, Schedule, keep_all, simulate, text
from caffejacinto_py.engine.memory.stages import Chain, Stage, chain_of
from caffejacinto_py.engine.memory.strategies import Strategy
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import UsageError
from caffejacinto_py.ir.graph import Value
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.precision import resolve
from caffejacinto_py.passes.storages import Numbers
from caffejacinto_py.schema.text import parse
from caffejacinto_py.solver import Solver
from caffejacinto_py.solver.feed import Feed

torch.set_num_threads(1)
MB = 1 << 20


def conv(name: str, bottom: str, out: int = 8) -> str:
    return f"""
layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" convolution_param {{
  num_output: {out} kernel_size: 3 pad: 1 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "{name}_bn" type: "BatchNorm" bottom: "{name}" top: "{name}" }}
layer {{ name: "{name}_scale" type: "Scale" bottom: "{name}" top: "{name}" scale_param {{ bias_term: true }} }}
layer {{ name: "{name}_relu" type: "ReLU" bottom: "{name}" top: "{name}" }}"""


def score(name: str, bottom: str, weight: float = 1) -> str:
    return f"""
layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "{name}_loss" type: "SoftmaxWithLoss" bottom: "{name}" bottom: "label" top: "{name}_loss"
  loss_weight: {weight} }}"""


HEAD = """name: "branched"
layer { name: "data" type: "DummyData" top: "data" top: "label" dummy_data_param {
  shape { dim: 8 dim: 3 dim: 16 dim: 16 } shape { dim: 8 } data_filler { type: "gaussian" }
  data_filler { type: "uniform" min: 0 max: 4.9 } } }"""
NET = (
    HEAD
    + conv("a", "data")
    + conv("b", "a")
    + 'layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "b" top: "sum" }'
    + 'layer { name: "drop" type: "Dropout" bottom: "sum" top: "sum" }'
    + 'layer { name: "pool" type: "Pooling" bottom: "sum" top: "pool" pooling_param { kernel_size: 2 stride: 2 } }'
    + score("side", "pool", 0.3)
    + conv("c", "pool", 16)
    + conv("d", "c", 16)
    + 'layer { name: "cat" type: "Concat" bottom: "c" bottom: "d" top: "cat" }'
    + 'layer { name: "drop2" type: "Dropout" bottom: "cat" top: "drop2" }'
    + conv("e", "drop2", 16)
    + score("fc", "e")
)
BN_OWN_SCALE = "batch_norm_param { scale_bias: true moving_average_fraction: 0.9 }"
NVCAFFE = NET.replace('type: "BatchNorm"', f'type: "BatchNorm" {BN_OWN_SCALE}')


def graph(text: str = NET, **options: Any):
    return prepare(parse(text, "NetParameter").message, phase="TRAIN", **options)


def solver(net: str, **more: Any) -> Solver:
    message = parse(
        "base_lr: 0.01 momentum: 0.9 lr_policy: 'fixed' max_iter: 40 random_seed: 3", "SolverParameter"
    ).message
    message.net_param.CopyFrom(parse(net, "NetParameter").message)
    message.snapshot_prefix = "s"
    for name, value in more.items():
        setattr(message, name, value)
    return Solver(message)


def tight(net: Net, share: float = 0.0, strategy: Strategy = Strategy()):  # noqa: B008
    """Plan a net to a share of the way from the least memory to what it takes unplanned."""
    plain = make_plan(net.graph, numbers=numbers_of(net))
    if strategy.name == "rotor":
        least = rotor.least(rotor.solve(plain.chain))[1].peak
    else:
        least = strategies.find(plain.chain, 0, strategy).cost.peak
    budget = plain.fixed + least + int(share * (plain.cost.peak - least))
    return attach(net, budget, strategy=strategy)


# --- chains and schedules --------------------------------------------------------------------------------------------
def uniform(n: int, *, fixed: tuple[int, ...] = ()) -> Chain:
    """n stages of one second and a megabyte each."""
    values = [Value(f"v{i}") for i in range(n + 1)]
    stages = tuple(
        Stage(k, k + 1, f"s{k}", 1.0, 1.0, k in fixed, frozenset((values[k], values[k + 1])), 0, 0, 0) for k in range(n)
    )
    places = tuple(frozenset((v,)) for v in values)
    return Chain(stages, places, places, dict.fromkeys(values, MB))


def runs(schedule: Schedule, counts: dict[int, int]) -> dict[int, int]:
    """How often each stage runs forward."""
    for item in schedule:
        if isinstance(item, Again):
            for k in range(item.first, item.last):
                counts[k] = counts.get(k, 0) + 1
            runs(item.inner, counts)
        else:
            counts[item] = counts.get(item, 0) + 1
    return counts


@pytest.mark.parametrize(("slots", "repeats"), [(1, 3), (2, 3), (3, 2), (4, 3)])
def test_revolve_reverses_as_many_stages_as_the_closed_form_says(slots: int, repeats: int) -> None:
    """With c checkpoints (the input is one) and at most r extra runs of a stage: binomial(c + r, c), and no more."""
    n = comb(slots + repeats, slots)
    found = runs(strategies.revolve(uniform(n), slots - 1), {})
    assert max(found.values()) == repeats + 1
    assert max(runs(strategies.revolve(uniform(n + 1), slots - 1), {}).values()) == repeats + 2


@pytest.mark.parametrize(("n", "segments"), [(18, 3), (34, 5), (50, 10), (7, 7), (5, 9)])
def test_sequential_runs_its_segments_twice(n: int, segments: int) -> None:
    chain = uniform(n)
    schedule = strategies.sequential(chain, segments)
    assert simulate(chain, schedule).forwards == n + (segments - 1) * (n // segments)
    assert sorted(runs(schedule, {})) == list(range(n))


def test_rotor_on_a_uniform_chain_beats_the_others_and_keeps_its_budget() -> None:
    chain = uniform(24)
    table = rotor.solve(chain)
    plain = simulate(chain, keep_all(chain))
    for share in (0.9, 0.7, 0.5, 0.4):
        budget = int(plain.peak * share)
        found = rotor.within(table, budget)
        assert found is not None
        assert simulate(chain, found[0]) == found[1]
        assert found[1].peak <= budget
        for word in ("sequential", "sequential:3", "revolve"):
            other = strategies.find(chain, budget, strategies.parse(word))
            assert not other.fits or other.cost.seconds >= found[1].seconds - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_rotor_against_every_flat_schedule(seed: int) -> None:
    """A random chain of 7 stages: nothing that runs segments once more is quicker within the same bytes."""
    draw = random.Random(seed)
    n = 7
    base = uniform(n)
    sizes = {v: draw.randrange(20, 400) * MB for v in base.sizes} | {Value(f"v{n}"): 1}
    stages = tuple(
        Stage(s.first, s.last, s.name, draw.random(), draw.random(), False, s.keeps, draw.randrange(50) * MB, 0, 0)
        for s in base.stages
    )
    chain = Chain(stages, base.frontiers, base.gradients, sizes)
    table = rotor.solve(chain)
    plain = simulate(chain, keep_all(chain)).peak
    for share in (0.8, 0.65):
        budget = int(plain * share)
        costs = [simulate(chain, s) for s in flat(0, n)]
        quickest = min((c.seconds for c in costs if c.peak <= budget), default=None)
        found = rotor.within(table, budget)
        if quickest is not None:
            assert found is not None
            assert found[1].seconds <= quickest * 1.02  # slots are rounded up


def flat(first: int, last: int) -> list[Schedule]:
    """Every way to cut first..last-1 into kept stages and segments that are run once more."""
    if first == last:
        return [()]
    found: list[Schedule] = [(first, *rest) for rest in flat(first + 1, last)]
    for end in range(first + 1, last):
        found += [(Again(first, end, tuple(range(first, end))), *rest) for rest in flat(end, last)]
    return found


def test_what_may_not_run_again_is_kept() -> None:
    chain = uniform(12, fixed=(5, 6))
    schedules = [rotor.least(rotor.solve(chain))[0]]
    schedules += [strategies.sequential(chain, 3), strategies.revolve(chain, 1)]
    for schedule in schedules:
        counts = runs(schedule, {})
        assert (counts[5], counts[6]) == (1, 1), text(chain, schedule)
        assert max(counts.values()) > 1


def test_the_chain_of_a_net() -> None:
    g = graph()
    chain = chain_of(g)
    names = [s.name for s in chain.stages]
    assert [s.name for s in chain.stages if s.fixed] == ["side_loss", "fc_loss"]
    assert [chain.stages[0].first, chain.stages[-1].last] == [0, len(Net(g, seed=0).plan.fast)]
    assert all(a.last == b.first for a, b in zip(chain.stages, chain.stages[1:]))
    # no cut between a blob and who overwrites it: ReLU on BatchNorm's top, Dropout on the sum
    assert not {"a_bn", "sum"} & set(names)
    assert len(chain_of(g, most=4)) == 4


# --- execution -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("net", [NET, NVCAFFE], ids=["bvlc", "nvcaffe"])
@pytest.mark.parametrize("word", ["rotor", "sequential:4", "revolve"])
def test_training_is_the_same_bit_for_bit(net: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 passes each with dropout and BatchNorm: gradients, blobs, buffers, random state, snapshot bytes."""
    folders = [tmp_path / "plain", tmp_path / "planned"]
    found = []
    for folder in folders:
        folder.mkdir()
        monkeypatch.chdir(folder)
        s = solver(net, iter_size=2)
        if folder.name == "planned":
            made = tight(s.net, 0.1, strategies.parse(word))
            assert made.cost.forwards > len(made.chain)
        gradients: list[Any] = []
        for _ in range(20 if word == "rotor" else 5):
            s.step(1)
            gradients.append([b.param.grad.clone() for b in s.net.learnable if b.param.grad is not None])
        model, state = s.snapshot()
        files = [Path(model).read_bytes(), Path(state).read_bytes()]
        blobs = [p.detach() for ps in s.net.params.values() for p in ps]
        found.append((gradients, blobs, list(s.net.buffers()), [torch.get_rng_state()], files))
        s.close()
    (ga, *tensors_a, files_a), (gb, *tensors_b, files_b) = found
    assert all(torch.equal(x, y) for a, b in zip(ga, gb, strict=True) for x, y in zip(a, b, strict=True))
    for a, b in zip(tensors_a, tensors_b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert files_a == files_b


def test_stages_run_as_often_as_the_schedule_says() -> None:
    torch.manual_seed(0)
    net = Net(
        graph(HEAD + "".join(conv(x, y) for x, y in zip("abcdef", ["data", *"abcde"])) + score("fc", "f")), seed=0
    )
    made = tight(net)
    calls: dict[str, int] = {}
    for step in net.plan.fast:
        name = step.node.name
        net.layers[step.module].register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
        )
    net(Feed(net, seed=0).next()).loss.backward()
    wanted = runs(made.schedule, {})
    assert max(wanted.values()) > 1
    for k, count in wanted.items():
        first = net.plan.fast[made.chain.stages[k].first].node.name
        assert calls[first] == count, (first, text(made.chain, made.schedule))


def test_the_measured_peak_is_within_the_plan() -> None:
    """Two convolution stacks wide enough that blobs, not statistics, count."""
    net = Net(graph(NET.replace("dim: 16 dim: 16", "dim: 32 dim: 32")), seed=0)
    batch = Feed(net, seed=0).next()

    def run() -> None:
        net(batch).loss.backward()
        for blob in net.learnable:
            blob.param.grad = None

    run()
    before = peak_bytes(run)
    made = tight(net)
    run()
    after = peak_bytes(run)
    assert after < before
    assert after <= made.cost.peak


FROZEN = NET.replace(
    'top: "a" convolution_param', 'top: "a" param { lr_mult: 0 } param { lr_mult: 0 } convolution_param'
)


@pytest.mark.parametrize("kind", ["frozen", "bf16", "force_backward"])
def test_one_pass_of_other_nets_is_the_same(kind: str) -> None:
    """A frozen first layer, number types of layers, gradients of the data."""
    text = {"frozen": FROZEN, "force_backward": NET + " force_backward: true"}.get(kind, NET)
    assert text != NET or kind == "bf16"
    g = graph(text)
    found = []
    for planned in (False, True):
        net = Net(g, seed=0, types=resolve(g, "bf16") if kind == "bf16" else None)
        if planned:
            made = tight(net, 0.1)
            assert made.cost.forwards > len(made.chain)
        torch.manual_seed(2)
        batch = Feed(net, seed=0).next()
        if kind == "force_backward":
            batch["data"].requires_grad_()
        net(batch).loss.backward()
        gradients = [p.grad for p in (*net.parameters(), batch["data"]) if p.grad is not None]
        found.append([*gradients, *net.parameters(), torch.get_rng_state()])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_who_is_never_run_again() -> None:
    text = (
        HEAD
        + """
layer { name: "clip" type: "DummyData" top: "clip" dummy_data_param { shape { dim: 8 dim: 3 } } }
layer { name: "lstm" type: "LSTM" bottom: "data" bottom: "clip" top: "lstm" recurrent_param { num_output: 4 } }
layer { name: "relu" type: "ReLU" bottom: "lstm" top: "lstm" }
layer { name: "drop" type: "Dropout" bottom: "lstm" top: "lstm" }
layer { name: "sum" type: "Reduction" bottom: "lstm" top: "sum" loss_weight: 1 }
layer { name: "top" type: "ArgMax" bottom: "lstm" top: "top" }"""
    )
    g = graph(
        text.replace("dim: 8 dim: 3 dim: 16 dim: 16", "dim: 8 dim: 3 dim: 16").replace(
            "shape { dim: 8 } ", "shape { dim: 8 } "
        )
    )
    again = {n.name for n in g.nodes if n.layer.repeatable()}
    assert again == {"relu", "drop", "sum"}
    fixed = {s.name for s in chain_of(g).stages if s.fixed}
    assert "sum" in fixed  # it has a loss weight
    assert "relu" not in fixed


def test_without_a_graph_nothing_is_planned() -> None:
    net = Net(graph(), seed=0)
    batch = Feed(net, seed=0).next()
    tight(net)
    with torch.no_grad():
        assert not net(batch).loss.requires_grad


class Counting(Hook):
    """Counts the tops that it was shown."""

    repeatable = True

    def __init__(self) -> None:
        self.seen = self.again = 0

    def tops(self, node, outs):
        if self.repeating:
            self.again += 1
        else:
            self.seen += 1
        return outs


def test_hooks_are_told() -> None:
    net = Net(graph(), seed=0)
    net.hook = hook = Counting()
    made = tight(net)
    net(Feed(net, seed=0).next()).loss.backward()
    assert hook.seen == len(net.graph.nodes)
    # torch ends a range as soon as it has what backward reads, so its last layer may not run again
    ranges = text(made.chain, made.schedule).count("[")
    assert hook.again >= made.cost.forwards - len(made.chain) - ranges > 0
    assert not hook.repeating
    net.hook = None
    with pytest.raises(UsageError, match="hook has changed"):
        net(Feed(net, seed=0).next())


def test_a_hook_that_must_not_see_a_blob_twice_is_refused() -> None:
    net = Net(graph(), seed=0)
    net.hook = Hook()
    chain = chain_of(net.graph, numbers=Numbers(fused=False))
    with pytest.raises(UsageError, match="cannot run layers a second time"):
        Recompute(net, chain, keep_all(chain))


def test_a_profile_measures_and_leaves_no_trace() -> None:
    net = Net(graph(), seed=0)
    batch = Feed(net, seed=0).next()
    chain = chain_of(net.graph)
    blobs = [p.detach().clone() for p in net.parameters()]
    state = torch.get_rng_state()
    found = profile(net, chain, batch, rounds=1)
    assert all(s.forward > 0 for s in found.stages)
    assert sum(s.backward > 0 for s in found.stages) == len(found.stages)
    assert all(a.extra >= b.extra for a, b in zip(found.stages, chain.stages))
    assert all(torch.equal(a, b) for a, b in zip(blobs, net.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


# --- budgets ---------------------------------------------------------------------------------------------------------
def test_bytes() -> None:
    assert parse_bytes("1.5GiB") == 3 << 29
    assert parse_bytes(" 512 mib") == 512 << 20
    assert (parse_bytes("800MB"), parse_bytes("1000"), parse_bytes("7B")) == (800_000_000, 1000, 7)
    for word in ("", "much", "-1GiB", "0", "1.5.2MB", "3 stones", "0.1B", "1e9"):
        with pytest.raises(UsageError, match="no number of bytes"):
            parse_bytes(word)
    assert parse_bytes(in_units(12345678)) >= 12345678


def test_strategies_by_name() -> None:
    assert strategies.parse("sequential:7") == Strategy("sequential", 7)
    for word in ("roter", "sequential:", "sequential:0", "sequential:x", "rotor:3"):
        with pytest.raises(UsageError, match="unknown"):
            strategies.parse(word)


def test_what_is_beside_the_net() -> None:
    """Teachers run before the pass, a bucket of gradients for other ranks is there during it."""
    g = graph()
    plain = make_plan(g)
    assert make_plan(g, beside=Beside(sending=1000)).peak == plain.peak + 1000
    assert make_plan(g, beside=Beside(100, plain.cost.peak)).peak == plain.peak + 100
    assert make_plan(g, beside=Beside(100, plain.cost.peak + 5)).peak == plain.peak + 105


def test_too_small_a_budget_is_answered() -> None:
    g = graph()
    plain = make_plan(g)
    with pytest.raises(BudgetError, match="weights, gradients and history alone") as caught:
        make_plan(g, budget=plain.fixed)
    assert caught.value.batch == 0
    with pytest.raises(BudgetError, match="most is needed at layer") as caught:
        make_plan(g, budget=plain.fixed + plain.cost.peak // 3)
    error = caught.value
    assert error.stage in error.text
    assert 0 < error.batch < 8
    assert error.hint is not None
    assert "times the iter_size" in error.hint
    made = make_plan(g, budget=error.least)
    assert made.peak <= error.least
    with pytest.raises(BudgetError):
        make_plan(g, budget=error.least - 1)
    with pytest.raises(BudgetError, match="'none'"):
        make_plan(g, budget=error.least, strategy=Strategy("none"))
