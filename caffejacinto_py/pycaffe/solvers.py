"""`caffe.get_solver` and the solver classes: a training run whose nets can be looked at between steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from caffejacinto_py.engine.net import Result
from caffejacinto_py.pycaffe.mode import MODE
from caffejacinto_py.pycaffe.net import Net
from caffejacinto_py.schema.upgrade import load_solver
from caffejacinto_py.solver import Solver as Loop
from caffejacinto_py.solver import lr
from caffejacinto_py.solver.loop import Callbacks

log = logging.getLogger(__name__)


class Solver:
    """A solver of the type its prototxt names. Trains where `set_mode_cpu` / `set_mode_gpu` say, not its solver_mode.

    net, test_nets: live views. After `step` and `solve` the blobs of `net` hold the last pass, with its gradients.
    """

    _type: ClassVar[str | None] = None

    def __init__(self, solver_file: str | os.PathLike[str]) -> None:
        doc = load_solver(os.fspath(solver_file))
        if self._type is not None:
            doc.message.type = self._type
        if MODE.seed is not None and not doc.message.HasField("random_seed"):
            doc.message.random_seed = MODE.seed
        self._loop = Loop(doc, device=MODE.device, layout="nchw", python_layers=True, compat=MODE.compat,
                          precision="fp32")  # fmt: skip  # blobs are float32 arrays
        if self._loop.memory is not None:
            log.warning("Memory: pycaffe runs passes that it shows layer by layer, and keeps everything then")
        self._last = 0
        self._own = False
        self._loop.callbacks.append(Callbacks(self._choose_pass, lambda: None))
        self.net = Net.of_engine(self._loop.net, self._loop.feed)
        pairs = zip(self._loop.test_nets, self._loop.test_feeds, strict=True)
        self.test_nets = [Net.of_engine(net, feed) for net, feed in pairs]

    @property
    def iter(self) -> int:
        return self._loop.iter

    @property
    def param(self) -> Any:
        """The SolverParameter message; changes of base_lr and the like take effect in the next step."""
        return self._loop.param

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        loop = self._loop
        return lr.learning_rate(loop.param, loop.iter, step=loop.current_step, dialect=loop.dialect)

    def step(self, n: int) -> None:
        """Run n iterations. `Input` layers deliver what stands in their blobs."""
        self._run(self._loop.iter + n, lambda: self._loop.step(n))

    def solve(self, resume: str | os.PathLike[str] | None = None) -> None:
        """Train to max_iter, from a .solverstate if one is given."""
        file = os.fspath(resume) if resume is not None else None
        self._run(self._loop.param.max_iter, lambda: self._loop.solve(file))

    def apply_update(self) -> None:
        """Change the weights by the gradients that stand in `net.params`."""
        self.net._params_to_net()
        self._loop.apply_update()
        self.net._params_from_net()

    def snapshot(self) -> None:
        """Write <snapshot_prefix>_iter_<iter>.caffemodel and .solverstate."""
        self.net._params_to_net()
        self._loop.snapshot()

    def restore(self, state_file: str | os.PathLike[str]) -> None:
        """Go on where a .solverstate was written. Raises WeightsError."""
        self._loop.restore(os.fspath(state_file))
        self.net._params_from_net()

    def share_weights(self, net: Net) -> None:
        """Let another net use the memory of this solver's weights (layers of the same name)."""
        net.share_with(self.net)

    def add_callback(self, on_start: Callable[[], Any], on_gradients_ready: Callable[[], Any]) -> None:
        """Have functions called in every iteration: before its passes, and between backward and update. They may read
        and write `net`'s parameters and gradients."""

        def synced(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                self.net._params_from_net()
                call()
                self.net._params_to_net()

            return run

        self._loop.callbacks.append(Callbacks(synced(on_start), synced(on_gradients_ready)))

    # --- running -----------------------------------------------------------------------------------------------------
    def _run(self, until: int, train: Callable[[], None]) -> None:
        self.net._params_to_net()
        shapes = self._loop.net.graph.shapes
        reshaped = False
        for node in self.net._graph.nodes:
            if node.layer.source == "input":
                blobs = [self.net.blobs[v.name] for v in node.outputs]
                if any(b.shape != shapes[v] for b, v in zip(blobs, node.outputs)):
                    reshaped = True
                    continue
                feeder: Any = self._loop.feed.feeders[node.name]
                feeder.reset(*(b.data for b in blobs))
        self._last = until - 1
        self._own = reshaped or self.net._written_constants()
        try:
            train()
        finally:
            self.net._params_from_net()

    def _choose_pass(self) -> None:
        """Run the last iteration layer by layer, so that all of its blobs and gradients can be looked at; earlier ones
        only where somebody may look, or where the user made the net's input something else: new shapes, or other
        constants in a DummyData.
        """
        watched = self.net._callbacks or len(self._loop.callbacks) > 1
        look = self._loop.iter == self._last or watched or self._own
        self._loop.one_pass = self._pass if look else None

    def _pass(self) -> Result:
        net, last = self.net, len(self.net._graph.nodes) - 1
        net._params_from_net()
        loss = net._forward(0, last)
        net._backward(last, 0)
        values = {name: blob._data.take(self._loop.device) for name, blob in net.blobs.items()}
        self._loop.feed.last = {top: values[top] for source in self._loop.net.sources for top in source.tops}
        return Result(torch.tensor(loss), {name: values[name] for name in net.outputs})


class SGDSolver(Solver):
    """Stochastic gradient descent with momentum."""

    _type = "SGD"


class NesterovSolver(Solver):
    """Nesterov's accelerated gradient."""

    _type = "Nesterov"


class AdaGradSolver(Solver):
    """AdaGrad (Duchi et al. 2011)."""

    _type = "AdaGrad"


class RMSPropSolver(Solver):
    """RMSProp (Tieleman and Hinton 2012)."""

    _type = "RMSProp"


class AdaDeltaSolver(Solver):
    """AdaDelta (Zeiler 2012)."""

    _type = "AdaDelta"


class AdamSolver(Solver):
    """Adam (Kingma and Ba 2015)."""

    _type = "Adam"


def get_solver(solver_file: str | os.PathLike[str]) -> Solver:
    """A solver of the type that the file names."""
    return Solver(solver_file)
