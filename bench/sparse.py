"""What sparsity costs: a plain training step against one with L1 and one of the sparse stage, and one thresholding.

Steps of our Solver on fixed synthetic inputs. The contenders take turns in one process, in rotating order; the ratio to
the plain step is taken per round. On a CPU the time is that of the processor (all threads), which a busy machine
disturbs less than the clock on the wall. masks: every convolution weight is masked, 80 % zeros in those that can have
them. sparse: masks and L1. An event thresholds every eligible layer and makes new masks.

    python bench/sparse.py [--nets lenet,jacintonet11v2] [--batch 16] [--rounds 9] [--seconds 1] [--threads 1]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable

from turns import ratio, take_turns

from caffejacinto_py.engine import allocator

SETTINGS = {
    "plain": "",
    "L1": 'regularization_type: "L1"',
    "masks": "sparse_mode: SPARSE_UPDATE",
    "sparse": 'sparse_mode: SPARSE_UPDATE regularization_type: "L1"',
}
SCHEDULE = """ sparsity_target: 0.99 sparsity_start_factor: 0.8 sparsity_step_factor: 0 sparsity_step_iter: 1000000000
sparsity_start_iter: 1000000000 sparsity_threshold_maxratio: 1 sparsity_threshold_value_max: 10"""


def make(name: str, settings: str, batch: int, device: str) -> tuple[Callable[[int], float], Callable[[], float]]:
    """(seconds per step over so many steps, seconds of one thresholding)."""
    import contenders
    import torch

    from caffejacinto_py.schema.text import parse
    from caffejacinto_py.solver.sparse import Sparse

    case = contenders.CASES[name]
    data, label = contenders.make_inputs(case, batch, device, torch.float32)
    ours = contenders.Ours(case, data, label)
    solver = ours.solver
    message = parse(settings + (SCHEDULE if "sparse_mode" in settings else ""), "SolverParameter").message
    solver.param.MergeFrom(message)
    solver.rule.regularisation = type(solver.rule.regularisation)(l1="L1" in settings)
    solver.sparse = Sparse(solver.net, solver.param, solver.where, solver.dialect)

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def steps(count: int) -> float:
        started = now()
        ours.steps(count)
        return (now() - started) / count

    def event() -> float:
        solver.sparse.begin()
        solver.sparse.last_event = -1
        started = now()
        with torch.no_grad():
            solver.sparse._event(0)
        return now() - started

    return steps, event


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the rows of one net."""
    turns = {kind: make(name, text, options.batch, options.device) for kind, text in SETTINGS.items()}
    for kind in ("masks", "sparse"):
        turns[kind][1]()
    slowest = max(steps(2) for steps, _ in turns.values())
    count = max(2, round(options.seconds / slowest))
    seconds = take_turns({kind: steps for kind, (steps, _) in turns.items()}, options.rounds, count)
    for kind, found in seconds.items():
        spread = ratio(found, seconds["plain"])
        print(f"{name:<16}{options.batch:>6}  {kind:<8}{1e3 * statistics.median(found):>10.2f}   {spread}", flush=True)
    events = [turns["sparse"][1]() for _ in range(5)]
    print(f"{name:<16}{'':>6}  {'event':<8}{1e3 * statistics.median(events):>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="lenet,jacintonet11v2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        allocator.tune()
    import torch

    logging.disable(logging.WARNING)  # the target is meant to be out of reach
    torch.set_num_threads(options.threads)
    print(f"{'net':<16}{'batch':>6}  {'step':<8}{'ms':>10}   ratio to plain (min..max of {options.rounds} rounds)")
    for name in options.nets.split(","):
        measure(name, options)


if __name__ == "__main__":
    main()
