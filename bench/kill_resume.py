"""Kill a training run again and again while it writes snapshots; every resume must go on from a whole one.

A run that snapshots after every iteration is killed with SIGKILL at random moments, each time resumed from what
`find_latest` finds, and at last finished. Its weights must equal those of an uninterrupted run bit for bit.

    python bench/kill_resume.py [--kills 20] [--seed 0] [--sparse]

--sparse: a run in its sparse stage, thresholding all the while; masks and factor must be equal too.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NET = """
name: "kill"
layer {{ name: "data" type: "Data" top: "data" top: "label"
  transform_param {{ mirror: true crop_size: 10 scale: 0.01 }}
  data_param {{ source: "{db}" batch_size: 8 backend: LMDB }} }}
layer {{ name: "ip1" type: "{type}" bottom: "data" top: "ip1" {options} }}
layer {{ name: "relu1" type: "ReLU" bottom: "ip1" top: "ip1" }}
layer {{ name: "drop1" type: "Dropout" bottom: "ip1" top: "ip1" }}
layer {{ name: "ip2" type: "InnerProduct" bottom: "ip1" top: "ip2"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label" top: "loss" }}
"""
DENSE = 'inner_product_param { num_output: 600 weight_filler { type: "xavier" } }'
CONVOLUTION = 'convolution_param { num_output: 64 kernel_size: 5 weight_filler { type: "xavier" } }'
SPARSE = """
sparse_mode: SPARSE_UPDATE sparsity_target: 0.9 sparsity_start_factor: 0.04 sparsity_step_factor: 0.02
sparsity_step_iter: {every} sparsity_threshold_maxratio: 1 sparsity_threshold_value_max: 10
sparsity_layer_type: "InnerProduct" regularization_type: "L1"
"""
SOLVER = """
net: "{folder}/net.prototxt" base_lr: 0.01 lr_policy: "inv" gamma: 0.01 power: 0.75 momentum: 0.9 weight_decay: 0.001
iter_size: 2 average_loss: 4 random_seed: 3 solver_mode: CPU max_iter: {iterations} snapshot: {every}
snapshot_prefix: "{folder}/snap"
"""


def prepare(folder: Path, db: Path, every: int, iterations: int, *, sparse: bool) -> None:
    folder.mkdir()
    kind = {"type": "Convolution", "options": CONVOLUTION} if sparse else {"type": "InnerProduct", "options": DENSE}
    (folder / "net.prototxt").write_text(NET.format(db=db, **kind))
    solver = SOLVER.format(folder=folder, iterations=iterations, every=every)
    if sparse:  # events over the whole run, not at every snapshot
        solver += SPARSE.format(every=max(iterations // 50, 2))
    (folder / "solver.prototxt").write_text(solver)


def masks(folder: Path, iterations: int) -> dict[str, bytes]:
    """Factor and masks of the last snapshot."""
    from caffejacinto_py.solver.snapshot import load_extra

    extra = load_extra(str(folder / f"snap_iter_{iterations}.solverstate"))
    found = {name: array.tobytes() for name, array in extra.arrays.items() if name.startswith("mask/")}
    return {**found, "factor": str(extra.meta.get("sparse")).encode()}


def make_db(path: Path) -> None:
    import numpy as np

    from caffejacinto_py.data.datasets import write_arrays

    rng = np.random.default_rng(0)
    write_arrays(str(path), rng.integers(0, 255, (100, 3, 12, 12), np.uint8), [i % 5 for i in range(100)])


def train(folder: Path) -> None:
    """Start or resume, to the end."""
    import torch

    from caffejacinto_py.solver import Solver, find_latest
    from caffejacinto_py.solver.logs import setup

    torch.set_num_threads(1)
    setup("info")
    solver = Solver(folder / "solver.prototxt", device="cpu")
    solver.solve(resume=find_latest(str(folder / "snap")))


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--train", str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def run_and_kill(folder: Path, delay: float) -> tuple[int, bool, str]:
    """(iteration it began at, whether it was killed, its log up to the first snapshot)."""
    child = start(folder)
    assert child.stderr is not None
    log, begun = "", 0
    for line in child.stderr:
        log += line
        resumed = re.search(r"Restoring previous solver status from .*_iter_(\d+)\.", line)
        begun = int(resumed[1]) if resumed else begun
        if "Snapshotting to" in line:
            break
    time.sleep(delay)
    killed = child.poll() is None
    child.kill()
    child.stderr.close()
    child.wait()
    return begun, killed, log


def prune(folder: Path, keep: int = 5) -> None:
    """Delete all but the newest snapshots, to spare the disk."""
    numbers = sorted({int(m[1]) for p in folder.iterdir() if (m := re.match(r"snap_iter_(\d+)\.", p.name))})
    for number in numbers[:-keep]:
        for path in folder.glob(f"snap_iter_{number}.*"):
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train)
        return 0
    rng = random.Random(args.seed)
    iterations = 30 * args.kills + 20  # more than the runs get done before they are killed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_db(folder / "db")
        prepare(folder / "whole", folder / "db", iterations, iterations, sparse=args.sparse)
        prepare(folder / "killed", folder / "db", 1, iterations, sparse=args.sparse)
        assert start(folder / "whole").communicate()[0] is None
        kills, last = 0, 0
        while kills < args.kills:
            begun, killed, log = run_and_kill(folder / "killed", rng.uniform(0, 0.25))
            if not killed:
                print(log)
                print("the run ended before it could be killed")
                return 1
            kills += 1
            skipped = log.count("skipping snapshot")
            print(f"kill {kills}: began at iteration {begun}, {skipped} snapshots skipped", flush=True)
            if begun < last:
                print("a whole snapshot was lost")
                return 1
            last = begun
            prune(folder / "killed")
        _, log = start(folder / "killed").communicate()
        model = f"snap_iter_{iterations}.caffemodel"
        if not (folder / "killed" / model).exists():
            print(log)
            return 1
        equal = (folder / "whole" / model).read_bytes() == (folder / "killed" / model).read_bytes()
        what = "weights"
        if args.sparse:
            one, other = (masks(folder / name, iterations) for name in ("whole", "killed"))
            equal, what = equal and one == other, "weights, masks and factor"
            print(f"{len(one) - 1} masks, {one['factor'].decode()}")
        print(f"after {kills} kills the {what} {'equal' if equal else 'DIFFER FROM'} those of the uninterrupted run")
        return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
