"""Start-up times: `caffejacinto --help`, and a whole `train` of one iteration (part of `make bench`).

Medians over fresh processes. A bare interpreter and `import torch` stand beside them as the floor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NET = """
layer {
  name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param {
    shape { dim: 64 dim: 1 dim: 28 dim: 28 } shape { dim: 64 }
    data_filler { type: "gaussian" } data_filler { type: "constant" value: 3 }
  }
}
layer {
  name: "ip" type: "InnerProduct" bottom: "data" top: "ip"
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } }
}
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SOLVER = 'net: "net.prototxt" base_lr: 0.01 lr_policy: "fixed" max_iter: 1 display: 1 snapshot_prefix: "snap"\n'


def seconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    python = sys.executable
    commands = {
        "python -c pass": [python, "-c", "pass"],
        "python -c 'import torch'": [python, "-c", "import torch"],
        "caffejacinto --help": [python, "-m", "caffejacinto_py", "--help"],
        "caffejacinto train, 1 iteration": [python, "-m", "caffejacinto_py", "train", "--solver=solver.prototxt"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "net.prototxt").write_text(NET)
        Path(folder, "solver.prototxt").write_text(SOLVER)
        for _ in range(rounds + 1):
            for name, command in commands.items():
                times[name].append(seconds(command, folder))
    for name, found in times.items():
        print(f"{name:<34}{statistics.median(found[1:]):>7.2f} s")  # the first fills the disk cache


if __name__ == "__main__":
    main()
