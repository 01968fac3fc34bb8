"""Training on several ranks against one, and the loss curves of both.

    python bench/ranks.py [--nets lenet,vgg] [--ranks 2] [--batch 64] [--iterations 60] [--rounds 5] [--data LMDB]

Runs `caffejacinto train` with 1 and with N ranks in turns, each with the same number of threads per rank (--threads 1),
and takes the images per second from the records of the runs: two lengths are subtracted, so that the start does not
count. Two settings: the batch divided among the ranks (NVCaffe's), and the whole batch on each rank (BVLC's).

--curve: 200 iterations of LeNet with a global batch of 64 on N ranks and on one, in float32 and, where rounding hides
nothing, in float64; prints the largest difference of the losses. --data: an LMDB of 28x28 records, such as MNIST;
without it scikit-learn's digits, enlarged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = """
layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ scale: 0.00390625 mirror: true }}
  data_param {{ source: "{db}" batch_size: {batch} backend: LMDB }} }}
"""
CONV = """layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}"
  param {{ lr_mult: 1 }} param {{ lr_mult: 2 }}
  convolution_param {{ num_output: {n} kernel_size: {k} pad: {pad} weight_filler {{ type: "xavier" }} }} }}
"""
POOL = """layer {{ name: "{name}" type: "Pooling" bottom: "{bottom}" top: "{name}"
  pooling_param {{ pool: MAX kernel_size: 2 stride: 2 }} }}
"""
RELU = 'layer {{ name: "relu_{bottom}" type: "ReLU" bottom: "{bottom}" top: "{bottom}" }}\n'
IP = """layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}"
  param {{ lr_mult: 1 }} param {{ lr_mult: 2 }}
  inner_product_param {{ num_output: {n} weight_filler {{ type: "xavier" }} }} }}
"""
LOSS = 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label" top: "loss" }\n'
SOLVER = """net: "{net}" base_lr: 0.01 momentum: 0.9 weight_decay: 0.0005 lr_policy: "fixed" display: {display}
max_iter: {iterations} random_seed: 1 solver_mode: CPU snapshot_after_train: false
"""


def lenet(db: str, batch: int) -> str:
    return (
        DATA.format(db=db, batch=batch)
        + CONV.format(name="conv1", bottom="data", n=20, k=5, pad=0)
        + POOL.format(name="pool1", bottom="conv1")
        + CONV.format(name="conv2", bottom="pool1", n=50, k=5, pad=0)
        + POOL.format(name="pool2", bottom="conv2")
        + IP.format(name="ip1", bottom="pool2", n=500)
        + RELU.format(bottom="ip1")
        + IP.format(name="ip2", bottom="ip1", n=10)
        + LOSS
    )


def vgg(db: str, batch: int) -> str:
    """Six 3x3 convolutions: many flops for each weight, where LeNet has few."""
    text, bottom = DATA.format(db=db, batch=batch), "data"
    for stage, n in enumerate((32, 64, 128), 1):
        for i in (1, 2):
            name = f"conv{stage}_{i}"
            text += CONV.format(name=name, bottom=bottom, n=n, k=3, pad=1) + RELU.format(bottom=name)
            bottom = name
        text += POOL.format(name=f"pool{stage}", bottom=bottom)
        bottom = f"pool{stage}"
    return text + IP.format(name="ip2", bottom=bottom, n=10) + LOSS


NETS = {"lenet": lenet, "vgg": vgg}


def digits(path: Path) -> str:
    """An LMDB of scikit-learn's digits at 28x28."""
    import numpy as np
    from sklearn.datasets import load_digits

    from caffejacinto_py.data.convert import LmdbWriter
    from caffejacinto_py.schema.datum import make_datum

    found = load_digits()
    with LmdbWriter(str(path)) as db:
        for i, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
            large = np.kron(image * 15.9, np.ones((4, 4)))[2:30, 2:30].astype(np.uint8)
            db.put(b"%08d" % i, make_datum(large[None], label=int(label)))
    return str(path)


def train(
    folder: Path, net: str, ranks: int, dialect: str, iterations: int, threads: int, *more: str, display: int = 0
) -> list[dict]:
    """The records of one run. more: options of train."""
    (folder / "net.prototxt").write_text(net)
    text = SOLVER.format(net=folder / "net.prototxt", iterations=iterations, display=display)
    (folder / "solver.prototxt").write_text(text)
    command = [sys.executable, "-m", "caffejacinto_py", "train", "--solver", str(folder / "solver.prototxt")]
    command += ["--dialect", dialect, "--ranks", str(ranks), "--threads", str(threads), "--log-level", "error"]
    command += ["--metrics", str(folder / "m.jsonl"), *more]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]


def speed(folder: Path, net: str, ranks: int, dialect: str, given: argparse.Namespace) -> float:
    """Iterations per second between a short run and a long one."""
    ends = []
    for iterations in (given.warmup, given.warmup + given.iterations):
        ends.append(train(folder, net, ranks, dialect, iterations, given.threads)[-1]["seconds"])
    return given.iterations / max(ends[1] - ends[0], 1e-9)


def curve(folder: Path, db: str, given: argparse.Namespace) -> None:
    print(f"LeNet, global batch 64, 200 iterations, {given.ranks} ranks against 1:")
    for precision in ("fp32", "fp64"):
        losses = []
        for ranks in (1, given.ranks):
            options = ("--precision", precision)
            records = train(folder, lenet(db, 64), ranks, "nvcaffe", 200, given.threads, *options, display=1)
            losses.append([r["loss"] for r in records if r["event"] == "train"])
        apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
        parts = [max(apart[k : k + 50]) for k in range(0, len(apart), 50)]
        print(
            f"  {precision}: loss {losses[0][0]:.6f} .. {losses[0][-1]:.6f}; largest difference in each 50 iterations "
            + ", ".join(f"{p:.1e}" for p in parts)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default="lenet,vgg")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--curve", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        db = given.data or digits(folder / "db")
        if given.curve:
            curve(folder, db, given)
            return
        print(
            f"{given.threads} thread(s) a rank, batch {given.batch}; img/s, medians of {given.rounds} rounds in turns"
        )
        for kind in given.nets.split(","):
            net = NETS[kind](db, given.batch)
            rates: dict[str, list[float]] = {"1 rank": [], "divided": [], "each": []}
            for _ in range(given.rounds):
                rates["1 rank"].append(given.batch * speed(folder, net, 1, "bvlc", given))
                rates["divided"].append(given.batch * speed(folder, net, given.ranks, "nvcaffe", given))
                rates["each"].append(given.ranks * given.batch * speed(folder, net, given.ranks, "bvlc", given))
            for name, label in (("divided", "batch divided"), ("each", "whole batch each")):
                ratios = [b / a for a, b in zip(rates["1 rank"], rates[name], strict=True)]
                print(
                    f"{kind:6} {given.ranks} ranks, {label:16} {statistics.median(rates[name]):8.1f} "
                    f"against {statistics.median(rates['1 rank']):8.1f} on one: x{statistics.median(ratios):.2f} "
                    f"({min(ratios):.2f}..{max(ratios):.2f})"
                )


if __name__ == "__main__":
    main()
