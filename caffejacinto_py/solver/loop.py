"""The training loop: Caffe's Solver::Step and Solve, with its order of test, pass, display, update, snapshot."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caffejacinto_py.data.order import Share
from caffejacinto_py.engine.evaluate import Score, evaluate, loss_weights
from caffejacinto_py.engine.net import Net, Result
from caffejacinto_py.engine.ranks import ALONE, Ranks
from caffejacinto_py.errors import Loc, RankError, UsageError
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import Dialect, resolve_dialect
from caffejacinto_py.schema.upgrade import load_solver, upgrade_solver
from caffejacinto_py.solver import build, lr, memory, nets, rules, settings, together, watch
from caffejacinto_py.solver.display import Display, named
from caffejacinto_py.solver.feed import Feed
from caffejacinto_py.solver.logs import number, output_lines
from caffejacinto_py.solver.metrics import Metrics
from caffejacinto_py.solver.progress import Clock, Losses
from caffejacinto_py.solver.reduce import Reducer
from caffejacinto_py.solver.resume import Resumable
from caffejacinto_py.solver.scaling import Scaling
from caffejacinto_py.solver.signals import Signals
from caffejacinto_py.solver.snapshot import remove_leftovers
from caffejacinto_py.solver.sparse import Sparse
from caffejacinto_py.solver.teacher import Teachers

log = logging.getLogger(__name__)


class Callbacks(NamedTuple):
    """Called in every iteration: before its passes, and when its gradients are complete."""

    on_start: Callable[[], Any]
    on_gradients_ready: Callable[[], Any]


class Solver(Resumable, Display):
    """Trains a net as a solver prototxt says.

    source: a path, a Document of `load_solver`, or a SolverParameter message.
    device: None lets solver_mode decide. dialect: a name of `schema.dialect.DIALECTS`; None looks at the files.
    weights: files to start from, replacing the solver's `weights`. level, stages: added to the train net's state.
    on_nan: "stop" raises CaffeError at a loss that is NaN or infinite, "warn" goes on.
    workers: feeder threads per data layer. metrics, tensorboard: where records go (see `Metrics`).
    sigint, sighup: "stop", "snapshot" or "none", while `solve` runs. python_layers: Python layers may run their code.
    compat: switches that reproduce a C++ binary. precision: see `passes.precision.resolve`. ranks: the processes that
    train this net together, see solver/together.py; every one of them makes a Solver with the same arguments. sync_bn:
    BatchNorm takes its statistics over all ranks.

    Raises PrototxtError, LayerError, DataError, WeightsError or ManyErrors before anything is trained; RankError at any
    time when another rank is gone.
    """

    def __init__(
        self,
        source: Any,
        *,
        device: str | torch.device | None = None,
        dialect: str | None = None,
        weights: str | os.PathLike[str] | Sequence[str] = (),
        level: int | None = None,
        stages: Sequence[str] = (),
        workers: int = 1,
        on_nan: str = "stop",
        metrics: str | os.PathLike[str] | None = None,
        tensorboard: str | None = None,
        sigint: str = "stop",
        sighup: str = "snapshot",
        layout: str = "auto",
        python_layers: bool = False,
        compat: Compat | None = None,
        precision: str | None = None,
        ranks: Ranks = ALONE,
        sync_bn: bool = False,
    ) -> None:
        self.on_nan, self.ranks = _known(on_nan), ranks
        self.signals = Signals(sigint=sigint, sighup=sighup)
        self.requests = together.Requests(self.signals, ranks)
        self._open(source)
        param = self.param
        files = nets.NetFiles(self.where)
        train = nets.train_source(param, self.where, files, level=level, stages=tuple(stages))
        tests = nets.test_sources(param, self.where, files)
        self.dialect = _said(resolve_dialect(train.doc.message, param, dialect, compat=compat))
        settings.check(param, self.where, self.dialect)
        if self.dialect.global_batch:
            train = nets.divide(train, ranks.world)
        if param.snapshot:
            self.check_snapshots()
        chosen = {"--precision": precision, "--sync-bn": sync_bn, "--on-nan": on_nan}
        names = self._agree(train, tests, weights, chosen)
        self.device = build.choose_device(param, device)
        self.seed = ranks.share(build.choose_seed(param) if ranks.first else None)
        build.seed_everything(self.seed)
        options: dict[str, Any] = {"dialect": self.dialect, "device": self.device, "layout": layout}
        options |= {"python_layers": python_layers, "precision": precision}
        options["teachers"] = Teachers(param, self.where, files)
        self._build(train, tests, workers, options)
        build.load_weights([self.net, *self.test_nets], names, tolerant=self.tolerant)
        together.connect(ranks, [self.net, *self.test_nets], sync_bn=sync_bn)
        self.reducer = Reducer(self.net, ranks)
        self.rule = rules.make(self.net.learnable, param, larc=param.larc, floor=self.dialect.delta_floor)
        self.scaling = Scaling(self.net, chosen=precision == "fp16")
        self.sparse = Sparse(self.net, param, self.where, self.dialect)
        self.memory = memory.plan_solver(self)
        self.iter = self.current_step = 0
        self.losses, self.clock = Losses(param.average_loss), Clock(self.device)
        self.metrics = Metrics(metrics, tensorboard=tensorboard) if ranks.first else Metrics()
        self.stopped = False
        self.callbacks: list[Callbacks] = []
        self.one_pass: Callable[[], Result] | None = None  # instead of a whole pass of `net`: pycaffe's, layer by layer
        self.loss_weights = loss_weights(self.net)

    def _open(self, source: Any) -> None:
        """The message and where its fields stand."""
        doc = load_solver(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else source
        self.file = ""
        self.where: lr.Where = lr.nowhere
        if hasattr(doc, "message"):
            for notice in doc.notices:
                log.info("%s", notice)
            self.param, self.file = doc.message, doc.file
            self.where = lambda *path: doc.locs.find(path) or Loc(doc.file)
        else:
            self.param = doc
            upgrade_solver(self.param)

    def _build(
        self, train: nets.NetSource, tests: Sequence[nets.NetSource], workers: int, options: dict[str, Any]
    ) -> None:
        """Nets and their feeds. options: of `build.build_net`."""
        ranks, seed = self.ranks, self.seed
        self.net: Net = build.build_net(train, "TRAIN", seed=seed, **options)
        self.test_nets: list[Net] = [
            build.build_net(t, "TEST", seed=seed + 1 + i, share=self.net, **options) for i, t in enumerate(tests)
        ]
        parts, whole = Share(ranks.rank, ranks.world, ranks.world), Share(ranks.rank, ranks.world)
        self.feed = Feed(self.net, seed=seed, workers=workers, share=parts)
        self.test_feeds = [Feed(net, seed=seed, workers=workers, share=whole) for net in self.test_nets]
        options["teachers"].attach(self.feed, *self.test_feeds)

    def _agree(
        self, train: nets.NetSource, tests: Sequence[nets.NetSource], weights: Any, chosen: dict[str, Any]
    ) -> list[str]:
        """Before anything is built: all ranks have the same files and options. Returns the weights files."""
        names = build.split_names(weights) or build.split_names(list(self.param.weights))
        if not self.ranks.alone:
            sources = {"the train net": train, **{f"test net {i}": t for i, t in enumerate(tests)}}
            chosen |= {"--dialect": self.dialect.name, "--compat": repr(self.dialect.compat)}
            together.check_same(self.ranks, together.facts(self.param, sources, names, options=chosen))
        return names

    @property
    def tolerant(self) -> bool:
        """Whether weights of other shapes are skipped instead of refused."""
        given = self.param.HasField("ignore_shape_mismatch")
        return bool(self.param.ignore_shape_mismatch) if given else self.dialect.ignore_shape_mismatch

    # --- the loop ----------------------------------------------------------------------------------------------------
    def solve(self, resume: str | os.PathLike[str] | None = None) -> None:
        """Train to max_iter, with signals caught. resume: a solverstate to restore first."""
        param, began = self.param, time.perf_counter()
        if param.snapshot_after_train:
            self.check_snapshots()
        if param.snapshot_prefix and self.ranks.first:
            remove_leftovers(param.snapshot_prefix)
        if resume is None:
            self.sparse.begin()
        log.info("Solving %s", self.net.graph.name)
        log.info("Learning Rate Policy: %s", param.lr_policy)
        self.stopped = False
        with self.signals:
            if resume is not None:
                self.restore(resume)
                if self.iter >= param.max_iter:
                    text = "Nothing is left to train: iteration %d, max_iter %d (raise it, or --iterations, to go on)"
                    log.info(text, self.iter, param.max_iter)
            try:
                self.metrics.check()
                self.step(param.max_iter - self.iter)
                if not self.stopped:
                    self.sparse.after_training(self.iter)
                if param.snapshot_after_train and not self._snapshot_due(self.iter):
                    self.snapshot()
                self._finish()
            except RankError as e:
                raise together.with_snapshot(e, param.snapshot_prefix) from e
            finally:
                self._summary(time.perf_counter() - began)
                self.close()

    def step(self, n: int) -> None:
        """Run n iterations, or fewer when a signal stops them."""
        param, stop_at = self.param, self.iter + n
        self._start_window()
        self.sparse.begin()
        self.clock.start()
        while self.iter < stop_at:
            self.clear_grads()
            if self._test_due():
                self.test_all()
                if self.stopped:
                    break
            self.requests.begin()
            together.reseed(self.seed, self.iter, self.ranks)
            for call in self.callbacks:
                call.on_start()
            display = bool(param.display) and self.iter % param.display == 0
            result = self.forward_backward(debug=display and param.debug_info)
            self._look(display)
            if display:
                self._display(result)
            for call in self.callbacks:
                call.on_gradients_ready()
            self.apply_update(display=display)
            self.sparse.after_update(self.iter)
            self.iter += 1
            self.clock.count(self.feed.batch * param.iter_size * self.ranks.world)
            request = self.requests.poll()
            if self._snapshot_due(self.iter) or request == "snapshot":
                self._look(True)
                self.snapshot()
            if request == "stop":
                self.stopped = True
                break
        self._look(True)
        self.clock.stop()

    def clear_grads(self) -> None:
        """Forget gradients; the next pass allocates them, which saves the pass over memory that zeroing is."""
        for blob in self.net.learnable:
            blob.param.grad = None

    def forward_backward(self, *, debug: bool = False) -> Result:
        """iter_size passes that add up gradients. Their mean loss is recorded. Returns the last result."""
        total: Tensor | None = None
        for i in range(self.param.iter_size):
            if debug:
                result = watch.debug_pass(self.net, self.feed.next())
            elif self.one_pass is not None:
                result = self.one_pass()
            else:
                result = self.net(self.feed.next())
                if result.loss.requires_grad:
                    with self.reducer.sending(i == self.param.iter_size - 1):
                        self.scaling.backward(result.loss)
            loss = result.loss.detach()
            total = loss if total is None else total + loss
        assert total is not None
        total = self.reducer.finish(total)
        self.scaling.finish(self.iter)
        self.losses.add(self.iter, total / self.param.iter_size if self.param.iter_size > 1 else total)
        if debug:
            watch.debug_update(self.net)
        return result

    def rates(self) -> rules.Rates:
        """Learning rate, momentum and weight decay of the coming update. Moves the multistep counter."""
        before = self.current_step
        self.current_step = lr.advance_step(self.param, self.iter, before)
        if self.current_step != before and self.param.lr_policy == "multistep":
            log.info("MultiStep Status: Iteration %d, step = %d", self.iter, self.current_step)
        rate = lr.learning_rate(self.param, self.iter, step=self.current_step, dialect=self.dialect)
        sgd = self.param.type == rules.SGD.__name__
        momentum = lr.momentum(self.param, self.iter, rate) if sgd else self.param.momentum
        decay = lr.weight_decay(self.param, self.iter, dialect=self.dialect)
        return rules.Rates(rate, momentum, decay, self.iter)

    def apply_update(self, *, display: bool = False) -> None:
        """Change the weights by their gradients. Where snapshot_diff saves them, gradients become the update."""
        rates = self.rates()
        if display:
            text = f"Iteration {self.iter}, lr = {number(rates.lr)}"
            if self.param.momentum_policy != "fixed" or self.param.weight_decay_policy != "fixed":
                text += f", m = {number(rates.momentum)}, wd = {number(rates.weight_decay)}"
            log.info("%s", text + self.scaling.shown)
        before = self._weights_for_diff()
        if self.scaling.good:
            self.rule.step(rates)
        for param, old in before:
            param.grad = old - param.detach()

    def _weights_for_diff(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        due = self._snapshot_due(self.iter + 1) or self.iter + 1 == self.param.max_iter
        if not (self.param.snapshot_diff and due):
            return []
        return [(b.param, b.param.detach().clone()) for b in self.net.learnable if b.lr_mult]

    # --- tests -------------------------------------------------------------------------------------------------------
    def _test_due(self) -> bool:
        every = self.param.test_interval
        if not every or not self.test_nets or self.iter % every:
            return False
        return self.iter > 0 or self.param.test_initialization or not self.dialect.test_initialization

    def test_all(self) -> list[Score]:
        """Run every test net over its test_iter batches and log the means. Stops early at a signal."""
        running = self.clock.running
        self.clock.stop()
        scores: list[Score] = []
        together.spread_statistics(self.ranks, self.net)
        for i, (net, feed) in enumerate(zip(self.test_nets, self.test_feeds)):
            # NVCaffe and caffe-jacinto look at one batch only before the first iteration
            brief = self.iter == 0 and not self.dialect.test_initialization
            count = 1 if brief else self.param.test_iter[i]
            log.info("Iteration %d, Testing net (#%d)", self.iter, i)
            score = evaluate(net, feed, count, proceed=self._proceed, ranks=self.ranks)
            feed.settle(score.iterations)
            if self.stopped:
                log.info("Test interrupted.")
                break
            if self.param.test_compute_loss:
                log.info("Test loss: %s", number(score.loss))
            for line in output_lines("Test", score.outputs):
                log.info("%s", line)
            self.metrics.record("test", self.iter, {"net": i, **named(score.outputs)})
            scores.append(score)
        if running:
            self.clock.start()
        return scores

    def _proceed(self) -> bool:
        """Between test batches: serve requests; False: stop."""
        request = self.requests.poll()
        if request == "snapshot":
            self.snapshot()
        self.stopped = self.stopped or request == "stop"
        return not self.stopped

    def close(self) -> None:
        """Stop the feeders and close files. The solver can be used again."""
        for feed in (self.feed, *self.test_feeds):
            feed.close()
        self.metrics.close()


def _known(on_nan: str) -> str:
    if on_nan not in ("stop", "warn"):
        raise UsageError(f"on_nan '{on_nan}' is unknown", hint="stop or warn")
    return on_nan


def _said(dialect: Dialect) -> Dialect:
    """Log which dialect it is, and why."""
    log.info("Dialect: %s (%s)", dialect.name, dialect.reason)
    for name, value in dialect.compat.changed().items():
        log.info("Compat: %s=%s", name, value)
    return dialect
