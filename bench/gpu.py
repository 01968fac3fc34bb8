"""Training on a GPU in each number type: images per second and memory, then what 16 bits do to an accuracy.

Steps are those of `caffejacinto train` (forward, backward, update by our Solver) of nets of models/ on synthetic inputs
that lie on the device. All types of a net are in memory at the same time and take turns, in rotating order; the ratio
to the first type is taken per round, medians are shown. Memory: weights and history of the type, and the most that
torch's allocator held beside them during a step: gradients, activations, workspaces.

Accuracy: LeNet on MNIST where LMDBs of it are given (`caffejacinto convert_mnist_data`), else on scikit-learn's digits
(360 test images: one is 0.28 points), once per seed and type, with equal initial weights and batches.

    python bench/gpu.py [--device cuda:0] [--nets caffenet,resnet50,jacintonet11] [--types fp32,tf32,fp16,bf16]
                        [--batch N] [--size PIXELS] [--rounds 7] [--seconds 0.3] [--layout auto] [--json FILE]
                        [--mnist FOLDER] [--iterations N] [--seeds 3]

A few minutes with default arguments. To try it without a GPU:
    python bench/gpu.py --device cpu --batch 2 --size 64 --rounds 1 --seconds 0.01 --iterations 20 --seeds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import rivals
import torch
from contenders import DECAY, LR, MODELS, MOMENTUM, SEED, Case, Fixed, make_inputs, our_message
from turns import ratio, take_turns

from caffejacinto_py.cli.options import size
from caffejacinto_py.engine.memory.measure import peak_bytes
from caffejacinto_py.engine.precision import missing
from caffejacinto_py.passes.precision import OVERRIDES
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.upgrade import load_solver
from caffejacinto_py.solver import Solver

NETS = {
    "caffenet": Case("caffenet", (3, 227, 227), -128, 127, 1000, rivals.AlexNet),
    "resnet50": Case("resnet50", (3, 224, 224), -128, 127, 1000, rivals.ResNet50),
    "jacintonet11": Case("jacintonet11v2_imagenet", (3, 224, 224), 0, 255, 1000, rivals.JacintoNet11),
}
BATCH = {"caffenet": 256, "resnet50": 128, "jacintonet11": 128}
MNIST = ("mnist_train_lmdb", "mnist_test_lmdb")


class Contender:
    """One net in one type, as `train --precision` runs it."""

    def __init__(self, case: Case, kind: str, batch: int, options: argparse.Namespace) -> None:
        message = pb.SolverParameter(base_lr=LR, lr_policy="fixed", momentum=MOMENTUM, weight_decay=DECAY)
        message.net_param.CopyFrom(our_message(case, batch, dropout=True))
        if options.size:
            any_size(message.net_param)
        message.max_iter, message.random_seed = 1 << 30, SEED
        more: dict[str, Any] = {"device": options.device, "precision": kind, "layout": options.layout, "on_nan": "warn"}
        self.solver = Solver(message, workers=0, **more)
        self.device = self.solver.device
        data, label = make_inputs(case, batch, options.device, torch.float32)
        self.solver.feed = feed = Fixed(self.solver.net, seed=SEED)
        feed.inputs = {"data": data, "label": label}

    def step(self) -> None:
        self.solver.clear_grads()
        self.solver.forward_backward()
        self.solver.apply_update()
        self.solver.iter += 1

    def __call__(self, count: int) -> float:
        """Seconds per step; the first one of a turn is not counted."""
        self.step()
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            self.step()
        self.wait()
        return (time.perf_counter() - start) / count

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """Bytes: own weights and history, and what a step takes beside them, gradients too."""
        self.solver.clear_grads()
        own = sum(p.nbytes for p in self.solver.net.parameters()) * 2
        return own + peak_bytes(self.step, self.device)

    @property
    def runs(self) -> str:
        table = self.solver.net.types
        return "FLOAT" if table is None else "TF32" if table.tf32 else "/".join(table.types)


def any_size(net: Any) -> None:
    """The last pooling of a net for 224 pixels over whatever is left."""
    for layer in net.layer:
        if layer.HasField("pooling_param") and layer.pooling_param.kernel_size == 7:
            layer.pooling_param.Clear()
            layer.pooling_param.pool, layer.pooling_param.global_pooling = 1, True


def speed(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one net."""
    case, batch = NETS[name], options.batch or BATCH[name]
    if options.size:
        case = replace(case, shape=(case.shape[0], options.size, options.size))
    contenders = {kind: Contender(case, kind, batch, options) for kind in options.types}
    slowest = max(max(c(1) for _ in range(2)) for c in contenders.values())  # cuDNN has searched by now
    count = max(1, round(options.seconds / slowest))
    seconds = take_turns(contenders, options.rounds, count)
    first = seconds[options.types[0]]
    rows = []
    for kind, contender in contenders.items():
        one = statistics.median(seconds[kind])
        layout = "NHWC" if contender.solver.net.layout.channels_last else "NCHW"
        row = {"net": name, "batch": batch, "type": kind, "runs": contender.runs, "layout": layout, "ms": 1e3 * one}
        row |= {"images_per_second": batch / one, "bytes": contender.memory(), "ratio": ratio(first, seconds[kind])}
        rows.append(row)
        print(f"{name:<14}{batch:>6}  {kind:<6}{contender.runs:<16}{layout:<6}{row['ms']:>9.2f}{batch / one:>10.1f}"
              f"{size(row['bytes']):>12}   {row['ratio']}", flush=True)  # fmt: skip
    return rows


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """LeNet's test accuracy in each type, seed by seed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        what, sources = data(options, folder)
        iterations = options.iterations or (2000 if what == "MNIST" else 400)
        print(f"\nLeNet on {what}, {iterations} iterations: test accuracy in percent", flush=True)
        found: dict[str, list[float]] = {}
        for kind in dict.fromkeys((options.types[0], *(k for k in options.types if k.endswith("16")))):
            found[kind] = [train(kind, seed, iterations, sources, options) for seed in range(1, options.seeds + 1)]
            mean, base = statistics.mean(found[kind]), statistics.mean(found[options.types[0]])
            each = " ".join(f"{v:.2f}" for v in found[kind])
            print(f"{kind:<6}{mean:>8.2f}  ({mean - base:+.2f} points)   seeds: {each}", flush=True)
            rows.append({"type": kind, "data": what, "iterations": iterations, "accuracies": found[kind]})
    return rows


def data(options: argparse.Namespace, folder: str) -> tuple[str, tuple[str, str]]:
    """What LeNet learns: name, LMDB to train with, LMDB to test with."""
    given = Path(options.mnist)
    if all((given / name).is_dir() for name in MNIST):
        return "MNIST", (str(given / MNIST[0]), str(given / MNIST[1]))
    from caffejacinto_py.data.datasets import make_digits

    make_digits(folder, size=28, test=360, seed=0, report=lambda text: None)
    return "digits", (f"{folder}/digits_train_lmdb", f"{folder}/digits_test_lmdb")


def train(kind: str, seed: int, iterations: int, sources: tuple[str, str], options: argparse.Namespace) -> float:
    """Percent of the test images that are right."""
    mnist = "mnist" in sources[0]
    text = (MODELS / "lenet" / ("train_val.prototxt" if mnist else "digits_train_val.prototxt")).read_text()
    doc = load_solver(str(MODELS / "lenet" / ("solver.prototxt" if mnist else "digits_solver.prototxt")))
    param = doc.message
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as net:
        for line in (x for x in text.splitlines() if "source:" in x):
            old = line.split('source: "')[1].split('"')[0]
            text = text.replace(f'"{old}"', f'"{sources["test" in old]}"')
        net.write(text)
        net.flush()
        param.net, param.random_seed, param.max_iter = net.name, seed, iterations
        for field in ("snapshot", "display", "test_interval", "snapshot_prefix"):
            param.ClearField(field)
        param.test_interval, param.snapshot_after_train = 1 << 30, False
        solver = Solver(doc, device=options.device, precision=kind)
    try:
        solver.step(iterations)
        (score,) = solver.test_all()
    finally:
        solver.close()
    return 100 * next(o.value for o in score.outputs if o.name == "accuracy")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--nets", default=",".join(NETS), help="'none': only accuracies")
    parser.add_argument("--types", default="fp32,tf32,fp16,bf16")
    parser.add_argument("--batch", type=int, help="of all nets")
    parser.add_argument("--size", type=int, help="of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn of the slowest type")
    parser.add_argument("--layout", choices=("auto", "nchw", "channels_last"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mnist", default="data", help="folder of mnist_train_lmdb and mnist_test_lmdb")
    parser.add_argument("--iterations", type=int, help="of LeNet; 0: no accuracies")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.nets = [n for n in options.nets.split(",") if n != "none"]
    options.types = options.types.split(",")
    unknown = [x for x in options.nets if x not in NETS] + [x for x in options.types if x not in OVERRIDES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here; --device cpu tries the bench (see --help)")
    return options


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    for kind in options.types:
        why = missing(OVERRIDES[kind], device)
        if why:
            print(f"{kind}: {why}; computed in FLOAT", file=sys.stderr)
    print(f"{'net':<14}{'batch':>6}  {'type':<6}{'layers run in':<16}{'':<6}{'ms/step':>9}{'img/s':>10}{'memory':>12}"
          f"   times as fast as {options.types[0]}", flush=True)  # fmt: skip
    rows = []
    for net in options.nets:
        rows += speed(net, options)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    scores = accuracy(options) if options.iterations != 0 else []
    if options.json:
        options.json.write_text(json.dumps({"device": name, "nets": rows, "accuracies": scores}, indent=2))


if __name__ == "__main__":
    main()
