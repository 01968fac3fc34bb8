"""Start from the weights of train.py, with a new last layer: finetune.py FOLDER [ITERATIONS]"""

import os
import sys

import caffe
import numpy as np


def run(solvers, iterations):
    """Losses of several solvers side by side."""
    losses = {name: np.zeros(iterations) for name in solvers}
    for i in range(iterations):
        for name, solver in solvers.items():
            solver.step(1)
            losses[name][i] = solver.net.blobs["loss"].data.copy()
    return losses


def main(folder, iterations=40):
    path = os.path.join(folder, "solver_finetune.prototxt")
    tuned, scratch = caffe.SGDSolver(path), caffe.SGDSolver(path)
    tuned.net.copy_from(os.path.join(folder, "bars.caffemodel"))
    losses = run({"fine-tuned": tuned, "from scratch": scratch}, iterations)
    for name, loss in losses.items():
        print(f"{name:12s}: mean loss of the last 10 iterations {loss[-10:].mean():.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
