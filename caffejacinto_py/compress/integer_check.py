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


def simulated(built: Built, net: Net, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The integers of every tensor of the program in one pass of the simulation: `net` with its hook."""
    tape, before = Tape(built), net.hook
    net.hook = Hooks(before, tape) if before is not None else tape
    try:
        with torch.no_grad():
            net(batch)
    finally:
        net.hook = before
    return tape.values


def verify(
    built: Built, net: Net, batches: Iterable[Mapping[str, Tensor]], *, net32: Net | None = None
) -> list[OpCheck]:
    """Run program and simulation side by side. net: the quantized net in float64, with its simulation hook; net32: the
    same in float32, whose differences are counted too. batches: what the nets are fed."""
    program = built.program
    checks = {
        op["output"]: OpCheck(op, op["output"] in built.exact, 0, Difference(), Difference(), Difference())
        for op in program.info["ops"]
    }

    def watch(op: Mapping[str, Any], accumulator: int, total: int) -> None:
        check = checks[op["output"]]
        check.accumulator, check.total = max(check.accumulator, accumulator), max(check.total, total)

    for batch in batches:
        theirs = simulated(built, net, batch)
        ours = run(program, {name: theirs[name] for name in program.info["inputs"]}, watch=watch)
        single = simulated(built, net32, batch) if net32 is not None else {}
        for name, check in checks.items():
            check.numbers += ours[name].size
            check.whole.add(ours[name], theirs[name])
            check.alone.add(_alone(program, check.op, theirs), theirs[name])
            if net32 is not None:
                check.in_float32.add(ours[name], single[name])
    return list(checks.values())


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
