"""What fewer bits of history take and cost: bytes, time of an update, and what a training ends with.

Bytes: from shapes, of nets in models/. Time: one update of a parameter of --numbers numbers, the types in turns, as a
ratio to float32. Training: models/lenet on scikit-learn's digits (or on MNIST's LMDBs) with the same seeds and batches;
the test loss and accuracy after the last iteration. "nearest": the same types without stochastic rounding.

    python bench/history.py [--what bytes,time,training] [--rules SGD,Adam] [--types float32,bfloat16,int8]
        [--iterations 400] [--seeds 1,2,3] [--mnist FOLDER with mnist_train_lmdb, mnist_test_lmdb] [--numbers 4000000]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[1] / "models"
NETS = {"lenet": (1, 28, 28), "caffenet": (3, 227, 227), "resnet50": (3, 224, 224)}
RATES = {"SGD": 0.01, "Nesterov": 0.01, "AdaGrad": 0.01, "RMSProp": 0.001, "AdaDelta": 1.0, "Adam": 0.001}
MOMENTUM = {"AdaGrad": 0.0, "RMSProp": 0.0, "AdaDelta": 0.95}
DELTA = {"AdaDelta": 1e-6}
SOLVER = """net: "{net}" type: "{rule}" base_lr: {rate} lr_policy: "poly" power: 1 momentum: {momentum} delta: {delta}
weight_decay: 0.0005 max_iter: {iterations} test_iter: {tests} test_interval: {iterations} test_initialization: false
random_seed: {seed} solver_mode: CPU snapshot_after_train: false history_type: "{kind}"
"""
NEAREST = " nearest"


def show_bytes(options: argparse.Namespace) -> None:
    from caffejacinto_py.checking import fit
    from caffejacinto_py.passes.memory import account
    from caffejacinto_py.schema.upgrade import load_net

    print("MiB of history")
    print(f"{'net':10}{'rule':10}" + "".join(f"{kind:>10}" for kind in options.types))
    for name, shape in NETS.items():
        graph = fit(load_net(MODELS / name / "train_val.prototxt"), phase="TRAIN", data_shape=shape)[0]
        for rule in options.rules:
            sizes = [account(graph, solver=rule, history=kind).history / 2**20 for kind in options.types]
            print(f"{name:10}{rule:10}" + "".join(f"{size:10.2f}" for size in sizes))


def show_time(options: argparse.Namespace) -> None:
    import torch

    from caffejacinto_py.engine.params import Learnable
    from caffejacinto_py.schema import pb
    from caffejacinto_py.solver import rules

    print(f"\nms of an update of {options.numbers:,} numbers, {torch.get_num_threads()} threads, {options.device}")
    for name in options.rules:
        made = []
        for kind in options.types:
            p = torch.nn.Parameter(torch.randn(options.numbers, device=options.device) * 0.01)
            param = pb.SolverParameter(type=name, history_type=kind, delta=1e-6)
            made.append((p, rules.make([Learnable(p, 1.0, 1.0, "n", 0, "")], param), torch.randn_like(p)))
        rows: list[list[float]] = []
        for t in range(options.rounds):
            row = []
            for p, rule, gradient in made:
                p.grad = gradient.clone()
                if p.is_cuda:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                rule.step(rules.Rates(1e-3, MOMENTUM.get(name, 0.9), 5e-4, t))
                if p.is_cuda:
                    torch.cuda.synchronize()
                row.append(1000 * (time.perf_counter() - began))
            rows.append(row)
        cells = []
        for k, kind in enumerate(options.types):
            ratio = statistics.median(row[k] / row[0] for row in rows[1:])
            cells.append(f"{kind} {statistics.median(row[k] for row in rows[1:]):.1f} ({ratio:.1f}x)")
        print(f"{name:10}" + "   ".join(cells), flush=True)


def sources(options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """LMDBs to train and to test with."""
    if options.mnist:
        return f"{options.mnist}/mnist_train_lmdb", f"{options.mnist}/mnist_test_lmdb"
    from caffejacinto_py.cli import main as run

    if run(["digits", str(folder / "digits")]):
        raise SystemExit("no digits")
    return str(folder / "digits/digits_train_lmdb"), str(folder / "digits/digits_test_lmdb")


def train(net: Path, options: argparse.Namespace, rule: str, kind: str, seed: int) -> tuple[float, float]:
    """(test loss, test accuracy in percent) of one run."""
    from caffejacinto_py.schema.text import parse
    from caffejacinto_py.solver import Solver

    fields = {"rate": RATES[rule], "momentum": MOMENTUM.get(rule, 0.9), "delta": DELTA.get(rule, 1e-8)}
    more = {"iterations": options.iterations, "tests": 100 if options.mnist else 6, "seed": seed}
    text = SOLVER.format(net=net, rule=rule, kind=kind.removesuffix(NEAREST), **fields, **more)
    solver = Solver(parse(text, "SolverParameter").message, device="cpu", workers=0)
    if kind.endswith(NEAREST) and solver.rule.noise is not None:
        solver.rule.noise.values.fill_(1 << 15)  # half a step, always
    solver.step(options.iterations)
    (score,) = solver.test_all()
    solver.close()
    named = {o.name: o.value for o in score.outputs}
    return named["loss"], 100 * named["accuracy"]


def show_training(options: argparse.Namespace) -> None:
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.upgrade import load_net

    with tempfile.TemporaryDirectory() as folder:
        message: Any = load_net(MODELS / "lenet" / "train_val.prototxt").message
        for layer, source, batch in zip(message.layer[:2], sources(options, Path(folder)), (64, 60), strict=True):
            layer.data_param.source, layer.data_param.batch_size = (
                source,
                100 if options.mnist and batch == 60 else batch,
            )
        net = Path(folder) / "net.prototxt"
        net.write_text(dumps(message))
        data = "MNIST" if options.mnist else "digits"
        print(f"\nLeNet on {data}, {options.iterations} iterations of 64, seeds {options.seeds}")
        print(f"{'rule':10}{'history':18}{'test loss':>10}{'accuracy %':>12}   each")
        for rule in options.rules:
            for kind in (k + more for more in ("", NEAREST) for k in options.types if not more or k != "float32"):
                found = [train(net, options, rule, kind, int(seed)) for seed in options.seeds.split(",")]
                loss, accuracy = (statistics.mean(column) for column in zip(*found, strict=True))
                each = " ".join(f"{a:.2f}" for _, a in found)
                print(f"{rule:10}{kind:18}{loss:10.4f}{accuracy:12.2f}   {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="bytes,time,training")
    parser.add_argument("--rules", default="SGD,Adam", type=lambda s: s.split(","))
    parser.add_argument("--types", default="float32,bfloat16,int8", type=lambda s: s.split(","))
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--mnist")
    parser.add_argument("--numbers", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="of the updates")
    options = parser.parse_args()
    from caffejacinto_py.engine import allocator

    allocator.tune()
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for what, show in (("bytes", show_bytes), ("time", show_time), ("training", show_training)):
        if what in options.what.split(","):
            show(options)


if __name__ == "__main__":
    main()
