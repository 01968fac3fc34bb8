"""Training speed: our engine against the same net written by hand in eager PyTorch (`make bench`).

A step is forward, backward and an SGD update (momentum, weight decay, lr_mult and decay_mult of the prototxt) on
fixed synthetic inputs. The contenders take turns, each in its own process: ours as `caffejacinto train` sets it up, the
rivals as plain PyTorch. The faster rival of NCHW and channels_last counts. The ratio is taken per round; the median is
shown. Before timing, both sides must compute the same losses from the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from turns import Turn

NETS = ("lenet", "cifar10_quick", "jacintonet11v2", "alexnet", "resnet50")
BATCH = {"lenet": 64, "cifar10_quick": 100, "jacintonet11v2": 64, "alexnet": 16, "resnet50": 4}
LAYOUTS = ("nchw", "channels_last")
HEAD = f"{'net':<16}{'batch':>6}{'ours':>10}{'nchw':>10}{'ch_last':>10}   ratio (min..max)"


def start(kind: str, name: str, options: argparse.Namespace) -> Turn:
    """A contender, ready to run."""
    tuned = kind == "ours" or options.tuned
    turn = Turn(kind, name, BATCH[name], options.device, options.threads, tuned, options.fused)
    turn.receive()
    return turn


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one net: img/s of every contender and the ratio rival / ours, per round."""
    if not options.trust:
        start("verify", name, options).close()
    turns = {kind: start(kind, name, options) for kind in ("ours", *LAYOUTS)}
    slowest = max(turn(2) for turn in turns.values())
    steps = options.iterations or max(2, round(options.seconds / slowest))
    rounds: dict[str, list[float]] = {kind: [] for kind in turns}
    order = list(turns)
    for _ in range(options.rounds):
        for kind in order:
            rounds[kind].append(turns[kind](steps))
        order.append(order.pop(0))  # nobody always runs behind the same neighbour
    for turn in turns.values():
        turn.close()
    best = min(LAYOUTS, key=lambda kind: statistics.median(rounds[kind]))
    ratios = [rival / mine for rival, mine in zip(rounds[best], rounds["ours"], strict=True)]
    return {
        "net": name,
        "batch": BATCH[name],
        "images_per_second": {k: BATCH[name] / statistics.median(v) for k, v in rounds.items()},
        "rival": best,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "steps": steps,
    }


def row(found: dict[str, Any]) -> str:
    speeds = "".join(f"{found['images_per_second'][k]:>10.1f}" for k in ("ours", *LAYOUTS))
    low, high = min(found["ratios"]), max(found["ratios"])
    return f"{found['net']:<16}{found['batch']:>6}{speeds}   {found['ratio']:.2f} ({low:.2f}..{high:.2f})"


def arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS), help="comma-separated, of: " + ", ".join(NETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one turn of one contender")
    parser.add_argument("--iterations", type=int, default=0, help="steps of a turn, instead of --seconds")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as this process may use")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fused", action="store_true", help="give the rivals torch's fused SGD (not its default)")
    parser.add_argument("--tuned", action="store_true", help="give the rivals our allocator settings as well")
    parser.add_argument("--trust", action="store_true", help="skip the check that both sides compute the same losses")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(args)
    options.nets = options.nets.split(",")
    if unknown := [n for n in options.nets if n not in NETS]:
        parser.error(f"unknown nets: {', '.join(unknown)}")
    return options


def main(args: list[str] | None = None) -> None:
    options = arguments(args)
    print(f"images per second on {options.device}\n{HEAD}", flush=True)
    results = []
    for name in options.nets:
        results.append(measure(name, options))
        print(row(results[-1]), flush=True)
    mean = statistics.geometric_mean(r["ratio"] for r in results)
    print(f"geometric mean of the ratios: {mean:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"geometric_mean": mean, "nets": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
