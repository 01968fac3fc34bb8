"""What training in little memory costs: a plain step against planned ones, and measured bytes against the plan.

A step is forward and backward of a net of models/ on random inputs, in this process (no update, which is the same for
all). Budgets are shares of the activations that the unplanned net has at its fullest moment. The contenders take turns
in rotating order; the ratio to the plain step is taken per round, on a CPU in time of the processor. Bytes: torch's
allocator during one step, from the profiler's record; gradients of weights are part of it, so they are of the plan.

    python bench/memory.py [--net resnet50] [--batch 8] [--size 224] [--shares 0.75,0.5] [--rounds 3] [--threads 2]
                           [--strategy rotor] [--profile]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from caffejacinto_py.engine import allocator

MODELS = Path(__file__).resolve().parents[1] / "models"


class Contender:
    """One net with its plan, or none."""

    def __init__(self, graph: Any, share: float | None, args: argparse.Namespace) -> None:
        import torch

        from caffejacinto_py.cli.time import _random_batch
        from caffejacinto_py.engine.memory.budget import make_plan
        from caffejacinto_py.engine.memory.execute import Recompute
        from caffejacinto_py.engine.memory.profile import profile
        from caffejacinto_py.engine.memory.strategies import parse
        from caffejacinto_py.engine.net import Net

        self.net = Net(graph, device=args.device, seed=0)
        torch.manual_seed(0)
        self.batch = _random_batch(self.net)
        self.plan = make_plan(graph)
        if share is not None:
            refine = (lambda chain: profile(self.net, chain, self.batch)) if args.profile else None
            budget = self.plan.fixed + int(share * self.plan.plain.peak)
            self.plan = make_plan(graph, budget=budget, strategy=parse(args.strategy), refine=refine)
            self.net.recompute = Recompute(self.net, self.plan.chain, self.plan.schedule)
        self.share = share
        self.wall = self.cpu = 0.0

    def step(self) -> None:
        for blob in self.net.learnable:
            blob.param.grad = None
        self.net(self.batch).loss.backward()

    def timed(self) -> None:
        import torch

        cuda = self.net.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        if cuda:
            torch.cuda.synchronize()
        self.wall = time.perf_counter() - wall
        self.cpu = self.wall if cuda else time.process_time() - cpu

    def peak(self) -> int:
        from caffejacinto_py.engine.memory.measure import peak_bytes

        for blob in self.net.learnable:
            blob.param.grad = None
        return peak_bytes(self.step, self.net.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--shares", default="0.75,0.5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--strategy", default="rotor")
    parser.add_argument("--profile", action="store_true", help="plan with measured times")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    allocator.tune()
    import torch

    from caffejacinto_py.checking import fit
    from caffejacinto_py.passes.memory import with_batch
    from caffejacinto_py.schema.upgrade import load_net

    if args.threads:
        torch.set_num_threads(args.threads)
    doc = load_net(MODELS / args.net / "train_val.prototxt")
    for proto in doc.message.layer:  # a crop would decide the size
        proto.transform_param.ClearField("crop_size")
    graph = with_batch(fit(doc, phase="TRAIN", data_shape=(3, args.size, args.size))[0], args.batch)
    contenders = [Contender(graph, s, args) for s in (None, *map(float, args.shares.split(",")))]
    for c in contenders:
        c.step()
    rounds: list[list[tuple[float, float]]] = []
    for i in range(args.rounds):
        order = contenders[i % len(contenders) :] + contenders[: i % len(contenders)]
        for c in order:
            c.timed()
        rounds.append([(c.cpu, c.wall) for c in contenders])
    print(f"{args.net}, batch {args.batch}, {args.size} pixels, {args.device}, {torch.get_num_threads()} threads")
    print("share  plan acts  plan all  measured  predicted time  measured time (min .. max)  wall s")
    for k, c in enumerate(contenders):
        planned = c.plan.cost.peak + c.plan.memory.gradients
        ratios = sorted(row[k][0] / row[0][0] for row in rounds)
        peak, mib = c.peak(), 2**20
        print(
            f"{'plain' if c.share is None else f'{c.share:.2f}':5}  {c.plan.cost.peak / mib:9.1f}  {planned / mib:8.1f}"
            f"  {peak / mib:8.1f}  {c.plan.ratio:14.3f}  {statistics.median(ratios):5.3f} ({ratios[0]:.3f} .. "
            f"{ratios[-1]:.3f})         {statistics.median(row[k][1] for row in rounds):.2f}"
            f"{'' if peak <= planned else '  MORE THAN PLANNED'}"
        )


if __name__ == "__main__":
    main()
