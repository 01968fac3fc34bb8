"""What training in little memory costs: a plain step against planned ones, and measured bytes against the plan.

A step is forward and backward of a net of models/ on random inputs, in this process (no update, which is the same for
all). Budgets are shares of the activations and gradients that the unplanned net has at its fullest moment. The
contenders take turns in rotating order; the ratio to the plain step is taken per round, on a CPU in time of the
processor. Bytes: torch's allocator during one step, from the profiler's record; with gradients of weights, as the plan.

Then whole trainings, planned and not, from one seed: are gradients of every iteration, weights, statistics and buffers,
random state and the bytes of both snapshot files the same? `--same` iterations of a small net with BatchNorm and
dropout, `--same-net` of the net itself at its last share.

    python bench/memory.py [--net resnet50] [--batch 8] [--size 224] [--shares 0.75,0.5] [--rounds 5] [--threads 2]
                           [--strategy rotor] [--profile] [--same 20] [--same-net 2]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
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
        from caffejacinto_py.engine.memory.budget import make_plan, numbers_of
        from caffejacinto_py.engine.memory.execute import Recompute
        from caffejacinto_py.engine.memory.profile import profile
        from caffejacinto_py.engine.memory.strategies import parse
        from caffejacinto_py.engine.net import Net

        self.net = Net(graph, device=args.device, seed=0)
        torch.manual_seed(0)
        self.batch = _random_batch(self.net)
        numbers = numbers_of(self.net)
        self.plan = make_plan(graph, numbers=numbers)
        if share is not None:
            refine = (lambda chain: profile(self.net, chain, self.batch)) if args.profile else None
            budget = max(self.plan.update, self.plan.fixed + int(share * self.plan.plain.peak))
            strategy = parse(args.strategy)
            self.plan = make_plan(graph, budget=budget, strategy=strategy, numbers=numbers, refine=refine)
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


BLOCK = """
layer {{ name: "c{k}" type: "Convolution" bottom: "{bottom}" top: "c{k}" convolution_param {{
  num_output: 16 kernel_size: 3 pad: 1 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "b{k}" type: "BatchNorm" bottom: "c{k}" top: "c{k}" }}
layer {{ name: "s{k}" type: "Scale" bottom: "c{k}" top: "c{k}" scale_param {{ bias_term: true }} }}
layer {{ name: "r{k}" type: "ReLU" bottom: "c{k}" top: "c{k}" }}
layer {{ name: "d{k}" type: "Dropout" bottom: "c{k}" top: "d{k}" dropout_param {{ dropout_ratio: 0.2 }} }}"""
END = """
layer { name: "ip" type: "InnerProduct" bottom: "d7" top: "ip"
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }"""


def small_net() -> Any:
    from caffejacinto_py.schema.text import parse

    blocks = (BLOCK.format(k=k, bottom=f"d{k - 1}" if k else "data") for k in range(8))
    return parse("name: 'small'" + "".join(blocks) + END, "NetParameter").message


def fed(message: Any, batch: int, size: int, classes: int) -> Any:
    """The layers of a net that train, on random images in place of its data."""
    from caffejacinto_py.schema import pb

    net = pb.NetParameter(name=message.name)
    source = net.layer.add(name="random", type="DummyData", top=["data", "label"]).dummy_data_param
    source.shape.add(dim=[batch, 3, size, size])
    source.shape.add(dim=[batch])
    source.data_filler.add(type="gaussian")
    source.data_filler.add(type="uniform", min=0, max=classes - 0.01)
    for proto in message.layer:
        if proto.bottom and not any(rule.phase == pb.TEST for rule in proto.include):
            net.layer.add().CopyFrom(proto)
    return net


def training(net: Any, iterations: int, share: float | None, strategy: str) -> dict[str, str]:
    """What a training leaves behind, as digests. share: of the activations; None: without a plan."""
    import torch

    from caffejacinto_py.engine.memory.budget import attach, make_plan, numbers_of
    from caffejacinto_py.engine.memory.strategies import parse
    from caffejacinto_py.schema import pb
    from caffejacinto_py.solver import Solver

    param = pb.SolverParameter(base_lr=0.01, lr_policy="fixed", momentum=0.9, weight_decay=1e-4, max_iter=iterations)
    param.random_seed, param.snapshot_prefix = 1, "same"
    param.net_param.CopyFrom(net)
    solver = Solver(param, device="cpu")
    if share is not None:
        plain = make_plan(solver.net.graph, numbers=numbers_of(solver.net))
        budget = max(plain.update, plain.fixed + int(share * plain.plain.peak))
        attach(solver.net, budget, strategy=parse(strategy))
    found = {
        k: hashlib.sha256() for k in ("gradients", "weights and statistics", "buffers", "random state", "snapshot")
    }

    def see(what: str, tensors: Any) -> None:
        for tensor in tensors:
            found[what].update(tensor.detach().contiguous().numpy().tobytes())

    for _ in range(iterations):
        solver.step(1)
        see("gradients", (b.param.grad for b in solver.net.learnable if b.param.grad is not None))
    see("weights and statistics", solver.net.parameters())
    see("buffers", solver.net.buffers())
    see("random state", [torch.get_rng_state()])
    for path in solver.snapshot():
        found["snapshot"].update(Path(path).read_bytes())
    solver.close()
    return {k: v.hexdigest() for k, v in found.items()}


def same(name: str, net: Any, iterations: int, share: float, strategy: str) -> None:
    """Train with and without a plan, and say what differs."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            plain, planned = (training(net, iterations, s, strategy) for s in (None, share))
        finally:
            os.chdir(here)
    other = [k for k in plain if plain[k] != planned[k]]
    verdict = f"DIFFERENT: {', '.join(other)}" if other else f"the same bits: {', '.join(plain)}"
    print(f"{name}, {iterations} iterations, planned (share {share:g}) against plain: {verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--shares", default="0.75,0.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--strategy", default="rotor")
    parser.add_argument("--profile", action="store_true", help="plan with measured times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--same", type=int, default=20, help="iterations of the small net that are compared; 0: none")
    parser.add_argument("--same-net", type=int, default=2, help="iterations of the net itself")
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
    print("share  plan MiB  measured  predicted time  measured time (min .. max)  wall s")
    for k, c in enumerate(contenders):
        planned = c.plan.cost.peak
        ratios = sorted(row[k][0] / row[0][0] for row in rounds)
        peak, mib = c.peak(), 2**20
        print(
            f"{'plain' if c.share is None else f'{c.share:.2f}':5}  {planned / mib:8.1f}"
            f"  {peak / mib:8.1f}  {c.plan.ratio:14.3f}  {statistics.median(ratios):5.3f} ({ratios[0]:.3f} .. "
            f"{ratios[-1]:.3f})         {statistics.median(row[k][1] for row in rounds):.2f}"
            f"{'  within the plan' if peak <= planned else '  MORE THAN PLANNED'}"
        )
    last = contenders[-1].share
    del contenders[:]
    if args.same and last is not None:
        same("small net", fed(small_net(), 16, 32, 10), args.same, last, args.strategy)
    if args.same_net and last is not None:
        same(args.net, fed(doc.message, args.batch, args.size, 10), args.same_net, last, args.strategy)


if __name__ == "__main__":
    main()
