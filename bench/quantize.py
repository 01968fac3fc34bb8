"""What simulated quantization costs: training steps and test passes with `quantize: true` against plain float ones.

Steps of our Solver, and forward passes of a TEST net without gradients, on fixed synthetic inputs. The contenders take
turns in one process, in rotating order; the ratio to the plain one is taken per round. On a CPU the time is that of the
processor (all threads), which a busy machine disturbs less than the clock on the wall.

    python bench/quantize.py [--nets lenet,jacintonet11v2] [--batch 64] [--rounds 9] [--seconds 1] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from turns import ratio, take_turns

from caffejacinto_py.engine import allocator

SETTINGS = {
    "plain": None,
    "quantized": "",
    "stochastic": "rounding_scheme: QuantizationParameter_Rounding_STOCHASTIC",
    "channels": "per_channel_weights: true",
}


def timer(run: Callable[[int], Any], device: str) -> Callable[[int], float]:
    """Seconds per step over so many steps."""
    import torch

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def steps(count: int) -> float:
        started = now()
        run(count)
        return (now() - started) / count

    return steps


def quantized(net: Any, settings: str | None) -> None:
    from caffejacinto_py.compress import quantize
    from caffejacinto_py.schema.text import parse

    if settings is not None:
        text = f"quantize: true net_quantization_param {{ display_quantization: 0 {settings} }}"
        net.graph.proto.MergeFrom(parse(text, "NetParameter").message)
        quantize.attach(net)


def train(name: str, settings: str | None, batch: int, device: str) -> Callable[[int], float]:
    import contenders
    import torch

    case = contenders.CASES[name]
    ours = contenders.Ours(case, *contenders.make_inputs(case, batch, device, torch.float32))
    quantized(ours.solver.net, settings)
    return timer(ours.steps, device)


def test(name: str, settings: str | None, batch: int, device: str) -> Callable[[int], float]:
    import contenders
    import torch

    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes import prepare

    case = contenders.CASES[name]
    data, label = contenders.make_inputs(case, batch, device, torch.float32)
    message = contenders.our_message(case, batch, dropout=True)
    net = Net(prepare(message, phase="TEST"), device=device, seed=1)
    quantized(net, settings)
    tops = [top for source in net.sources for top in source.tops]
    inputs = dict(zip(tops, (data, label.float()), strict=True))

    def run(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                net(inputs)

    return timer(run, device)


def measure(name: str, what: str, options: argparse.Namespace) -> None:
    """Print the rows of one net."""
    make = {"train": train, "test": test}[what]
    turns = {kind: make(name, text, options.batch, options.device) for kind, text in SETTINGS.items()}
    slowest = max(steps(3) for steps in turns.values())
    count = max(2, round(options.seconds / slowest))
    seconds = take_turns(turns, options.rounds, count)
    for kind, found in seconds.items():
        spread = ratio(found, seconds["plain"])
        print(f"{name:<16}{what:<7}{kind:<11}{1e3 * statistics.median(found):>9.2f}   {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="lenet,jacintonet11v2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        allocator.tune()
    import torch

    torch.set_num_threads(options.threads)
    print(f"batch {options.batch}, {options.threads} threads, {options.device}")
    print(f"{'net':<16}{'what':<7}{'':<11}{'ms':>9}   ratio to plain (min..max of {options.rounds} rounds)")
    for name in options.nets.split(","):
        for what in ("train", "test"):
            measure(name, what, options)


if __name__ == "__main__":
    main()
