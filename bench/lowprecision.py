"""What fixed-point words cost a small VGG, and how many activations they make zero.

Trains models/vgg_digits in float, converts it with `caffejacinto lowprecision` to each number of bits, scores it, and
fine-tunes it with the solver that the conversion wrote. Test accuracies, and zeros among the activations behind the
ReLUs (all rounded layers together), of the float net, the converted one and the tuned one.

    python bench/lowprecision.py [--bits 16,8,6,4] [--criterion abs-max] [--mnist DIR] [--iterations N] [--json FILE]

--mnist: the folder with MNIST's four idx files (may be gzipped); without it scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "vgg_digits"


def cli(*args: str) -> str:
    """Run a verb in this process; what it prints. Ends the program where it fails."""
    from caffejacinto_py.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([args[0], *args[1:]])
    if code:
        sys.exit(f"caffejacinto {' '.join(args)}: exit code {code}")
    return out.getvalue()


def data(mnist: Path | None) -> tuple[tuple[str, str], int]:
    """The LMDBs (train, test), made where they are not there, and the number of test images."""
    if mnist is None:
        if not Path("demo").exists():
            cli("digits", "demo")
        return ("demo/digits_train_lmdb", "demo/digits_test_lmdb"), 360
    for kind, files in (("train", "train"), ("test", "t10k")):
        images, labels = (next(mnist.glob(f"{files}-{what}*")) for what in ("images", "labels"))
        if not Path(f"mnist_{kind}_lmdb").exists():
            cli("convert_mnist_data", str(images), str(labels), f"mnist_{kind}_lmdb")
    return ("mnist_train_lmdb", "mnist_test_lmdb"), 10_000


def files(sources: tuple[str, str], batch: int, iterations: int) -> None:
    """net.prototxt and solver.prototxt of the float net."""
    net = (MODEL / "train_val.prototxt").read_text()
    for old, new in zip(("demo/digits_train_lmdb", "demo/digits_test_lmdb"), sources, strict=True):
        net = net.replace(old, new)
    net = net.replace("batch_size: 60", f"batch_size: {batch}")
    Path("net.prototxt").write_text(net)
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.upgrade import load_solver

    solver = load_solver(str(MODEL / "solver.prototxt")).message
    solver.net, solver.max_iter, solver.snapshot_prefix = "net.prototxt", iterations, "float"
    solver.test_interval = 0
    del solver.test_iter[:]
    Path("solver.prototxt").write_text(dumps(solver))


def accuracy(model: str, weights: str, batches: int) -> float:
    found = json.loads(
        cli("test", f"--model={model}", f"--weights={weights}", f"--iterations={batches}", "--json",
            "--log-level=warning")
    )  # fmt: skip
    return next(o["mean"] for o in found["outputs"] if o["name"] == "accuracy")


def zeros(model: str, weights: str, layers: list[str], batches: int) -> float:
    """Share of zeros among the tops of some layers, over the test data."""
    from caffejacinto_py.compress.lowprecision import watch
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.schema.weights import read_model
    from caffejacinto_py.solver.build import probe
    from caffejacinto_py.solver.feed import Feed

    net = Net(prepare(load_net(model), phase="TEST", probe=probe))
    net.load(read_model(weights))
    feed = Feed(net, seed=0, workers=0)
    seen, _ = watch(net, feed, batches, layers)
    feed.close()
    return sum(s.zeros for s in seen.values()) / sum(s.count for s in seen.values())


def convert(bits: int, batches: int, tune: int, criterion: str) -> dict[str, Any]:
    """One row of the table."""
    name = f"low{bits}"
    found = json.loads(
        cli("lowprecision", "--model=net.prototxt", "--weights=float.caffemodel", f"--bits={bits}", f"--output={name}",
            f"--iterations={batches}", f"--criterion={criterion}", f"--tune-iterations={tune}", "--json",
            "--log-level=warning")
    )  # fmt: skip
    solver = Path(f"{name}_solver.prototxt")
    solver.write_text(solver.read_text() + "random_seed: 1\n")
    cli("train", f"--solver={solver}", f"--weights={name}.caffemodel", "--log-level=warning", "--metrics=none")
    tuned = f"{name}_tuned_iter_{tune}.caffemodel"
    acts = [x["activations"] for x in found["layers"]]
    inner = [a["layer"] for a in acts if a["rounded"]]
    scores = {o["name"]: o for o in found["outputs"]}["accuracy"]
    return {
        "bits": bits, "float": scores["float"], "converted": scores["low_precision"],
        "tuned": accuracy(f"{name}.prototxt", tuned, batches), "zeros_float": found["zeros"],
        "zeros_converted": found["zeros_rounded"],
        "zeros_tuned": zeros(f"{name}.prototxt", tuned, inner, batches),
        "layers": [{"layer": a["layer"], "zeros": a["zeros"], "rounded": a["zeros_rounded"]}
                   for a in acts if a["rounded"]],
    }  # fmt: skip


def step_ratio(rounds: int = 5, steps: int = 4) -> float:
    """CPU time of forward and backward passes of the 16-bit net over the float net's: median of rounds in turn."""
    from statistics import median

    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver.build import probe
    from caffejacinto_py.solver.feed import Feed

    names = ("net.prototxt", "low16.prototxt")
    nets = [Net(prepare(load_net(name), phase="TRAIN", probe=probe), seed=0) for name in names]
    feed = Feed(nets[0], seed=0, workers=0)
    batch = feed.next()
    feed.close()

    def seconds(net: Net) -> float:
        started = time.process_time()
        for _ in range(steps):
            net(batch).loss.backward()
        return time.process_time() - started

    for net in nets:
        seconds(net)
    pairs = [(seconds(nets[0]), seconds(nets[1])) for _ in range(rounds)]
    return median(b / a for a, b in pairs)


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("bits", "float", "converted", "tuned", "points", "zeros: float", "converted", "tuned")
    print("  ".join(f"{h:>12}" for h in heads))
    for r in rows:
        cells = [f"{r[k]:.4f}" for k in ("float", "converted", "tuned")]
        cells += [f"{100 * (r['tuned'] - r['float']):+.2f}"]
        cells += [f"{100 * r[k]:.2f} %" for k in ("zeros_float", "zeros_converted", "zeros_tuned")]
        print("  ".join(f"{c:>12}" for c in (str(r["bits"]), *cells)))
    print("\nzeros in % of each layer's activations: float, then converted to each number of bits")
    for i, layer in enumerate(rows[0]["layers"]):
        cells = [f"{r['bits']}: {100 * r['layers'][i]['rounded']:.2f}" for r in rows]
        print(f"  {layer['layer']:<10} {100 * layer['zeros']:.2f}  {'  '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy and activation zeros of low-precision nets.")
    parser.add_argument("--bits", default="16,8,6,4")
    parser.add_argument("--criterion", default="abs-max")
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--iterations", type=int, help="of the float training; default 400, MNIST 1500")
    parser.add_argument("--tune", type=int, default=100, help="iterations of fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mnist = options.mnist.resolve() if options.mnist else None
    out = options.json.resolve() if options.json else None
    import torch

    torch.set_num_threads(options.threads)
    iterations = options.iterations or (1500 if mnist else 400)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sources, images = data(mnist)
        batch = 100 if mnist else 60  # divides the number of test images
        batches = images // batch
        files(sources, batch, iterations)
        started = time.process_time()
        cli("train", "--solver=solver.prototxt", "--log-level=warning", "--metrics=none")
        Path(f"float_iter_{iterations}.caffemodel").rename("float.caffemodel")
        print(f"float: {iterations} iterations, {time.process_time() - started:.0f} s of CPU")
        rows = [convert(int(b), batches, options.tune, options.criterion) for b in options.bits.split(",")]
        ratio = step_ratio() if any(r["bits"] == 16 for r in rows) else None
        os.chdir(ROOT)
    show(rows)
    if ratio is not None:
        print(f"\nforward and backward with 16 bits: {ratio:.2f} x the CPU time of float")
    if out:
        out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
