"""`caffe.get_solver` and the solver classes: a training run whose nets can be looked at between steps."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch

from caffejacinto_py.engine.net import Net as Engine
from caffejacinto_py.ir.graph import Value
from caffejacinto_py.pycaffe.mode import MODE
from caffejacinto_py.pycaffe.net import Net
from caffejacinto_py.schema.upgrade import load_solver
from caffejacinto_py.solver import Solver as Loop
from caffejacinto_py.solver import lr


class Solver:
    """A solver of the type its prototxt names. Trains where `set_mode_cpu` / `set_mode_gpu` say, not its solver_mode.

    net, test_nets: live views. After `step` and `solve` the blobs of `net` hold the last pass.
    """

    _type: ClassVar[str | None] = None

    def __init__(self, solver_file: str | os.PathLike[str]) -> None:
        doc = load_solver(os.fspath(solver_file))
        if self._type is not None:
            doc.message.type = self._type
        if MODE.seed is not None and not doc.message.HasField("random_seed"):
            doc.message.random_seed = MODE.seed
        self._loop = Loop(doc, device=MODE.device, layout="nchw")
        self._seen = Watch(self._loop.net)
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
        self._before()
        self._loop.step(n)
        self._after()

    def solve(self, resume: str | os.PathLike[str] | None = None) -> None:
        """Train to max_iter, from a .solverstate if one is given."""
        self._before()
        self._loop.solve(os.fspath(resume) if resume is not None else None)
        self._after()

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

    def _before(self) -> None:
        self.net._params_to_net()
        for node in self.net._graph.nodes:
            if node.layer.source == "input":
                feeder: Any = self._loop.feed.feeders[node.name]
                feeder.reset(*(self.net.blobs[v.name].data for v in node.outputs))

    def _after(self) -> None:
        self.net._params_from_net()
        self.net._show({**self._seen.values, **self._loop.feed.last})


class Watch:
    """Keeps the tops of the last training pass of a net, by blob name."""

    def __init__(self, net: Engine) -> None:
        self.values: dict[str, torch.Tensor] = {}
        for step, module in zip(net.plan.steps, net.layers, strict=True):
            module.register_forward_hook(self._recorder(step.node.outputs))

    def _recorder(self, tops: tuple[Value, ...]) -> Any:
        def record(module: torch.nn.Module, args: Any, out: Any) -> None:
            outs = out if isinstance(out, tuple) else (out,)
            self.values.update((v.name, o.detach()) for v, o in zip(tops, outs, strict=True))

        return record


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
