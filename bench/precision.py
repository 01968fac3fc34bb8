"""Training steps in 16 bits against float32, and whether the loss goes the same way.

A net of models/ (`--net`, those of bench/train.py with 10 classes) through our Solver, on images made of ten patterns
and noise, new ones in each iteration and the same for every type. First steps in turns, in rotating order: the ratio is
taken per round, the median is shown. Then `--iterations` of training from equal weights: the mean loss of the last
tenth, and how far it is from float32's. A type that the machine has no instructions for runs in float32, as in `train`;
`--force` computes in it all the same, slowly, for the losses. `--emulate` does so at float32's speed: convolutions,
products, normalization and pooling read values that are rounded to 16 bits, compute in float32 and round what they
make, forward and backward, which is what the instructions do. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from contenders import CASES, LR, MOMENTUM, our_message
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from caffejacinto_py.engine import precision
from caffejacinto_py.engine.memory.measure import watch_saved
from caffejacinto_py.schema import pb
from caffejacinto_py.solver import Solver
from caffejacinto_py.solver.feed import Feed

NETS = ("jacintonet11v2", "lenet", "cifar10_quick")


class Patterns(Feed):
    """Images of ten classes: a pattern each, and noise. A pure function of the batch's number."""

    batch_size = 64
    case = CASES[NETS[0]]

    def next(self) -> dict[str, Tensor]:
        self.number = getattr(self, "number", -1) + 1
        fixed = torch.Generator().manual_seed(0)
        case, span = self.case, self.case.high - self.case.low
        patterns = torch.rand(case.classes, *case.shape, generator=fixed) * span / 4
        draw = torch.Generator().manual_seed(1 + self.number)
        label = torch.randint(case.classes, (self.batch_size,), generator=draw)
        noise = torch.randn(self.batch_size, *case.shape, generator=draw) * span / 6
        data = case.low + span / 3 + patterns[label] + noise
        self.last = {"data": data, "label": label}
        return self.last


class Emulated(TorchFunctionMode):
    """16-bit tensors go through the slow operations in float32."""

    SLOW = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "batch_norm")
    SLOW += ("max_pool2d", "max_pool2d_with_indices", "avg_pool2d")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        halves = [a for a in args if isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16)]
        if not halves or getattr(func, "__name__", "") not in self.SLOW:
            return func(*args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        made = func(*wide, **kwargs)
        return tree_map(lambda t: t.to(halves[0].dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, made)


def solver(kind: str, options: argparse.Namespace) -> Solver:
    param = pb.SolverParameter(base_lr=10 * LR, lr_policy="fixed", momentum=MOMENTUM, weight_decay=0.0005, type="SGD")
    param.random_seed, param.max_iter = 1, 1
    param.net_param.CopyFrom(our_message(CASES[options.net], options.batch, dropout=False))
    made = Solver(param, device=options.device, precision=kind, dialect="jacinto", workers=0)
    made.feed.close()
    made.feed = Patterns(made.net, seed=1)
    made.feed.batch_size, made.feed.case = options.batch, CASES[options.net]
    return made


def step(solver: Solver) -> tuple[float, float]:
    """Seconds and loss of an iteration."""
    start = time.perf_counter()
    solver.clear_grads()
    result = solver.forward_backward()
    solver.apply_update()
    solver.iter += 1
    loss = float(result.loss.detach())  # waits for the device
    return time.perf_counter() - start, loss


def kept(solver: Solver) -> float:
    """MiB that a pass keeps for its gradient."""
    inputs = {name: solver.net.feed(name, solver.feed.next()) for s in solver.net.sources for name in s.tops}
    with watch_saved(solver.net) as saved:
        solver.net(inputs)
    return saved.total / 2**20


def speed(kinds: list[str], options: argparse.Namespace) -> None:
    solvers = {kind: solver(kind, options) for kind in kinds}
    for one in solvers.values():
        step(one)
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = list(kinds)
    for _ in range(options.rounds):
        for kind in order:
            rounds[kind].append(statistics.median(step(solvers[kind])[0] for _ in range(options.steps)))
        order.append(order.pop(0))
    print(f"{'type':<6}{'layers run in':<22}{'ms/step':>10}{'img/s':>9}{'kept MiB':>10}   ratio (min..max)")
    for kind in kinds:
        ratios = sorted(a / b for a, b in zip(rounds[kinds[0]], rounds[kind], strict=True))
        types: Any = solvers[kind].net.types
        seconds = statistics.median(rounds[kind])
        row = f"{kind:<6}{'/'.join(types.types):<22}{1e3 * seconds:>10.1f}{options.batch / seconds:>9.1f}"
        row += f"{kept(solvers[kind]):>10.1f}   {statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        print(row, flush=True)


def losses(kinds: list[str], options: argparse.Namespace) -> None:
    ends: dict[str, float] = {}
    last = max(1, options.iterations // 10)
    for kind in kinds:
        one = solver(kind, options)
        curve = [step(one)[1] for _ in range(options.iterations)]
        ends[kind] = statistics.mean(curve[-last:])
        off = 100 * (ends[kind] / ends[kinds[0]] - 1)
        skipped = f", {one.scaling.skipped} steps skipped" if one.scaling.active else ""
        text = f"{kind}: loss {curve[0]:.4f} -> {ends[kind]:.4f} after {options.iterations} iterations"
        print(f"{text} ({off:+.2f} %{skipped})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default=NETS[0])
    parser.add_argument("--types", default="fp32,bf16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--iterations", type=int, default=500, help="of the comparison of losses; 0: none")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    kinds = options.types.split(",")
    for kind in kinds:
        name = precision.OVERRIDES[kind]
        why = precision.missing(name, torch.device(options.device))
        if why:
            print(f"{kind}: {why}; computed {'all the same' if options.force or options.emulate else 'in FLOAT'}")
    if options.force or options.emulate:
        precision.missing = lambda kind, device: None  # type: ignore[assignment]
    with Emulated() if options.emulate else nullcontext():
        if options.rounds:
            speed(kinds, options)
        if options.iterations:
            losses(kinds, options)


if __name__ == "__main__":
    main()
