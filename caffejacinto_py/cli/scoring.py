"""How `test` runs a net: batches, means, ranks, the simulation and its float twin, and what a report measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging

    from caffejacinto_py.compress.report import Meter
    from caffejacinto_py.engine.evaluate import TestOutput
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes.absorb import Absorbed
    from caffejacinto_py.passes.heads import TopK
    from caffejacinto_py.solver.feed import Feed


@dataclass
class Scores:
    """Means over the batches. ranks: of every TopK, in order."""

    loss: float
    outputs: Sequence[TestOutput]
    ranks: Sequence[float]


@dataclass
class Run:
    """A net under test.

    net: as it is saved. runner: the same parameters, with an output for each rank. twin: the float net with weights of
    its own, where the net is simulated and both are to be compared.
    """

    net: Net
    runner: Net
    ranks: tuple[TopK, ...]
    twin: Net | None = None
    meter: Meter | None = None
    absorbed: Absorbed | None = None
    scores: Scores | None = None
    exact: Scores | None = None
    seconds: float = 0.0
    images: int = 0
    added: frozenset[str] = field(default=frozenset())


def absorb_into(net: Net, log: logging.Logger) -> tuple[Net, Absorbed]:
    """The net after absorbing batch norm, on the same device; simulated if it asks for that."""
    from caffejacinto_py.cli.optimize import report
    from caffejacinto_py.compress import quantize
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes.absorb import absorb

    log.info("Optimizing Net %s", net.graph.name)
    done = absorb(net.graph, net.model(), shared="keep")
    report(done, log)
    new = Net(done.graph, device=net.device, seed=0)
    new.load(done.model)
    quantize.attach(new)
    return new, done


def make_run(net: Net, *, measured: bool, absorbed: Absorbed | None = None) -> Run:
    """The net with what the test needs around it. measured: for a report."""
    from caffejacinto_py.compress import quantize
    from caffejacinto_py.compress.report import Meter
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes import heads

    graph, ranks = heads.score(net.graph)
    added = frozenset(t.output for t in ranks if t.added)
    runner = net if graph is net.graph else Net(graph, device=net.device, dtype=net.dtype, share=net)
    run = Run(net, runner, ranks, absorbed=absorbed, added=added)
    held = net.model() if measured else None  # before a simulation may touch the weights
    if quantize.find(net) is not None:
        runner.hook = net.hook
        if held is not None:
            run.twin = Net(graph, device=net.device, dtype=net.dtype, seed=0)
            run.twin.load(held)
    if measured:
        run.meter = Meter(runner, run.twin, leave_out=sorted(added))
    return run


def score(run: Run, feed: Feed, iterations: int, log: logging.Logger) -> None:
    """Run the batches; logs every one as `caffe test` does."""
    import torch

    from caffejacinto_py.solver.logs import number

    tables = [_Table(run, net) for net in (run.runner, run.twin) if net is not None]
    log.info("Running for %d iterations.", iterations)
    started = time.perf_counter()
    for i in range(iterations):
        batch = feed.next()
        with torch.no_grad():
            for table in tables:
                table.add(table.net(batch))
        if run.meter is not None:
            run.meter.after()
        for name, values in tables[0].last.items():
            for value in values.tolist():
                log.info("Batch %d, %s = %s", i, name, number(value))
    run.seconds = time.perf_counter() - started
    run.images = feed.batch * iterations
    run.scores = tables[0].scores()
    run.exact = tables[1].scores() if len(tables) > 1 else None
    log.info("Performance: %.1f img/s (%d images in %.2f s)", run.images / run.seconds, run.images, run.seconds)


class _Table:
    """What one net put out, batch by batch. last: of the latest batch, without the ranks that were added."""

    def __init__(self, run: Run, net: Net) -> None:
        self.run, self.net = run, net
        self.last: dict[str, Any] = {}
        self._rows: dict[str, list[Any]] = {}
        self._losses: list[float] = []

    def add(self, result: Any) -> None:
        self._losses.append(float(result.loss))
        flat = {name: value.detach().reshape(-1) for name, value in result.outputs.items()}
        for name, value in flat.items():
            self._rows.setdefault(name, []).append(value)
        self.last = {name: value for name, value in flat.items() if name not in self.run.added}

    def scores(self) -> Scores:
        from caffejacinto_py.engine.evaluate import loss_weights, summarize

        own = {name: values for name, values in self._rows.items() if name not in self.run.added}
        outputs = summarize(own, loss_weights(self.net))
        extra = {o.name: o.value for o in summarize(self._rows, {})}
        loss = sum(x / len(self._losses) for x in self._losses)
        return Scores(loss, outputs, [extra.get(t.output, float("nan")) for t in self.run.ranks])
