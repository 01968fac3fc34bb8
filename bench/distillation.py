"""What a teacher is worth: a small student on MNIST with and without LeNet beside it, at equal iterations.

Both runs are `examples/distillation`'s student on the first N training images, with the same seed, batches and solver;
without a teacher the labels' loss has weight 1, with one it has --labels. Every run at several learning rates, because
the two losses have gradients of other sizes; the means at the best rate of each side are compared. Test accuracy over
all 10,000 images.

    python bench/distillation.py --teacher lenet.prototxt --weights lenet.caffemodel
        [--train data/mnist_train_lmdb] [--test data/mnist_test_lmdb] [--images 1000] [--iterations 400] [--seeds 1,2,3]
        [--rates 0.01,0.03,0.1] [--temperature 4] [--labels 0.1]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

STUDENT = Path(__file__).resolve().parents[1] / "examples" / "distillation" / "student.prototxt"
SOLVER = """net: "{net}" base_lr: {rate} lr_policy: "poly" power: 1 momentum: 0.9 weight_decay: 0.0005
max_iter: {iterations} test_iter: 100 test_interval: {iterations} test_initialization: false random_seed: {seed}
solver_mode: CPU snapshot_after_train: false
"""


def subset(source: str, target: Path, count: int) -> None:
    """The first records of an LMDB as one of its own."""
    from caffejacinto_py.data.convert import LmdbWriter
    from caffejacinto_py.data.sources import Database

    with Database(source).read(list(range(count))) as values, LmdbWriter(str(target)) as db:
        for i, value in enumerate(values):
            db.put(b"%08d" % i, bytes(value))


def student(target: Path, options: argparse.Namespace, train: Path, *, taught: bool) -> None:
    """The student's prototxt for these data."""
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.upgrade import load_net

    message = load_net(STUDENT).message
    data, test = message.layer[0], message.layer[1]
    data.data_param.source, test.data_param.source = str(train), options.test
    for layer in message.layer:
        if layer.name == "loss":
            layer.loss_weight[:] = [options.labels if taught else 1]
        if layer.name == "teacher":
            layer.top[0] = f"teacher/{options.blob}"
        if layer.name == "distill":
            layer.bottom[1] = f"teacher/{options.blob}"
            layer.loss_weight[:] = [1 - options.labels]
            layer.distill_softmax_loss_param.temperature = options.temperature
    if not taught:
        kept = [layer for layer in message.layer if layer.name not in ("teacher", "distill")]
        del message.layer[:]
        message.layer.extend(kept)
    target.write_text(dumps(message))


def accuracy(net: Path, options: argparse.Namespace, rate: float, seed: int, *, taught: bool) -> float:
    """Train once; test accuracy in percent."""
    from caffejacinto_py.schema.text import parse
    from caffejacinto_py.solver import Solver

    text = SOLVER.format(net=net, rate=rate, iterations=options.iterations, seed=seed)
    param: Any = parse(text, "SolverParameter").message
    if taught:
        param.teacher.add(net=options.teacher, weights=[options.weights])
    solver = Solver(param, device="cpu")
    solver.step(options.iterations)
    (score,) = solver.test_all()
    solver.close()
    return 100 * next(o.value for o in score.outputs if o.name == "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="prototxt")
    parser.add_argument("--weights", required=True, help="its caffemodel")
    parser.add_argument("--blob", default="ip2", help="its scores")
    parser.add_argument("--train", default="data/mnist_train_lmdb")
    parser.add_argument("--test", default="data/mnist_test_lmdb")
    parser.add_argument("--images", type=int, default=1000, help="so many of the training images")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--rates", default="0.01,0.03,0.1", help="learning rates to try; each side has its best one")
    parser.add_argument("--temperature", type=float, default=4)
    parser.add_argument("--labels", type=float, default=0.1, help="weight of the labels' loss beside the teacher's")
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    found: dict[float, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train_lmdb"
        subset(options.train, train, options.images)
        nets = {taught: Path(folder) / f"student_{taught}.prototxt" for taught in (False, True)}
        for taught, net in nets.items():
            student(net, options, train, taught=taught)
        head = f"{options.images} images, {options.iterations} iterations of 64, T {options.temperature:g}"
        print(f"{head}; test accuracy in %\n{'rate':>6}{'seed':>6}{'alone':>10}{'taught':>10}")
        for rate in (float(r) for r in options.rates.split(",")):
            rows = found.setdefault(rate, [])
            for seed in (int(s) for s in options.seeds.split(",")):
                alone, taught = (accuracy(nets[t], options, rate, seed, taught=t) for t in (False, True))
                rows.append((alone, taught))
                print(f"{rate:>6g}{seed:>6}{alone:>10.2f}{taught:>10.2f}", flush=True)
    best = [max((statistics.mean(row[side] for row in rows), rate) for rate, rows in found.items()) for side in (0, 1)]
    for name, (mean, rate) in zip(("alone", "taught"), best, strict=True):
        print(f"{name}: {mean:.2f} at its best rate, {rate:g}")
    print(f"gain: {best[1][0] - best[0][0]:+.2f}")


if __name__ == "__main__":
    main()
