"""Whether an integer program does what the simulation does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress.integer import Built
from caffejacinto_py.compress.integer_run import Program, apply, dequantize, quantize, run
from caffejacinto_py.engine.hooks import Hook, Hooks
from caffejacinto_py.errors import InputError
from caffejacinto_py.ir.graph import Node, Value

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net


@dataclass
class Difference:
    """Numbers of one tensor that differ from the simulation. most: the largest difference, in steps (LSB)."""

    count: int = 0
    most: int = 0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        off = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))
        self.count += int((off != 0).sum())
        self.most = max(self.most, int(off.max(initial=0)))


@dataclass
class OpCheck:
    """One op. numbers: values compared. alone: fed with the simulation's own integers. whole: fed by the program.
    in_float32: whole, against the simulation in float32. accumulator, total: the largest magnitudes met.

    exact: must be equal bit for bit, from the input on; else one step is allowed where the op is fed alone.
    """

    op: Mapping[str, Any]
    exact: bool
    numbers: int
    alone: Difference
    whole: Difference
    in_float32: Difference
    accumulator: int = 0
    total: int = 0

    @property
    def good(self) -> bool:
        return self.whole.count == 0 if self.exact else self.alone.most <= 1


@dataclass(frozen=True)
class Score:
    """Mean of a net output that is one number (accuracy, loss): behind the program, and in the simulation."""

    name: str
    integer: float
    simulation: float


@dataclass(frozen=True)
class Verification:
    """checks: one an op, in order. scores: what the layers left out say of the program's outputs."""

    checks: tuple[OpCheck, ...]
    scores: tuple[Score, ...]
    batches: int


class Tape(Hook):
    """Remembers blobs of a pass as integers. Last of several hooks, it sees what the simulation made."""

    def __init__(self, built: Built) -> None:
        self.places: dict[Value, str] = {v: n for n, v in built.places.items()}
        self.program = built.program
        self.values: dict[str, np.ndarray] = {}

    def tops(self, node: Node, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for value, out in zip(node.outputs, outs, strict=True):
            name = self.places.get(value)
            if name is not None:
                real = out.detach().double().cpu().numpy()
                self.values[name] = quantize(self.program, name, real)
                if name in self.program.info["inputs"]:
                    self._check_input(name, real)
        return outs

    def _check_input(self, name: str, real: np.ndarray) -> None:
        """The net's own inputs are where the integers begin: they must be numbers that integers stand for."""
        off = np.abs(dequantize(self.program, name, self.values[name]) - real) * self.program.tensors[name]["scale"]
        if off.max(initial=0) > 1e-2:
            text = f"the data of input '{name}' are not whole numbers 0 .. 255"
            raise InputError(text, hint="calibrate the net instead of --pixels")


def simulated(built: Built, net: Net, batch: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """One pass of the simulation, `net` with its hook: the integers of every tensor of the program; the net's
    outputs."""
    tape, before = Tape(built), net.hook
    net.hook = Hooks(before, tape) if before is not None else tape
    try:
        with torch.no_grad():
            outputs = net(batch).outputs
    finally:
        net.hook = before
    return tape.values, outputs


def finished(
    built: Built, net: Net, batch: Mapping[str, Tensor], values: Mapping[str, np.ndarray]
) -> dict[str, Tensor]:
    """Outputs of the layers that the program leaves out, on its tensors as reals; those that can be computed so."""
    program, names = built.program, {entry["layer"] for entry in built.program.info["left_out"]}
    blobs = {v: torch.from_numpy(dequantize(program, n, values[n])).to(net.dtype) for n, v in built.places.items()}
    for source in net.sources:
        blobs.update((v, net.feed(v.name, batch)) for v in source.node.outputs if v not in blobs)
    for step, module in zip(net.plan.steps, net.layers, strict=True):
        node = step.node
        if node.name in names and all(v in blobs for v in node.inputs):
            with torch.no_grad():
                out = module(*(blobs[v] for v in node.inputs))
            blobs.update(zip(node.outputs, out if isinstance(out, tuple) else (out,), strict=True))
    return {v.name: blobs[v] for v in net.graph.outputs if v in blobs}


def verify(
    built: Built, net: Net, batches: Iterable[Mapping[str, Tensor]], *, net32: Net | None = None
) -> Verification:
    """Run program and simulation side by side. net: the quantized net in float64, with its simulation hook; net32: the
    same in float32, whose differences are counted too. batches: what the nets are fed."""
    program, count = built.program, 0
    checks = {
        op["output"]: OpCheck(op, op["output"] in built.exact, 0, Difference(), Difference(), Difference())
        for op in program.info["ops"]
    }
    sums: dict[str, list[float]] = {}

    def watch(op: Mapping[str, Any], accumulator: int, total: int) -> None:
        check = checks[op["output"]]
        check.accumulator, check.total = max(check.accumulator, accumulator), max(check.total, total)

    for batch in batches:
        count += 1
        theirs, outputs = simulated(built, net, batch)
        ours = run(program, {name: theirs[name] for name in program.info["inputs"]}, watch=watch)
        single = simulated(built, net32, batch)[0] if net32 is not None else {}
        for name, check in checks.items():
            check.numbers += ours[name].size
            check.whole.add(ours[name], theirs[name])
            check.alone.add(_alone(program, check.op, theirs), theirs[name])
            if net32 is not None:
                check.in_float32.add(ours[name], single[name])
        for name, value in finished(built, net, batch, ours).items():
            if value.numel() == 1:
                old = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [old[0] + float(value), old[1] + float(outputs[name])]
    scores = tuple(Score(name, a / count, b / count) for name, (a, b) in sums.items())
    return Verification(tuple(checks.values()), scores, count)


def _alone(program: Program, op: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> np.ndarray:
    return apply(program, op, [theirs[name] for name in op["inputs"]])


def random_batch(built: Built, net: Net, seed: int) -> dict[str, Tensor]:
    """Inputs for a net without data: for the program's inputs any of their integers, for others zeros."""
    rng = np.random.default_rng(seed)
    names = {built.places[n].name: built.program.tensors[n] for n in built.program.info["inputs"]}
    batch = {}
    for source in net.sources:
        for top, shape in zip(source.tops, source.shapes, strict=True):
            tensor = names.get(top)
            if tensor is None:
                batch[top] = torch.zeros(shape, dtype=net.dtype)
                continue
            low, high = (-(1 << (tensor["bits"] - 1)), 1 << (tensor["bits"] - 1)) if tensor["signed"] else (
                0, 1 << tensor["bits"])  # fmt: skip
            whole = rng.integers(low, high, shape)
            batch[top] = torch.from_numpy((whole - tensor["zero"]) / tensor["scale"]).to(net.dtype)
    return batch
